"""The JumpReLU SAE: a learned threshold per feature, penalised by the number of active features."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chatsae.sae.base import SAE, normalize_rows_


class JumpReLUSAE(SAE, architecture="jumprelu"):
    """f = z · H(z − θ), penalty ‖f‖₀; θ learns through straight-through estimators (paper, section 2).

    form="paper": θ = exp(log_threshold), decoder rows of unit norm, restored before every step.
    form="v6": θ itself is the parameter and is kept at 0 or above before every step; free decoder rows.
    """

    log_threshold: nn.Parameter  # form="paper" [d_sae]
    raw_threshold: nn.Parameter  # form="v6" [d_sae]

    _order: ClassVar = {
        "paper": ("log_threshold", "b_enc", "W_dec", "W_enc", "b_dec"),
        "v6": ("b_dec", "W_dec", "W_enc", "b_enc", "raw_threshold"),
    }

    @property
    def threshold(self) -> Float[Tensor, " F"]:
        """What a pre-activation must exceed for its feature to be active."""
        if self.spec.form == "paper":
            return self.log_threshold.exp()
        return self.raw_threshold.clamp_min(0)  # an optimizer step may have left it below

    @torch.no_grad()
    def set_threshold_(self, threshold: Float[Tensor, " F"] | float) -> None:
        """Set θ, in the form's own parametrisation."""
        if isinstance(threshold, float):
            threshold = torch.full_like(self.b_enc, threshold, dtype=torch.float64)
        if self.spec.form == "paper":
            self.log_threshold.copy_(_log(threshold, self.log_threshold.dtype))
        else:
            self.raw_threshold.copy_(threshold)

    def before_step_(self) -> None:
        if self.spec.form == "paper":
            normalize_rows_(self.W_dec)
        else:
            # on .data: a clamp in the graph would stop the gradient of a threshold that has reached zero
            self.raw_threshold.data.clamp_min_(0)

    @torch.no_grad()
    def unscale_input_(self, factor: float) -> None:
        super().unscale_input_(factor)
        self.set_threshold_(self.threshold.double() / factor)

    def _scale_features_(self, scale: Float[Tensor, " F"]) -> None:
        threshold = self.threshold * scale
        super()._scale_features_(scale)
        self.set_threshold_(threshold)

    def file_tensors(self) -> dict[str, Tensor]:
        return {**super().file_tensors(), "threshold": self.threshold.detach()}

    def load_file_tensors_(self, tensors: dict[str, Tensor]) -> None:
        super().load_file_tensors_(tensors)
        self.set_threshold_(tensors["threshold"])

    def _activation(self, hidden_pre: Float[Tensor, "*N F"]) -> Float[Tensor, "*N F"]:
        return _JumpReLU.apply(hidden_pre, self.threshold, self.spec.bandwidth)

    def _penalty(self, hidden_pre: Float[Tensor, "N F"], feature_acts: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
        return _Step.apply(hidden_pre, self.threshold, self.spec.bandwidth).sum(-1)


class _JumpReLU(torch.autograd.Function):
    """z · H(z − θ). Backward: dz = H(z − θ) g and dθ = −(θ/ε) Σ_N K((z − θ)/ε) g, with K = 1 on (−½, ½)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return _exceeds(z, threshold).mul_(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        (g,) = grads
        d_z = _exceeds(z, threshold).mul_(g)
        d_threshold = _kernel(z, threshold, ctx.bandwidth).mul_(-(threshold / ctx.bandwidth)).mul_(g)
        return d_z, d_threshold.flatten(0, -2).sum(0), None


class _Step(torch.autograd.Function):
    """H(z − θ). Backward: dθ = −(1/ε) Σ_N K((z − θ)/ε) g, and nothing for z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return _exceeds(z, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        (g,) = grads
        d_threshold = _kernel(z, threshold, ctx.bandwidth).mul_(-(1.0 / ctx.bandwidth)).mul_(g)
        return None, d_threshold.flatten(0, -2).sum(0), None


def _exceeds(z: Tensor, threshold: Tensor) -> Tensor:
    """H(z − θ) as zeros and ones of the dtype of z: on CPUs five times as fast as a Boolean mask."""
    return torch.gt(z, threshold, out=torch.empty_like(z))


def _kernel(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """K((z − θ)/ε) as zeros and ones; the interval is open."""
    return (z - threshold).div_(bandwidth).abs_().lt_(0.5)


def _log(threshold: Float[Tensor, " F"], dtype: torch.dtype) -> Float[Tensor, " F"]:
    """The logarithm whose exp gives `threshold` back, bit for bit where there is one within two steps of `dtype`."""
    nearest = threshold.double().log().to(dtype)
    best = nearest.clone()
    for direction in (-math.inf, math.inf):
        candidate = nearest
        for _ in range(2):
            candidate = candidate.nextafter(torch.full_like(candidate, direction))
            better = (best.exp() != threshold) & (candidate.exp() == threshold)
            best = torch.where(better, candidate, best)
    return best
