"""The compiled loops of the deduplication. Importing this module imports numba; nothing does so unless it is needed.

All of them are here because numba's cache notices changes of one file only.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_ONE = np.uint64(1)
_MIX1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX2 = np.uint64(0xC4CEB9FE1A85EC53)
_LOW24 = np.uint64(0xFFFFFF)
DONE, GROW, CROWDED = 0, 1, 2


def _jit(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no directory to keep compiled code in: compiled anew in every process
        return numba.njit(nogil=True)(function)


@_jit
def _mix(h):
    """fmix64 of MurmurHash3, a bijection."""
    h = (h ^ (h >> np.uint64(33))) * _MIX1
    h = (h ^ (h >> np.uint64(33))) * _MIX2
    return h ^ (h >> np.uint64(33))


@_jit
def home(h, slots):
    """floor(top 48 bits of h / 2^48 * slots): it never falls when h rises; slots below 2^40."""
    low = ((h >> np.uint64(16)) & _LOW24) * slots
    return np.int64(((h >> np.uint64(40)) * slots + (low >> np.uint64(24))) >> np.uint64(24))


@_jit
def _space_width(data, i, end):
    """Bytes of the white space of two or three bytes at i; 0 when there is none."""
    if i + 1 >= end:
        return 0
    first, second = data[i], data[i + 1]
    if first == 0xC2:
        return 2 if second == 0x85 or second == 0xA0 else 0
    if i + 2 >= end:
        return 0
    third = data[i + 2]
    if first == 0xE1:
        return 3 if second == 0x9A and third == 0x80 else 0
    if first == 0xE3:
        return 3 if second == 0x80 and third == 0x80 else 0
    if second == 0x80:
        return 3 if third <= 0x8A or third == 0xA8 or third == 0xA9 or third == 0xAF else 0
    return 3 if second == 0x81 and third == 0x9F else 0


@_jit
def _split(data, i, end, byte_class, multiplier, words):
    """Hashes of the words of one turn into `words`, still to be mixed; their number. The turn's last byte is white.

    Free of branches for one-byte characters, since where words end cannot be predicted.
    """
    count, inside, h = 0, 0, np.uint64(0)
    while i < end:
        byte = data[i]
        kind = np.int64(byte_class[byte])
        if kind == 2:
            width = _space_width(data, i, end)
            kind = 1 if width else 0
            i += max(width, 1)
        else:
            i += 1
        words[count] = h
        count += kind & inside
        inside = 1 - kind
        h = (h * multiplier + (np.uint64(byte) + _ONE)) & (np.uint64(0) - np.uint64(inside))
    return count


@_jit
def window_hashes(data, ends, turns, n, byte_class, word_multiplier, window_multiplier, values, bounds):
    """See `hashing.ngram_hashes`: dialogue d has the turns turns[d]..turns[d+1], turn t ends before byte ends[t]."""
    longest, start = 0, 0
    for end in ends:
        longest, start = max(longest, end - start), end
    words = np.empty(longest // 2 + 1, np.uint64)
    leaving = _ONE
    for _ in range(n):
        leaving *= window_multiplier
    out, start = 0, 0
    for d in range(len(turns) - 1):
        for t in range(turns[d], turns[d + 1]):
            count = _split(data, start, ends[t], byte_class, word_multiplier, words)
            start = ends[t]
            if count < n:
                continue
            h = np.uint64(0)
            for i in range(count):
                words[i] = _mix(words[i])
                h = h * window_multiplier + words[i]
                if i >= n:
                    h -= words[i - n] * leaving
                if i >= n - 1:
                    values[out] = max(_mix(h), _ONE)
                    out += 1
        bounds[d + 1] = out
    return out


@_jit
def _find(table, slots, h):
    """The first slot that is empty or holds h or more; the length of the table when there is none."""
    i = home(h, slots)
    while i < len(table) and table[i] != 0 and table[i] < h:
        i += 1
    return i


@_jit
def _insert(table, slots, h):
    """1: inserted, 0: was there, -1: no empty slot from here to the end (nothing was changed)."""
    i = _find(table, slots, h)
    if i == len(table):
        return -1
    if table[i] == h:
        return 0
    empty = i
    while empty < len(table) and table[empty] != 0:
        empty += 1
    if empty == len(table):
        return -1
    while empty > i:
        table[empty] = table[empty - 1]
        empty -= 1
    table[i] = h
    return 1


@_jit
def insert(table, slots, capacity, values, step, state):
    """Inserts the values, `step` apart and round again; DONE, GROW or CROWDED.

    state = [values done, index of the next, keys in the table]; step is coprime to the number of values.
    """
    while state[0] < len(values):
        if state[2] >= capacity:
            return GROW
        inserted = _insert(table, slots, values[state[1]])
        if inserted < 0:
            return CROWDED
        state[2] += inserted
        state[0] += 1
        state[1] = (state[1] + step) % len(values)
    return DONE


@_jit
def contains(table, slots, values, found):
    for k in range(len(values)):
        i = _find(table, slots, values[k])
        found[k] = i < len(table) and table[i] == values[k]


@_jit
def greedy(table, slots, capacity, values, bounds, keep, state):
    """Keeps each dialogue none of whose values is in the table, and inserts its values.

    state = [dialogue, value to insert next or -1, keys in the table, new keys]: with GROW or CROWDED the caller
    enlarges the table and calls again. New keys are gathered at the front of `values`, which is read ahead of them.
    """
    while state[0] < len(keep):
        d = state[0]
        first, last = bounds[d], bounds[d + 1]
        if state[1] < 0:
            shared = False
            for k in range(first, last):
                i = _find(table, slots, values[k])
                if i < len(table) and table[i] == values[k]:
                    shared = True
                    break
            keep[d] = not shared
            state[1] = last if shared else first
        while state[1] < last:
            if state[2] >= capacity:
                return GROW
            h = values[state[1]]
            inserted = _insert(table, slots, h)
            if inserted < 0:
                return CROWDED
            if inserted:
                values[state[3]] = h
                state[3] += 1
                state[2] += 1
            state[1] += 1
        state[0], state[1] = d + 1, -1
    return DONE


@_jit
def compact(table, length):
    """Moves the keys of table[:length], in order, to the end of the table; the slot of the first one.

    Of the keys at or above a slot there are no more than slots to the end: the write never passes below the read.
    """
    write = len(table)
    for read in range(length - 1, -1, -1):
        key = table[read]
        if key != 0:
            table[read] = 0
            write -= 1
            table[write] = key
    return write


@_jit
def spread(table, slots, first):
    """Puts the sorted keys at table[first:] into their places from the front; False when the end is too crowded.

    The places rise by at least one from key to key. So if the last one fits, at or before the last slot, the key that
    has m keys after it goes at least m slots before that one, which is at or before the slot it is read from: no
    unread key is overwritten. If a place would lie behind the slot of its key, the last key cannot fit; then the table
    still holds every key in order, and `compact` may follow.
    """
    write = 0
    for read in range(first, len(table)):
        key = table[read]
        write = max(write, home(key, slots))
        if write > read:
            return False
        table[read] = 0
        table[write] = key
        write += 1
    return True


@_jit
def mark(seen, again, bits, values):
    """Sets the bit of each value in `seen`, and in `again` when it was set in `seen`; how many `seen` has more."""
    fresh = 0
    for h in values:
        i = home(h, bits)
        byte, bit = i >> 3, np.uint8(1 << (i & 7))
        if seen[byte] & bit:
            again[byte] |= bit
        else:
            seen[byte] |= bit
            fresh += 1
    return fresh


@_jit
def marked(bitmap, bits, values, found):
    for k in range(len(values)):
        i = home(values[k], bits)
        found[k] = bitmap[i >> 3] & np.uint8(1 << (i & 7)) != 0
