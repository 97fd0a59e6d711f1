"""The fast training step on a CPU: a dense encoder, and everything after it only where a feature is active.

ReLU + L1 and JumpReLU have gradients that are exactly zero outside their active pairs (JumpReLU: θ also learns from the
pairs within its bandwidth), so nothing is approximated: gradients, global clipping and Adam are those of
`chatsae.sae.step`, summed in another order. Features without a gradient are moved by Adam too, in the same pass over
memory. The gradient of a row with few pairs is never stored: its norm, which clipping needs first, follows from the
products of the tokens with each other where these are few, and it is summed where Adam needs it.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.sae import dense, kernels, kernels_sums
from chatsae.sae.arrays import Vectors, Weights, by_feature, losses_of
from chatsae.sae.base import SAE, Losses
from chatsae.sae.crew import share
from chatsae.sae.pairs import Pairs, find
from chatsae.sae.workspace import Array, moved, product, release, space

_PARTS = 16  # of the sum for b_dec: fixed, so that threads change no bit
_GRAM = 512
"""Tokens up to which the norm of a gradient that is not stored comes from the products of tokens with each other."""
_ROOM, _ROOM_BEYOND = 8, 4
"""Pairs of a row up to which its gradient is not stored but summed where Adam needs it, beyond _GRAM for its norm as
well: no more than `kernels.adam_sparse` and `kernels.row_grads` can sum."""


class FastStep:
    """The steps of one SAE, sparse and dense.

    W_enc and its moments are laid out by feature while it is used: shape [d_in, d_sae] as ever, strides (1, d_in).
    """

    def __init__(self, sae: SAE, optimizer: torch.optim.Adam) -> None:
        self.sae, self.optimizer = sae, optimizer
        self._moments: dict[str, tuple[Array, Array]] = {}
        self._steps: list[Array] = []
        self._seen: Any = None
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
                    self._seen = None

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
        room = _ROOM if len(x) <= _GRAM else _ROOM_BEYOND
        pairs = find(sae_in, weights.W_enc, weights.activation(), limit=limit, room=room)
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
        found = dense.gradients(weights, x, self.sae.spec.coefficient * sparsity_scale)
        if math.isfinite(found.losses.total.item()):
            numbers = self.numbers(lr, _clip(found.squared, found.vectors, clip_grad_norm))
            args = (*self.arrays("W_dec"), *self.arrays("W_enc"), found.W_dec, found.W_enc, found.pulls)
            args = (*args, weights.keeps_norms, weights.norms(), numbers)
            share(kernels.adam_dense, len(found.W_dec), 16 * found.W_dec.size, *args)
            self.move(found.vectors, numbers)
        return found.losses, found.density

    def count(self, *counts: Tensor) -> None:
        """See `kernels_sums.count`."""
        kernels_sums.count(*(tensor.numpy() for tensor in counts))

    def move(self, vectors: Vectors, numbers: tuple[Any, ...]) -> None:
        """Take the step of the parameters that are vectors."""
        for name, grad in vectors.items():
            kernels.adam_vector(*self.arrays(name), grad[None], numbers)

    def arrays(self, name: str) -> tuple[Array, Array, Array]:
        """A parameter and its moments, as rows."""
        return self._weights.rows[name], *self._moments[name]

    def numbers(self, lr: float, clip: float) -> tuple[Any, ...]:
        """Count a step of Adam, and give its numbers in the order of `kernels.adam_vector`."""
        if self._seen is not self.optimizer.state:  # a state was loaded, or this is the first step
            self._read()
        for steps in self._steps:
            steps += 1
        k = int(self._steps[0])
        (group,) = self.optimizer.param_groups
        group["lr"] = lr
        (beta1, beta2), eps = group["betas"], group["eps"]
        corrected = lr / (1 - beta1**k), (1 - beta2**k) ** -0.5
        limits, dtype = self._limits, self._limits.dtype.type
        values = (clip, beta1, 1 - beta1, beta2, 1 - beta2, *corrected, eps, limits.tiny, 4 * limits.eps)
        return tuple(map(dtype, values))

    def _read(self) -> None:
        """The state of Adam as arrays that share its memory."""
        self._moments, self._steps = {}, []
        for name, p in self.sae.named_parameters():
            state = self.optimizer.state[p]
            if not state:  # as torch makes it
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            for key in ("exp_avg", "exp_avg_sq") if p.dim() == 2 else ():
                state[key] = moved(state[key].T).T if name == "W_enc" else moved(state[key])
            self._moments[name] = by_feature(name, state["exp_avg"]), by_feature(name, state["exp_avg_sq"])
            self._steps.append(state["step"].numpy())
        self._seen = self.optimizer.state


class _Batch:
    """One sparse step behind the encoder."""

    def __init__(
        self, fast: FastStep, weights: Weights, x: Array, sae_in: Array, pairs: Pairs, sparsity_scale: float
    ) -> None:
        self.fast, self.weights, self.x, self.sae_in, self.pairs = fast, weights, x, sae_in, pairs
        self.coefficient = weights.spec.coefficient * sparsity_scale
        self.dtype = weights.dtype
        self.F, self.d_out = len(weights.b_enc), space("d_out", x.shape, self.dtype)
        self.d_acts, self.d_pre = space("d_pairs", (2, pairs.total), self.dtype)
        self.g_b = space("g_b", self.F, self.dtype)
        self.stored = space("g_rows", (2, pairs.slots, x.shape[1]), self.dtype)

    def step(self, lr: float, clip_grad_norm: float) -> Losses:
        losses = self._forward()
        if not math.isfinite(losses.total.item()):
            return losses
        squared, vectors, p, w = self._square_rows(), self._vectors(), self.pairs, self.weights
        numbers = self.fast.numbers(lr, _clip(squared, vectors, clip_grad_norm))
        dec = (*self.fast.arrays("W_dec"), p.r_acts, self.d_out, self.pulls, self.stored[0])
        enc = (*self.fast.arrays("W_enc"), self.d_pre, self.sae_in, self.stored[1])
        args = (p.row_of, p.r_begin, p.r_tokens, p.slot, *dec, *enc)
        args = (*args, w.unit, w.keeps_norms, w.norms(), numbers)
        share(kernels.adam_sparse, self.F, 16 * w.W_dec.size, *args)
        self.fast.move(vectors, numbers)
        return losses

    def _forward(self) -> Losses:
        p, w, (n, d), F, r = self.pairs, self.weights, self.x.shape, self.F, len(self.pairs.rows)
        norms, mse = w.norms(), space("mse", n, self.dtype)
        args = (p.start, p.features, p.acts, w.W_dec, w.unit, norms, w.b_dec, self.dtype(2 / n))
        out = (self.d_out, self.d_acts, mse)
        share(kernels.decode, n, 2 * p.total * d, self.x, *args, *out, ends=p.start[1:])

        l1, firings = self.dtype(0 if w.jump else self.coefficient / n), np.empty(F, self.dtype)
        self.pulls, self.crosses, penalties = space("of_rows", (3, r), self.dtype)
        args = (p.row_of, p.r_begin, p.r_acts, p.places, self.d_acts, norms, w.weighted, l1)
        out = (firings, self.g_b, self.d_pre, self.pulls, self.crosses, penalties)
        share(kernels.penalise, F, 2 * p.total, *args, *out)
        l0 = float(p.r_begin[-1]) / n
        penalty = self.coefficient * l0 if w.jump else kernels_sums.total(penalties)
        return losses_of(kernels_sums.total(mse) / n, penalty, l0, firings)

    def _square_rows(self) -> float:
        """The squared norm of the gradients of W_dec and W_enc; those of the rows with many pairs are stored."""
        p, (n, d), r = self.pairs, self.x.shape, len(self.pairs.rows)
        squares, zeros = space("squares", (2, r), self.dtype), np.zeros(r, self.dtype)
        terms = (p.r_acts, self.d_out, self.pulls, self.crosses), (self.d_pre, self.sae_in, zeros, zeros)
        gram = p.slots < r and n <= _GRAM
        for (values, vectors, pulls, crosses), stored, out in zip(terms, self.stored, squares, strict=True):
            if gram:
                products, _ = product("gram", y := torch.from_numpy(vectors), y.T, self.dtype)
                share(kernels.gram_squares, r, p.total, p.r_begin, p.r_tokens, values, products, crosses, out)
            if p.slots > 0 or not gram:
                by_row = (vectors, p.rows, p.r_begin, p.r_tokens, values, pulls, self.weights.W_dec, p.slot, not gram)
                share(kernels.row_grads, r, p.total * d, *by_row, stored, out, ends=p.r_begin[1:])
        return float(kernels_sums.total(squares.reshape(-1)))

    def _vectors(self) -> Vectors:
        w, (n, d), r = self.weights, self.x.shape, len(self.pairs.rows)
        less = space("through_encoder", (_PARTS if w.spec.apply_b_dec_to_input else 0, d), self.dtype)
        if len(less) > 0:  # (sum over tokens of d hidden_pre) @ W_enc.T, from the rows that fired
            share(kernels_sums.weighted_rows, _PARTS, r * d, w.W_enc, self.pairs.rows, self.g_b, less)
        vectors = {"b_enc": self.g_b, "b_dec": space("g_b_dec", d, self.dtype)}
        kernels_sums.b_dec_grad(self.d_out, less, vectors["b_dec"])
        if w.jump:
            p, grad, l0 = self.pairs, np.empty(self.F, self.dtype), self.dtype(self.coefficient / n)
            args = (p.start, p.features, p.band, self.d_acts, w.theta, self.dtype(w.spec.bandwidth), l0)
            kernels.threshold_grad(*args, grad)
            vectors[w.threshold_name] = grad * w.theta if w.unit else grad
        return vectors


def _clip(squared: float, vectors: Vectors, most: float) -> float:
    """What torch's clip_grad_norm_ multiplies gradients with; `squared`: the squared norm of those of the weights."""
    norm = math.sqrt(squared + kernels_sums.squared_norm(tuple(vectors.values())))
    return min(1.0, most / (norm + 1e-6))
