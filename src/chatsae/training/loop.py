"""Train every SAE of a grid from one stream of mixed activations."""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from chatsae.sae.init import set_b_dec_
from chatsae.sae.step import StepState, make_state, train_step
from chatsae.training.schedule import lr_at, sparsity_scale_at, steps_of
from chatsae.training.side_by_side import Together, side_by_side
from chatsae.training.state import MeanErrors, restore, snapshot

_MEDIAN_SAMPLE = 8192  # rows; 4k to 16k place the geometric median well
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
) -> Summary:
    """`train` with a run directory for metrics and checkpoints.

    A `checkpoint` is gone on from, to the same bits; `acts` must stand where it was made (`activations(skip=...)`).
    `tally`, which counts what the data drop, is kept in checkpoints.

    Raises:
        UserError: see `train`.
    """
    layers = tuple(layers or sorted({state.sae.spec.layer for state in states.values()}))
    errors = MeanErrors()
    first = step = _start(states, acts, layers, checkpoint, errors)
    total, tokens, meter, ending = steps_of(config).total, first * config.batch_size, Meter(), "done"
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
            logs = (step + 1) % config.log_every == 0 or step + 1 == total
            noise = _gsnr_all(states, batch, layers, step, config, meter) if logs and _gsnr_due(step, config) else {}
            losses = _step_all(states, batch, layers, step, config, meter, together)
            errors.add(losses)
            step, tokens = step + 1, tokens + batch.shape[1]
            advance(1)
            if logs:
                record = _record(step, first, losses, errors.take(), noise, states, config, meter)
                advance(0, _live(record))
                if run is not None:
                    run.log(record)
            if step < total and stop.is_set():
                ending = "interrupted"
            if run is not None and step < total and (stop.is_set() or step % config.checkpoint_every == 0):
                run.save_checkpoint(snapshot(step, states, acts, tally, errors))
    for state in states.values():
        state.sae.before_step_()
        state.sae.fresh = False
    seconds = time.perf_counter() - meter.start
    return Summary(
        ending=ending,
        steps=step,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=(step - first) * config.batch_size / seconds,
        shares=meter.shares(),
    )


def _step_all(
    states: Mapping[str, StepState],
    batch: Float[Tensor, "L N D"],
    layers: Sequence[int],
    step: int,
    config: TrainConfig,
    meter: Meter,
    together: Together,
) -> dict[str, Losses]:
    """One step of every SAE, each on the batch of its layer with the rate of its schedule."""
    start, steps = time.perf_counter(), steps_of(config)
    scale = sparsity_scale_at(step, warmup_steps=steps.sparsity_warmup)

    def one(state: StepState) -> Losses:
        spec = state.sae.spec
        x = batch[layers.index(spec.layer)].to(state.sae.W_enc)
        lr = lr_at(
            step,
            total_steps=steps.total,
            lr=spec.lr,
            lr_end=spec.lr * config.lr_end_share,
            warmup_steps=steps.lr_warmup,
            decay_steps=steps.lr_decay,
        )
        return train_step(state, x, lr=lr, sparsity_scale=scale, clip_grad_norm=config.clip_grad_norm)

    losses = dict(zip(states, together(one, states.values()), strict=True))
    meter.sae += time.perf_counter() - start
    return losses


def _gsnr_due(step: int, config: TrainConfig) -> bool:
    """Whether the coming step is the first one to be logged in a hundred steps."""
    last = step // config.log_every * config.log_every
    return config.gsnr and (step + 1) // _GSNR_EVERY > last // _GSNR_EVERY


def _gsnr_all(
    states: Mapping[str, StepState],
    batch: Float[Tensor, "L N D"],
    layers: Sequence[int],
    step: int,
    config: TrainConfig,
    meter: Meter,
) -> dict[str, Gsnr]:
    """The GSNR of every SAE on the batch of the coming step, at the weights that step begins with.

    On copies: a step begins by putting the weights where their form wants them, and doing so twice would round twice.
    """
    start, found = time.perf_counter(), {}
    scale = sparsity_scale_at(step, warmup_steps=steps_of(config).sparsity_warmup)
    for name, state in states.items():
        sae = copy.deepcopy(state.sae)
        sae.before_step_()
        found[name] = gsnr(sae, batch[layers.index(sae.spec.layer)].to(sae.W_enc), sparsity_scale=scale)
    meter.gsnr += time.perf_counter() - start
    return found


def _start(
    states: Mapping[str, StepState],
    acts: Activations,
    layers: Sequence[int],
    checkpoint: Checkpoint | None,
    errors: MeanErrors,
) -> int:
    """Take up a checkpoint, or place b_dec; returns the number of steps that are done."""
    if checkpoint is not None:
        restore(checkpoint, states, acts, errors)
        return checkpoint.step
    with console.progress("fill the buffer", acts.capacity) as acts.on_fill:
        sample = acts.peek(_MEDIAN_SAMPLE)
    acts.on_fill = lambda n: None
    if sample.shape[0] != len(layers):
        raise UserError(f"the activations hold {sample.shape[0]} layers, the SAEs want {len(layers)}: {layers}")
    for name, state in states.items():
        sae = state.sae
        if sae.spec.layer not in layers:
            raise UserError(f"{name} is of layer {sae.spec.layer}, the activations are of {tuple(layers)}")
        if sae.spec.d_in != sample.shape[-1]:
            raise UserError(f"{name}: d_in is {sae.spec.d_in}, the activations have {sample.shape[-1]}")
        if sae.fresh and not bool(sae.b_dec.any()):
            set_b_dec_(sae, sample[layers.index(sae.spec.layer)].to(sae.W_enc))
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


def _record(
    step: int,
    first: int,
    losses: Mapping[str, Losses],
    errors: Mapping[str, float],
    noise: Mapping[str, Gsnr],
    states: Mapping[str, StepState],
    config: TrainConfig,
    meter: Meter,
) -> dict[str, Any]:
    saes = {}
    for name, loss in losses.items():
        state = states[name]
        saes[name] = {
            "mse": errors[name] / state.sae.spec.d_in,
            "sparsity": loss.sparsity.item(),
            "l0": loss.l0.item(),
            "dead_fraction": (state.steps_since_fired > config.dead_feature_window).double().mean().item(),
            "sparse_step": state.switch is not None and not state.switch.dense,
            **({"gsnr": asdict(noise[name])} if name in noise else {}),
        }
        if not torch.isfinite(loss.total):
            raise UserError(f"the loss of {name} is {loss.total.item()} at step {step}; a lower sae.lrs may help")
    seconds = time.perf_counter() - meter.start
    return {
        "step": step,
        "tokens": step * config.batch_size,
        "tokens_per_second": (step - first) * config.batch_size / seconds,
        "shares": meter.shares(),
        "saes": saes,
    }


def _live(record: Mapping[str, Any]) -> str:
    shown = [
        f"{n} mse {r['mse']:.3g} l0 {r['l0']:.0f} dead {r['dead_fraction']:.0%}" for n, r in record["saes"].items()
    ]
    more = f" +{len(shown) - 2} more" if len(shown) > 2 else ""
    shares = " ".join(f"{k} {v:.0%}" for k, v in record["shares"].items())
    return f"{record['tokens_per_second']:,.0f} tokens/s ({shares}) | {' | '.join(shown[:2])}{more}"
