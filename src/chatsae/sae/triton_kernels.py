"""The Triton kernels of the GPU training step. Importing this module imports triton; nothing does so unless needed.

Letters: N tokens, F d_sae, D d_in. W_enc comes transposed, [F, D]: a feature is a row. A pair (token, feature) is
listed when the feature is active or, for JumpReLU, within the bandwidth of its threshold. Lists of pairs have a fixed
capacity; when more pairs are listed than fit, the kernels that walk the lists walk all tokens (or features) instead, so
that the result is right whatever the density, and nobody has to tell the host. Every sum is over a fixed order: no
floating-point atomics, the same bits every time. What changes from step to step comes in `numbers`, on the device.

Block sizes: R rows of BD >= D columns; BN tokens by BF features. Block sizes and capitals of truth values are
compile-time constants.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Places in `numbers` (float64, written by the host).
TWO_N = tl.constexpr(0)  # 2 / N
PENALTY_N = tl.constexpr(1)  # coefficient over N
PENALTY = tl.constexpr(2)  # coefficient
STEP_SIZE = tl.constexpr(3)  # lr / (1 - beta1^k)
ROOT2 = tl.constexpr(4)  # (1 - beta2^k)^-1/2
BETA1 = tl.constexpr(5)
BETA2 = tl.constexpr(6)
EPS = tl.constexpr(7)
MAX_NORM = tl.constexpr(8)
BANDWIDTH = tl.constexpr(9)
TINY = tl.constexpr(10)
NUMBERS = 11

# Places in `scalars` (float64, written by `finish`).
CLIP = tl.constexpr(0)
GATE = tl.constexpr(1)  # 1, or 0 when nothing may be changed
POISON = tl.constexpr(2)  # 1 from the first step on whose loss or gradient is not finite
SCALARS = 3


def _jit(function: Callable[..., Any]) -> Any:
    return triton.jit(inspect.unwrap(function))  # the tests wrap every function of this package


@_jit
def row_norms(W, norms, F, D, R: tl.constexpr, BD: tl.constexpr):
    f = tl.program_id(0) * R + tl.arange(0, R)
    j = tl.arange(0, BD)
    w = tl.load(W + f.to(tl.int64)[:, None] * D + j[None, :], mask=(f < F)[:, None] & (j < D)[None, :], other=0.0)
    tl.store(norms + f, tl.sqrt(tl.sum(w * w, 1)), mask=f < F)


@_jit
def count_features(z, theta, numbers, firings, listed, N, F, JUMP: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr):
    """Tokens on which each feature is active, and pairs that each feature lists. NaN counts as active."""
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    inside = f < F
    th = tl.load(theta + f, mask=inside, other=0.0)[None, :]
    bandwidth = tl.load(numbers + BANDWIDTH).to(theta.dtype.element_ty)
    fired = tl.zeros([BF], dtype=tl.int32)
    pairs = tl.zeros([BF], dtype=tl.int32)
    for t0 in range(0, N, BN):
        t = t0 + tl.arange(0, BN)
        here = (t < N)[:, None] & inside[None, :]
        v = tl.load(z + t.to(tl.int64)[:, None] * F + f[None, :], mask=here, other=0.0)
        active = ((v > th) | (v != v)) & here
        fired += tl.sum(active.to(tl.int32), 0)
        if JUMP:
            near = (tl.abs((v - th) / bandwidth) < 0.5) & here
            pairs += tl.sum((active | near).to(tl.int32), 0)
    tl.store(firings + f, fired.to(firings.dtype.element_ty), mask=inside)
    tl.store(listed + f, pairs if JUMP else fired, mask=inside)


@_jit
def list_tokens(
    z, theta, numbers, ends, listed, tokens, N, F, capacity, JUMP: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr
):
    """The tokens of each feature's pairs, in order, from ends[f] - listed[f] to ends[f]; what does not fit is left."""
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    inside = f < F
    th = tl.load(theta + f, mask=inside, other=0.0)[None, :]
    bandwidth = tl.load(numbers + BANDWIDTH).to(theta.dtype.element_ty)
    place = tl.load(ends + f, mask=inside, other=0) - tl.load(listed + f, mask=inside, other=0)
    for t0 in range(0, N, BN):
        t = t0 + tl.arange(0, BN)
        here = (t < N)[:, None] & inside[None, :]
        v = tl.load(z + t.to(tl.int64)[:, None] * F + f[None, :], mask=here, other=0.0)
        keep = (v > th) | (v != v)
        if JUMP:
            keep = keep | (tl.abs((v - th) / bandwidth) < 0.5)
        keep = keep & here
        ones = keep.to(tl.int32)
        at = place[None, :] + tl.cumsum(ones, 0) - 1
        tl.store(tokens + at, t[:, None] + tl.zeros_like(ones), mask=keep & (at < capacity))
        place += tl.sum(ones, 0)


@_jit
def count_tokens(z, theta, active_on, N, F, BN: tl.constexpr, BF: tl.constexpr):
    """Features that are active on each token."""
    t = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], dtype=tl.int32)
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        here = (t < N)[:, None] & (f < F)[None, :]
        v = tl.load(z + t.to(tl.int64)[:, None] * F + f[None, :], mask=here, other=0.0)
        th = tl.load(theta + f, mask=f < F, other=0.0)[None, :]
        total += tl.sum((((v > th) | (v != v)) & here).to(tl.int32), 1)
    tl.store(active_on + t, total, mask=t < N)


@_jit
def list_features(z, theta, ends, active_on, features, N, F, capacity, BN: tl.constexpr, BF: tl.constexpr):
    """The features that are active on each token, in order; what does not fit is left."""
    t = tl.program_id(0) * BN + tl.arange(0, BN)
    place = tl.load(ends + t, mask=t < N, other=0) - tl.load(active_on + t, mask=t < N, other=0)
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        here = (t < N)[:, None] & (f < F)[None, :]
        v = tl.load(z + t.to(tl.int64)[:, None] * F + f[None, :], mask=here, other=0.0)
        th = tl.load(theta + f, mask=f < F, other=0.0)[None, :]
        keep = ((v > th) | (v != v)) & here
        ones = keep.to(tl.int32)
        at = place[:, None] + tl.cumsum(ones, 1) - 1
        tl.store(features + at, f[None, :] + tl.zeros_like(ones), mask=keep & (at < capacity))
        place += tl.sum(ones, 1)


@_jit
def decode(
    x, z, theta, W, norms, b_dec, numbers, ends, active_on, features, d_out, squares,
    N, F, D, capacity, UNIT: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """d_out = d loss / d sae_out [N, D], and the squared error of each token in each strip of BD columns."""
    t = tl.program_id(0) * R + tl.arange(0, R)
    j = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (t < N)[:, None] & (j < D)[None, :]
    fit = tl.load(ends + N - 1) <= capacity
    count = tl.load(active_on + t, mask=t < N, other=0)
    begin = tl.load(ends + t, mask=t < N, other=0) - count
    steps = tl.where(t < N, tl.where(fit, count, F), 0)
    tiny = tl.load(numbers + TINY).to(x.dtype.element_ty)
    at = t.to(tl.int64)[:, None] * D + j[None, :]
    e = tl.load(b_dec + j, mask=j < D, other=0.0)[None, :] - tl.load(x + at, mask=inside, other=0.0)
    e = tl.where(inside, e, 0.0)
    for k in range(0, tl.max(steps, 0)):
        here = k < steps
        f = tl.load(features + begin + k, mask=here & fit, other=k).to(tl.int64)
        v = tl.load(z + t.to(tl.int64) * F + f, mask=here, other=0.0)
        th = tl.load(theta + f, mask=here, other=0.0)
        a = tl.where(((v > th) | (v != v)) & here, v, 0.0)
        if UNIT:
            a = a / tl.maximum(tl.load(norms + f, mask=here, other=1.0), tiny)
        e += a[:, None] * tl.load(W + f[:, None] * D + j[None, :], mask=here[:, None] & (j < D)[None, :], other=0.0)
    tl.store(squares + t * tl.num_programs(1) + tl.program_id(1), tl.sum(e * e, 1), mask=t < N)
    tl.store(d_out + at, e * tl.load(numbers + TWO_N).to(x.dtype.element_ty), mask=inside)


@_jit
def _store_sums(
    f, inside, F, th, norm, l1, sum_a, sum_b, sum_theta, g_b, g_theta, reg, squares,
    UNIT: tl.constexpr, WEIGHTED: tl.constexpr, JUMP: tl.constexpr,
):  # fmt: skip
    """Gradients of b_enc and of the threshold, their squares, and the penalty of each feature.

    Returns what a row of W_dec is pulled by: d (sum of acts) ‖w‖ = (sum of acts) w / ‖w‖, kept in place of the
    threshold's gradient.
    """
    pull = tl.where((norm > 0) & (sum_a != 0), sum_a * l1 / norm, 0.0)
    tl.store(g_b + f, sum_b, mask=inside)
    tl.store(squares + 2 * F + f, sum_b * sum_b, mask=inside)
    if JUMP:
        grad = sum_theta
        if UNIT:
            grad = grad * th  # the parameter is log theta
        tl.store(g_theta + f, grad, mask=inside)
        tl.store(squares + 3 * F + f, grad * grad, mask=inside)
    elif WEIGHTED:
        tl.store(reg + f, sum_a * norm, mask=inside)
        tl.store(g_theta + f, pull, mask=inside)
    else:
        tl.store(reg + f, sum_a, mask=inside)
    return pull


@_jit
def feature_gradients(
    z, theta, W, norms, d_out, sae_in, numbers, ends, listed, tokens,
    g_dec, g_enc, g_b, g_theta, reg, squares, d_acts, N, F, D, capacity,
    UNIT: tl.constexpr, WEIGHTED: tl.constexpr, JUMP: tl.constexpr, FOLD: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All gradients of a feature in one visit of its pairs, and their squares in five runs of F.

    FOLD: the rows of W_dec and W_enc are left to `update_features`; instead d loss / d hidden_pre goes to `d_acts`
    [N, F], zero elsewhere, and the first F squares hold what the pull of the penalty adds to the Gram identity.
    """
    f = tl.program_id(0) * R + tl.arange(0, R)
    j = tl.arange(0, BD)
    inside, columns = f < F, (j < D)[None, :]
    fit = tl.load(ends + F - 1) <= capacity
    count = tl.load(listed + f, mask=inside, other=0)
    begin = tl.load(ends + f, mask=inside, other=0) - count
    steps = tl.where(inside, tl.where(fit, count, N), 0)
    most = tl.max(steps, 0)
    row = f.to(tl.int64)[:, None] * D + j[None, :]
    touched = (steps > 0)[:, None] & columns
    w = tl.load(W + row, mask=touched, other=0.0)
    th = tl.load(theta + f, mask=inside, other=0.0)
    norm = tl.load(norms + f, mask=inside, other=1.0)
    scale = 1.0 / tl.maximum(norm, tl.load(numbers + TINY).to(norm.dtype))
    bandwidth = tl.load(numbers + BANDWIDTH).to(norm.dtype)
    l1 = tl.load(numbers + PENALTY_N).to(norm.dtype)
    sum_a = tl.zeros([R], dtype=W.dtype.element_ty)
    sum_aq = tl.zeros([R], dtype=W.dtype.element_ty)
    sum_b = tl.zeros([R], dtype=W.dtype.element_ty)
    sum_theta = tl.zeros([R], dtype=W.dtype.element_ty)
    rows_dec = tl.zeros([R, BD], dtype=W.dtype.element_ty)
    rows_enc = tl.zeros([R, BD], dtype=W.dtype.element_ty)
    for k in range(0, most):
        here = k < steps
        t = tl.load(tokens + begin + k, mask=here & fit, other=k).to(tl.int64)
        v = tl.load(z + t * F + f, mask=here, other=0.0)
        active = ((v > th) | (v != v)) & here
        a = tl.where(active, v, 0.0)
        pair = t[:, None] * D + j[None, :]
        e = tl.load(d_out + pair, mask=here[:, None] & columns, other=0.0)
        q = tl.sum(e * w, 1)
        if UNIT:
            q = q * scale
        if JUMP:
            near = (tl.abs((v - th) / bandwidth) < 0.5) & here
            sum_theta -= tl.where(near, (th * q + l1) / bandwidth, 0.0)
            d = tl.where(active, q, 0.0)
        else:
            d = tl.where(active, q + (l1 * norm if WEIGHTED else l1), 0.0)
        sum_a += a
        sum_b += d
        if FOLD:
            sum_aq += a * q
            tl.store(d_acts + t * F + f, d, mask=here)
        else:
            rows_dec += a[:, None] * e
            rows_enc += d[:, None] * tl.load(sae_in + pair, mask=here[:, None] & columns, other=0.0)
    sums = (sum_a, sum_b, sum_theta)
    pull = _store_sums(f, inside, F, th, norm, l1, *sums, g_b, g_theta, reg, squares, UNIT, WEIGHTED, JUMP)
    if FOLD:
        if WEIGHTED:
            tl.store(squares + f, pull * (2 * sum_aq + pull * norm * norm), mask=inside)
    else:
        if WEIGHTED:
            rows_dec += pull[:, None] * w
        tl.store(g_dec + row, rows_dec, mask=touched)
        tl.store(g_enc + row, rows_enc, mask=touched)
        tl.store(squares + f, tl.sum(rows_dec * rows_dec, 1), mask=inside)
        tl.store(squares + F + f, tl.sum(rows_enc * rows_enc, 1), mask=inside)


@_jit
def activate(z, theta, norms, numbers, acts, N, F, UNIT: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr):
    """acts = the activations, divided by the norms of the rows of W_dec if those are to be of unit norm."""
    t = tl.program_id(0) * BN + tl.arange(0, BN)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    here = (t < N)[:, None] & (f < F)[None, :]
    at = t.to(tl.int64)[:, None] * F + f[None, :]
    v = tl.load(z + at, mask=here, other=0.0)
    th = tl.load(theta + f, mask=f < F, other=0.0)[None, :]
    a = tl.where((v > th) | (v != v), v, 0.0)
    if UNIT:
        norm = tl.load(norms + f, mask=f < F, other=1.0)
        a = a / tl.maximum(norm, tl.load(numbers + TINY).to(norm.dtype))[None, :]
    tl.store(acts + at, a, mask=here)


@_jit
def residual(x, out, numbers, squares, N, D, R: tl.constexpr, BD: tl.constexpr):
    """out becomes d loss / d sae_out; the squared error of each token in each strip of BD columns."""
    t = tl.program_id(0) * R + tl.arange(0, R)
    j = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (t < N)[:, None] & (j < D)[None, :]
    at = t.to(tl.int64)[:, None] * D + j[None, :]
    e = tl.load(out + at, mask=inside, other=0.0) - tl.load(x + at, mask=inside, other=0.0)
    tl.store(squares + t * tl.num_programs(1) + tl.program_id(1), tl.sum(e * e, 1), mask=t < N)
    tl.store(out + at, e * tl.load(numbers + TWO_N).to(e.dtype), mask=inside)


@_jit
def through_activation(
    z, theta, norms, numbers, acts, d_acts, firings, g_b, g_theta, reg, squares, N, F,
    UNIT: tl.constexpr, WEIGHTED: tl.constexpr, JUMP: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """d_acts, which comes without the scale of the rows, becomes d loss / d hidden_pre, and acts the activations.

    Sums over tokens as in `feature_gradients`, whose places in `squares` are kept.
    """
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    inside = f < F
    th = tl.load(theta + f, mask=inside, other=0.0)
    norm = tl.load(norms + f, mask=inside, other=1.0)
    scale = 1.0 / tl.maximum(norm, tl.load(numbers + TINY).to(norm.dtype))
    bandwidth = tl.load(numbers + BANDWIDTH).to(norm.dtype)
    l1 = tl.load(numbers + PENALTY_N).to(norm.dtype)
    weight = norm if WEIGHTED else tl.full([BF], 1.0, dtype=z.dtype.element_ty)
    fired = tl.zeros([BF], dtype=tl.int32)
    sum_a = tl.zeros([BF], dtype=z.dtype.element_ty)
    sum_b = tl.zeros([BF], dtype=z.dtype.element_ty)
    sum_theta = tl.zeros([BF], dtype=z.dtype.element_ty)
    for t0 in range(0, N, BN):
        t = t0 + tl.arange(0, BN)
        here = (t < N)[:, None] & inside[None, :]
        at = t.to(tl.int64)[:, None] * F + f[None, :]
        v = tl.load(z + at, mask=here, other=0.0)
        q = tl.load(d_acts + at, mask=here, other=0.0)
        if UNIT:
            q = q * scale[None, :]
        active = ((v > th[None, :]) | (v != v)) & here
        a = tl.where(active, v, 0.0)
        if JUMP:
            near = (tl.abs((v - th[None, :]) / bandwidth) < 0.5) & here
            sum_theta -= tl.sum(tl.where(near, (th[None, :] * q + l1) / bandwidth, 0.0), 0)
            d = tl.where(active, q, 0.0)
        else:
            d = tl.where(active, q + l1 * weight[None, :], 0.0)
        fired += tl.sum(active.to(tl.int32), 0)
        sum_a += tl.sum(a, 0)
        sum_b += tl.sum(d, 0)
        tl.store(d_acts + at, d, mask=here)
        if UNIT:
            tl.store(acts + at, a, mask=here)
    tl.store(firings + f, fired.to(firings.dtype.element_ty), mask=inside)
    sums = (sum_a, sum_b, sum_theta)
    _store_sums(f, inside, F, th, norm, l1, *sums, g_b, g_theta, reg, squares, UNIT, WEIGHTED, JUMP)


@_jit
def row_squares(G, W, pulls, squares, F, D, PULL: tl.constexpr, R: tl.constexpr, BD: tl.constexpr):
    """Squared norms of the rows of a gradient, after pulls[f] W[f] has been added to it if PULL."""
    f = tl.program_id(0) * R + tl.arange(0, R)
    j = tl.arange(0, BD)
    here = (f < F)[:, None] & (j < D)[None, :]
    at = f.to(tl.int64)[:, None] * D + j[None, :]
    g = tl.load(G + at, mask=here, other=0.0)
    if PULL:
        g += tl.load(pulls + f, mask=f < F, other=0.0)[:, None] * tl.load(W + at, mask=here, other=0.0)
        tl.store(G + at, g, mask=here)
    tl.store(squares + f, tl.sum(g * g, 1), mask=f < F)
