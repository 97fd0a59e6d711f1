"""The fast training step on a CPU: a dense encoder, and everything after it only where a feature is active.

ReLU + L1 and JumpReLU have gradients that are exactly zero outside their active pairs (JumpReLU: θ also learns from the
pairs within its bandwidth), so nothing is approximated: gradients, global clipping and Adam are those of
`chatsae.sae.step`, summed in another order. Features without a gradient are moved by Adam too, in the same pass over
memory; putting their updates off would save traffic but not the square roots, which are what the pass costs.
"""

import math
import threading
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.config import SAESpec
from chatsae.sae import kernels
from chatsae.sae.base import SAE, Losses
from chatsae.sae.crew import share
from chatsae.sae.jumprelu import JumpReLUSAE

Array = npt.NDArray[Any]

_PARTS = 16  # of the sum for b_dec: fixed, so that threads change no bit
_AMD = llvmlite.binding.get_host_cpu_name().startswith("znver")


@dataclass
class Pairs:
    """The (token, feature) pairs of a batch that are active or near their threshold, by token and by feature."""

    start: Array
    """Where the pairs of each token start [N]."""
    stop: Array
    features: Array
    acts: Array
    band: Array
    """Whether the pre-activation lies within the bandwidth of the threshold."""
    total: int


class _Spaces(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[tuple[str, Any], Array] = {}


_spaces = _Spaces()


def space(name: str, shape: int | tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array of the work space, which all SAEs that one thread trains share."""
    size = shape if isinstance(shape, int) else math.prod(shape)
    array = _spaces.arrays.get((name, dtype))
    if array is None or array.size < size:
        array = np.empty(size + size // 4, dtype)  # room for the next, slightly larger batch
        _spaces.arrays[name, dtype] = array
    return array[:size].reshape(shape)


class FastStep:
    """The step of one SAE.

    W_enc and its moments are laid out by feature while it is used: shape [d_in, d_sae] as ever, strides (1, d_in).
    """

    def __init__(self, sae: SAE, optimizer: torch.optim.Adam) -> None:
        self.sae, self.optimizer = sae, optimizer
        self._jump = isinstance(sae, JumpReLUSAE)
        self._unit = sae.spec.form == "paper"
        self.lay_out_()

    @torch.no_grad()
    def lay_out_(self) -> None:
        """Give W_enc and its moments rows by feature; the plain step works on them as well, a little slower."""
        tensors = {"W_enc": self.sae.W_enc.data, **self.optimizer.state.get(self.sae.W_enc, {})}
        for key, value in tensors.items():
            if value.dim() == 2 and not value.T.is_contiguous():
                laid_out = value.T.contiguous().T
                if key == "W_enc":
                    self.sae.W_enc.data = laid_out
                else:
                    self.optimizer.state[self.sae.W_enc][key] = laid_out

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float, limit: float
    ) -> Losses | None:
        """One step; None when more than `limit` of all pairs are active.

        Nothing has been changed then, nor when the loss that comes back is not finite.
        """
        self.lay_out_()
        if not self._unit:
            self.sae.before_step_()
        x = x.contiguous()
        sae_in = x - self.sae.b_dec if self.sae.spec.apply_b_dec_to_input else x
        pairs = self._compact(_encode(sae_in, self.sae.W_enc.T, self.sae.b_enc), limit)
        if pairs is None:
            return None
        return _Batch(self, x.numpy(), sae_in.numpy(), pairs, sparsity_scale).step(lr, clip_grad_norm)

    def dense(self, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float) -> Losses:
        """The step for batches with many active features: gradients as the plain step has them, but one pass for the
        clipping and Adam, which torch's makes copies for where W_enc lies by feature.
        """
        self.lay_out_()
        self.sae.before_step_()
        losses = self.sae.loss(x, sparsity_scale)
        losses.total.backward()
        named = {name: p.grad for name, p in self.sae.named_parameters() if p.grad is not None}
        norm = float(torch.nn.utils.get_total_norm(named.values()))
        grads = {name: np.ascontiguousarray(_rows(name, grad)) for name, grad in named.items()}
        every = np.arange(self.sae.spec.d_sae, dtype=np.int32)
        self.adam(grads, {"W_dec": every, "W_enc": every}, _clip(norm, clip_grad_norm), lr, unit=False)
        self.optimizer.zero_grad(set_to_none=True)
        return Losses(*(value.detach() for value in losses))

    @torch.no_grad()
    def adam(self, grads: dict[str, Array], slots: dict[str, Array], clip: float, lr: float, *, unit: bool) -> None:
        """Moves all parameters; unit: the rows of W_dec are to be scaled to unit norm first."""
        dtype = _array(self.sae.b_enc).dtype.type
        moments = {name: (p.detach(), _moments(self.optimizer, p)) for name, p in self.sae.named_parameters()}
        scalars = _adam_scalars(self.optimizer, int(moments["W_dec"][1]["step"]), lr, clip, dtype)
        for name, (p, state) in moments.items():
            arrays = [_rows(name, t) for t in (p, state["exp_avg"], state["exp_avg_sq"])]
            slot = slots.get(name, np.zeros(1, np.int32))
            work = arrays[0].size * 8
            share(kernels.adam, len(slot), work, *arrays, grads[name], slot, unit and name == "W_dec", scalars)

    def theta(self) -> Array:
        sae = self.sae
        return sae.threshold.detach().numpy() if isinstance(sae, JumpReLUSAE) else np.zeros_like(_array(sae.b_enc))

    def _compact(self, z: Array, limit: float) -> Pairs | None:
        theta, dtype = self.theta(), z.dtype.type
        bandwidth, low = dtype(self.sae.spec.bandwidth if self._jump else 0), theta
        if self._jump:  # safely below what counts as near
            low = theta - dtype(0.501) * bandwidth - dtype(4 * np.finfo(z.dtype).eps) * abs(theta)
        counts = space("counts", len(z), np.int64)
        share(kernels.count, len(z), z.size, z, low, counts)
        total = int(counts.sum())
        if total > limit * z.size:
            return None
        start = np.zeros(len(z), np.int64)
        np.cumsum(counts[:-1] + 1, out=start[1:])
        room = total + len(z)
        pairs = Pairs(
            start=start,
            stop=space("stop", len(z), np.int64),
            features=space("features", room, np.int32),
            acts=space("acts", room, dtype),
            band=space("band", room, np.bool_),
            total=total,
        )
        share(
            kernels.compact,
            len(z),
            z.size,
            z,
            low,
            theta,
            bandwidth,
            dtype(0.5),
            start,
            pairs.stop,
            pairs.features,
            pairs.acts,
            pairs.band,
        )
        return pairs


class _Batch:
    """One step after the encoder."""

    def __init__(self, fast: FastStep, x: Array, sae_in: Array, pairs: Pairs, sparsity_scale: float) -> None:
        self.fast, self.x, self.sae_in, self.pairs = fast, x, sae_in, pairs
        self.spec: SAESpec = fast.sae.spec
        self.coefficient = self.spec.coefficient * sparsity_scale
        self.dtype = x.dtype.type
        self.W_dec = _array(fast.sae.W_dec)
        self.jump, self.unit = self.spec.architecture == "jumprelu", self.spec.form == "paper"
        self.weighted = not self.jump and not self.unit
        self.sparse_grads: dict[str, Array] = {}
        self.squared_norm = 0.0
        self.d_acts = space("d_acts", len(pairs.acts), self.dtype)
        self.d_out = space("d_out", x.shape, self.dtype)

    def step(self, lr: float, clip_grad_norm: float) -> Losses:
        self._sort()
        losses = self._forward()
        if not losses.total.isfinite():
            return losses
        grads = self._gradients()
        norm = math.sqrt(self.squared_norm + sum(float(np.vdot(g, g)) for g in grads.values()))
        grads = {**{name: grad[None] for name, grad in grads.items()}, **self.sparse_grads}
        slots = {"W_dec": self.slot, "W_enc": self.slot}
        self.fast.adam(grads, slots, _clip(norm, clip_grad_norm), lr, unit=self.unit)
        return losses

    def _sort(self) -> None:
        p, F = self.pairs, self.spec.d_sae
        room = len(p.acts)
        self.begin = space("begin", F + 1, np.int64)
        self.touched = space("touched", F, np.bool_)
        self.slot = space("slot", F, np.int32)
        self.tokens = space("tokens", room, np.int32)
        self.places = space("places", room, np.int32)
        rows, cursor = space("rows", F, np.int32), space("cursor", F, np.int64)
        n = kernels.by_feature(
            p.start,
            p.stop,
            p.features,
            p.acts,
            self.begin,
            cursor,
            self.touched,
            rows,
            self.slot,
            self.tokens,
            self.places,
        )
        self.rows, self.begin = rows[:n], self.begin[: n + 1]
        self.norms = space("norms", F, self.dtype)
        if self.unit or self.weighted:
            share(kernels.row_norms, F, len(self.rows) * self.x.shape[1], self.W_dec, self.touched, self.norms)

    def _forward(self) -> Losses:
        p, n, F, dtype = self.pairs, len(self.x), self.spec.d_sae, self.fast.sae.b_enc.dtype
        ones = np.ones(F, self.dtype)
        with np.errstate(all="ignore"):  # rows that were not asked for hold anything
            scale = 1 / np.maximum(self.norms, np.finfo(self.dtype).tiny) if self.unit else ones
        weights = np.zeros(F, self.dtype) if self.jump else self.norms if self.weighted else ones
        l1 = self.dtype(0 if self.jump else self.coefficient / n)
        mse, reg = np.empty(n, self.dtype), np.empty(n, self.dtype)
        share(
            kernels.decode,
            n,
            2 * p.total * self.x.shape[1],
            self.x,
            p.start,
            p.stop,
            p.features,
            p.acts,
            self.W_dec,
            scale,
            weights,
            _array(self.fast.sae.b_dec),
            self.dtype(2 / n),
            l1,
            self.d_out,
            self.d_acts,
            mse,
            reg,
            ends=p.stop,
        )
        firings = np.zeros(F, np.float64)
        firings[self.rows] = np.diff(self.begin)
        l0 = firings.sum() / n
        error = mse.mean(dtype=np.float64)
        penalty = self.coefficient * (l0 if self.jump else reg.mean(dtype=np.float64))
        total, mse_, sparsity, l0_ = torch.tensor([error + penalty, error, penalty, l0], dtype=torch.float64).to(dtype)
        return Losses(total, mse_, sparsity, l0_, torch.from_numpy(firings).to(dtype))

    def _gradients(self) -> dict[str, Array]:
        """Those of W_dec and W_enc stay in the work space, rows that fired only; the others are returned."""
        p, (n, d) = self.pairs, self.x.shape
        r, rows, by_row, ends = len(self.rows), self.rows, (self.begin, self.tokens, self.places), self.begin[1:]
        sums, g_b = np.empty(r, self.dtype), np.zeros(self.spec.d_sae, self.dtype)
        kernels.row_sums(0, r, rows, self.begin, self.places, p.acts, self.d_acts, sums, g_b)
        pulls = np.zeros(r, self.dtype)
        if self.weighted:  # d (sum of acts) ‖w‖ = (sum of acts) w / ‖w‖
            norms = self.norms[rows]
            pulls = np.divide(sums * self.dtype(self.coefficient / n), norms, out=pulls, where=norms > 0)
        for name, vectors, values in (("W_dec", self.d_out, p.acts), ("W_enc", self.sae_in, self.d_acts)):
            grad, squares = space(f"g_{name}", (r, d), self.dtype), np.empty(r, self.dtype)
            args = (vectors, rows, *by_row, values, pulls, self.W_dec, grad, squares)
            share(kernels.outer_products, r, p.total * d, *args, ends=ends)
            self.sparse_grads[name] = grad
            self.squared_norm += float(squares.sum(dtype=np.float64))
            pulls = np.zeros(r, self.dtype)
        grads = {"b_enc": g_b, "b_dec": self.d_out.sum(0)}
        if self.spec.apply_b_dec_to_input:
            grads["b_dec"] -= self._through_encoder(g_b)
        if self.jump:
            grads["log_threshold" if self.unit else "raw_threshold"] = self._threshold_grad()
        return grads

    def _through_encoder(self, g_b: Array) -> Array:
        """(sum over tokens of d hidden_pre) @ W_enc.T, from the rows that fired."""
        r, d = len(self.rows), self.x.shape[1]
        cuts = np.arange(_PARTS + 1) * r // _PARTS
        out = np.empty((_PARTS, d), self.dtype)
        W_enc = _array(self.fast.sae.W_enc.T)
        share(kernels.weighted_rows, _PARTS, r * d, W_enc, self.rows, cuts, g_b, out)
        return out.sum(0)

    def _threshold_grad(self) -> Array:
        p, theta, grad = self.pairs, self.fast.theta(), np.empty(self.spec.d_sae, self.dtype)
        bandwidth, l0 = self.dtype(self.spec.bandwidth), self.dtype(self.coefficient / len(self.x))
        kernels.threshold_grad(p.start, p.stop, p.features, p.band, self.d_acts, theta, bandwidth, l0, grad)
        return grad * theta if self.unit else grad


def _encode(x: Float[Tensor, "N D"], rows: Float[Tensor, "F D"], b_enc: Float[Tensor, " F"]) -> Array:
    """x @ rows.T + b_enc. On AMD, torch's own float32 product takes twice the time of oneDNN's, which is chosen here.

    By the kind of CPU and not by a timing: what is computed must not hang on how busy the machine was.
    """
    rows, b_enc = rows.detach(), b_enc.detach()
    if _AMD and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        try:
            return torch.ops.mkldnn._linear_pointwise(x, rows, b_enc, "none", [], "").numpy()
        except (AttributeError, RuntimeError, TypeError):  # it is not a public operator
            pass
    hidden_pre = space("hidden_pre", (len(x), len(rows)), _array(b_enc).dtype.type)
    torch.addmm(b_enc, x, rows.T, out=torch.from_numpy(hidden_pre))
    return hidden_pre


def _clip(norm: float, most: float) -> float:
    """What torch's clip_grad_norm_ multiplies gradients with."""
    return min(1.0, most / (norm + 1e-6))


def _array(tensor: Tensor) -> Array:
    return tensor.detach().numpy()


def _rows(name: str, tensor: Tensor) -> Array:
    """W_enc by feature, W_dec as it is, a vector as one row; shares memory."""
    if tensor.dim() == 1:
        return tensor.numpy()[None]
    return (tensor.T if name == "W_enc" else tensor).numpy()


def _moments(optimizer: torch.optim.Adam, p: Tensor) -> dict[str, Tensor]:
    """The state of a parameter, made as torch makes it, with the step counted."""
    state = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    state["step"] += 1
    return state


def _adam_scalars(optimizer: torch.optim.Adam, k: int, lr: float, clip: float, dtype: Any) -> tuple[Any, ...]:
    """The numbers of the k-th step of Adam, counted from 1, in the order of `kernels.adam`."""
    (group,) = optimizer.param_groups
    group["lr"] = lr
    (beta1, beta2), eps = group["betas"], group["eps"]
    numbers = np.finfo(dtype)
    values = (
        clip,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**k),
        (1 - beta2**k) ** -0.5,
        eps,
        numbers.tiny,
        4 * numbers.eps,
    )
    return tuple(dtype(v) for v in values)
