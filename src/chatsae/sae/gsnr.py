"""GSNR: how much of an SAE's gradient is signal, exactly, without the gradient of any single token in memory."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.errors import UserError
from chatsae.sae.base import SAE
from chatsae.sae.jumprelu import JumpReLUSAE, _exceeds, _kernel
from chatsae.sae.standard import StandardSAE

Unit = Literal["token", "sequence", "step"]
"""What one sample of the gradient is: that of a token, or the mean gradient over a sequence or a training batch."""

_ACTIVATIONS = 2**24  # of [rows, d_sae] at a time: 64 MB in float32
_ENTRIES = 2**22  # of a parameter that are reduced at a time


@dataclass(frozen=True, slots=True)
class ParameterGsnr:
    """The entries of one parameter.

    mean, median: of the GSNR of the entries whose gradient varies; None where none does.
    total: squared norm of the mean gradient, corrected, over the trace of its covariance.
    n_varying, n_silent, n_constant: entries whose gradient varies, is zero on every sample, or is the same number but
        not zero on every sample, so that its GSNR is infinite; only those that vary count.
    """

    mean: float | None
    median: float | None
    total: float | None
    n_varying: int
    n_silent: int
    n_constant: int


@dataclass(frozen=True, slots=True)
class Gsnr:
    """Gradient signal-to-noise ratio; comparable at an equal unit only.

    value: mean over all entries of all parameters whose gradient varies; None with a `reason`.
    total: squared norm of the mean gradient, corrected, over the trace of its covariance, all parameters together.
    n: samples, each one `unit`.
    """

    value: float | None
    total: float | None
    n: int
    unit: Unit
    by_parameter: dict[str, ParameterGsnr]
    reason: str | None = None


def gsnr(sae: SAE, x: Float[Tensor, "N D"], *, sparsity_scale: float = 1.0) -> Gsnr:
    """The GSNR of the training loss per token, over the tokens of one batch; see `GsnrSums`.

    Takes about as long as two or three training steps, and a few times the memory of the largest parameter.

    Raises:
        UserError: the SAE is of an architecture whose gradient is not known here.
    """
    sae = _wide(sae)
    reduced = _Reduced(len(x), sae.W_enc.dtype)
    with torch.no_grad():
        for name, first, second in _moments(sae, x, sparsity_scale) if len(x) else ():
            assert second is not None
            reduced.add(name, first, second)
    return reduced.result("token")


class GsnrSums:
    """Streaming sums of the gradient and of its square, in float64, of which `result` is the GSNR.

    Per entry j of a parameter GSNR = (ḡ² − s²/n) / s² with the mean ḡ and the variance s² of its gradient over n
    samples (Liu et al. 2020, there without −s²/n). Numerator and denominator are unbiased; their ratio keeps a bias of
    order (GSNR + 1/n)/n. Samples must be independent for this: tokens of a few dialogues are less so than tokens from
    the mixing buffer.

    The gradient is that of `SAE.loss` for the parameters as they are, before clipping. The gradient of a token is an
    outer product for W_enc and W_dec, hence Σ g = AᵀE and Σ g² = (A∘A)ᵀ(E∘E). Products are taken in the dtype of the
    SAE: in float64 sums equal those of per-sample autograd to 1e-12.
    """

    def __init__(self, sae: SAE, *, unit: Unit = "token", sparsity_scale: float = 1.0) -> None:
        """`unit` "token": each row of a batch is a sample; otherwise each call of `add` is one."""
        self.sae, self.unit, self.sparsity_scale, self.n = _wide(sae), unit, sparsity_scale, 0
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def add(self, x: Float[Tensor, "N D"]) -> None:
        """Count the tokens of a batch; without a token it does nothing.

        Raises:
            UserError: the SAE is of an architecture whose gradient is not known here.
        """
        if not len(x):
            return
        by_token = self.unit == "token"
        for name, first, second in _moments(self.sae, x, self.sparsity_scale, squares=by_token):
            mean = first.double() / len(x)
            self._put(name, *((mean, mean.square()) if second is None else (first.double(), second.double())))
        self.n += len(x) if by_token else 1

    def _put(self, name: str, first: Tensor, second: Tensor) -> None:
        if name in self._sums:
            for total, more in zip(self._sums[name], (first, second), strict=True):
                total += more
        else:
            self._sums[name] = first, second

    @staticmethod
    def merged(parts: Sequence["GsnrSums"]) -> "GsnrSums":
        """The sums of several that counted other samples of the same SAE."""
        whole = GsnrSums(parts[0].sae, unit=parts[0].unit, sparsity_scale=parts[0].sparsity_scale)
        for part in parts:
            whole._take(part)
        return whole

    def _take(self, part: "GsnrSums") -> None:
        self.n += part.n
        for name, (first, second) in part._sums.items():
            if name in self._sums:
                self._put(name, first, second)
            else:
                self._sums[name] = first.clone(), second.clone()

    def result(self) -> Gsnr:
        """The GSNR of all that has been counted."""
        reduced = _Reduced(self.n, self.sae.W_enc.dtype)
        for name, (first, second) in self._sums.items():
            reduced.add(name, first, second)
        return reduced.result(self.unit)

    @staticmethod
    def across(parts: Iterable["GsnrSums"]) -> Gsnr:
        """The GSNR of parts that are independent of each other, though the samples within a part are not.

        ḡ² − s²/n gives way to the mean product of the gradients of two samples from different parts, so that what
        the tokens of one dialogue have in common does not pass for signal. Needs two parts with samples. Parts that
        are made one after the other take no more memory than two of them.
        """
        whole, inside, pairs, count = None, dict[str, Tensor](), 0, 0
        for part in parts:
            if not part.n:
                continue
            if whole is None:
                whole = GsnrSums(part.sae, unit=part.unit, sparsity_scale=part.sparsity_scale)
            whole._take(part)
            pairs, count = pairs - part.n**2, count + 1
            for name, (first, _) in part._sums.items():
                inside[name] = first.square() + inside[name] if name in inside else first.square()
        if whole is None or count < 2:
            n, unit = (0, "token") if whole is None else (whole.n, whole.unit)
            return Gsnr(None, None, n, unit, {}, f"{count} independent parts; two are needed")
        reduced = _Reduced(whole.n, whole.sae.W_enc.dtype)
        pairs += whole.n**2
        for name, (first, second) in whole._sums.items():
            reduced.add(name, first, second, (first.square() - inside[name]) / pairs)
        return reduced.result(whole.unit)


_Moments = tuple[str, Tensor, Tensor | None]


def _wide(sae: SAE) -> SAE:
    """The SAE in float32 or better: squares of half precision say nothing about a variance."""
    half = sae.W_enc.dtype in (torch.float16, torch.bfloat16)
    return copy.deepcopy(sae).float() if half else sae


class _Outer(NamedTuple):
    """Gradients rowᵢ ⊗ (columnᵢ + shift) of a matrix, one per token; `shift` is the same for all tokens."""

    row: Float[Tensor, "N R"]
    column: Float[Tensor, "N C"]
    shift: Float[Tensor, "R C"] | None = None

    def total(self) -> Float[Tensor, "R C"]:
        total = self.row.T @ self.column
        return total if self.shift is None else total + self.row.sum(0)[:, None] * self.shift

    def squares(self) -> Float[Tensor, "R C"]:
        row2 = self.row.square()
        total = row2.T @ self.column.square()
        if self.shift is None:
            return total
        return total + (row2.T @ self.column).mul_(2 * self.shift) + row2.sum(0)[:, None] * self.shift.square()


def _moments(sae: SAE, x: Float[Tensor, "N D"], scale: float, *, squares: bool = True) -> Iterator[_Moments]:
    """For every parameter the sums over tokens of the gradient and, if asked for, of its square.

    In float64 where they are sums of several chunks.
    """
    chunks = x.to(sae.W_enc).split(max(1, _ACTIVATIONS // sae.spec.d_sae))
    if len(chunks) == 1:  # parameter by parameter: two tensors of a parameter's size at a time
        for name, gradient in _gradients(sae, x.to(sae.W_enc), scale).items():
            yield name, _total(gradient), _squares(gradient) if squares else None
        return
    sums: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        for name, *moments in _moments(sae, chunk, scale, squares=squares):
            new = [moment.double() for moment in moments if moment is not None]
            sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new
    for name, new in sums.items():
        yield name, new[0], new[1] if squares else None


def _total(gradient: Tensor | _Outer) -> Tensor:
    return gradient.sum(0) if isinstance(gradient, Tensor) else gradient.total()


def _squares(gradient: Tensor | _Outer) -> Tensor:
    return gradient.square().sum(0) if isinstance(gradient, Tensor) else gradient.squares()


def _gradients(sae: SAE, x: Float[Tensor, "N D"], scale: float) -> dict[str, Tensor | _Outer]:
    """The gradient of every token's own loss, for each parameter [N, ...] or as the factors of its outer product."""
    sae_in = x - sae.b_dec if sae.spec.apply_b_dec_to_input else x
    hidden_pre = sae_in @ sae.W_enc + sae.b_enc
    coefficient = sae.spec.coefficient * scale
    if isinstance(sae, StandardSAE):
        d_hidden, own = _standard(sae, x, hidden_pre, coefficient)
    elif isinstance(sae, JumpReLUSAE):
        d_hidden, own = _jumprelu(sae, x, hidden_pre, coefficient)
    else:
        raise UserError(f"{sae.spec.name}: the GSNR of the architecture {sae.spec.architecture!r} is not known")
    d_out = own.pop("b_dec")
    assert isinstance(d_out, Tensor)
    d_b_dec = d_out - d_hidden @ sae.W_enc.T if sae.spec.apply_b_dec_to_input else d_out
    return {"W_enc": _Outer(sae_in, d_hidden), "b_enc": d_hidden, "b_dec": d_b_dec, **own}


def _standard(
    sae: StandardSAE, x: Float[Tensor, "N D"], hidden_pre: Float[Tensor, "N F"], coefficient: float
) -> tuple[Float[Tensor, "N F"], dict[str, Tensor | _Outer]]:
    """Gradients of hidden_pre, and of W_dec and the output (as b_dec)."""
    acts = hidden_pre.relu()
    d_out = 2 * (sae.decode(acts) - x)
    norms, shift = torch.ones_like(sae.b_enc), None
    if sae.spec.form == "v6":  # the penalty weighs by row norms, whose gradient is the row's direction
        norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
        shift = coefficient * sae.W_dec / norms[:, None].clamp_min(torch.finfo(norms.dtype).tiny)
    d_hidden = (d_out @ sae.W_dec.T + coefficient * norms) * (hidden_pre > 0)
    return d_hidden, {"W_dec": _Outer(acts, d_out, shift), "b_dec": d_out}


def _jumprelu(
    sae: JumpReLUSAE, x: Float[Tensor, "N D"], hidden_pre: Float[Tensor, "N F"], coefficient: float
) -> tuple[Float[Tensor, "N F"], dict[str, Tensor | _Outer]]:
    """Gradients of hidden_pre, and of W_dec, the output (as b_dec) and the form's threshold parameter."""
    threshold, bandwidth = sae.threshold, sae.spec.bandwidth
    active = _exceeds(hidden_pre, threshold)
    acts = active * hidden_pre
    d_out = 2 * (sae.decode(acts) - x)
    d_acts = d_out @ sae.W_dec.T
    d_threshold = _kernel(hidden_pre, threshold, bandwidth) * (threshold * d_acts + coefficient) / -bandwidth
    own: dict[str, Tensor | _Outer] = {"W_dec": _Outer(acts, d_out), "b_dec": d_out}
    if sae.spec.form == "paper":
        own["log_threshold"] = d_threshold * threshold
    else:
        own["raw_threshold"] = d_threshold * (sae.raw_threshold >= 0)  # below zero it is clamped
    return d_acts * active, own


class _Reduced:
    """GSNR of one parameter after the other, from its sums over n samples."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.n = n
        self.rounding = 64 * torch.finfo(dtype).eps  # of a variance, as a share of the mean square
        self.parameters: dict[str, ParameterGsnr] = {}
        self.signal = self.noise = self.ratios = 0.0

    def add(self, name: str, first: Tensor, second: Tensor, signal: Tensor | None = None) -> None:
        """One parameter; `signal` is the square of its mean gradient where that is known better than from `first`."""
        n, strength, noise, silent, values = self.n, 0.0, 0.0, 0, []
        given = None if signal is None else signal.flatten().split(_ENTRIES)
        for i, (g, g2) in enumerate(
            zip(first.flatten().split(_ENTRIES), second.flatten().split(_ENTRIES), strict=True)
        ):
            mean2, spread = (g / n).square_(), g2 / n
            least = spread * self.rounding
            spread -= mean2
            constant = spread <= least  # false for NaN, so that it shows
            if given is None:
                own = (mean2 / spread).mul_((n - 1) / n).sub_(1 / n)  # (mean2 - variance / n) / variance
            else:
                own = (given[i] / spread).mul_((n - 1) / n)
            if bool(constant.any()):
                spread[constant] = 0
                own = own[~constant]
                silent += int((g2 == 0).sum())
            variance = float(spread.sum()) * (n / max(n - 1, 1))
            noise += variance
            strength += float(mean2.sum()) - variance / n if given is None else float(given[i].sum())
            values.append(own)
        ratios = torch.cat(values) if len(values) > 1 else values[0]
        total = float(ratios.sum())
        self.parameters[name] = ParameterGsnr(
            mean=total / len(ratios) if len(ratios) else None,
            median=float(ratios.median()) if len(ratios) else None,
            total=strength / noise if noise else None,
            n_varying=len(ratios),
            n_silent=silent,
            n_constant=first.numel() - len(ratios) - silent,
        )
        self.signal, self.noise, self.ratios = self.signal + strength, self.noise + noise, self.ratios + total

    def result(self, unit: Unit) -> Gsnr:
        n_varying = sum(p.n_varying for p in self.parameters.values())
        if self.n < 2:
            return Gsnr(None, None, self.n, unit, {}, f"{self.n} samples; a variance needs two")
        if not math.isfinite(self.ratios):
            return Gsnr(None, None, self.n, unit, {}, "the gradient is not finite")
        if not n_varying:
            return Gsnr(None, None, self.n, unit, self.parameters, "no entry of the gradient varies")
        return Gsnr(self.ratios / n_varying, self.signal / self.noise, self.n, unit, self.parameters)
