"""The dense step on a CPU: the gradients of autograd, written out.

Five matrix products into arrays that are kept, the loops between them compiled, and d loss / d b_dec through the
encoder as (sum of d hidden_pre) @ W_enc.T, where autograd multiplies two matrices.
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from chatsae.sae import kernels_dense, kernels_sums
from chatsae.sae.arrays import Vectors, Weights, losses_of
from chatsae.sae.base import Losses
from chatsae.sae.crew import share
from chatsae.sae.workspace import Array, both, product, space


class DenseBatch:
    """One batch: `losses` at once, then `gradients`. The paper form's decoder rows are normalised first."""

    losses: Losses
    density: float
    """Share of the pairs that the sparse step would have to look at."""
    pulls: Array
    """What each decoder row adds of itself to its gradient."""

    def __init__(self, weights: Weights, x: Float[Tensor, "N D"], coefficient: float) -> None:
        self.weights, self.coefficient, (self.n, d) = weights, coefficient, x.shape
        self.dtype, w = weights.dtype, weights
        if w.unit:
            share(kernels_dense.normalise, len(w.W_dec), w.W_dec.size, w.W_dec, w.norms(), np.finfo(self.dtype).tiny)
        self.x, self.inputs = space("dense_x", (d, self.n), self.dtype), both("dense_in", (d, self.n), self.dtype)
        kernels_dense.turn(x.contiguous().numpy(), w.b_dec, w.spec.apply_b_dec_to_input, self.x, self.inputs[0])
        self._forward()

    def _forward(self) -> None:
        w, n, F, d = self.weights, self.n, len(self.weights.b_enc), len(self.x)
        self.z, z = product("dense_z", w.tensors["W_enc"], self.inputs[1], self.dtype)
        fired = near = np.empty(F, self.dtype)
        self.penalties, self.pulls, self.crosses, self.more = space("dense_features", (4, F), self.dtype)
        if w.jump:
            self.acts, near = both("dense_acts", self.z.shape, self.dtype), np.empty(F, self.dtype)
            args = (self.z, w.b_enc, w.activation().low, w.theta, self.acts[0], fired, near)
            share(kernels_dense.jump, F, self.z.size, *args)
            self.penalties[:] = self.pulls[:] = self.crosses[:] = 0
        else:
            self.acts, l1 = (self.z, z), self.dtype(self.coefficient / n)
            out = (fired, self.penalties, self.pulls, self.crosses, self.more)
            share(kernels_dense.relu, F, self.z.size, self.z, w.b_enc, w.norms(), w.weighted, l1, *out)
        self.d_out = product("dense_out", w.tensors["W_dec"].T, self.acts[1], self.dtype)
        mse = space("dense_mse", n, self.dtype)
        share(kernels_dense.errors, n, n * d, self.x, w.b_dec, self.dtype(2 / n), self.d_out[0], mse)

        l0 = kernels_sums.total(fired) / n
        self.density = kernels_sums.total(near) / (n * F)
        penalty = self.coefficient * l0 if w.jump else kernels_sums.total(self.penalties)
        self.losses = losses_of(kernels_sums.total(mse) / n, penalty, l0, fired)

    def gradients(self) -> tuple[Array, Array, Vectors, float]:
        """Those of W_dec (without its pulls) and W_enc, by feature, of all vectors, and the squared norm of all."""
        w, F, n = self.weights, len(self.weights.b_enc), self.n
        d_pre, d_pre_t = product("dense_d", w.tensors["W_dec"], self.d_out[1], self.dtype)
        g_b, vectors = space("dense_g_b", F, self.dtype), {}
        if w.jump:
            grad, l0 = space("dense_g_theta", F, self.dtype), self.dtype(self.coefficient / n)
            args = (self.z, d_pre, w.theta, self.dtype(w.spec.bandwidth), self.dtype(0.5), l0, g_b, grad)
            share(kernels_dense.jump_back, F, d_pre.size, *args)
            vectors[w.threshold_name] = grad * w.theta if w.unit else grad
        else:
            args = (self.acts[0], d_pre, self.more, self.pulls, self.crosses, g_b)
            share(kernels_dense.relu_back, F, d_pre.size, *args)
        vectors |= {"b_enc": g_b, "b_dec": space("dense_g_b_dec", len(self.x), self.dtype)}
        kernels_dense.row_sums(self.d_out[0], vectors["b_dec"])
        if w.spec.apply_b_dec_to_input:
            kernels_dense.through_encoder(w.W_enc, g_b, vectors["b_dec"])
        squares = space("dense_squares", F, self.dtype)
        g_dec, _ = product("dense_g_dec", self.acts[1], self.d_out[1].T, self.dtype)
        share(kernels_dense.squares, F, g_dec.size, g_dec, self.crosses, squares)
        g_enc, _ = product("dense_g_enc", d_pre_t, self.inputs[1].T, self.dtype)
        share(kernels_dense.squares, F, g_enc.size, g_enc, squares, squares)
        return g_dec, g_enc, vectors, kernels_sums.total(squares)
