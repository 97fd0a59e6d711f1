"""Which of the two steps runs: the plain one, or the fast one where few features are active."""

import importlib.util
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.errors import UserError
from chatsae.sae.base import SAE, Losses

StepKind = Literal["auto", "plain", "fast"]

CROSSOVER = 0.12
"""Share of (token, feature) pairs that are active from which the dense step may be the faster one.

Measured on a CPU with AVX-512: 12 % at 896 x 7168 with 1024 tokens, 20 % with 128, 20 to 25 % at 256 x 2048.
"""
_HYSTERESIS = 0.8
_PROBE_EVERY = 16  # steps of the dense phase; a probe costs a sixth of a dense step


@runtime_checkable
class _Fast(Protocol):
    def __call__(
        self, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float, limit: float
    ) -> Losses | None: ...

    def dense(self, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float) -> Losses: ...


@dataclass
class Switch:
    """Decides per step from the measured density; both steps work on the same weights and moments.

    `dense` is all it remembers. What it decides hangs on the data and the step number alone, so that a run that goes on
    from a checkpoint takes the same way; a timing would not.
    """

    fast: _Fast
    always: bool = False
    dense: bool = True

    def __call__(
        self, step: int, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float
    ) -> Losses:
        """Step number `step`: the sparse one, or the dense one, which is probed for sparsity now and then."""
        numbers = {"lr": lr, "sparsity_scale": sparsity_scale, "clip_grad_norm": clip_grad_norm}
        losses = None
        if not self.dense or self.always or step % _PROBE_EVERY == 0:
            limit = 1.0 if self.always else CROSSOVER * (_HYSTERESIS if self.dense else 1.0)
            losses = self.fast(x, limit=limit, **numbers)
        self.dense = losses is None
        return self.fast.dense(x, **numbers) if losses is None else losses


def make_switch(sae: SAE, optimizer: torch.optim.Adam, kind: StepKind) -> Switch | None:
    """What chooses the step of an SAE; None where that is always the plain one.

    auto: the fast step where numba is installed, the SAE is on a CPU in float32 or float64, and the batch is sparse.

    Raises:
        UserError: the fast step is asked for and cannot run here.
    """
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
