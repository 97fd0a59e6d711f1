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
    """numba.njit as the step needs it; inline "always": for what is called per row, as a call costs half a row.

    Nothing compiled here makes an array, so references to arrays need not be counted, which took a third of the time of
    Adam on short rows.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        function = inspect.unwrap(function)  # the tests wrap every function of this package
        # error_model "python" stops SIMD; _nrt: numba's runtime, which counts references
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy", "_nrt": False}
        options["inline"] = inline
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


@jit(REORDER, "always")
def _norm(W, f):
    square = W.dtype.type(0)
    for j in range(W.shape[1]):
        square += W[f, j] * W[f, j]
    return math.sqrt(square)


@jit(REORDER)
def row_norms(first, last, W, norms):
    for f in range(first, last):
        norms[f] = _norm(W, f)


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
    first, last, row_of, r_begin, r_acts, places, d_acts, norms, weighted, l1, firings, g_b, d_pre, pulls, crosses,
    penalties,
):  # fmt: skip
    """Per feature: firings, d_pre = d loss / d hidden_pre of its pairs, their sum g_b, and what the penalty does to it.

    The penalty of a row is l1 (sum of its acts), times the norm of its decoder row w if `weighted`, which then gets
    pull w as a gradient more: d (a ‖w‖) = a w / ‖w‖. With it, the squared norm of the gradient grows by crosses[r].
    """
    for f in range(first, last):
        r, zero = row_of[f], g_b.dtype.type(0)
        if r < 0:
            firings[f] = g_b[f] = zero
            continue
        pull = l1 * norms[f] if weighted else l1
        a_sum = total = along = zero
        for k in range(r_begin[r], r_begin[r + 1]):
            d = d_acts[places[k]]
            d_pre[k] = d + pull
            total += d + pull
            a_sum += r_acts[k]
            along += r_acts[k] * d
        firings[f] = r_begin[r + 1] - r_begin[r]
        g_b[f], penalties[r], pulls[r], crosses[r] = total, a_sum * pull, zero, zero
        if weighted and norms[f] > 0:
            more = a_sum * l1
            pulls[r], crosses[r] = more / norms[f], more * (more + (along + along) / norms[f])


@jit(REORDER)
def gram_squares(first, last, r_begin, r_tokens, values, gram, crosses, squares):
    """squares[r] = ‖sum of values[pair] vectors[token]‖², from the products of all vectors with each other [N, N], and
    crosses[r]."""
    for r in range(first, last):
        square = crosses[r]
        for k in range(r_begin[r], r_begin[r + 1]):
            row, half = gram[r_tokens[k]], values.dtype.type(0)
            for i in range(r_begin[r], k):
                half += values[i] * row[r_tokens[i]]
            square += values[k] * (half + half + values[k] * row[r_tokens[k]])
        squares[r] = square


@jit(REORDER, "always")
def _row_grad(g, k, end, values, tokens, Y, j0, j1, pull, w):
    """g = pull w + the sum over the pairs k..end of values[pair] Y[token], columns j0..j1, four per visit."""
    for j in range(g.size):
        g[j] = pull * w[j]
    if (end - k) & 1:
        a0, y0 = values[k], Y[tokens[k], j0:j1]
        for j in range(g.size):
            g[j] += a0 * y0[j]
        k += 1
    if (end - k) & 2:
        a0, a1 = values[k], values[k + 1]
        y0, y1 = Y[tokens[k], j0:j1], Y[tokens[k + 1], j0:j1]
        for j in range(g.size):
            g[j] += a0 * y0[j] + a1 * y1[j]
        k += 2
    while k < end:
        a0, a1, a2, a3 = values[k], values[k + 1], values[k + 2], values[k + 3]
        y0, y1 = Y[tokens[k], j0:j1], Y[tokens[k + 1], j0:j1]
        y2, y3 = Y[tokens[k + 2], j0:j1], Y[tokens[k + 3], j0:j1]
        for j in range(g.size):
            g[j] += a0 * y0[j] + a1 * y1[j] + (a2 * y2[j] + a3 * y3[j])
        k += 4


@jit(False, "always")
def _pair(k, end, values, tokens):
    """The value and token of a pair; behind the last one 0 and a token that is there."""
    if k < end:
        return values[k], tokens[k]
    return values.dtype.type(0), tokens[end - 1]


@jit(REORDER)
def row_grads(first, last, Y, rows, r_begin, r_tokens, values, pulls, W, slot, every, grads, squares):
    """The gradients of the rows that have a slot, in grads[slot[r]], and their squared norms; those of `every` row.

    In strips of the vectors Y of the tokens that stay in the cache. Rows without a slot have up to four pairs here.
    """
    d, strip = Y.shape[1], max(64, 2**18 // max(Y.shape[0], 1))
    zero = Y.dtype.type(0)
    for r in range(first, last):
        if every or slot[r] >= 0:
            squares[r] = 0
    for j0 in range(0, d, strip):
        j1 = min(j0 + strip, d)
        for r in range(first, last):
            k, end, w, pull = r_begin[r], r_begin[r + 1], W[rows[r], j0:j1], pulls[r]
            if slot[r] >= 0:
                g = grads[slot[r], j0:j1]
                _row_grad(g, k, end, values, r_tokens, Y, j0, j1, pull, w)
                squares[r] += _dot(g, g)
            elif every:
                a0, t0 = _pair(k, end, values, r_tokens)
                a1, t1 = _pair(k + 1, end, values, r_tokens)
                a2, t2 = _pair(k + 2, end, values, r_tokens)
                a3, t3 = _pair(k + 3, end, values, r_tokens)
                y0, y1, y2, y3 = Y[t0, j0:j1], Y[t1, j0:j1], Y[t2, j0:j1], Y[t3, j0:j1]
                square = zero
                for j in range(w.size):
                    value = pull * w[j] + a0 * y0[j] + a1 * y1[j] + (a2 * y2[j] + a3 * y3[j])
                    square += value * value
                squares[r] += square


@jit(REORDER, "always")
def _move(P, M, V, f, G, i, pull, scale, numbers):
    """torch.optim.Adam on row f with gradient G[i] + pull P[f], the clipping folded in; the row is scaled first."""
    clip, _, one_beta1, beta2, one_beta2, step_size, root2, eps, _, _ = numbers
    for j in range(P.shape[1]):
        u = (G[i, j] + pull * P[f, j]) * clip
        a = M[f, j] + one_beta1 * (u - M[f, j])
        b = beta2 * V[f, j] + one_beta2 * u * u
        M[f, j] = a
        V[f, j] = b
        P[f, j] = P[f, j] * scale - step_size * (a / (math.sqrt(b) * root2 + eps))


@jit(REORDER, "always")
def _coast(P, M, V, f, scale, numbers):
    """`_move` without a gradient; returns whether it moved. A row whose first moment has died away (some 800 silent
    steps in float32) is left alone: its update is exactly zero."""
    _, beta1, _, beta2, _, step_size, root2, eps, tiny, near_one = numbers
    one, zero = P.dtype.type(1), P.dtype.type(0)
    alive = zero
    for j in range(P.shape[1]):
        a = M[f, j] * beta1
        b = V[f, j] * beta2
        a = a if abs(a) >= tiny else zero  # denormal numbers are slow, and too small to move anything
        M[f, j] = a
        V[f, j] = b if b >= tiny else zero
        alive += abs(a)
    if alive != 0:
        for j in range(P.shape[1]):
            P[f, j] = P[f, j] * scale - step_size * (M[f, j] / (math.sqrt(V[f, j]) * root2 + eps))
        return True
    if abs(scale - one) > near_one:
        for j in range(P.shape[1]):
            P[f, j] *= scale
        return True
    return False


@jit(REORDER, "always")
def _move_by_pairs(P, M, V, f, k, end, values, tokens, Y, pull, scale, numbers):
    """`_move` with the gradient pull P[f] + the sum over the pairs k..end, up to eight, of values[pair] Y[token].

    They are summed where they are used, which hides behind the roots and divisions.
    """
    clip, _, one_beta1, beta2, one_beta2, step_size, root2, eps, _, _ = numbers
    many = end - k > 4
    a0, t0 = _pair(k, end, values, tokens)
    a1, t1 = _pair(k + 1, end, values, tokens)
    a2, t2 = _pair(k + 2, end, values, tokens)
    a3, t3 = _pair(k + 3, end, values, tokens)
    a4, t4 = _pair(k + 4, end, values, tokens)
    a5, t5 = _pair(k + 5, end, values, tokens)
    a6, t6 = _pair(k + 6, end, values, tokens)
    a7, t7 = _pair(k + 7, end, values, tokens)
    for j in range(P.shape[1]):
        g = pull * P[f, j] + a0 * Y[t0, j] + a1 * Y[t1, j] + (a2 * Y[t2, j] + a3 * Y[t3, j])
        if many:
            g += a4 * Y[t4, j] + a5 * Y[t5, j] + (a6 * Y[t6, j] + a7 * Y[t7, j])
        u = g * clip
        a = M[f, j] + one_beta1 * (u - M[f, j])
        b = beta2 * V[f, j] + one_beta2 * u * u
        M[f, j] = a
        V[f, j] = b
        P[f, j] = P[f, j] * scale - step_size * (a / (math.sqrt(b) * root2 + eps))


@jit(REORDER)
def adam_vector(p, m, v, g, numbers):
    """One step of a parameter [1, F] on its gradient; `numbers` as `chatsae.sae.step_numba` makes them."""
    _move(p, m, v, 0, g, 0, p.dtype.type(0), p.dtype.type(1), numbers)


@jit(REORDER)
def adam_dense(first, last, P, M, V, Q, R, S, g_dec, g_enc, pulls, keep, norms, numbers):
    """One step of both rows of every feature: decoder P and encoder Q, and their moments. pulls[f] times its row of the
    decoder is a gradient more. norms: those of the rows of the decoder afterwards, if `keep`."""
    one, zero = P.dtype.type(1), P.dtype.type(0)
    for f in range(first, last):
        _move(P, M, V, f, g_dec, f, pulls[f], one, numbers)
        _move(Q, R, S, f, g_enc, f, zero, one, numbers)
        if keep:
            norms[f] = _norm(P, f)


@jit(REORDER)
def adam_sparse(
    first, last, row_of, r_begin, r_tokens, slot, P, M, V, acts, d_out, pulls, g_dec, Q, R, S, d_pre, inputs, g_enc,
    unit, keep, norms, numbers,
):  # fmt: skip
    """One step of both rows of every feature; gradients without a slot, of up to eight pairs, are summed here.

    Decoder P, encoder Q: each with its moments, what its gradients are sums of (values of pairs, vectors of tokens) and
    those that are stored. unit: rows of the decoder are scaled to unit norm before the update. norms: as they are, and
    afterwards, if `keep`.
    """
    tiny, one, zero = numbers[8], P.dtype.type(1), P.dtype.type(0)
    for f in range(first, last):
        r, moved = row_of[f], True
        scale = one / max(norms[f], tiny) if unit else one
        if r < 0:
            moved = _coast(P, M, V, f, scale, numbers)
            _coast(Q, R, S, f, one, numbers)
        elif slot[r] >= 0:
            _move(P, M, V, f, g_dec, slot[r], zero, scale, numbers)
            _move(Q, R, S, f, g_enc, slot[r], zero, one, numbers)
        else:
            k, end = r_begin[r], r_begin[r + 1]
            _move_by_pairs(P, M, V, f, k, end, acts, r_tokens, d_out, pulls[r], scale, numbers)
            _move_by_pairs(Q, R, S, f, k, end, d_pre, r_tokens, inputs, zero, one, numbers)
        if keep and moved:
            norms[f] = _norm(P, f)
