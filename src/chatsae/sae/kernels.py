"""The compiled loops of the sparse step. Importing this module imports numba; nothing does so unless needed.

Letters: N tokens, F d_sae, D d_in, P pairs (token, feature) that are active or lie in the bandwidth of a threshold, A
active pairs. W_enc comes transposed, [F, D]: a feature is a row. Most kernels work on first <= row < last, so that
threads share them; what they sum is summed per row, so that the number of threads changes no bit. Scalars come in the
dtype of the arrays: a float32 times a literal is a float64. A kernel and what it calls are in one file, because numba's
cache notices changes of one file only.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

REORDER = {"reassoc", "nsz", "contract", "arcp"}  # no "nnan": NaN must stay NaN


def jit(fastmath: Any, inline: str = "never") -> Callable[[Callable[..., Any]], Any]:
    """numba.njit as the step needs it; inline "always": for what is called per row, as a call costs half a row."""

    def decorate(function: Callable[..., Any]) -> Any:
        function = inspect.unwrap(function)  # the tests wrap every function of this package
        # error_model "python" stops SIMD
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy", "inline": inline}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no directory to keep compiled code in: compiled anew in every process
            return numba.njit(**options)(function)

    return decorate


@jit(REORDER, "always")
def _dot(a, b):
    total = a.dtype.type(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@jit(REORDER)
def row_norms(first, last, W, touched, norms):
    for i in range(first, last):
        f = touched[i]
        norms[f] = math.sqrt(_dot(W[f], W[f]))


@jit(REORDER)
def decode(first, last, x, start, features, acts, W, unit, norms, b_dec, two_n, d_out, d_acts, mse):
    """d_out = d mse / d sae_out [N, D], d_acts = d mse / d acts [P], and the squared error of each token.

    unit: rows count as scaled to unit norm. Forward and backward in one visit per token, while its rows are in cache.
    """
    one, tiny = x.dtype.type(1), np.finfo(x.dtype).tiny
    for t in range(first, last):
        e, target, n, end = d_out[t], x[t], start[t], start[t + 1]
        for j in range(e.size):
            e[j] = b_dec[j] - target[j]
        if unit:  # d_acts holds the scale of each row meanwhile
            for k in range(n, end):
                norm = norms[features[k]]
                d_acts[k] = one / norm if not (norm < tiny) else one
        else:
            d_acts[n:end] = one
        while n + 4 <= end:
            w0, w1, w2, w3 = W[features[n]], W[features[n + 1]], W[features[n + 2]], W[features[n + 3]]
            a0, a1 = acts[n] * d_acts[n], acts[n + 1] * d_acts[n + 1]
            a2, a3 = acts[n + 2] * d_acts[n + 2], acts[n + 3] * d_acts[n + 3]
            for j in range(e.size):
                e[j] += a0 * w0[j] + a1 * w1[j] + (a2 * w2[j] + a3 * w3[j])
            n += 4
        while n < end:
            a0, w0 = acts[n] * d_acts[n], W[features[n]]
            for j in range(e.size):
                e[j] += a0 * w0[j]
            n += 1
        square = x.dtype.type(0)
        for j in range(e.size):
            square += e[j] * e[j]
            e[j] *= two_n
        mse[t] = square

        n = start[t]
        while n + 4 <= end:
            w0, w1, w2, w3 = W[features[n]], W[features[n + 1]], W[features[n + 2]], W[features[n + 3]]
            q0 = q1 = q2 = q3 = x.dtype.type(0)
            for j in range(e.size):
                q0 += e[j] * w0[j]
                q1 += e[j] * w1[j]
                q2 += e[j] * w2[j]
                q3 += e[j] * w3[j]
            d_acts[n] *= q0
            d_acts[n + 1] *= q1
            d_acts[n + 2] *= q2
            d_acts[n + 3] *= q3
            n += 4
        while n < end:
            d_acts[n] *= _dot(e, W[features[n]])
            n += 1


@jit(REORDER)
def threshold_grad(start, features, band, d_acts, theta, bandwidth, l0, grad):
    """d loss / d theta through the straight-through estimators; l0 is the coefficient over N."""
    grad[:] = 0
    for n in range(start[start.size - 1]):
        if band[n]:
            f = features[n]
            grad[f] -= (theta[f] * d_acts[n] + l0) / bandwidth


@jit(REORDER)
def penalise(
    first, last, rows, r_begin, r_acts, places, d_acts, W, weighted, l1, d_pre, pulls, crosses, penalties, g_b
):  # fmt: skip
    """Per row that fired: d_pre = d loss / d hidden_pre of its pairs, their sum g_b, and what the penalty does to it.

    The penalty of a row is l1 (sum of its acts), times the norm of its decoder row w if `weighted`, which then gets
    pull w as a gradient more: d (a ‖w‖) = a w / ‖w‖. With it, the squared norm of the gradient grows by crosses[r].
    """
    for r in range(first, last):
        f, zero, pull, norm = rows[r], g_b.dtype.type(0), l1, l1
        if weighted:
            norm = math.sqrt(_dot(W[f], W[f]))
            pull = l1 * norm
        a_sum = total = along = zero
        for k in range(r_begin[r], r_begin[r + 1]):
            d = d_acts[places[k]]
            d_pre[k] = d + pull
            total += d + pull
            a_sum += r_acts[k]
            along += r_acts[k] * d
        g_b[f], penalties[r], pulls[r], crosses[r] = total, a_sum * pull, zero, zero
        if weighted and norm > 0:
            more = a_sum * l1
            pulls[r], crosses[r] = more / norm, more * (more + (along + along) / norm)


@jit(REORDER)
def gram_squares(first, last, r_begin, r_tokens, values, gram, squares):
    """squares[r] = ‖sum of values[pair] vectors[token]‖², from the products of all vectors with each other [N, N]."""
    for r in range(first, last):
        total = values.dtype.type(0)
        for k in range(r_begin[r], r_begin[r + 1]):
            row, half = gram[r_tokens[k]], values.dtype.type(0)
            for i in range(r_begin[r], k):
                half += values[i] * row[r_tokens[i]]
            total += values[k] * (half + half + values[k] * row[r_tokens[k]])
        squares[r] = total


@jit(REORDER, "always")
def _row_grad(g, k, end, values, tokens, vectors, j0, pull, w):
    """g = pull w + the sum over the pairs k..end of values[pair] vectors[token], columns from j0; four per visit."""
    j1 = j0 + g.size
    if pull != 0:
        for j in range(g.size):
            g[j] = pull * w[j0 + j]
    else:
        for j in range(g.size):
            g[j] = pull
    if (end - k) & 1:
        a0, y0 = values[k], vectors[tokens[k], j0:j1]
        for j in range(g.size):
            g[j] += a0 * y0[j]
        k += 1
    if (end - k) & 2:
        a0, a1 = values[k], values[k + 1]
        y0, y1 = vectors[tokens[k], j0:j1], vectors[tokens[k + 1], j0:j1]
        for j in range(g.size):
            g[j] += a0 * y0[j] + a1 * y1[j]
        k += 2
    while k < end:
        a0, a1, a2, a3 = values[k], values[k + 1], values[k + 2], values[k + 3]
        y0, y1 = vectors[tokens[k], j0:j1], vectors[tokens[k + 1], j0:j1]
        y2, y3 = vectors[tokens[k + 2], j0:j1], vectors[tokens[k + 3], j0:j1]
        for j in range(g.size):
            g[j] += a0 * y0[j] + a1 * y1[j] + (a2 * y2[j] + a3 * y3[j])
        k += 4


@jit(REORDER)
def row_grads(first, last, vectors, rows, r_begin, r_tokens, values, pulls, W, slot, every, grads, squares):
    """The gradients of the rows that have a slot, in grads[slot[r]], and their squared norms; those of `every` row.

    In strips of the vectors that stay in the cache.
    """
    strip = min(max(64, 2**18 // max(vectors.shape[0], 1)), vectors.shape[1])
    scratch = np.empty(strip, vectors.dtype)
    for r in range(first, last):
        if every or slot[r] >= 0:
            squares[r] = 0
    for j0 in range(0, vectors.shape[1], strip):
        j1 = min(j0 + strip, vectors.shape[1])
        for r in range(first, last):
            if every or slot[r] >= 0:
                g = scratch[: j1 - j0]
                if slot[r] >= 0:
                    g = grads[slot[r], j0:j1]
                _row_grad(g, r_begin[r], r_begin[r + 1], values, r_tokens, vectors, j0, pulls[r], W[rows[r]])
                squares[r] += _dot(g, g)


@jit(REORDER)
def weighted_rows(first, last, W, rows, begin_part, weights, out):
    """out[part] = sum of weights[f] W[f] over the rows of the part: what b_dec gets through the encoder."""
    for part in range(first, last):
        total = out[part]
        total[:] = 0
        for r in range(begin_part[part], begin_part[part + 1]):
            w, c = W[rows[r]], weights[rows[r]]
            for j in range(total.size):
                total[j] += c * w[j]


@jit(REORDER, "always")
def _scale(p, unit, tiny):
    one = p.dtype.type(1)
    return one / max(math.sqrt(_dot(p, p)), tiny) if unit else one


@jit(REORDER, "always")
def _move(p, m, v, g, scale, numbers):
    """torch.optim.Adam on one row, with the clipping folded in; the row is scaled first."""
    clip, _, one_beta1, beta2, one_beta2, step_size, root2, eps, _, _ = numbers
    for j in range(p.size):
        u = g[j] * clip
        a = m[j] + one_beta1 * (u - m[j])
        b = beta2 * v[j] + one_beta2 * u * u
        m[j] = a
        v[j] = b
        p[j] = p[j] * scale - step_size * (a / (math.sqrt(b) * root2 + eps))


@jit(REORDER, "always")
def _coast(p, m, v, scale, numbers):
    """`_move` without a gradient. A row whose first moment has died away (some 800 silent steps in float32) is left
    alone: its update is exactly zero."""
    _, beta1, _, beta2, _, step_size, root2, eps, tiny, near_one = numbers
    one, zero = p.dtype.type(1), p.dtype.type(0)
    alive = zero
    for j in range(p.size):
        a = m[j] * beta1
        b = v[j] * beta2
        a = a if abs(a) >= tiny else zero  # denormal numbers are slow, and too small to move anything
        m[j] = a
        v[j] = b if b >= tiny else zero
        alive += abs(a)
    if alive != 0:
        for j in range(p.size):
            p[j] = p[j] * scale - step_size * (m[j] / (math.sqrt(v[j]) * root2 + eps))
    elif abs(scale - one) > near_one:
        for j in range(p.size):
            p[j] *= scale


@jit(REORDER)
def adam(first, last, P, M, V, G, numbers):
    """One step of every row on its gradient; `numbers` as `chatsae.sae.step_numba` makes them."""
    one = P.dtype.type(1)
    for f in range(first, last):
        _move(P[f], M[f], V[f], G[f], one, numbers)


@jit(REORDER)
def adam_rows(
    first, last, P, M, V, row_of, r_begin, r_tokens, values, vectors, pulls, slot, grads, unit, numbers
):  # fmt: skip
    """One step of every row; gradients without a slot are summed here, in the cache, instead of read.

    unit: rows are scaled to unit norm before the update.
    """
    scratch = np.empty(P.shape[1], P.dtype)
    tiny = numbers[8]
    for f in range(first, last):
        p, m, v, r = P[f], M[f], V[f], row_of[f]
        scale = _scale(p, unit, tiny)
        if r < 0:
            _coast(p, m, v, scale, numbers)
            continue
        g = scratch
        if slot[r] >= 0:
            g = grads[slot[r]]
        else:
            _row_grad(g, r_begin[r], r_begin[r + 1], values, r_tokens, vectors, 0, pulls[r], p)
        _move(p, m, v, g, scale, numbers)
