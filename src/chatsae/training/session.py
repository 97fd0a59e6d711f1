"""Train a recipe in a run directory: load, harvest, mix, train, save."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import torch

from chatsae import console
from chatsae.config import BufferConfig, RunConfig, SAESpec, Way, check_run, sae_specs
from chatsae.data.store.manifest import changes, manifest_digest
from chatsae.data.template import chat_template, template_facts
from chatsae.errors import UserError
from chatsae.files import read_object, shared_names, with_checksum, write_json
from chatsae.lm.forward import check_block
from chatsae.lm.load import LanguageModel, load_model
from chatsae.lm.norms import LayerNorms, norms_sentence, read_norms
from chatsae.run_model import remember_model
from chatsae.runs import Checkpoint, Run
from chatsae.sae.grid import build_grid, check_fits
from chatsae.sae.step import StepState
from chatsae.training.calibrate import duration, predict_run
from chatsae.training.inputs import Unit, units_of, unscale_
from chatsae.training.loop import Summary, make_states, train_states
from chatsae.training.overlap import overlaps, shared_threads
from chatsae.training.pipeline import activations, data_facts, harvest_facts
from chatsae.training.schedule import buffer_capacity


def train_run(config: RunConfig, out: Path) -> Summary:
    """Train every SAE of a recipe and save them under `out`/saes; goes on from a checkpoint when there is one.

    Raises:
        UserError: the recipe, the model, the data or the directory is not usable.
    """
    check_run(config)
    with ExitStack() as stack:
        run = stack.enter_context(closing(Run.open(out, config)))
        finished = _finished(run)
        if finished is not None:
            run.clear_checkpoints()
            console.say(f"{out} is already trained; its SAEs are in {out / 'saes'}")
            return finished
        checkpoint = run.load_checkpoint()
        resumes, seed = checkpoint is not None, config.train.seed
        lm = load_model(remember_model(run, resumes=resumes))
        if config.data.method != "fast":
            check_block(lm, config.data.block_size)
        if config.data.method != "bt-p" and not config.data.prepared:
            chat_template(lm.tokenizer)  # raises early, before anything is measured
        specs = sae_specs(config.sae, layers=lm.layers, d_in=lm.d_in)
        check_fits(specs)
        tally: Counter[str] = Counter()
        facts = _remembered(
            run, "data.json", resumes, lambda before: data_facts(config.data, lm.tokenizer, seed=seed, before=before)
        )
        how = _remembered(run, "harvest.json", resumes, lambda before: _as_begun(before, config, lm))
        run.forget_after(0 if checkpoint is None else checkpoint.step)
        if checkpoint is not None:
            console.say(f"resuming at step {checkpoint.step:,}, past the data that was trained on")
        done = 0 if checkpoint is None else checkpoint.facts["buffer/harvest_batches"]
        counted = None if checkpoint is None else checkpoint.facts.get("dropped")
        held = _capacity(config, checkpoint)
        norms = _Norms(run, lm, resumes)
        found = {"facts": facts, "how": how, "norms": norms.known, "on_measured": norms.take}
        acts = activations(config, lm, skip=done, capacity=held, counted=counted, tally=tally, **found)
        stack.callback(acts.close)
        saes = build_grid(specs, seed=config.train.seed)
        for sae in saes.values():
            sae.to(lm.device)
        console.say(f"{config.model.name} is read {_how(how)}")
        console.say(f"{config.data.method}: {len(saes)} SAEs from one pass of {config.model.name}: {', '.join(saes)}")
        reading = {"lm": lm, "way": how["way"], "token_budget": how["token_budget"]}
        step = 0 if checkpoint is None else checkpoint.step
        overlap = overlaps(config, lm)
        if stack.enter_context(shared_threads(overlap, lm.device)):
            console.say(f"the model reads ahead while the SAEs train; threads for each: {torch.get_num_threads()}")
        predicted, start = predict_run(config, specs, **reading, done=step, overlap=overlap), time.perf_counter()
        states = make_states(saes, config.train)
        place = {"layers": lm.layers, "run": run, "checkpoint": checkpoint}
        summary = train_states(states, acts, config.train, **place, tally=tally, units=norms.units)
        console.say(_sentence(summary, tally))
        if summary.ending == "data ended":
            console.warn(
                f"the data gave {summary.tokens:,} of {config.train.tokens:,} tokens; data.epochs 0 repeats it"
            )
        if summary.ending == "interrupted":
            return summary
        took = time.perf_counter() - start
        if predicted is not None:
            console.say(f"predicted {duration(predicted)}, took {duration(took)}")
        manifest_sha256 = manifest_digest(facts)
        _save(run, lm, states, norms.units, manifest_sha256)
        about = {"dropped": dict(tally), "harvest": how, "manifest_sha256": manifest_sha256}
        about |= {"predicted_seconds": predicted, "took_seconds": took}
        write_json(run.path / "summary.json", asdict(summary) | about)
        run.clear_checkpoints()
        return summary


def _save(
    run: Run, lm: LanguageModel, states: Mapping[str, StepState], units: Mapping[int, Unit], manifest_sha256: str
) -> None:
    """Save every SAE so that it reads the activations as they are."""
    for name, state in states.items():
        metadata = _metadata(run.config, state.sae.spec, lm, manifest_sha256)
        unscale_(state.sae, units.get(state.sae.spec.layer, Unit()).factor)
        sparsity = state.firing_frequency()
        state.sae.save(run.path / "saes" / name, metadata=metadata, sparsity=sparsity)
        if (l0 := float(sparsity.sum())) > lm.d_in / 4:
            console.warn(f"{name} ends with {l0:.0f} active features per token; sae.target_l0 asks for fewer")


def _capacity(config: RunConfig, checkpoint: Checkpoint | None) -> int:
    """Of the buffer: that of the checkpoint, whichever rule it was made by."""
    if checkpoint is not None and "buffer/ring" in checkpoint.tensors:
        return checkpoint.tensors["buffer/ring"].shape[1]
    held, asked = buffer_capacity(config), config.buffer.capacity
    if held < asked != BufferConfig().capacity:
        console.say(f"buffer.capacity: {held:,} in place of {asked:,}; the training takes no more activations")
    return held


def _remembered(
    run: Run, name: str, resumes: bool, find: Callable[[dict[str, Any] | None], dict[str, Any]]
) -> dict[str, Any]:
    """Facts that a run found when it began, in a file of its directory; `find` gets them when the run goes on.

    Raises:
        UserError: a run that goes on would do so with others.
    """
    path = run.path / name
    before = None
    if resumes and path.exists():
        before = read_object(path, "delete the run directory to begin again")
    facts = find(before)
    changed = changes(before, facts) if before is not None else []
    if changed:
        raise UserError(f"{path.stem} of {run.path} is not what it began with: {'; '.join(changed)}")
    write_json(path, with_checksum(facts))
    return facts


def _as_begun(before: dict[str, Any] | None, config: RunConfig, lm: LanguageModel) -> dict[str, Any]:
    """How the model is read: as when the run began, where that is known.

    Raises:
        UserError: what is known is nothing that `harvest_facts` gives; or see there.
    """
    if before is None:
        return harvest_facts(config.harvest, lm)
    way, budget, prefix = (before.get(key) for key in ("way", "token_budget", "prefix"))
    if way not in get_args(Way) or not isinstance(prefix, bool) or not isinstance(budget, int) or budget < 1:
        raise UserError(
            f"harvest.json is damaged: way must be one of {', '.join(get_args(Way))}, token_budget at least 1 and "
            f"prefix true or false, not {way!r}, {budget!r} and {prefix!r}; delete the run directory to begin again"
        )
    return before


class _Norms:
    """The norms of a run's activations, in RUN/norms.json from the first batches on.

    Attributes: known (of a run that goes on), units (by layer, once the norms are known).

    Raises:
        UserError: a run that goes on has none, and what it trains on depends on them; or they are damaged.
    """

    def __init__(self, run: Run, lm: LanguageModel, resumes: bool) -> None:
        self._path, self._config, self._lm = run.path / "norms.json", run.config, lm
        self.known: list[LayerNorms] | None = None
        self.units: dict[int, Unit] = {}
        changes = (run.config.train.sinks, run.config.sae.normalize) != ("keep", "none")
        if resumes and (changes or self._path.exists()):
            self.known = read_norms(self._path, "delete the run directory to begin again")
            self._measure_in(self.known)

    def take(self, found: list[LayerNorms]) -> None:
        """Keep what was measured, and say it."""
        write_json(self._path, with_checksum({"layers": [one.facts() for one in found]}))
        self._measure_in(found)
        for one in found:
            console.say(norms_sentence(one, self._lm.tokenizer))

    def _measure_in(self, norms: list[LayerNorms]) -> None:
        sinks, normalize = self._config.train.sinks, self._config.sae.normalize == "scale"
        self.units |= units_of(norms, self._lm.d_in, policy=sinks, normalize=normalize)


def _how(how: dict[str, Any]) -> str:
    exact = f"relative error to one dialogue at a time: median {how['median']:.1e}, 90 % below {how['p90']:.1e}"
    refused = "".join(f"; not {way}: {reason}" for way, reason in how["refused"].items())
    prefix = ", the template's prefix once" if how["prefix"] else ""
    return f"{how['way']}, {how['token_budget']:,} tokens per forward{prefix} ({exact}){refused}"


def _finished(run: Run) -> Summary | None:
    path = run.path / "summary.json"
    if not path.exists():
        return None
    advice = "delete it to train this run again"
    kinds = {"ending": str, "steps": int, "tokens": int, "seconds": float, "tokens_per_second": float, "shares": dict}
    facts = read_object(path, advice, kinds)
    return Summary(**{field.name: facts[field.name] for field in fields(Summary)})


def _metadata(config: RunConfig, spec: SAESpec, lm: LanguageModel, manifest_sha256: str) -> dict[str, Any]:
    data = config.data
    return {
        "model_name": lm.label,
        "hook_name": f"blocks.{spec.layer}.hook_resid_post",
        "hf_hook_name": f"model.layers.{spec.layer}",
        "context_size": data.max_length if data.method == "fast" else data.block_size,
        "dataset_path": ", ".join(shared_names(data.text_sources if data.method == "bt-p" else data.sources)),
        "method": data.method,
        "manifest_sha256": manifest_sha256,
        "training_tokens": config.train.tokens,
        "seed": config.train.seed,
        "template_sha256": template_facts(lm.tokenizer).sha256 if lm.tokenizer.chat_template else None,
        **({} if lm.random_weights is None else {"random_weights": lm.random_weights}),
    }


def _sentence(summary: Summary, tally: Counter[str]) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.shares.items())
    dropped = "".join(f"; {n:,} × {reason}" for reason, n in tally.most_common())
    return (
        f"{summary.ending}: {summary.tokens:,} tokens in {summary.seconds:.0f} s, "
        f"{summary.tokens_per_second:,.0f} tokens/s ({shares}){dropped}"
    )
