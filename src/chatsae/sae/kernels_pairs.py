"""The compiled loops that find the active pairs behind the encoder (see `chatsae.sae.kernels` for the letters)."""

import numpy as np

from chatsae.sae.kernels import jit

FREE = 4
"""Slots behind the pairs of a feature that may be written."""


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


@jit(False)
def make_room(counts, begin, used):
    """Where the pairs of each feature go, with FREE slots behind them; returns where the next would go."""
    for f in range(counts.size):
        begin[f] = used
        used += counts[f] + FREE
    return used


@jit(False)
def found(begin, end):
    """The number of pairs."""
    n = 0
    for f in range(begin.size):
        n += end[f] - begin[f]
    return n


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
def _flagged(eights, f, first, last, n, tokens):
    """Write the tokens first..last with a flag of feature f at n; returns where the next goes.

    Flags are bytes of 0 and 1, eight to a word. A product brings those of a word together, 64 make one number, and its
    ones are taken from below: a branch per flag would be guessed wrongly half of the time.
    """
    gather, one, top, exponent = np.uint64(0x0102040810204080), np.uint64(1), np.uint64(56), np.uint64(52)
    for i0 in range(first // 8, last // 8, 8):
        ones, i1 = np.uint64(0), min(i0 + 8, last // 8)
        for i in range(i0, i1):
            ones |= ((eights[f, i] * gather) >> top) << np.uint64(8 * (i - i0))
        while ones != 0:
            lowest = ones & (~ones + one)
            tokens[n] = 8 * i0 + np.int64(np.float64(lowest).view(np.uint64) >> exponent) - 1023
            n += 1
            ones ^= lowest
    return n


@jit(False)
def compact(first, last, z, eights, b_enc, theta, bandwidth, half, begin, end, tokens, acts, band):
    """The pairs of each feature in the order of tokens: acts = z + b_enc where that exceeds theta, else 0.

    band: |(z + b_enc - theta) / bandwidth| < half; not written where the bandwidth is 0, as theta does not learn there.
    The pairs of feature f go to begin[f]..end[f].
    """
    for f in range(first, last):
        kept = begin[f]
        n = _flagged(eights, f, 0, 8 * eights.shape[1], kept, tokens)
        for k in range(begin[f], n):
            t = tokens[k]
            kept = _keep(kept, t, z[f, t] + b_enc[f], theta[f], bandwidth, half, tokens, acts, band)
        end[f] = kept


@jit(False)
def by_token(
    begin, end, tokens, acts, band, jump, room, start, cursor, features, t_acts, t_band, rows, row_of, r_begin,
    r_tokens, r_acts, places, slot,
):  # fmt: skip
    """The pairs of each token, start[t]..start[t + 1], and the active ones of each feature that has any.

    Row r is feature rows[r], row_of its inverse (-1: not active); its pairs are r_begin[r]..r_begin[r + 1], at `places`
    among those of the tokens. slot[r]: among the rows of more than `room` pairs, else -1. Returns the numbers of rows
    and slots.
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
    r = n = slots = 0
    for f in range(begin.size):
        r_begin[r], row_of[f] = n, -1
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
    return r, slots
