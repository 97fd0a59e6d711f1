"""The compiled loops that find the active pairs behind the encoder (see `chatsae.sae.kernels` for the letters).

Every product that is kept is exact. `search` leaves out the pairs that cannot be active before, on a CPU with AMX.
"""

import math

import numpy as np

from chatsae.sae.instructions import (
    TILE,
    add_products,
    clear_sums,
    configure,
    load_left,
    load_right,
    release,
    store_sums,
    turn,
)
from chatsae.sae.kernels import REORDER, jit

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


@jit(REORDER, "always")
def _products(W, f, x, tokens, k, n, acts):
    """acts[k..n] = W[f] · x[tokens[k..n]], four per visit; up to three more are written."""
    d, zero = W.shape[1], W.dtype.type(0)
    while k < n:
        last, t0 = n - 1, tokens[k]
        t1, t2, t3 = tokens[min(k + 1, last)], tokens[min(k + 2, last)], tokens[min(k + 3, last)]
        q0 = q1 = q2 = q3 = zero
        for j in range(d):
            q0 += W[f, j] * x[t0, j]
            q1 += W[f, j] * x[t1, j]
            q2 += W[f, j] * x[t2, j]
            q3 += W[f, j] * x[t3, j]
        acts[k], acts[k + 1], acts[k + 2], acts[k + 3] = q0, q1, q2, q3
        k += 4


@jit(REORDER)
def narrow(first, last, W, out, norms):
    """The rows of W as the bits of bfloat16, rounded to nearest, and norms [2, F]: of the rows, of what they lost."""
    half, bits = np.uint32(0x8000), np.uint32(16)
    for f in range(first, last):
        row, to, square, lost = W[f], out[f - first], W.dtype.type(0), W.dtype.type(0)
        for j in range(row.size):
            to[j] = np.uint16((np.float32(row[j]).view(np.uint32) + half) >> bits)
        for j in range(row.size):
            off = row[j] - np.uint32(np.uint32(to[j]) << bits).view(np.float32)
            square += row[j] * row[j]
            lost += off * off
        norms[0, f - first], norms[1, f - first] = math.sqrt(square), math.sqrt(lost)


@jit(False)
def pack(rows, packed):
    """`narrow` rows [32 panels, 32 steps] as the right side of a product: [panel, step, 2] tiles."""
    stride, to, steps = rows.strides[0], packed.ctypes.data, rows.shape[1] // 32
    for panel in range(rows.shape[0] // 32):
        for k in range(steps):
            at = rows.ctypes.data + 32 * panel * stride + 64 * k
            turn(at, stride, to)
            turn(at + 16 * stride, stride, to + TILE)
            to += 2 * TILE


@jit(False)
def _multiply(rows, packed, out):
    """out [32, N] = 32 `narrow` rows times all that is `pack`ed."""
    stride, steps = rows.strides[0], rows.shape[1] // 32
    right, to = packed.ctypes.data, out.ctypes.data
    for _ in range(out.shape[1] // 32):
        clear_sums()
        for k in range(steps):
            left = rows.ctypes.data + 64 * k
            load_left(left, left + 16 * stride, stride)
            load_right(right, right + TILE)
            add_products()
            right += 2 * TILE
        store_sums(to, out.strides[0])
        to += 128


@jit(False)
def _flag(z, f, norms, bounds, b_enc, low, flags, begin, end, used):
    """flags[r, t]: whether the pair of feature f + r and token t may be active, from products z [32, N]; NaN may.

    z is off by norms[0, r] bounds[0, t] + norms[1, r] bounds[1, t] at the most. Each feature gets room for its pairs
    and FREE more, behind the `used` places; returns where the next would begin.
    """
    rounding, least = np.float32(2**-21), np.float32(1e-17)  # of z + b_enc; of what is too small for its square
    n = bounds.shape[1]
    for r in range(32):
        row, out, passed, norm, lost = z[r], flags[r], 0, norms[0, r], norms[1, r]
        most = low[f + r] - b_enc[f + r] - (rounding * (abs(low[f + r]) + abs(b_enc[f + r])) + least)
        for t in range(n):
            may = not (row[t] + (norm * bounds[0, t] + lost * bounds[1, t]) <= most)
            out[t] = may
            passed += may
        out[n:] = 0
        begin[f + r] = end[f + r] = used
        used += passed + FREE
    return used


@jit(REORDER)
def search(
    first, last, parts, config, x, packed, bounds, W, b_enc, low, theta, bandwidth, half, begin, end, tokens, acts,
    band, room, most, bits, norms, strips, flags, eights, reached, passed,
):  # fmt: skip
    """What `count` and `compact` find, by products in bfloat16 of all pairs and exact ones of those that may be active.

    Parts first <= part < last of the features, each with so much `room` in the lists; some features at a time, whose
    rows stay in the cache in between. passed[part]: pairs that may be active; reached[part]: how far it came, which is
    not to its end where its room was used up or `most` passed. packed, bounds: what `pack` and `_flag` need of x. bits
    [parts, some, D], norms [parts, 2, some], strips [parts, 32, N or more], flags [parts, some, N or more] and
    `eights`, which is the same: work space.
    """
    d, some, panels = x.shape[1], bits.shape[1], len(W) // 32
    length, wide = 8 * eights.shape[2], max(2**17 // d // 8 * 8, 8)  # tokens whose vectors stay in the cache
    configure(config)
    for part in range(first, last):
        start, stop = 32 * (panels * part // parts), 32 * (panels * (part + 1) // parts)
        f0, used = start, part * room
        passed[part] = 0
        while f0 < stop:
            f1 = min(f0 + some, stop)
            narrow(f0, f1, W, bits[part], norms[part])
            after = used
            for r in range(0, f1 - f0, 32):
                _multiply(bits[part, r : r + 32], packed, strips[part])
                args = (strips[part], f0 + r, norms[part, :, r : r + 32], bounds, b_enc, low, flags[part, r : r + 32])
                after = _flag(*args, begin, end, after)
            passed[part] += after - used - FREE * (f1 - f0)
            if after > (part + 1) * room or passed[part] > most:
                break
            for t0 in range(0, length, wide):
                for f in range(f0, f1):
                    kept = end[f]
                    k = _flagged(eights[part], f - f0, t0, min(t0 + wide, length), kept, tokens)
                    _products(W, f, x, tokens, kept, k, acts)
                    for i in range(end[f], k):
                        kept = _keep(kept, tokens[i], acts[i] + b_enc[f], theta[f], bandwidth, half, tokens, acts, band)
                    end[f] = kept
            f0, used = f1, after
        reached[part] = f0
    release()


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
