"""The compiled loops of the fast training step. Importing this module imports numba; nothing does so unless needed.

All of them are here because numba's cache notices changes of one file only. Letters: N tokens, F d_sae, D d_in, P pairs
(token, feature) that are active or lie in the bandwidth of a threshold. W_enc comes transposed, [F, D]: a feature is a
row. Most kernels work on first <= row < last, so that threads share them; what they sum is summed per row, so that the
number of threads changes no bit. Scalars come in the dtype of the arrays: a float32 times a literal is a float64.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numba

_REORDER = {"reassoc", "nsz", "contract", "arcp"}  # no "nnan": NaN must stay NaN


def _jit(fastmath: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        function = inspect.unwrap(function)  # the tests wrap every function of this package
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}  # "python" stops SIMD
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no directory to keep compiled code in: compiled anew in every process
            return numba.njit(**options)(function)

    return decorate


@_jit(False)
def count(first, last, z, low, counts):
    """counts[t]: features of token t that `compact` will look at. NaN counts, so that it reaches the loss."""
    for t in range(first, last):
        row, n = z[t], 0
        for f in range(row.size):
            n += not (row[f] <= low[f])
        counts[t] = n


@_jit(False)
def compact(first, last, z, low, theta, bandwidth, half, start, stop, features, acts, band):
    """The pairs of each token in the order of features: acts = z where z > theta, else 0.

    band: |(z - theta) / bandwidth| < half; not written where the bandwidth is 0, as theta does not learn there. The
    pairs of token t go to start[t]..stop[t]; one slot behind the last may be written.
    """
    zero, jump = z.dtype.type(0), bandwidth > 0
    for t in range(first, last):
        row, n = z[t], start[t]
        for f0 in range(0, row.size, 64):
            if f0 + 64 <= row.size:  # slices and a fixed length: one vector comparison for many features
                block, bounds, hits = row[f0 : f0 + 64], low[f0 : f0 + 64], 0
                for i in range(64):
                    hits += not (block[i] <= bounds[i])
                if hits == 0:
                    continue
            end = min(f0 + 64, row.size)
            if not jump:
                for f in range(f0, end):  # without a branch per feature: which are active cannot be predicted
                    value = row[f]
                    features[n] = f
                    acts[n] = value
                    n += not (value <= theta[f])
                continue
            for f in range(f0, end):
                if row[f] <= low[f]:
                    continue
                value, gap = row[f], row[f] - theta[f]
                active = not (value <= theta[f])
                near = abs(gap / bandwidth) < half
                features[n] = f
                acts[n] = value if active else zero
                band[n] = near
                n += active | near
        stop[t] = n


@_jit(False)
def by_feature(start, stop, features, acts, begin, cursor, touched, rows, slot, tokens, places):
    """The active pairs in the order of features: those of row r, feature rows[r], are begin[r]..begin[r + 1].

    touched[f]: the feature has a pair; slot[f]: its row, -1 when it is not active at all. Returns the number of rows.
    """
    touched[:] = False
    cursor[:] = 0
    for t in range(start.size):
        for n in range(start[t], stop[t]):
            f = features[n]
            touched[f] = True
            cursor[f] += acts[n] != 0
    r, total = 0, 0
    for f in range(cursor.size):
        slot[f] = -1
        fired = cursor[f]
        if fired > 0:
            rows[r], begin[r], slot[f] = f, total, r
            r += 1
        cursor[f] = total
        total += fired
    begin[r] = total
    for t in range(start.size):
        for n in range(start[t], stop[t]):
            if acts[n] != 0:
                k = cursor[features[n]]
                tokens[k], places[k] = t, n
                cursor[features[n]] = k + 1
    return r


@_jit(_REORDER)
def row_norms(first, last, W, touched, norms):
    for f in range(first, last):
        if touched[f]:
            row, square = W[f], W.dtype.type(0)
            for j in range(row.size):
                square += row[j] * row[j]
            norms[f] = math.sqrt(square)


@_jit(_REORDER)
def decode(first, last, x, start, stop, features, acts, W, scale, weights, b_dec, two_n, l1, d_out, d_acts, mse, reg):
    """d_out = d loss / d sae_out [N, D], d_acts = d loss / d acts [P], and per token the squared error and the penalty.

    The row of feature f is scale[f] W[f]; forward and backward in one visit per token, while its rows are in the cache.
    """
    for t in range(first, last):
        e, target, n, end = d_out[t], x[t], start[t], stop[t]
        for j in range(e.size):
            e[j] = b_dec[j] - target[j]
        penalty = x.dtype.type(0)
        while n + 4 <= end:
            f0, f1, f2, f3 = features[n], features[n + 1], features[n + 2], features[n + 3]
            penalty += acts[n] * weights[f0] + acts[n + 1] * weights[f1]
            penalty += acts[n + 2] * weights[f2] + acts[n + 3] * weights[f3]
            a0, a1, a2, a3 = (
                acts[n] * scale[f0],
                acts[n + 1] * scale[f1],
                acts[n + 2] * scale[f2],
                acts[n + 3] * scale[f3],
            )
            w0, w1, w2, w3 = W[f0], W[f1], W[f2], W[f3]
            for j in range(e.size):
                e[j] += a0 * w0[j] + a1 * w1[j] + (a2 * w2[j] + a3 * w3[j])
            n += 4
        while n < end:
            f0 = features[n]
            penalty += acts[n] * weights[f0]
            a0, w0 = acts[n] * scale[f0], W[f0]
            for j in range(e.size):
                e[j] += a0 * w0[j]
            n += 1
        square = x.dtype.type(0)
        for j in range(e.size):
            square += e[j] * e[j]
            e[j] *= two_n
        mse[t], reg[t] = square, penalty

        n = start[t]
        while n + 4 <= end:
            f0, f1, f2, f3 = features[n], features[n + 1], features[n + 2], features[n + 3]
            w0, w1, w2, w3 = W[f0], W[f1], W[f2], W[f3]
            q0 = q1 = q2 = q3 = x.dtype.type(0)
            for j in range(e.size):
                q0 += e[j] * w0[j]
                q1 += e[j] * w1[j]
                q2 += e[j] * w2[j]
                q3 += e[j] * w3[j]
            d_acts[n] = q0 * scale[f0] + l1 * weights[f0]
            d_acts[n + 1] = q1 * scale[f1] + l1 * weights[f1]
            d_acts[n + 2] = q2 * scale[f2] + l1 * weights[f2]
            d_acts[n + 3] = q3 * scale[f3] + l1 * weights[f3]
            n += 4
        while n < end:
            f0 = features[n]
            w0, q0 = W[f0], x.dtype.type(0)
            for j in range(e.size):
                q0 += e[j] * w0[j]
            d_acts[n] = q0 * scale[f0] + l1 * weights[f0]
            n += 1


@_jit(_REORDER)
def threshold_grad(start, stop, features, band, d_acts, theta, bandwidth, l0, grad):
    """d loss / d theta through the straight-through estimators; l0 is the coefficient over N."""
    grad[:] = 0
    for t in range(start.size):
        for n in range(start[t], stop[t]):
            if band[n]:
                f = features[n]
                grad[f] -= (theta[f] * d_acts[n] + l0) / bandwidth


@_jit(_REORDER)
def row_sums(first, last, rows, begin, places, acts, d_acts, sum_acts, g_b):
    """Per feature that fired, the sum of its acts, and of d_acts, which is the gradient of b_enc."""
    for r in range(first, last):
        a_sum = b_sum = acts.dtype.type(0)
        for k in range(begin[r], begin[r + 1]):
            a_sum += acts[places[k]]
            b_sum += d_acts[places[k]]
        sum_acts[r], g_b[rows[r]] = a_sum, b_sum


@_jit(_REORDER)
def outer_products(first, last, vectors, rows, begin, tokens, places, values, pulls, W, grads, squares):
    """grads[r] = pulls[r] W[rows[r]] + the sum over the pairs of row r of values[pair] vectors[token]; squared norms.

    In strips of the vectors that stay in the cache, four tokens per visit of a row.
    """
    strip = max(64, 2**18 // max(vectors.shape[0], 1))
    for r in range(first, last):
        squares[r] = 0
    for j0 in range(0, vectors.shape[1], strip):
        j1 = min(j0 + strip, vectors.shape[1])
        for r in range(first, last):
            g, k, end = grads[r, j0:j1], begin[r], begin[r + 1]
            pull, square = pulls[r], vectors.dtype.type(0)
            if pull != 0:
                w = W[rows[r], j0:j1]
                for j in range(g.size):
                    g[j] = pull * w[j]
            else:
                for j in range(g.size):
                    g[j] = pull
            while k + 4 <= end:
                a0, a1 = values[places[k]], values[places[k + 1]]
                a2, a3 = values[places[k + 2]], values[places[k + 3]]
                y0, y1 = vectors[tokens[k], j0:j1], vectors[tokens[k + 1], j0:j1]
                y2, y3 = vectors[tokens[k + 2], j0:j1], vectors[tokens[k + 3], j0:j1]
                for j in range(g.size):
                    g[j] += a0 * y0[j] + a1 * y1[j] + (a2 * y2[j] + a3 * y3[j])
                k += 4
            while k < end:
                a0, y0 = values[places[k]], vectors[tokens[k], j0:j1]
                for j in range(g.size):
                    g[j] += a0 * y0[j]
                k += 1
            for j in range(g.size):
                square += g[j] * g[j]
            squares[r] += square


@_jit(_REORDER)
def weighted_rows(first, last, W, rows, begin_part, weights, out):
    """out[part] = sum of weights[f] W[f] over the rows of the part: what b_dec gets through the encoder."""
    for part in range(first, last):
        total = out[part]
        total[:] = 0
        for r in range(begin_part[part], begin_part[part + 1]):
            w, c = W[rows[r]], weights[rows[r]]
            for j in range(total.size):
                total[j] += c * w[j]


@_jit(_REORDER)
def adam(first, last, P, M, V, G, slot, unit, adam_scalars):
    """torch.optim.Adam with the clipping folded in; the row of feature f has the gradient G[slot[f]], or none.

    A row without a gradient moves on its moments as Adam has it, but reads and writes no gradient, and a row whose
    first moment has died away (some 800 silent steps in float32) is left alone: its update is exactly zero.
    unit: rows are scaled to unit norm before the update.
    """
    clip, beta1, one_beta1, beta2, one_beta2, step_size, root2, eps, tiny, near_one = adam_scalars
    one, zero = P.dtype.type(1), P.dtype.type(0)
    for f in range(first, last):
        p, m, v = P[f], M[f], V[f]
        scale = one
        if unit:
            square = zero
            for j in range(p.size):
                square += p[j] * p[j]
            scale = one / max(math.sqrt(square), tiny)
        if slot[f] >= 0:
            g = G[slot[f]]
            for j in range(p.size):
                u = g[j] * clip
                a = m[j] + one_beta1 * (u - m[j])
                b = beta2 * v[j] + one_beta2 * u * u
                m[j] = a
                v[j] = b
                p[j] = p[j] * scale - step_size * (a / (math.sqrt(b) * root2 + eps))
            continue
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
