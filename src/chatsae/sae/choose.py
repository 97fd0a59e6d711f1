"""Which of the two steps runs: the plain one, or the fast one where few features are active."""

import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.config import Precision
from chatsae.errors import UserError
from chatsae.sae.base import SAE, Losses

StepKind = Literal["auto", "plain", "fast"]

CROSSOVER = 0.11
"""Share of (token, feature) pairs that are active from which the dense step may be the faster one.

Measured on a CPU with AVX-512: 12 % at 256 x 2048 with 128 tokens, 18 % with 1,024, 10 % with 4,096; 11 % at 896 x 7168
with 128 tokens.
"""
_MANY, _CACHED, _MANY_FACTOR = 512, 2**19, 1.5
"""More tokens than this, up to so many numbers in their vectors, with which the sparse step pays that much further:
what it does per feature is for more of them, and their vectors still lie in the cache."""
_HYSTERESIS = 0.8


def crossover(n: int, d_in: int) -> float:
    """That of a batch of n tokens."""
    return CROSSOVER * (_MANY_FACTOR if n > _MANY and n * d_in <= _CACHED else 1)


@runtime_checkable
class _Fast(Protocol):
    def __call__(
        self, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float, limit: float
    ) -> Losses | None: ...

    def dense(
        self, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float
    ) -> tuple[Losses, float]: ...

    def count(self, *counts: Tensor) -> None: ...


@runtime_checkable
class Chooser(Protocol):
    """Takes each step on one of several routes, as `Switch` does; `waits`: the host may look at its losses at once."""

    dense: bool
    waits: ClassVar[bool]

    def __call__(
        self, step: int, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float
    ) -> Losses: ...

    def saved(self) -> int: ...

    def load(self, saved: int) -> None: ...


@dataclass
class Switch:
    """Decides per step from the measured density; both steps work on the same weights and moments.

    `dense` is all it remembers. What it decides hangs on the data alone, so that a run that goes on from a checkpoint
    takes the same way; a timing would not.
    """

    waits: ClassVar[bool] = True

    fast: _Fast
    always: bool = False
    dense: bool = True

    def __call__(
        self, step: int, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float
    ) -> Losses:
        """One step: the sparse one, or the dense one, which measures the density for the next."""
        numbers = {"lr": lr, "sparsity_scale": sparsity_scale, "clip_grad_norm": clip_grad_norm}
        limit = crossover(*x.shape)
        if self.always or not self.dense:
            losses = self.fast(x, limit=1.0 if self.always else limit, **numbers)
            self.dense = losses is None
            if losses is not None:
                return losses
        losses, density = self.fast.dense(x, **numbers)
        self.dense = density > limit * _HYSTERESIS
        return losses

    def count(self, firings: Tensor, firing_counts: Tensor, steps_since_fired: Tensor) -> None:
        """Add a step's firings [F] to what is remembered of them."""
        self.fast.count(firings, firing_counts, steps_since_fired)

    def saved(self) -> int:
        """What a checkpoint keeps."""
        return int(self.dense)

    def load(self, saved: int) -> None:
        """Take up what `saved` gave, here or on a GPU."""
        self.dense = bool(saved & 1)


def make_switch(
    sae: SAE, optimizer: torch.optim.Adam, kind: StepKind, precision: Precision = "float32"
) -> Chooser | None:
    """What chooses the step of an SAE; None where that is always the plain one.

    auto: the GPU step where triton is installed and the SAE on a GPU; the fast step where numba is installed and the
    SAE on a CPU; both take float32 and float64, and go by features where the batch is sparse.

    Raises:
        UserError: the fast step or a precision is asked for and cannot be had here.
    """
    gpu = sae.W_enc.is_cuda and sae.W_enc.dtype in (torch.float32, torch.float64) and kind != "plain"
    if gpu and importlib.util.find_spec("triton") is not None:
        from chatsae.sae.choose_gpu import make_gpu_switch  # imports triton, which takes a second

        return make_gpu_switch(sae, optimizer, always=kind == "fast", precision=precision)
    if precision != "float32":
        where = f"{sae.spec.name} is on {sae.W_enc.device} in {sae.W_enc.dtype} and train.step is {kind}"
        raise UserError(f"train.encoder_precision {precision} is for the GPU step (chatsae[gpu]), but {where}")
    if kind == "plain":
        return None
    if reason := _missing(sae):
        if kind == "fast":
            raise UserError(f"train.step is fast, but {reason}")
        return None
    from chatsae.sae.step_numba import FastStep  # imports numba, which takes a second

    return Switch(FastStep(sae, optimizer), always=kind == "fast")


def _missing(sae: SAE) -> str:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'chatsae[fast]'"
    if sae.W_enc.device.type != "cpu":
        return f"{sae.spec.name} is on {sae.W_enc.device} and the fast step is for CPUs"
    if sae.W_enc.dtype not in (torch.float32, torch.float64):
        return f"{sae.spec.name} is of {sae.W_enc.dtype} and the fast step takes float32 and float64"
    return ""
