"""`chatsae bench overlap`: the demo's training, its SAEs in turn or side by side, its model between steps or ahead."""

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import as_file, files
from statistics import median
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae import console
from chatsae.bench.result import BenchResult, Claim
from chatsae.buffer import Mixer
from chatsae.config import RunConfig, sae_specs
from chatsae.console import Column
from chatsae.lm.load import LanguageModel, load_model
from chatsae.recipe import load_recipe
from chatsae.sae.grid import build_grid
from chatsae.sae.step import StepState, train_step
from chatsae.training.loop import make_states
from chatsae.training.pipeline import activations, harvest_facts
from chatsae.training.side_by_side import Together, in_turn, side_by_side

Way = Literal["in turn", "side by side", "ahead"]
"""Everything in turn; the SAEs side by side, then the model; and the model in a thread ahead of them."""
_WAYS: tuple[Way, ...] = get_args(Way)
STEPS = 300
ROUNDS = 6
_QUIET = 0.02  # seconds without work after which the thread waits for room
_COLUMNS = (
    Column("way"),
    Column("threads", "threads of an operation"),
    Column("tokens_per_s", "tokens / s", best="max"),
    Column("over_first", "/ first row, by s"),
    Column("cores", "cores in use"),
    Column("waited", "share of waiting"),
)


@dataclass
class Training:
    """A training of its own that takes turns with others; `threads` are those of each operation of torch."""

    way: Way
    threads: int
    acts: Mixer
    states: dict[str, StepState]
    layers: tuple[int, ...]
    together: Together
    wall_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    lm_s: float = 0.0

    def part(self, steps: int) -> None:
        """Train, and wait until nothing is under way: every part does its share of reading ahead."""
        torch.set_num_threads(self.threads)  # a thread that starts takes it over
        cpu, wall, lm = time.process_time(), time.perf_counter(), self.acts.lm_seconds
        for _ in range(steps):
            self.together(partial(self._step, next(self.acts)), self.states.values())
        done = _when_quiet() if self.way == "ahead" else time.perf_counter()
        self.wall_s.append(done - wall)
        self.cpu_s += time.process_time() - cpu
        self.lm_s += self.acts.lm_seconds - lm

    def _step(self, batch: Float[Tensor, "L N D"], state: StepState) -> None:
        x = batch[self.layers.index(state.sae.spec.layer)].to(state.sae.W_enc)
        train_step(state, x, lr=state.sae.spec.lr, sparsity_scale=1.0, clip_grad_norm=1.0)


def bench_overlap(config: RunConfig | None = None, *, steps: int = 0, rounds: int = ROUNDS) -> BenchResult:
    """Trainings that take turns, each way with all threads for an operation and with half of them.

    They start with a full buffer. `steps` of each part (0: 300); by default the demo's recipe is trained. `threads` are
    those of an operation of the model, and of an SAE's step where the SAEs go in turn; side by side, they share them;
    ahead, the model has as many again.

    Raises:
        UserError: the recipe's model or data cannot be read.
    """
    config, steps = config or demo_config(), steps or STEPS
    lm = load_model(config.model)
    how = harvest_facts(config.harvest, lm)
    total = config.train.batch_size * steps * (rounds + 1)
    config = replace(config, train=replace(config.train, tokens=total), data=replace(config.data, epochs=0))
    before = torch.get_num_threads()
    trainings: list[Training] = []
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        for threads in sorted({before, max(before // 2, 1)}, reverse=True):
            trainings += [_start(config, lm, how, way, threads, stack) for way in _WAYS]
        with console.progress("overlap", rounds * len(trainings)) as advance:
            for r in range(rounds):
                for training in trainings if r % 2 == 0 else reversed(trainings):
                    training.part(steps)
                    advance(1, training.way)
    rows = [_row(training, trainings[0], steps * config.train.batch_size) for training in trainings]
    conditions = {"model": config.model.name, "d_in": lm.d_in, "saes": list(trainings[0].states), "steps": steps}
    conditions |= {"rounds": rounds, "cores": os.cpu_count(), "batch_size": config.train.batch_size, "harvest": how}
    conditions |= {"device": str(lm.device), "threads_change_bits": bool(_differ(trainings[0], trainings[-1]))}
    differ = sum(_differ(a, b) for a, b in zip(trainings[1::3], trainings[2::3], strict=True))
    claims = [Claim.at_most("weights that differ between ahead and side by side", differ, 0)]
    return BenchResult("overlap", _COLUMNS, conditions, rows, claims)


def demo_config() -> RunConfig:
    """The demo's recipe."""
    with as_file(files("chatsae.demo") / "recipe.yaml") as recipe:
        return load_recipe(recipe)


def _start(
    config: RunConfig, lm: LanguageModel, how: dict[str, Any], way: Way, threads: int, stack: ExitStack
) -> Training:
    """A training whose buffer is full; the stack ends its threads."""
    torch.set_num_threads(threads)
    config = replace(config, harvest=replace(config.harvest, overlap="on" if way == "ahead" else "off"))
    acts = activations(config, lm, how=how)
    stack.callback(acts.close)
    saes = build_grid(sae_specs(config.sae, layers=lm.layers, d_in=lm.d_in), seed=config.train.seed)
    for sae in saes.values():
        sae.to(lm.device)
    together = in_turn
    if way != "in turn":
        together = stack.enter_context(side_by_side(len(saes), [lm.device]))
    acts.peek(1)
    _when_quiet()
    return Training(way, threads, acts, make_states(saes, config.train), lm.layers, together)


def _when_quiet() -> float:
    """Waits until the process has nothing to do; returns about when that began."""
    while True:
        start, cpu = time.perf_counter(), time.process_time()
        time.sleep(_QUIET)
        if time.process_time() - cpu < _QUIET / 10:
            return start


def _row(training: Training, first: Training, tokens: int) -> dict[str, Any]:
    spent = median(training.wall_s)
    return {
        "way": training.way,
        "threads": training.threads,
        "wall_s": [round(s, 4) for s in training.wall_s],
        "tokens_per_s": round(tokens / spent),
        "over_first": round(median(first.wall_s) / spent, 3),
        "cores": round(training.cpu_s / sum(training.wall_s), 2),
        "waited": round(training.lm_s / sum(training.wall_s), 3),
    }


def _differ(a: Training, b: Training) -> int:
    """Weights of two trainings that are not the same bits."""
    total = 0
    for name, state in a.states.items():
        other = dict(b.states[name].sae.named_parameters())
        total += sum(int((value != other[key]).sum()) for key, value in state.sae.named_parameters())
    return total
