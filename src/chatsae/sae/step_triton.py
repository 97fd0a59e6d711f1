"""The training step on a GPU: the numbers of `chatsae.sae.step` in another order of summation, in Triton kernels.

Three routes to the same step. dense: matrix products. stored: after the dense encoder only the active pairs, by
feature, gradients written once. folded: as stored, but the norm for clipping comes from the Gram identity
‖AᵀG‖² = Σ (AAᵀ ∘ GGᵀ), so that gradients need not be kept and Adam runs where they arise; for small batches, where the
optimizer's traffic is the step. Nothing here waits for the device or branches on what it holds: what changes per step
goes there in one small copy, and a list of pairs that overflows is noticed by the kernels themselves.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from chatsae.config import Precision
from chatsae.sae import triton_kernels as kernels
from chatsae.sae import triton_update as update
from chatsae.sae.base import SAE, Losses
from chatsae.sae.cuda import Capture, Graphs, Outputs, half_product, tf32
from chatsae.sae.jumprelu import JumpReLUSAE

Route = Literal["dense", "stored", "folded"]

CROSSOVER = 0.03
"""Share of pairs from which the dense route is taken, and for which the lists have room. From arithmetic (float32
products at 60 TFLOP/s against gathers at 30 % of the L2 speed of an H200); not measured."""
FOLD_UP_TO = 256
"""Tokens per batch up to which the Gram matrices cost less than storing gradients. From arithmetic; not measured."""


@dataclass(frozen=True)
class Tiles:
    """Block sizes of the kernels, powers of two."""

    elements: int = 2048
    """Of weights per program; a program takes whole rows, at least one."""
    tokens: int = 1
    """Per program of the decoder."""
    strip: int = 512
    """Columns per program of the decoder."""
    n: int = 32
    """Tokens of a block of activations."""
    f: int = 64
    """Features of a block of activations."""


class GpuStep:
    """The step of one SAE.

    W_enc and its moments are laid out by feature while it is used: shape [d_in, d_sae] as ever, strides (1, d_in).

    Args:
        sae: on a GPU; or on a CPU where triton interprets its kernels (TRITON_INTERPRET=1).
        optimizer: its state is that of every other step.
        precision: of the encoder's product; gradients are taken as if it were exact.
        tiles: block sizes.
        capture: makes a CUDA graph of a function; None: no graphs.
    """

    def __init__(
        self,
        sae: SAE,
        optimizer: torch.optim.Adam,
        *,
        precision: Precision = "float32",
        tiles: Tiles | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.sae, self.optimizer, self.precision, self.tiles = sae, optimizer, precision, tiles or Tiles()
        self.jump, self.unit = isinstance(sae, JumpReLUSAE), sae.spec.form == "paper"
        self.weighted = not self.jump and not self.unit
        like = sae.b_enc.detach()
        self.numbers = torch.zeros(kernels.NUMBERS, dtype=torch.float64, device=like.device)
        self.scalars = torch.zeros(kernels.SCALARS, dtype=torch.float64, device=like.device)
        self.norms = torch.ones_like(like)
        self.zeros = torch.zeros_like(like)
        self.half = torch.empty(like.shape[0] if precision == "bf16" else 0, sae.spec.d_in, dtype=torch.bfloat16)
        self.half = self.half.to(like.device)
        self._seen: tuple[tuple[Tensor, int], ...] = ()
        self._graphs = Graphs(capture)

    @torch.no_grad()
    def __call__(
        self,
        route: Route,
        k: int,
        x: Float[Tensor, "N D"],
        *,
        lr: float,
        sparsity_scale: float,
        clip_grad_norm: float,
    ) -> Losses:
        """Step number `k`, counted from 1. A loss that is not finite changes nothing, then or in any later step, and
        all losses are NaN from then on.
        """
        self._prepare()
        self._upload(k, len(x), lr, self.sae.spec.coefficient * sparsity_scale, clip_grad_norm)
        tensors = [t for p in self.sae.parameters() for t in (p, *self.optimizer.state[p].values())]
        pointers = tuple(t.data_ptr() for t in tensors)
        losses, firings = self._graphs(pointers, route, x.contiguous(), lambda y: _Batch(self, y).step(route))
        total, mse, sparsity, l0 = losses.unbind()
        return Losses(total, mse, sparsity, l0, firings)

    def reset(self) -> None:
        """Forget that a loss was not finite: other weights have been loaded."""
        self.scalars.zero_()

    def _prepare(self) -> None:
        """Rows by feature, moments as torch makes them, and what is kept beside the weights, if someone moved them."""
        for p in self.sae.parameters():
            if not self.optimizer.state[p]:
                self.optimizer.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p, memory_format=torch.preserve_format),
                    exp_avg_sq=torch.zeros_like(p, memory_format=torch.preserve_format),
                )
        W_enc, W_dec = self.sae.W_enc, self.sae.W_dec
        state = self.optimizer.state[W_enc]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].T.contiguous().T
        if not W_enc.T.is_contiguous():
            W_enc.data = W_enc.data.T.contiguous().T
        seen = tuple((p.detach(), p._version) for p in (W_dec, W_enc))  # held, so that no other weights lie there
        same = [(t.data_ptr(), k) for t, k in seen] == [(t.data_ptr(), k) for t, k in self._seen]
        if not same:  # the kernels of a step keep both up to date, and do not count as versions
            if self.unit or self.weighted:
                self.by_rows(kernels.row_norms, W_dec.detach(), self.norms)
            if self.precision == "bf16":
                self.half.copy_(W_enc.detach().T)
            self._seen = seen

    def _upload(self, k: int, n: int, lr: float, coefficient: float, clip_grad_norm: float) -> None:
        (group,) = self.optimizer.param_groups
        group["lr"] = lr
        (beta1, beta2), eps = group["betas"], group["eps"]
        values = [
            2 / n,
            coefficient / n,
            coefficient,
            lr / (1 - beta1**k),
            (1 - beta2**k) ** -0.5,
            beta1,
            beta2,
            eps,
            clip_grad_norm,
            self.sae.spec.bandwidth,
            torch.finfo(self.norms.dtype).tiny,
        ]
        pinned = self.numbers.is_cuda  # its allocator keeps the memory until the copy is done
        self.numbers.copy_(torch.tensor(values, dtype=torch.float64, pin_memory=pinned), non_blocking=True)

    def theta(self) -> Float[Tensor, " F"]:
        """What a pre-activation must exceed; puts a threshold that is a parameter at 0 or above."""
        if not isinstance(self.sae, JumpReLUSAE):
            return self.zeros
        if not self.unit:
            return self.sae.raw_threshold.detach().clamp_min_(0)
        return self.sae.log_threshold.detach().exp()

    def encode(self, sae_in: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        W_enc, b_enc = self.sae.W_enc.detach(), self.sae.b_enc.detach()
        if self.precision == "bf16":
            return half_product(sae_in, self.half).add_(b_enc)
        with tf32(self.precision == "tf32"):
            return torch.addmm(b_enc, sae_in, W_enc)

    def adam_tensors(self, name: str) -> list[Tensor]:
        """A parameter, its moments and its step, rows by feature."""
        p = getattr(self.sae, name)
        state = self.optimizer.state[p]
        tensors = [t.detach() for t in (p, state["exp_avg"], state["exp_avg_sq"])]
        return [*(t.T if name == "W_enc" else t for t in tensors), state["step"]]

    def by_rows(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """A kernel over all features, each a whole row."""
        F, D = self.sae.W_dec.shape
        columns = triton.next_power_of_2(D)
        rows = max(1, self.tiles.elements // columns)
        warps = 4 if rows * columns <= 2048 else 8 if rows * columns <= 4096 else 16
        kernel[(math.ceil(F / rows),)](*args, F, D, **constants, R=rows, BD=columns, num_warps=warps)


class _Batch:
    """One step on one batch: launches only. A graph repeats them, so no host value here may change between steps."""

    def __init__(self, gpu: GpuStep, x: Float[Tensor, "N D"]) -> None:
        self.gpu, self.sae, self.x = gpu, gpu.sae, x
        (self.N, self.D), self.F = x.shape, gpu.sae.spec.d_sae
        self.sae_in = x - self.sae.b_dec if self.sae.spec.apply_b_dec_to_input else x
        self.theta = gpu.theta()
        self.z = gpu.encode(self.sae_in)
        self.W_dec, self.b_dec = self.sae.W_dec.detach(), self.sae.b_dec.detach()
        self.firings, self.g_b, self.g_theta, self.reg = (torch.empty_like(self.theta) for _ in range(4))
        self.strip = min(gpu.tiles.strip, triton.next_power_of_2(self.D))
        self.strips = math.ceil(self.D / self.strip)
        self.errors = x.new_empty(self.N * self.strips)
        self.squares = x.new_zeros(4 * self.F + self.D + 2)
        self.capacity = math.ceil(CROSSOVER * self.N * self.F)
        self.flags = {"UNIT": gpu.unit, "WEIGHTED": gpu.weighted, "JUMP": gpu.jump}
        self.keeps = {"NORMS": gpu.unit or gpu.weighted, "HALF": gpu.precision == "bf16"}

    def step(self, route: Route) -> Outputs:
        if route == "dense":
            g_dec, g_enc = self._dense()
            self._small_gradients()
            losses = self._finish()
            self._update_rows(g_dec, g_enc, None)
        else:
            self._list()
            self._decode()
            fold = route == "folded"
            g_dec, g_enc, d_acts = self._sparse(fold)
            self._small_gradients()
            losses = self._finish()
            if fold:
                self._update_features(d_acts)
            else:
                self._update_rows(g_dec, g_enc, self.listed)
        self._update_vectors()
        return losses, self.firings

    def _dense(self) -> tuple[Float[Tensor, "F D"], Float[Tensor, "F D"]]:
        tiles, numbers = self.gpu.tiles, self.gpu.numbers
        acts = torch.empty_like(self.z)
        self._activate(acts, self.gpu.unit)
        self.d_out = torch.addmm(self.b_dec, acts, self.W_dec)
        rows = max(1, tiles.elements // self.strip)
        grid = (math.ceil(self.N / rows), self.strips)
        kernels.residual[grid](self.x, self.d_out, numbers, self.errors, self.N, self.D, R=rows, BD=self.strip)
        d_acts = self.d_out @ self.W_dec.T
        args = (acts, d_acts, self.firings, self.g_b, self.g_theta, self.reg, self.squares, self.N, self.F)
        self._by_features(kernels.through_activation, self.gpu.norms, numbers, *args, **self.flags)
        g_dec, g_enc = acts.T @ self.d_out, d_acts.T @ self.sae_in
        by_rows, squares = self.gpu.by_rows, self.squares
        by_rows(kernels.row_squares, g_dec, self.W_dec, self.g_theta, squares, PULL=self.gpu.weighted)
        by_rows(kernels.row_squares, g_enc, self.W_dec, self.g_theta, squares[self.F :], PULL=False)
        return g_dec, g_enc

    def _list(self) -> None:
        """Active pairs by feature and by token."""
        z, theta, numbers, tiles = self.z, self.theta, self.gpu.numbers, self.gpu.tiles
        sizes, blocks = (self.N, self.F), {"BN": tiles.n, "BF": tiles.f}
        self.listed, self.active_on = (z.new_empty(n, dtype=torch.int32) for n in (self.F, self.N))
        self.tokens, self.features = (z.new_empty(self.capacity, dtype=torch.int32) for _ in range(2))
        jump = self.gpu.jump
        self._by_features(kernels.count_features, numbers, self.firings, self.listed, *sizes, JUMP=jump)
        self.token_ends = self.listed.cumsum(0)
        args = (numbers, self.token_ends, self.listed, self.tokens, *sizes, self.capacity)
        self._by_features(kernels.list_tokens, *args, JUMP=jump)
        grid = (math.ceil(self.N / tiles.n),)
        kernels.count_tokens[grid](z, theta, self.active_on, *sizes, **blocks)
        self.feature_ends = self.active_on.cumsum(0)
        args = (self.feature_ends, self.active_on, self.features, *sizes, self.capacity)
        kernels.list_features[grid](z, theta, *args, **blocks)

    def _decode(self) -> None:
        self.d_out = torch.empty_like(self.x)
        lists = (self.feature_ends, self.active_on, self.features)
        args = (self.gpu.norms, self.b_dec, self.gpu.numbers, *lists, self.d_out, self.errors)
        rows = self.gpu.tiles.tokens
        kernels.decode[(math.ceil(self.N / rows), self.strips)](
            self.x, self.z, self.theta, self.W_dec, *args, self.N, self.F, self.D, self.capacity,
            UNIT=self.gpu.unit, R=rows, BD=self.strip,
        )  # fmt: skip

    def _sparse(self, fold: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of W_dec and W_enc, rows that are listed only; folded: d loss / d hidden_pre instead."""
        g_dec, g_enc = (torch.empty_like(self.W_dec if not fold else self.theta) for _ in range(2))
        d_acts = torch.zeros_like(self.z) if fold else self.z
        lists = (self.token_ends, self.listed, self.tokens)
        outputs = (g_dec, g_enc, self.g_b, self.g_theta, self.reg, self.squares, d_acts)
        inputs = (self.z, self.theta, self.W_dec, self.gpu.norms, self.d_out, self.sae_in, self.gpu.numbers)
        self._rows_of_pairs(kernels.feature_gradients, *inputs, *lists, *outputs, **self.flags, FOLD=fold)
        if fold:
            acts = torch.empty_like(self.z)
            self._activate(acts, False)
            for place, a, b in ((-2, acts, self.d_out), (-1, d_acts, self.sae_in)):
                torch.dot((a @ a.T).view(-1), (b @ b.T).view(-1), out=self.squares[place])
            self.squares[-2:].clamp_min_(0)  # rounding may leave less; NaN stays
        return g_dec, g_enc, d_acts

    def _small_gradients(self) -> None:
        g = self.d_out.sum(0)
        if self.sae.spec.apply_b_dec_to_input:  # (sum over tokens of d hidden_pre) @ W_enc.T, not a product per token
            g = torch.addmv(g, self.sae.W_enc.detach(), self.g_b, alpha=-1)
        torch.mul(g, g, out=self.squares[4 * self.F : 4 * self.F + self.D])
        self.g_b_dec = g

    def _finish(self) -> Float[Tensor, "4"]:
        losses = self.x.new_empty(4)
        most = max(self.squares.numel(), self.errors.numel())
        count = min(update.MOST_PARTS, 2 ** math.ceil(math.log2(most / 1024)) if most > 1024 else 1)
        parts = self.gpu.numbers.new_empty(4 * count)
        sizes = (self.squares, self.squares.numel(), self.errors, self.errors.numel())
        jump, numbers, scalars = self.gpu.jump, self.gpu.numbers, self.gpu.scalars
        update.totals[(count,)](*sizes, self.reg, self.firings, self.F, parts, JUMP=jump, PARTS=count, BLOCK=1024)
        update.finish[(1,)](parts, numbers, scalars, losses, self.N, JUMP=jump, PARTS=count)
        return losses

    def _update_rows(
        self, g_dec: Float[Tensor, "F D"], g_enc: Float[Tensor, "F D"], listed: Int[Tensor, " F"] | None
    ) -> None:
        gpu = self.gpu
        has = self.firings if listed is None else listed
        tail = (has, gpu.norms, gpu.half.view(torch.int16), gpu.numbers, gpu.scalars)
        sparse = {"SPARSE": listed is not None}
        norms, half = self.keeps["NORMS"], self.keeps["HALF"]
        dec = {"UNIT": gpu.unit, "NORMS": norms, "HALF": False}
        enc = {"UNIT": False, "NORMS": False, "HALF": half}
        gpu.by_rows(update.update_rows, *gpu.adam_tensors("W_dec"), g_dec, *tail, **sparse, **dec)
        gpu.by_rows(update.update_rows, *gpu.adam_tensors("W_enc"), g_enc, *tail, **sparse, **enc)

    def _update_features(self, d_acts: Float[Tensor, "N F"]) -> None:
        gpu = self.gpu
        lists = (self.token_ends, self.listed, self.tokens)
        tail = (*lists, gpu.norms, gpu.half.view(torch.int16), gpu.numbers, gpu.scalars)
        inputs = (self.z, self.theta, self.d_out, self.sae_in, d_acts, self.g_theta)
        flags = {"UNIT": gpu.unit, "WEIGHTED": gpu.weighted, **self.keeps}
        both = (*gpu.adam_tensors("W_dec"), *gpu.adam_tensors("W_enc"))
        self._rows_of_pairs(update.update_features, *both, *inputs, *tail, **flags)

    def _update_vectors(self) -> None:
        gpu, grads = self.gpu, {"b_enc": self.g_b, "b_dec": self.g_b_dec}
        if gpu.jump:
            grads["log_threshold" if gpu.unit else "raw_threshold"] = self.g_theta
        for name, g in grads.items():
            n = g.numel()
            args = (*gpu.adam_tensors(name), g, gpu.numbers, gpu.scalars, n)
            update.update_vector[(math.ceil(n / 1024),)](*args, BLOCK=1024)

    def _activate(self, acts: Float[Tensor, "N F"], unit: bool) -> None:
        tiles = self.gpu.tiles
        grid = (math.ceil(self.N / tiles.n), math.ceil(self.F / tiles.f))
        args = (self.z, self.theta, self.gpu.norms, self.gpu.numbers, acts, self.N, self.F)
        kernels.activate[grid](*args, UNIT=unit, BN=tiles.n, BF=tiles.f)

    def _by_features(self, kernel: Any, *args: Any, **constants: Any) -> None:
        tiles = self.gpu.tiles
        grid = (math.ceil(self.F / tiles.f),)
        kernel[grid](self.z, self.theta, *args, **constants, BN=tiles.n, BF=tiles.f)

    def _rows_of_pairs(self, kernel: Any, *args: Any, **constants: Any) -> None:
        columns = triton.next_power_of_2(self.D)
        rows = max(1, self.gpu.tiles.elements // columns)
        warps = 4 if rows * columns <= 2048 else 8 if rows * columns <= 4096 else 16
        sizes = (self.N, self.F, self.D, self.capacity)
        kernel[(math.ceil(self.F / rows),)](*args, *sizes, **constants, R=rows, BD=columns, num_warps=warps)
