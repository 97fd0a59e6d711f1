"""The fast training step on a CPU: a dense encoder, and everything after it only where a feature is active.

ReLU + L1 and JumpReLU have gradients that are exactly zero outside their active pairs (JumpReLU: θ also learns from the
pairs within its bandwidth), so nothing is approximated: gradients, global clipping and Adam are those of
`chatsae.sae.step`, summed in another order. Features without a gradient are moved by Adam too, in the same pass over
memory. The gradient of a row with few pairs is never stored: its norm, which clipping needs first, follows from the
products of the tokens with each other where these are few, and it is summed where Adam needs it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.sae import kernels
from chatsae.sae.arrays import Array, Weights, by_feature, losses_of
from chatsae.sae.base import SAE, Losses
from chatsae.sae.crew import share
from chatsae.sae.dense import DenseBatch
from chatsae.sae.pairs import Pairs, find
from chatsae.sae.workspace import moved, release, space

_PARTS = 16  # of the sum for b_dec: fixed, so that threads change no bit
_GRAM = 512
"""Tokens up to which the norm of a gradient that is not stored comes from the products of tokens with each other."""
_ROOM, _ROOM_BEYOND = 8, 4
"""Pairs of a row up to which its gradient is not stored but summed where Adam needs it; beyond _GRAM, once more."""


class FastStep:
    """The steps of one SAE, sparse and dense.

    W_enc and its moments are laid out by feature while it is used: shape [d_in, d_sae] as ever, strides (1, d_in).
    """

    def __init__(self, sae: SAE, optimizer: torch.optim.Adam) -> None:
        self.sae, self.optimizer = sae, optimizer
        self._named = dict(sae.named_parameters())
        self._moments: dict[str, Moments] = {}
        self._limits = np.finfo(sae.b_enc.detach().numpy().dtype)
        self._was_dense = False
        sae.W_dec.data = moved(sae.W_dec.data)
        self.lay_out_()
        self._weights = Weights(sae)

    @torch.no_grad()
    def lay_out_(self) -> None:
        """Give W_enc and its moments rows by feature; the plain step works on them as well, a little slower."""
        tensors = {"W_enc": self.sae.W_enc.data, **self.optimizer.state.get(self.sae.W_enc, {})}
        for key, value in tensors.items():
            if value.dim() == 2 and not value.T.is_contiguous():
                laid_out = moved(value.T).T
                if key == "W_enc":
                    self.sae.W_enc.data = laid_out
                else:
                    self.optimizer.state[self.sae.W_enc][key] = laid_out

    def weights(self) -> Weights:
        """The parameters, laid out, as the coming step finds them."""
        if not self._weights.current():
            self.lay_out_()
            self._weights = Weights(self.sae)
        self._weights.update_()
        return self._weights

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float, limit: float
    ) -> Losses | None:
        """One sparse step; None when more than `limit` of all pairs are active.

        Nothing has been changed then, nor when the loss that comes back is not finite.
        """
        weights = self.weights()
        inputs, sae_in = weights.inputs(x)
        pairs = find(
            sae_in, weights.W_enc, weights.activation(), limit=limit, room=_ROOM if len(x) <= _GRAM else _ROOM_BEYOND
        )
        if pairs is None:
            return None
        if self._was_dense:
            release("dense_")
            self._was_dense = False
        return _Batch(self, weights, inputs, sae_in, pairs, sparsity_scale).step(lr, clip_grad_norm)

    @torch.no_grad()
    def dense(
        self, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float
    ) -> tuple[Losses, float]:
        """The step for batches with many active features, and the share of pairs the sparse step would have had.

        Nothing has been changed when the loss that comes back is not finite.
        """
        self._was_dense = True
        weights = self.weights()
        batch = DenseBatch(weights, *weights.inputs(x), self.sae.spec.coefficient * sparsity_scale)
        if math.isfinite(batch.losses.total.item()):
            grads, norm = batch.gradients()
            numbers = self.numbers(lr, _clip(norm, clip_grad_norm))
            for name, grad in grads.items():
                arrays = self.arrays(name)
                share(kernels.adam, len(grad), 8 * grad.size, *arrays, grad, numbers)
        return batch.losses, batch.density

    def arrays(self, name: str) -> tuple[Array, Array, Array]:
        """A parameter and its moments, as rows."""
        found = self._moments[name]
        return self._weights.rows[name], found.mean, found.square

    def numbers(self, lr: float, clip: float) -> tuple[Any, ...]:
        """Count a step of Adam, and give its numbers in the order of `kernels.adam`."""
        k = 0
        for name, p in self._named.items():
            state = self.optimizer.state[p]
            if name not in self._moments or self._moments[name].tensor is not state.get("exp_avg"):
                self._moments[name] = self._read(name, p)
            count = self._moments[name].steps
            count += 1
            k = int(count)
        (group,) = self.optimizer.param_groups
        group["lr"] = lr
        (beta1, beta2), eps = group["betas"], group["eps"]
        corrected = lr / (1 - beta1**k), (1 - beta2**k) ** -0.5
        limits = self._limits
        values = (clip, beta1, 1 - beta1, beta2, 1 - beta2, *corrected, eps, limits.tiny, 4 * limits.eps)
        return tuple(limits.dtype.type(v) for v in values)

    def _read(self, name: str, p: torch.nn.Parameter) -> "Moments":
        state = self.optimizer.state[p]
        if not state:  # as torch makes it
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if p.dim() == 2:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = moved(state[key].T).T if name == "W_enc" else moved(state[key])
        mean, square = (by_feature(name, state[key]) for key in ("exp_avg", "exp_avg_sq"))
        return Moments(state["exp_avg"], mean, square, state["step"].numpy())


@dataclass(frozen=True)
class Moments:
    """The state of Adam for one parameter, as arrays that share its memory; good for as long as `tensor` is in use."""

    tensor: Tensor
    mean: Array
    square: Array
    steps: Array


class _Batch:
    """One sparse step behind the encoder."""

    def __init__(
        self, fast: FastStep, weights: Weights, x: Array, sae_in: Array, pairs: Pairs, sparsity_scale: float
    ) -> None:
        self.fast, self.weights, self.x, self.sae_in, self.pairs = fast, weights, x, sae_in, pairs
        self.coefficient = weights.spec.coefficient * sparsity_scale
        self.dtype = weights.dtype
        self.d_out = space("d_out", x.shape, self.dtype)
        self.d_acts = space("d_acts", pairs.total, self.dtype)
        self.d_pre = space("d_pre", pairs.total, self.dtype)
        self.squared_norm = 0.0

    def step(self, lr: float, clip_grad_norm: float) -> Losses:
        losses = self._forward()
        if not math.isfinite(losses.total.item()):
            return losses
        rows, small = self._row_gradients(), self._small_gradients()
        norm = math.sqrt(self.squared_norm + sum(float(np.vdot(g, g)) for g in small.values()))
        numbers = self.fast.numbers(lr, _clip(norm, clip_grad_norm))
        F, p = len(self.weights.b_enc), self.pairs
        for name, (values, vectors, pulls, stored) in rows.items():
            P, M, V = self.fast.arrays(name)
            args = (p.row_of, p.r_begin, p.r_tokens, values, vectors, pulls, p.slot, stored)
            unit = self.weights.unit and name == "W_dec"
            share(kernels.adam_rows, F, 8 * P.size, P, M, V, *args, unit, numbers)
        for name, grad in small.items():
            kernels.adam(0, 1, *self.fast.arrays(name), grad[None], numbers)
        return losses

    def _forward(self) -> Losses:
        p, w, (n, d), F = self.pairs, self.weights, self.x.shape, len(self.weights.b_enc)
        norms, mse = space("norms", F, self.dtype), np.empty(n, self.dtype)
        if w.unit:
            share(kernels.row_norms, len(p.touched), len(p.touched) * d, w.W_dec, p.touched, norms)
        args = (p.start, p.features, p.acts, w.W_dec, w.unit, norms, w.b_dec, self.dtype(2 / n))
        out = (self.d_out, self.d_acts, mse)
        share(kernels.decode, n, 2 * p.total * d, self.x, *args, *out, ends=p.start[1:])

        r, l1 = len(p.rows), self.dtype(0 if w.jump else self.coefficient / n)
        self.g_b, self.pulls, penalties = np.zeros(F, self.dtype), np.empty(r, self.dtype), np.empty(r, self.dtype)
        by_row = (p.rows, p.r_begin, p.r_acts, p.places, self.d_acts)
        self.crosses = np.empty(r, self.dtype)
        out = (self.d_pre, self.pulls, self.crosses, penalties, self.g_b)
        work = r * d if w.weighted else p.total
        share(kernels.penalise, r, work, *by_row, w.W_dec, w.weighted, l1, *out)
        firings = np.zeros(F, self.dtype)
        firings[p.rows] = p.r_begin[1:] - p.r_begin[:-1]
        l0 = float(p.r_begin[-1]) / n
        penalty = self.coefficient * l0 if w.jump else float(penalties.sum(dtype=np.float64))
        return losses_of(float(mse.mean(dtype=np.float64)), penalty, l0, firings)

    def _row_gradients(self) -> dict[str, tuple[Array, Array, Array, Array]]:
        """What the gradients of W_dec and W_enc are sums of, and those of the rows with many pairs."""
        p, d, r = self.pairs, self.x.shape[1], len(self.pairs.rows)
        rows, zeros = {}, np.zeros(r, self.dtype)
        terms = {
            "W_dec": (p.r_acts, self.d_out, self.pulls, self.crosses),
            "W_enc": (self.d_pre, self.sae_in, zeros, zeros),
        }
        for name, (values, vectors, pulls, crosses) in terms.items():
            stored, squares = space(f"g_{name}", (p.slots, d), self.dtype), np.empty(r, self.dtype)
            gram = p.slots < r and len(vectors) <= _GRAM
            if gram:
                y = torch.from_numpy(vectors)
                products = torch.mm(y, y.T).numpy()
                share(kernels.gram_squares, r, p.total, p.r_begin, p.r_tokens, values, products, squares)
                squares += crosses
            if p.slots > 0 or not gram:
                by_row = (vectors, p.rows, p.r_begin, p.r_tokens, values, pulls, self.weights.W_dec, p.slot, not gram)
                share(kernels.row_grads, r, p.total * d, *by_row, stored, squares, ends=p.r_begin[1:])
            self.squared_norm += float(squares.sum(dtype=np.float64))
            rows[name] = (values, vectors, pulls, stored)
        return rows

    def _small_gradients(self) -> dict[str, Array]:
        grads = {"b_enc": self.g_b, "b_dec": self.d_out.sum(0)}
        if self.weights.spec.apply_b_dec_to_input:
            grads["b_dec"] -= self._through_encoder()
        if self.weights.jump:
            grads[self.weights.threshold_name] = self._threshold_grad()
        return grads

    def _through_encoder(self) -> Array:
        """(sum over tokens of d hidden_pre) @ W_enc.T, from the rows that fired."""
        r, d = len(self.pairs.rows), self.x.shape[1]
        cuts = np.arange(_PARTS + 1) * r // _PARTS
        out = np.empty((_PARTS, d), self.dtype)
        share(kernels.weighted_rows, _PARTS, r * d, self.weights.W_enc, self.pairs.rows, cuts, self.g_b, out)
        return out.sum(0)

    def _threshold_grad(self) -> Array:
        p, w, grad = self.pairs, self.weights, np.empty_like(self.weights.theta)
        bandwidth, l0 = self.dtype(w.spec.bandwidth), self.dtype(self.coefficient / len(self.x))
        kernels.threshold_grad(p.start, p.features, p.band, self.d_acts, w.theta, bandwidth, l0, grad)
        return grad * w.theta if w.unit else grad


def _clip(norm: float, most: float) -> float:
    """What torch's clip_grad_norm_ multiplies gradients with."""
    return min(1.0, most / (norm + 1e-6))
