"""Train a recipe in a run directory: load, harvest, mix, train, save."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.config import RunConfig, SAESpec, sae_specs
from chatsae.data.template import template_facts
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.runs import Run, write_json
from chatsae.sae.grid import build_grid
from chatsae.training.loop import Summary, make_states, train_states
from chatsae.training.pipeline import activations


def train_run(config: RunConfig, out: Path) -> Summary:
    """Train every SAE of a recipe and save them under `out`/saes; goes on from a checkpoint when there is one.

    Raises:
        UserError: the recipe, the model, the data or the directory is not usable.
    """
    check(config)
    run = Run.open(out, config)
    try:
        finished = _finished(run)
        if finished is not None:
            console.say(f"{out} is already trained; its SAEs are in {out / 'saes'}")
            return finished
        lm = LanguageModel(
            config.model.name,
            config.model.layers,
            dtype=config.model.dtype,
            device=config.model.device,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
        tally: Counter[str] = Counter()
        checkpoint = run.load_checkpoint()
        done = 0 if checkpoint is None else checkpoint.facts["buffer/harvest_batches"]
        acts = activations(config, lm, skip=done, tally=tally)
        specs = sae_specs(config.sae, layers=lm.layers, d_in=lm.d_in)
        saes = build_grid(specs, seed=config.train.seed)
        for sae in saes.values():
            sae.to(lm.device)
        console.say(f"{config.data.method}: {len(saes)} SAEs from one pass of {config.model.name}: {', '.join(saes)}")
        if checkpoint is not None:
            run.forget_after(checkpoint.step)
            console.say(f"resuming at step {checkpoint.step:,}")
        states = make_states(saes, config.train)
        summary = train_states(states, acts, config.train, layers=lm.layers, run=run, checkpoint=checkpoint)
        console.say(_sentence(summary, tally))
        if summary.ending == "interrupted":
            return summary
        for name, state in states.items():
            metadata = _metadata(config, state.sae.spec, lm)
            state.sae.save(run.path / "saes" / name, metadata=metadata, sparsity=state.firing_frequency())
        write_json(run.path / "summary.json", asdict(summary) | {"dropped": dict(tally)})
        run.clear_checkpoints()
        return summary
    finally:
        run.close()


def check(config: RunConfig) -> None:
    """Refuse values that no run can have.

    Raises:
        UserError: names the field, what it holds and what was expected.
    """
    positive = {
        "data.max_length": config.data.max_length,
        "data.block_size": config.data.block_size,
        "harvest.token_budget": config.harvest.token_budget,
        "harvest.pool": config.harvest.pool,
        "train.batch_size": config.train.batch_size,
        "train.log_every": config.train.log_every,
        "train.checkpoint_every": config.train.checkpoint_every,
    }
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if config.train.tokens < config.train.batch_size:
        raise UserError(f"train.tokens is {config.train.tokens}, less than one batch of {config.train.batch_size}")
    if not config.model.layers:
        raise UserError("model.layers is empty; at least one layer is needed")
    for name in ("lr_warmup_share", "lr_decay_share", "sparsity_warmup_share", "lr_end_share"):
        if not 0 <= getattr(config.train, name) <= 1:
            raise UserError(f"train.{name} must be between 0 and 1, not {getattr(config.train, name)}")
    if config.train.lr_warmup_share + config.train.lr_decay_share > 1:
        raise UserError("train.lr_warmup_share and train.lr_decay_share add up to more than 1")


def _finished(run: Run) -> Summary | None:
    path = run.path / "summary.json"
    if not path.exists():
        return None
    import json

    facts = json.loads(path.read_text(encoding="utf-8"))
    facts.pop("dropped", None)
    return Summary(**facts)


def _metadata(config: RunConfig, spec: SAESpec, lm: LanguageModel) -> dict[str, Any]:
    data = config.data
    return {
        "model_name": config.model.name,
        "hook_name": f"blocks.{spec.layer}.hook_resid_post",
        "hf_hook_name": f"model.layers.{spec.layer}",
        "context_size": data.max_length if data.method == "fast" else data.block_size,
        "dataset_path": ", ".join(data.text_sources if data.method == "bt-p" else data.sources),
        "method": data.method,
        "training_tokens": config.train.tokens,
        "seed": config.train.seed,
        "template_sha256": template_facts(lm.tokenizer).sha256,
    }


def _sentence(summary: Summary, tally: Counter[str]) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.shares.items())
    dropped = "".join(f"; {n:,} × {reason}" for reason, n in tally.most_common())
    return (
        f"{summary.ending}: {summary.tokens:,} tokens in {summary.seconds:.0f} s, "
        f"{summary.tokens_per_second:,.0f} tokens/s ({shares}){dropped}"
    )
