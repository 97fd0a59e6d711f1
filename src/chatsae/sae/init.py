"""Initial weights: Kaiming uniform in the two forms, and the geometric median for b_dec."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chatsae.config import SAESpec
from chatsae.errors import UserError
from chatsae.sae.base import SAE, normalize_rows_
from chatsae.sae.jumprelu import JumpReLUSAE

_V6_ROW_NORM = 0.1
_QUANTILE_ROWS = 2048  # of the sample that an L0 is set by
_LEAST_THRESHOLD = 1e-6


@torch.no_grad()
def init_sae(spec: SAESpec, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> SAE:
    """A fresh SAE on the CPU; biases are zero (see `set_b_dec_`).

    form="paper": W_dec and W_enc Kaiming uniform, U(±√(6/d_in)) and U(±√(6/d_sae)), rows of W_dec then of unit norm.
    form="v6": W_dec Kaiming uniform, its rows scaled to 0.1, W_enc its transpose.
    Both draw the random numbers that sae_lens 5 and 6 draw, in their order.
    """
    sae = SAE.create(spec, dtype=dtype)
    nn.init.kaiming_uniform_(sae.W_dec, generator=generator)
    if spec.form == "paper":
        for _ in range(2):  # sae_lens 5 draws the encoder twice and keeps the second
            nn.init.kaiming_uniform_(sae.W_enc, generator=generator)
        normalize_rows_(sae.W_dec)
    else:
        normalize_rows_(sae.W_dec)
        sae.W_dec.mul_(_V6_ROW_NORM)
        sae.W_enc.copy_(sae.W_dec.T)
    if isinstance(sae, JumpReLUSAE):
        sae.set_threshold_(spec.init_threshold)
    sae.fresh = True
    return sae


@torch.no_grad()
def set_b_dec_(sae: SAE, sample: Float[Tensor, "N D"]) -> None:
    """Put b_dec where `spec.b_dec_init` says: at the geometric median of a sample of activations, or at zero.

    Raises:
        UserError: the sample holds NaN or inf.
    """
    if sae.spec.b_dec_init == "zeros":
        sae.b_dec.zero_()
        return
    median = geometric_median(sample)
    if not bool(median.isfinite().all()):
        raise UserError(f"{sae.spec.name}: the activations that place b_dec hold NaN or inf")
    sae.b_dec.copy_(median)


@torch.no_grad()
def set_l0_(sae: SAE, sample: Float[Tensor, "N D"], l0: float) -> None:
    """Put thresholds, or the encoder's biases where there are none, so that `l0` features are active on a token.

    All thresholds are multiplied by one factor, all biases lowered by one number: a quantile over a sample.
    """
    rows = sample[:_QUANTILE_ROWS]
    pre = (rows - sae.b_dec if sae.spec.apply_b_dec_to_input else rows) @ sae.W_enc + sae.b_enc
    least = pre.numel() - min(max(round(l0 * len(rows)), 1), pre.numel()) + 1
    if isinstance(sae, JumpReLUSAE):
        threshold = sae.threshold.clamp_min(_LEAST_THRESHOLD)
        factor = float((pre / threshold).flatten().kthvalue(least).values)
        sae.set_threshold_((threshold * factor).clamp_min(_LEAST_THRESHOLD))
    else:
        sae.b_enc.sub_(float(pre.flatten().kthvalue(least).values))


@torch.no_grad()
def geometric_median(
    points: Float[Tensor, "N D"],
    *,
    weights: Float[Tensor, " N"] | None = None,
    ftol: float = 1e-20,
    max_iterations: int = 100,
    eps: float = 1e-6,
) -> Float[Tensor, " D"]:
    """The point with the smallest sum of distances to `points`, by Weiszfeld's iteration (paper, appendix).

    m₀ is the weighted mean; then mₖ₊₁ is the mean with weights wᵢ / max(‖pᵢ − mₖ‖, eps), until the objective
    f(m) = Σ wᵢ ‖pᵢ − m‖ changes by no more than ftol · f. Half precision is raised to float32.
    """
    points = points.float() if points.dtype in (torch.float16, torch.bfloat16) else points
    weights = points.new_ones(len(points)) if weights is None else weights.to(points)
    median = _weighted_mean(points, weights)
    distances = torch.linalg.vector_norm(points - median, dim=1)
    objective = (weights * distances).sum()
    for _ in range(max_iterations):
        median = _weighted_mean(points, weights / distances.clamp_min(eps))
        distances = torch.linalg.vector_norm(points - median, dim=1)
        previous, objective = objective, (weights * distances).sum()
        if bool((previous - objective).abs() <= ftol * objective):
            break
    return median


def _weighted_mean(points: Float[Tensor, "N D"], weights: Float[Tensor, " N"]) -> Float[Tensor, " D"]:
    return (weights / weights.sum()) @ points
