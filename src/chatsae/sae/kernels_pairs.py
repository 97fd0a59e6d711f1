"""The compiled loops that find the active pairs behind the encoder (see `chatsae.sae.kernels` for the letters).

Every product that is kept is exact. Where the CPU multiplies bfloat16 many times as fast as float32, the pairs that
cannot be active are left out on their products in bfloat16, whose error is bounded by the norms of both vectors.
"""

import math

import numpy as np

from chatsae.sae.kernels import REORDER, jit


@jit(REORDER)
def narrow(first, last, W, out, norms):
    """Rows in bfloat16, rounded to nearest, as their bits; and the norm of each row."""
    half, one, bits = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for f in range(first, last):
        w, narrowed, square = W[f], out[f], W.dtype.type(0)
        for j in range(w.size):
            square += w[j] * w[j]
        for j in range(w.size):
            u = np.float32(w[j]).view(np.uint32)
            narrowed[j] = np.uint16((u + half + ((u >> bits) & one)) >> bits)
        norms[f] = math.sqrt(square)


@jit(False)
def count_screened(first, last, z, norms, slack, bound, flags, counts):
    """`count` for products z in the bits of bfloat16, which are off by norms[f] slack[t] at the most."""
    bits = np.uint32(16)
    for f in range(first, last):
        row, out, n, norm, most = z[f], flags[f], 0, norms[f], bound[f]
        for t in range(row.size):
            value = np.uint32(np.uint32(row[t]) << bits).view(np.float32)
            may = not (value + norm * slack[t] <= most)
            out[t] = may
            n += may
        out[row.size :] = 0
        counts[f] = n


@jit(False)
def count(first, last, z, b_enc, low, flags, counts):
    """flags[f, t]: whether `compact` looks at the pair, from products z [F, N]; counts[f]: how many.

    NaN counts, so that it reaches the loss. Rows of flags are longer, so that they can be read eight at a time.
    """
    for f in range(first, last):
        row, out, n, b, most = z[f], flags[f], 0, b_enc[f], low[f]
        for t in range(row.size):
            may = not (row[t] + b <= most)
            out[t] = may
            n += may
        out[row.size :] = 0
        counts[f] = n


@jit(False, "always")
def _keep(n, t, value, theta, bandwidth, half, tokens, acts, band):
    """Write a pair at n, and return where the next one goes: it stays if it is active or near."""
    active = not (value <= theta)
    tokens[n] = t
    acts[n] = value if active else acts.dtype.type(0)
    if bandwidth > 0:
        band[n] = abs((value - theta) / bandwidth) < half
        return n + (active | band[n])
    return n + active


@jit(False, "always")
def _flagged(row, eights, first, last, n, tokens):
    """Write the tokens first..last that have a flag at n, without a branch per token; returns where the next goes."""
    for i in range(first // 8, last // 8):
        if eights[i] != 0:
            for t in range(8 * i, 8 * i + 8):
                tokens[n] = t
                n += row[t]
    return n


@jit(False)
def compact(first, last, z, flags, eights, b_enc, theta, bandwidth, half, begin, end, tokens, acts, band):
    """The pairs of each feature in the order of tokens: acts = z + b_enc where that exceeds theta, else 0.

    band: |(z + b_enc - theta) / bandwidth| < half; not written where the bandwidth is 0, as theta does not learn there.
    The pairs of feature f go to begin[f]..end[f]; one slot behind the last may be written.
    """
    for f in range(first, last):
        row, kept, b = z[f], begin[f], b_enc[f]
        n = _flagged(flags[f], eights[f], 0, flags.shape[1], begin[f], tokens)
        for k in range(begin[f], n):
            t = tokens[k]
            kept = _keep(kept, t, row[t] + b, theta[f], bandwidth, half, tokens, acts, band)
        end[f] = kept


@jit(REORDER, "always")
def _product(a, b):
    total = a.dtype.type(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@jit(REORDER, "always")
def _dots(w, x, tokens, k, acts):
    """acts[k..k + 3] = w · x[tokens[k..k + 3]]."""
    x0, x1, x2, x3 = x[tokens[k]], x[tokens[k + 1]], x[tokens[k + 2]], x[tokens[k + 3]]
    q0 = q1 = q2 = q3 = w.dtype.type(0)
    for j in range(w.size):
        q0 += w[j] * x0[j]
        q1 += w[j] * x1[j]
        q2 += w[j] * x2[j]
        q3 += w[j] * x3[j]
    acts[k], acts[k + 1], acts[k + 2], acts[k + 3] = q0, q1, q2, q3


@jit(REORDER)
def compact_screened(
    first, last, W, x, flags, eights, b_enc, theta, bandwidth, half, begin, end, tokens, acts, band
):  # fmt: skip
    """`compact`, with the exact products of the flagged pairs made here."""
    some = max(2**17 // W.shape[1] // 8 * 8, 8)  # features and tokens whose vectors stay in the cache
    for f in range(first, last):
        end[f] = begin[f]
    for f0 in range(first, last, some):
        for t0 in range(0, flags.shape[1], some):
            for f in range(f0, min(f0 + some, last)):
                w, k, kept = W[f], end[f], end[f]
                n = _flagged(flags[f], eights[f], t0, min(t0 + some, flags.shape[1]), k, tokens)
                while k + 4 <= n:
                    _dots(w, x, tokens, k, acts)
                    k += 4
                while k < n:
                    acts[k] = _product(w, x[tokens[k]])
                    k += 1
                for k in range(end[f], n):
                    kept = _keep(kept, tokens[k], acts[k] + b_enc[f], theta[f], bandwidth, half, tokens, acts, band)
                end[f] = kept


@jit(False)
def by_token(
    begin, end, tokens, acts, band, jump, room, start, cursor, features, t_acts, t_band, rows, row_of, r_begin,
    r_tokens, r_acts, places, slot, touched,
):  # fmt: skip
    """The pairs of each token, start[t]..start[t + 1], and the active ones of each feature that has any.

    Row r is feature rows[r], row_of its inverse (-1: not active); its pairs are r_begin[r]..r_begin[r + 1], at `places`
    among those of the tokens. slot[r]: among the rows of more than `room` pairs, else -1. touched: the features with a
    pair. Returns the numbers of rows, slots and touched features.
    """
    cursor[:] = 0
    for f in range(begin.size):
        for k in range(begin[f], end[f]):
            cursor[tokens[k]] += 1
    total = 0
    for t in range(cursor.size):
        start[t] = total
        total += cursor[t]
        cursor[t] = start[t]
    start[cursor.size] = total
    r = n = slots = met = 0
    for f in range(begin.size):
        r_begin[r], row_of[f] = n, -1
        if begin[f] < end[f]:
            touched[met] = f
            met += 1
        for k in range(begin[f], end[f]):
            t = tokens[k]
            p = cursor[t]
            cursor[t] = p + 1
            features[p], t_acts[p] = f, acts[k]
            if jump:
                t_band[p] = band[k]
            if acts[k] != 0:
                r_tokens[n], r_acts[n], places[n] = t, acts[k], p
                n += 1
        if n > r_begin[r]:
            rows[r], row_of[f], slot[r] = f, r, -1
            if n - r_begin[r] > room:
                slot[r] = slots
                slots += 1
            r += 1
    r_begin[r] = n
    return r, slots, met
