"""The dense step on a CPU: the gradients of autograd, written out.

Five matrix products into arrays that are kept, the loops between them compiled, and d loss / d b_dec through the
encoder as (sum of d hidden_pre) @ W_enc.T, where autograd multiplies two matrices.
"""

import math

import numpy as np
import torch

from chatsae.sae import kernels_dense as kernels
from chatsae.sae.arrays import Weights, losses_of
from chatsae.sae.base import Losses
from chatsae.sae.crew import share
from chatsae.sae.workspace import Array, product, space


class DenseBatch:
    """One batch: `losses` at once, then `gradients`. The paper form's decoder rows are normalised first."""

    losses: Losses
    density: float
    """Share of the pairs that the sparse step would have to look at."""

    def __init__(self, weights: Weights, x: Array, sae_in: Array, coefficient: float) -> None:
        self.weights, self.x, self.sae_in, self.coefficient = weights, x, sae_in, coefficient
        self.dtype, w = weights.dtype, weights
        if w.unit:
            share(kernels.normalise, len(w.W_dec), w.W_dec.size, w.W_dec, np.finfo(self.dtype).tiny)
        self._forward()

    def _forward(self) -> None:
        w, (n, d), F = self.weights, self.x.shape, len(self.weights.b_enc)
        self.z = self._product("dense_z", w.W_enc, self.sae_in.T)
        fired, sums = np.empty(F, self.dtype), np.zeros(F, self.dtype)
        if w.jump:
            self.acts, near = space("dense_acts", self.z.shape, self.dtype), np.empty(F, self.dtype)
            args = (self.z, w.b_enc, w.activation().low, w.theta, self.acts, fired, near)
            share(kernels.jump, F, self.z.size, *args)
        else:
            self.acts, near = self.z, fired
            share(kernels.relu, F, self.z.size, self.z, w.b_enc, fired, sums)
        self.d_out, mse = self._product("dense_out", self.acts.T, w.W_dec), np.empty(n, self.dtype)
        share(kernels.errors, n, n * d, self.x, w.b_dec, self.dtype(2 / n), self.d_out, mse)

        l0 = float(fired.sum(dtype=np.float64)) / n
        self.density = float(near.sum(dtype=np.float64)) / (n * F)
        l1, self.pulls = self.dtype(self.coefficient / n), np.zeros(F, self.dtype)
        self.penalties = np.full(F, l1)
        if w.weighted:  # d (a ‖w‖) = a w / ‖w‖
            norms = np.empty(F, self.dtype)
            share(kernels.norms, F, F * d, w.W_dec, norms)
            np.divide(sums * l1, norms, out=self.pulls, where=norms > 0)
            self.penalties *= norms
        l1_penalty = float(np.sum(sums * self.penalties, dtype=np.float64))
        mean = float(mse.mean(dtype=np.float64))
        self.losses = losses_of(mean, self.coefficient * l0 if w.jump else l1_penalty, l0, fired)

    def gradients(self) -> tuple[dict[str, Array], float]:
        """Those of all parameters, as rows by feature, and their norm."""
        w, F, (n, d) = self.weights, len(self.weights.b_enc), self.x.shape
        d_pre = self._product("dense_d", w.W_dec, self.d_out.T)
        g_b, small = np.empty(F, self.dtype), {}
        if w.jump:
            bandwidth, l0, grad = self.dtype(w.spec.bandwidth), self.dtype(self.coefficient / n), np.empty_like(g_b)
            args = (self.z, d_pre, w.theta, bandwidth, self.dtype(0.5), l0, g_b, grad)
            share(kernels.jump_back, F, d_pre.size, *args)
            small[w.threshold_name] = grad * w.theta if w.unit else grad
        else:
            share(kernels.relu_back, F, d_pre.size, self.acts, d_pre, self.penalties, g_b)
        small |= {"b_enc": g_b, "b_dec": self.d_out.sum(0)}
        if w.spec.apply_b_dec_to_input:
            small["b_dec"] -= torch.mv(torch.from_numpy(w.W_enc).T, torch.from_numpy(g_b)).numpy()
        grads = {
            "W_dec": self._product("dense_g_dec", self.acts, self.d_out),
            "W_enc": self._product("dense_g_enc", d_pre, self.sae_in),
        }
        squared, zeros = sum(float(np.vdot(g, g)) for g in small.values()), np.zeros(F, self.dtype)
        for name, pulls in (("W_dec", self.pulls), ("W_enc", zeros)):
            squares = np.empty(F, self.dtype)
            share(kernels.pull_and_square, F, F * d, grads[name], w.W_dec, pulls, squares)
            squared += float(squares.sum(dtype=np.float64))
        return grads | {name: grad[None] for name, grad in small.items()}, math.sqrt(squared)

    def _product(self, name: str, a: Array, b: Array) -> Array:
        return product(name, torch.from_numpy(a), torch.from_numpy(b), self.dtype)
