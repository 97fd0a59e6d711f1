"""The dense step on a CPU: the gradients of autograd, written out.

Five matrix products into arrays that are kept, the loops between them compiled, and d loss / d b_dec through the
encoder as (sum of d hidden_pre) @ W_enc.T, where autograd multiplies two matrices.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from chatsae.sae import kernels_dense, kernels_sums
from chatsae.sae.arrays import Vectors, Weights, losses_of
from chatsae.sae.base import Losses
from chatsae.sae.crew import share
from chatsae.sae.workspace import Array, both, product, space

_MOST = 1024
"""Tokens of a batch that are taken at once: more need memory and gain nothing (docs/log.md)."""


@dataclass
class Gradients:
    """What one batch gives. Arrays are of the work space, good until the next step."""

    losses: Losses
    density: float
    """Share of the pairs that the sparse step would have to look at."""
    W_dec: Array
    """By feature, without its pulls."""
    W_enc: Array
    """By feature."""
    pulls: Array
    """What each decoder row adds of itself to its gradient."""
    vectors: Vectors
    squared: float
    """The squared norm of those of W_dec and W_enc."""


def gradients(weights: Weights, x: Float[Tensor, "N D"], coefficient: float) -> Gradients:
    """The loss of a batch and its gradients. The paper form's decoder rows are normalised first."""
    w, F, n = weights, len(weights.b_enc), len(x)
    if w.unit:
        share(kernels_dense.normalise, F, w.W_dec.size, w.W_dec, w.norms(), np.finfo(w.dtype).tiny)
    batch = _Batch(w, n, coefficient)
    parts = -(-n // _MOST)
    for i in range(parts):
        batch.add(x if parts == 1 else x[n * i // parts : n * (i + 1) // parts])
    return batch.total()


class _Batch:
    """The sums over the parts of a batch."""

    def __init__(self, weights: Weights, n: int, coefficient: float) -> None:
        self.weights, self.n, self.coefficient, self.dtype = weights, n, coefficient, weights.dtype
        self.F, self.l1 = len(weights.b_enc), self.dtype(0 if weights.jump else coefficient / n)
        self.sums = space("dense_sums", (4, self.F), self.dtype)
        self.fired = self.near = np.zeros(self.F, self.dtype)
        self.g_b, self.along, self.acts_sum, self.g_theta = self.sums
        self.sums[:] = 0
        self.g_b_dec = space("dense_g_b_dec", weights.W_dec.shape[1], self.dtype)
        self.g_b_dec[:] = 0
        if weights.jump:
            self.near = np.zeros(self.F, self.dtype)
        self.mse = 0.0
        self.g_dec: tuple[Array, Tensor | None] = (self.g_b_dec, None)
        self.g_enc: tuple[Array, Tensor | None] = self.g_dec

    def add(self, x: Float[Tensor, "n D"]) -> None:
        """The forward and backward pass of a part of the tokens."""
        w, F, (n, d) = self.weights, self.F, x.shape
        xT, inputs = both("dense_x", (d, n), self.dtype), both("dense_in", (d, n), self.dtype, padded=True)
        xT[1].copy_(x.T)
        kernels_dense.subtract(n, xT[0], w.b_dec, w.spec.apply_b_dec_to_input, inputs[0])
        z, z_ = product("dense_z", w.tensors["W_enc"], inputs[1], self.dtype, padded=True)
        acts, acts_ = both("dense_acts", (F, n), self.dtype, padded=True) if w.jump else (z, z_)
        if w.jump:
            args = (n, z, w.b_enc, w.activation().low, w.theta, acts, self.fired, self.near)
            share(kernels_dense.jump, F, F * n, *args)
        else:
            share(kernels_dense.relu, F, F * n, n, z, w.b_enc, self.fired, self.acts_sum)

        d_out, d_out_ = product("dense_out", w.tensors["W_dec"].T, acts_, self.dtype, padded=True)
        squares = space("dense_mse", n, self.dtype)
        share(kernels_dense.errors, n, n * d, xT[0], w.b_dec, self.dtype(2 / self.n), d_out, squares)
        self.mse += kernels_sums.total(squares)
        kernels_dense.row_sums(n, d_out, self.g_b_dec)

        d_pre, d_pre_ = product("dense_d", w.tensors["W_dec"], d_out_, self.dtype, padded=True)
        if w.jump:
            l0 = self.dtype(self.coefficient / self.n)
            args = (n, z, d_pre, w.theta, self.dtype(w.spec.bandwidth), self.dtype(0.5), l0, self.g_b, self.g_theta)
            share(kernels_dense.jump_back, F, F * n, *args)
        else:
            args = (n, acts, d_pre, self.l1, w.norms(), w.weighted, self.along, self.g_b)
            share(kernels_dense.relu_back, F, F * n, *args)
        self.g_dec = product("dense_g_dec", acts_, d_out_.T, self.dtype, add=self.g_dec[1])
        self.g_enc = product("dense_g_enc", d_pre_, inputs[1].T, self.dtype, add=self.g_enc[1])

    def total(self) -> Gradients:
        """What all parts gave together."""
        w, n, F, (g_dec, _), (g_enc, _) = self.weights, self.n, self.F, self.g_dec, self.g_enc
        pulls, penalties, squares = space("dense_of_features", (3, F), self.dtype)
        args = (self.acts_sum, self.along, self.l1, w.norms(), w.weighted, g_dec, g_enc)
        share(kernels_dense.finish, F, 2 * g_dec.size, *args, pulls, penalties, squares)
        if w.spec.apply_b_dec_to_input:
            kernels_dense.through_encoder(w.W_enc, self.g_b, self.g_b_dec)
        vectors = {"b_enc": self.g_b, "b_dec": self.g_b_dec}
        if w.jump:
            vectors[w.threshold_name] = self.g_theta * w.theta if w.unit else self.g_theta
        l0 = kernels_sums.total(self.fired) / n
        penalty = self.coefficient * l0 if w.jump else kernels_sums.total(penalties)
        return Gradients(
            losses=losses_of(self.mse / n, penalty, l0, self.fired),
            density=kernels_sums.total(self.near) / (n * F),
            W_dec=g_dec,
            W_enc=g_enc,
            pulls=pulls,
            vectors=vectors,
            squared=kernels_sums.total(squares),
        )
