"""Which route the GPU step takes, decided without waiting for the GPU."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.config import Precision
from chatsae.sae.base import SAE, Losses
from chatsae.sae.cuda import Reading, capture_graph
from chatsae.sae.step_triton import CROSSOVER, FOLD_UP_TO, GpuStep

_HYSTERESIS = 0.8
_EVERY = 16  # steps between readings of the density; each decides when the next one is made
_GRAPHS_UP_TO = 2**25  # weights in a matrix: beyond, launches cost little, and a graph keeps its work space to itself


class GpuSwitch:
    """Decides from the density 16 steps ago, which the host has by then; see `chatsae.sae.choose.Chooser`.

    What it decides hangs on the data and the step number alone. The host waits only if it is 16 steps ahead of the GPU,
    which then still has work.
    """

    waits: ClassVar[bool] = False

    def __init__(self, gpu: GpuStep, *, always: bool = False) -> None:
        self.gpu, self.always, self.dense = gpu, always, not always
        self._reading = Reading(gpu.norms)
        self._next: bool | None = None
        """What a checkpoint knew of the next decision."""

    def __call__(
        self, step: int, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float
    ) -> Losses:
        """Step number `step`, counted from 0."""
        due = step % _EVERY == 0 and not self.always
        if due:
            self.dense = self._coming()
            self._next = None
        numbers = {"lr": lr, "sparsity_scale": sparsity_scale, "clip_grad_norm": clip_grad_norm}
        route = "dense" if self.dense else "folded" if len(x) <= FOLD_UP_TO else "stored"
        losses = self.gpu(route, step + 1, x, **numbers)
        if due:
            self._reading.post(losses.l0)
        return losses

    def saved(self) -> int:
        """What is chosen now, and what will be: dense in bit 0; in bits 1 and 2 the next decision, if one is due."""
        coming = self._coming() if self._reading.pending or self._next is not None else None
        if coming is not None:
            self._next = coming
        return int(self.dense) + (0 if coming is None else 2 + 4 * int(coming))

    def load(self, saved: int) -> None:
        """Take up what `saved` gave."""
        self.dense = bool(saved & 1) and not self.always
        self._next = bool(saved & 4) if saved & 2 else None
        self._reading.pending = False
        self.gpu.reset()

    def _coming(self) -> bool:
        if self.always:
            return False
        if self._reading.pending:
            density = self._reading.take() / self.gpu.sae.spec.d_sae
            return density > CROSSOVER * (_HYSTERESIS if self.dense else 1.0)
        return self.dense if self._next is None else self._next


def make_gpu_switch(sae: SAE, optimizer: torch.optim.Adam, *, always: bool, precision: Precision) -> GpuSwitch:
    """The GPU step of an SAE, with graphs where it is small."""
    small = sae.W_enc.is_cuda and sae.W_enc.numel() <= _GRAPHS_UP_TO
    gpu = GpuStep(sae, optimizer, precision=precision, capture=capture_graph if small else None)
    return GpuSwitch(gpu, always=always)
