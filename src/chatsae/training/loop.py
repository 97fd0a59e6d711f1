"""Train every SAE of a grid from one stream of mixed activations."""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae import console
from chatsae.config import TrainConfig, check_train
from chatsae.errors import UserError
from chatsae.runs import Checkpoint, Run
from chatsae.sae.base import SAE, Losses
from chatsae.sae.gsnr import Gsnr, gsnr
from chatsae.sae.init import set_b_dec_, set_l0_
from chatsae.sae.step import StepState, make_state, train_step
from chatsae.training.inputs import Unit
from chatsae.training.schedule import lr_at, sparsity_scale_at, steps_of
from chatsae.training.side_by_side import Together, side_by_side
from chatsae.training.sparsity import START, Steered
from chatsae.training.state import MeanErrors, restore, snapshot

_SAMPLE = 8192  # rows that b_dec and L0 are placed by; 4k to 16k place the geometric median well
_GSNR_EVERY = 100  # steps at least: it takes as long as several of them


class Activations(Protocol):
    """What the loop needs of its source of batches (see `chatsae.buffer.Mixer`)."""

    def __iter__(self) -> Iterator[Float[Tensor, "L N D"]]: ...
    def __next__(self) -> Float[Tensor, "L N D"]: ...

    on_fill: Callable[[int], object]

    @property
    def capacity(self) -> int: ...
    @property
    def lm_seconds(self) -> float: ...
    def peek(self, n: int) -> Float[Tensor, "L n D"]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Meter:
    """Where the time of a run went, in seconds; `lm` is the time that steps waited for the model."""

    lm: float = 0.0
    sae: float = 0.0
    gsnr: float = 0.0
    wait: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def shares(self) -> dict[str, float]:
        spent = {"lm": self.lm, "sae": self.sae, "gsnr": self.gsnr, "wait": self.wait}
        total = max(sum(spent.values()), 1e-9)
        return {name: seconds / total for name, seconds in spent.items()}


@dataclass(frozen=True)
class Summary:
    """How a training ended; `ending` is done, interrupted or data ended."""

    ending: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    shares: dict[str, float]


def train(
    saes: Mapping[str, SAE],
    acts: Activations,
    config: TrainConfig | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> Summary:
    """Train all SAEs in place, each on the activations of its layer; nothing is written to disk.

    Fresh SAEs begin with b_dec where `spec.b_dec_init` says; one that was loaded or trained goes on from its weights.

    Args:
        saes: the grid, by name.
        acts: batches [L, N, D]; axis 0 follows `layers`.
        config: steps, schedules, seeds; the paper's by default.
        layers: the layers of axis 0; by default those of the SAEs, in rising order.

    Raises:
        UserError: the tokens make no batch, a loss is not finite, a learning rate is not above 0, or the activations do
            not fit the SAEs.
    """
    config = config or TrainConfig()
    check_train(config)
    return train_states(make_states(saes, config), acts, config, layers=layers)


def make_states(saes: Mapping[str, SAE], config: TrainConfig) -> dict[str, StepState]:
    """Every SAE with a fresh optimizer.

    Raises:
        UserError: a learning rate is not above zero, or the fast step or a precision cannot be had here.
    """
    for name, sae in saes.items():
        if not 0 < sae.spec.lr < math.inf:
            raise UserError(
                f"{name}: its learning rate is {sae.spec.lr:g}, a number above 0 was expected. Files of others may say "
                "none; set one: sae.spec = dataclasses.replace(sae.spec, lr=7e-5)"
            )
        if not sae.fresh and not sae.spec.coefficient:
            console.warn(f"{name}: its sparsity coefficient is 0, so training makes it dense; set spec.coefficient")
    how = {"betas": config.adam_betas, "step": config.step, "encoder_precision": config.encoder_precision}
    states = {name: make_state(sae, **how) for name, sae in saes.items()}
    if config.encoder_precision != "float32":
        what = {"tf32": "rounded to 10 bits of mantissa", "bf16": "rounded to bfloat16"}[config.encoder_precision]
        console.say(f"encoder products of training: inputs {what}, sums in float32; all else stays in float32")
    return states


def train_states(
    states: Mapping[str, StepState],
    acts: Activations,
    config: TrainConfig,
    *,
    layers: Sequence[int] | None = None,
    run: Run | None = None,
    checkpoint: Checkpoint | None = None,
    tally: Counter[str] | None = None,
    units: Mapping[int, Unit] | None = None,
) -> Summary:
    """`train` with a run directory for metrics and checkpoints.

    A `checkpoint` is gone on from, to the same bits; `acts` must stand where it was made (`activations(skip=...)`).
    `tally`, which counts what the data drop, is kept in checkpoints. `units` by layer are looked up when metrics are
    written, which are of the activations as they are. An SAE with `target_l0` ends with the coefficient that gave it.

    Raises:
        UserError: see `train`.
    """
    layers = tuple(layers or sorted({state.sae.spec.layer for state in states.values()}))
    targets = {name: s.sae.spec.target_l0 for name, s in states.items() if s.sae.spec.target_l0 is not None}
    work = _Work(states, layers, config, Steered(targets, steps_of(config).total), {} if units is None else units)
    first = step = _start(work, acts, checkpoint)
    total, tokens, meter, ending = steps_of(config).total, first * config.batch_size, work.meter, "done"
    devices = [state.sae.W_enc.device for state in states.values()]
    with (
        side_by_side(len(states), devices) as together,
        console.stop_requested("this step") as stop,
        console.progress("train", total - first) as advance,
    ):
        while step < total and ending == "done":
            batch = _next(acts, meter)
            if batch is None:
                ending = "data ended"
                break
            if work.steered.settles(step):
                work.set_l0(acts.peek(_SAMPLE), targets)
            logs = (step + 1) % config.log_every == 0 or step + 1 == total
            noise = work.gsnr(batch, step) if logs and _gsnr_due(step, config) else {}
            losses = work.step(batch, step, together)
            step, tokens = step + 1, tokens + batch.shape[1]
            advance(1)
            if logs:
                record = work.record(step, first, batch, losses, noise)
                advance(0, _live(record))
                if run is not None:
                    run.log(record)
            if step < total and stop.is_set():
                ending = "interrupted"
            if run is not None and step < total and (stop.is_set() or step % config.checkpoint_every == 0):
                run.save_checkpoint(snapshot(step, states, acts, tally, errors=work.errors, target=work.steered))
    for name, state in states.items():
        state.sae.before_step_()
        state.sae.fresh = False
        if name in targets:
            coefficient = state.sae.spec.coefficient * work.steered.factor(name)
            state.sae.spec = replace(state.sae.spec, coefficient=coefficient)
    seconds = time.perf_counter() - meter.start
    return Summary(
        ending=ending,
        steps=step,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=(step - first) * config.batch_size / seconds,
        shares=meter.shares(),
    )


@dataclass
class _Work:
    """A grid in training: its SAEs, and what their steps add to."""

    states: Mapping[str, StepState]
    layers: Sequence[int]
    config: TrainConfig
    steered: Steered
    units: Mapping[int, Unit]
    errors: MeanErrors = field(default_factory=MeanErrors)
    meter: Meter = field(default_factory=Meter)

    def rows(self, batch: Float[Tensor, "L N D"], sae: SAE) -> Float[Tensor, "N D"]:
        """The batch of an SAE's layer, in its dtype and on its device."""
        return batch[self.layers.index(sae.spec.layer)].to(sae.W_enc)

    def step(self, batch: Float[Tensor, "L N D"], step: int, together: Together) -> dict[str, Losses]:
        """One step of every SAE, each on the batch of its layer with the rate of its schedule."""
        start, config, steps = time.perf_counter(), self.config, steps_of(self.config)
        scale = sparsity_scale_at(step, warmup_steps=steps.sparsity_warmup)

        def one(state: StepState) -> Losses:
            spec = state.sae.spec
            lr = lr_at(
                step,
                total_steps=steps.total,
                lr=spec.lr,
                lr_end=spec.lr * config.lr_end_share,
                warmup_steps=steps.lr_warmup,
                decay_steps=steps.lr_decay,
            )
            strength = scale * self.steered.factor(spec.name)
            x = self.rows(batch, state.sae)
            return train_step(state, x, lr=lr, sparsity_scale=strength, clip_grad_norm=config.clip_grad_norm)

        losses = dict(zip(self.states, together(one, self.states.values()), strict=True))
        self.meter.sae += time.perf_counter() - start
        self.errors.add(losses)
        self.steered.see(step, losses)
        return losses

    def set_l0(self, sample: Float[Tensor, "L n D"], targets: Mapping[str, float]) -> None:
        """Put the SAEs that have a target on it, over a sample of activations."""
        for name, target in targets.items():
            sae = self.states[name].sae
            set_l0_(sae, self.rows(sample, sae), target)

    def gsnr(self, batch: Float[Tensor, "L N D"], step: int) -> dict[str, Gsnr]:
        """The GSNR of every SAE on the batch of the coming step, at the weights that step begins with.

        On copies: a step begins by putting the weights where their form wants them, and doing so twice would round
        twice.
        """
        start, found = time.perf_counter(), {}
        scale = sparsity_scale_at(step, warmup_steps=steps_of(self.config).sparsity_warmup)
        for name, state in self.states.items():
            sae = copy.deepcopy(state.sae)
            sae.before_step_()
            found[name] = gsnr(sae, self.rows(batch, sae), sparsity_scale=scale * self.steered.factor(name))
        self.meter.gsnr += time.perf_counter() - start
        return found

    def record(
        self,
        step: int,
        first: int,
        batch: Float[Tensor, "L N D"],
        losses: Mapping[str, Losses],
        noise: Mapping[str, Gsnr],
    ) -> dict[str, Any]:
        """A line of metrics.jsonl; errors are of the activations as they are, means since the last line.

        Where sinks are trained on, the error of the last batch without them stands beside it.

        Raises:
            UserError: a loss is not finite.
        """
        errors, saes = self.errors.take(), {}
        for name, loss in losses.items():
            state, sae = self.states[name], self.states[name].sae
            unit = self.units.get(sae.spec.layer, Unit())
            if not torch.isfinite(loss.total):
                raise UserError(f"the loss of {name} is {loss.total.item()} at step {step}; a lower sae.lrs may help")
            saes[name] = {
                "mse": errors[name] / sae.spec.d_in / unit.factor**2,
                **({} if unit.bound is None else {"mse_no_sinks": _without_sinks(sae, self.rows(batch, sae), unit)}),
                "sparsity": loss.sparsity.item(),
                "l0": loss.l0.item(),
                "dead_fraction": (state.steps_since_fired > self.config.dead_feature_window).double().mean().item(),
                "sparse_step": state.switch is not None and not state.switch.dense,
                **({"gsnr": asdict(noise[name])} if name in noise else {}),
            }
            if sae.spec.target_l0 is not None:
                saes[name]["coefficient"] = sae.spec.coefficient * self.steered.factor(name)
        seconds = time.perf_counter() - self.meter.start
        return {
            "step": step,
            "tokens": step * self.config.batch_size,
            "tokens_per_second": (step - first) * self.config.batch_size / seconds,
            "shares": self.meter.shares(),
            "saes": saes,
        }


@torch.no_grad()
def _without_sinks(sae: SAE, x: Float[Tensor, "N D"], unit: Unit) -> float | None:
    """Mean squared error per dimension on the rows that are no sinks; None where all are."""
    rest = x[torch.linalg.vector_norm(x, dim=-1) <= unit.bound]
    return (sae(rest) - rest).square().mean().item() / unit.factor**2 if len(rest) else None


def _gsnr_due(step: int, config: TrainConfig) -> bool:
    """Whether the coming step is the first one to be logged in a hundred steps."""
    last = step // config.log_every * config.log_every
    return config.gsnr and (step + 1) // _GSNR_EVERY > last // _GSNR_EVERY


def _start(work: _Work, acts: Activations, checkpoint: Checkpoint | None) -> int:
    """Take up a checkpoint, or place b_dec; returns the number of steps that are done."""
    layers = work.layers
    if checkpoint is not None:
        restore(checkpoint, work.states, acts, errors=work.errors, target=work.steered)
        return checkpoint.step
    with console.progress("fill the buffer", acts.capacity) as acts.on_fill:
        sample = acts.peek(_SAMPLE)
    acts.on_fill = lambda n: None
    if sample.shape[0] != len(layers):
        raise UserError(f"the activations hold {sample.shape[0]} layers, the SAEs want {len(layers)}: {layers}")
    for name, state in work.states.items():
        sae = state.sae
        if sae.spec.layer not in layers:
            raise UserError(f"{name} is of layer {sae.spec.layer}, the activations are of {tuple(layers)}")
        if sae.spec.d_in != sample.shape[-1]:
            raise UserError(f"{name}: d_in is {sae.spec.d_in}, the activations have {sample.shape[-1]}")
        if sae.fresh and not bool(sae.b_dec.any()):
            set_b_dec_(sae, work.rows(sample, sae))
            if sae.spec.target_l0 is not None:
                set_l0_(sae, work.rows(sample, sae), START * sae.spec.target_l0)
        elif not sae.fresh:
            sae.take_up_()
    return 0


def _next(acts: Activations, meter: Meter) -> Float[Tensor, "L N D"] | None:
    start, lm_before = time.perf_counter(), acts.lm_seconds
    batch = next(acts, None)
    lm = acts.lm_seconds - lm_before
    meter.lm += lm
    meter.wait += time.perf_counter() - start - lm
    return batch


def _live(record: Mapping[str, Any]) -> str:
    shown = [
        f"{n} mse {r['mse']:.3g} l0 {r['l0']:.0f} dead {r['dead_fraction']:.0%}" for n, r in record["saes"].items()
    ]
    more = f" +{len(shown) - 2} more" if len(shown) > 2 else ""
    shares = " ".join(f"{k} {v:.0%}" for k, v in record["shares"].items())
    return f"{record['tokens_per_second']:,.0f} tokens/s ({shares}) | {' | '.join(shown[:2])}{more}"
