"""Whole trainings on recorded activations: chatsae beside sae_lens' own trainer, and how sparse real runs are.

Harvests activations of the bundled model once, trains on them (one process per training, one after the other), and
writes the section "The whole run" of docs/performance.md. What is in --out already is not done again, so an interrupted
call goes on where it stopped; --draw only writes the page.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatsae import console
from chatsae.config import RunConfig, SAEConfig, SAESpec, TrainConfig, sae_specs
from chatsae.files import write_json
from chatsae.lm.load import load_model
from chatsae.recipe import load_recipe, to_yaml
from chatsae.runs import environment
from chatsae.sae import SAE, init_sae
from chatsae.sae.init import geometric_median
from chatsae.sae.step import StepState
from chatsae.training.loop import make_states, train_states
from chatsae.training.pipeline import activations
from chatsae.training.schedule import steps_of
from end_to_end_page import write_page
from end_to_end_peer import batches

ROOT = Path(__file__).parents[1]
HELD_OUT = 32_768
_READINGS = 50  # steps between readings of L0


Setting = tuple[str, RunConfig, bool]


def settings(config: RunConfig, tokens: int) -> list[Setting]:
    """The trainings: a name, the configuration, and whether sae_lens has the same objective."""
    base = replace(config, train=replace(config.train, tokens=tokens, step="auto", gsnr=False))
    standard = replace(SAEConfig(), architectures=("standard",), lrs=base.sae.lrs)
    jumprelu = replace(base.sae, architectures=("jumprelu",))
    tiny = replace(jumprelu, **{k: getattr(SAEConfig(), k) for k in ("l0_coefficients", "bandwidth", "init_threshold")})
    made = [
        ("standard, v6 form", as_sae_lens(standard), True),
        ("jumprelu, v6 form", as_sae_lens(jumprelu), True),
        ("standard, paper form", standard, False),
        ("jumprelu, paper form", jumprelu, False),
        ("jumprelu, paper form, the paper's coefficient, bandwidth and threshold", tiny, False),
    ]
    return [(name, replace(base, sae=sae), compared) for name, sae, compared in made]


def as_sae_lens(sae: SAEConfig) -> SAEConfig:
    """The objective of sae_lens 6, and its default input."""
    return replace(sae, form="v6", apply_b_dec_to_input=True)


def harvest(config: RunConfig, rows: int, path: Path) -> None:
    """Write `train` and `held_out` activations of the first layer of the recipe, in float32."""
    lm = load_model(config.model)
    needed, kept, mixer = rows + HELD_OUT, [], activations(config, lm)
    with console.progress("harvest", needed) as advance:
        while sum(map(len, kept)) < needed:
            kept.append(next(mixer)[0].float().cpu())
            advance(len(kept[-1]))
    found = torch.cat(kept)[:needed]
    save_file({"held_out": found[:HELD_OUT].contiguous(), "train": found[HELD_OUT:].contiguous()}, path)


class Recorded:
    """The batches of `end_to_end_peer.batches` as the training loop wants them, which notes what each step was."""

    lm_seconds = 0.0

    def __init__(self, rows: Tensor, config: TrainConfig) -> None:
        self.rows, self.dense_steps = rows, 0
        self.state: StepState | None = None
        self.on_fill: Callable[[int], object] = lambda n: None
        self._batches = batches(rows, batch_size=config.batch_size, seed=config.seed)
        self.l0: list[float] = []
        self._counted = (0.0, 0)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self.state is not None:
            self._read()
        return next(self._batches)[None]

    def _read(self) -> None:
        """Before a step: whether it will be dense, and L0 of the steps since the last reading."""
        state = self.state
        assert state is not None
        assert state.switch is not None
        self.dense_steps += state.switch.dense
        if state.step and state.step % _READINGS == 0:
            fired, tokens = float(state.firing_counts.sum()), state.window_tokens
            before = self._counted if tokens > self._counted[1] else (0.0, 0)
            self.l0.append((fired - before[0]) / (tokens - before[1]))
            self._counted = (fired, tokens)

    @property
    def capacity(self) -> int:
        return 1

    def peek(self, n: int) -> Tensor:
        return self.rows[None, :n]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def spec_of(config: RunConfig, d_in: int) -> SAESpec:
    return sae_specs(config.sae, layers=config.model.layers, d_in=d_in)[0]


def ours(config: RunConfig, acts: Path, start: Path, out: Path) -> dict[str, Any]:
    """Train with chatsae in this process; the first step, which loads compiled loops, is counted with the rest."""
    rows = load_file(acts)["train"]
    sae = SAE.create(spec_of(config, rows.shape[1]))
    sae.load_state_dict(load_file(start))
    (name, state), *_ = make_states({"sae": sae}, config.train).items()
    recorded = Recorded(rows, config.train)
    recorded.state = state
    wall, cpu = time.perf_counter(), time.process_time()
    summary = train_states({name: state}, recorded, config.train)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    save_file({k: v.detach().contiguous() for k, v in sae.state_dict().items()}, out)
    return seconds | {
        "steps": summary.steps,
        "dense_steps": recorded.dense_steps,
        "every": _READINGS,
        "l0_readings": recorded.l0,
        "d_sae": sae.spec.d_sae,
    }


def begin(config: RunConfig, rows: Tensor, path: Path) -> None:
    """The same initial weights for both: those of chatsae, b_dec at the geometric median."""
    spec = spec_of(config, rows.shape[1])
    sae = init_sae(spec, torch.Generator().manual_seed(config.train.seed))
    with torch.no_grad():
        sae.b_dec.copy_(geometric_median(rows[:8192]))
    save_file({k: v.detach().contiguous() for k, v in sae.state_dict().items()}, path)


def score(config: RunConfig, weights: Path, held_out: Tensor) -> dict[str, float]:
    """mse (a mean over d_in) and L0 on rows that were not trained on."""
    sae = SAE.create(spec_of(config, held_out.shape[1]))
    sae.load_state_dict(load_file(weights))
    with torch.no_grad():
        sae.before_step_()
        acts = sae.encode(held_out)
        mse = (sae.decode(acts) - held_out).pow(2).mean().item()
    return {"mse": mse, "l0": (acts > 0).sum(1).double().mean().item()}


def train_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train what is missing, ours and theirs in turns; returns a record per training."""
    config, acts = load_recipe(args.recipe), args.out / "acts.safetensors"
    if not acts.exists():
        harvest(config, args.rows, acts)
    tensors, records = load_file(acts), []
    for seed in args.seeds:
        for number, (name, one, compared) in enumerate(settings(config, args.tokens)):
            if not compared and seed != args.seeds[0]:
                continue
            seeded = replace(one, train=replace(one.train, seed=seed))
            for who in ("chatsae", "sae_lens") if compared else ("chatsae",):
                place = args.out / f"{number}-{seed}-{who}"
                if not place.with_suffix(".json").exists():
                    console.say(f"{name}, seed {seed}: {who}")
                    _run(args, seeded, tensors["train"], place, who)
                record = json.loads(place.with_suffix(".json").read_text())
                scores = score(seeded, place.with_suffix(".safetensors"), tensors["held_out"])
                records.append({"name": name, "seed": seed, "who": who} | record | scores)
    return records


def _run(args: argparse.Namespace, config: RunConfig, rows: Tensor, place: Path, who: str) -> None:
    """One training in a process of its own; its JSON line becomes a file."""
    begin(config, rows, place.with_suffix(".start"))
    job, steps, spec = args.out / "job.json", steps_of(config.train), spec_of(config, rows.shape[1])
    facts = {
        "acts": str(args.out / "acts.safetensors"),
        "start": str(place.with_suffix(".start")),
        "out": str(place.with_suffix(".safetensors")),
        "config": to_yaml(config),
        "threads": args.threads,
        "lr_warmup": steps.lr_warmup,
        "lr_decay": steps.lr_decay,
        "sparsity_warmup": steps.sparsity_warmup,
        "lr_end": spec.lr * config.train.lr_end_share,
    }
    write_json(job, asdict(config.train) | asdict(spec) | facts)
    mine = [sys.executable, str(Path(__file__)), "--job", str(job)]
    theirs = [str(args.peer), str(ROOT / "tools" / "end_to_end_peer.py"), str(job)]
    answer = subprocess.run(mine if who == "chatsae" else theirs, check=True, stdout=subprocess.PIPE, text=True)
    write_json(place.with_suffix(".json"), json.loads(answer.stdout.strip().splitlines()[-1]))
    place.with_suffix(".start").unlink()


def _train_job(path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    recipe = path.with_name("job.yaml")
    recipe.write_text(job["config"], encoding="utf-8")
    print(json.dumps(ours(load_recipe(recipe), Path(job["acts"]), Path(job["start"]), Path(job["out"]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "end-to-end")
    parser.add_argument("--peer", type=Path, default=ROOT / ".venv-parity" / "bin" / "python")
    parser.add_argument("--tokens", type=int, default=2_048_000, help="of each training")
    parser.add_argument("--rows", type=int, default=512_000, help="activations that are recorded and passed over")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="only write the page from what was measured")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        _train_job(args.job)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.draw:
        facts = {"rows": args.rows, "tokens": args.tokens, "threads": args.threads, "machine": environment()}
        result = {**facts, "trainings": train_all(args)}
        write_json(args.out / "result.json", result)
    write_page(ROOT / "docs" / "performance.md", json.loads((args.out / "result.json").read_text()))


if __name__ == "__main__":
    main()
