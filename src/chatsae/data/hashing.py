"""64-bit hashes of word n-grams: one specification, a compiled and a NumPy implementation that give the same numbers.

The specification, `poly64-v1`, with all arithmetic modulo 2^64 and fmix64 the finaliser of MurmurHash3:
    word    fmix64(sum of (byte + 1) * A^(bytes after it)) over its UTF-8 bytes
    window  fmix64(sum of word * B^(words after it)) over its n words; 0, the mark of an empty slot, becomes 1
Words are those of str.split(). Two different windows share a value with probability about 2^-64: when the
4e9 n-grams of the paper's corpus are looked up among 1.7e9 kept ones, 1.7e9 * 4e9 / 2^64 = 0.37 dialogues are expected
to be dropped for a collision. The hash is fixed and not keyed: text can be made to collide on purpose.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64

from chatsae.batch import Dialogue
from chatsae.errors import UserError

SPEC = "poly64-v1"
WORD_MULTIPLIER = 0x9E3779B97F4A7C15  # A and B: any odd numbers of no pattern; 5 modulo 8 gives the longest cycle
WINDOW_MULTIPLIER = 0xD1342543DE82EF95
_WIDE_SPACES = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_SPACE, _LEAD = 1, 2
_PIECE = 1 << 17  # bytes hashed at a time by NumPy: its working arrays stay in the cache


def _byte_classes() -> UInt8[np.ndarray, "256"]:
    classes = np.zeros(256, np.uint8)
    classes[[*range(0x09, 0x0E), *range(0x1C, 0x21)]] = _SPACE
    classes[[space.encode()[0] for space in _WIDE_SPACES]] = _LEAD
    return classes


BYTE_CLASS = _byte_classes()


@dataclass(frozen=True, slots=True)
class Hashes:
    """The hashes of B dialogues: those of dialogue i are values[bounds[i] : bounds[i + 1]], in reading order."""

    values: UInt64[np.ndarray, " H"]
    bounds: Int64[np.ndarray, " B1"]

    def where(self, mask: Bool[np.ndarray, " H"]) -> "Hashes":
        """Only the values at which `mask` is true."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(mask, dtype=np.int64)])
        return Hashes(self.values[mask], before[self.bounds])


@cache
def compiled() -> ModuleType | None:
    """The compiled loops; None without numba."""
    try:
        from chatsae.data import kernels
    except ImportError:
        return None
    return kernels


def pick_engine(engine: str | None) -> str:
    """`numba` where it is installed, else `numpy`; or the one asked for.

    Raises:
        UserError: the engine is unknown, or numba is asked for and cannot be imported.
    """
    if engine not in (None, "numba", "numpy"):
        raise UserError(f"engine: expected numba or numpy, got {engine!r}")
    if engine == "numba" and compiled() is None:
        raise UserError("engine: numba cannot be imported; pip install 'chatsae[fast]', or use engine numpy")
    return engine or ("numba" if compiled() else "numpy")


def ngram_hashes(
    dialogues: Sequence[Dialogue], n: int, roles: Collection[str] = (), *, engine: str | None = None
) -> Hashes:
    """The hash of every window of n words within one turn, in reading order; repetitions are not removed.

    `roles` leaves out the turns of all other roles; empty: every turn counts.

    Raises:
        UserError: n is below 1, or see `pick_engine`.
    """
    if n < 1:
        raise UserError(f"ngram: expected a number of words, got {n}")
    kernels = compiled() if pick_engine(engine) == "numba" else None
    data, ends, turns = _encode(dialogues, roles)
    if kernels is None:
        return _numpy_hashes(data, ends, turns, n)
    most = np.maximum((np.diff(ends, prepend=0) + 1) // 2 - (n - 1), 0).sum()
    values, bounds = np.empty(most, np.uint64), np.zeros(len(turns), np.int64)
    a, b = np.uint64(WORD_MULTIPLIER), np.uint64(WINDOW_MULTIPLIER)
    found = kernels.window_hashes(data, ends, turns, n, BYTE_CLASS, a, b, values, bounds)
    return Hashes(values[:found], bounds)


def _encode(
    dialogues: Sequence[Dialogue], roles: Collection[str]
) -> tuple[UInt8[np.ndarray, " N"], Int64[np.ndarray, " T"], Int64[np.ndarray, " B1"]]:
    """UTF-8 of all turns, each followed by a newline; the byte after each turn; the first turn of each dialogue."""
    texts, turns = [], [0]
    for dialogue in dialogues:
        # lone surrogates, which JSON can hold, are encoded as any other code point: different texts stay different
        texts += [m.content.encode("utf-8", "surrogatepass") for m in dialogue.messages if not roles or m.role in roles]
        turns.append(len(texts))
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1)
    texts.append(b"")
    return np.frombuffer(b"\n".join(texts), np.uint8), ends, np.array(turns, np.int64)


def mix(h: UInt64[np.ndarray, " H"]) -> UInt64[np.ndarray, " H"]:
    """fmix64 of MurmurHash3, a bijection."""
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


def home(h: UInt64[np.ndarray, " H"], slots: int) -> Int64[np.ndarray, " H"]:
    """floor(top 48 bits of h / 2^48 * slots): it never falls when h rises; slots below 2^40."""
    low = ((h >> np.uint64(16)) & np.uint64(0xFFFFFF)) * np.uint64(slots)
    return (((h >> np.uint64(40)) * np.uint64(slots) + (low >> np.uint64(24))) >> np.uint64(24)).astype(np.int64)


def _numpy_hashes(
    data: UInt8[np.ndarray, " N"], ends: Int64[np.ndarray, " T"], turns: Int64[np.ndarray, " B1"], n: int
) -> Hashes:
    words, starts = _numpy_words(data)
    turn = np.searchsorted(ends, starts, side="right")
    windows = max(len(words) - n + 1, 0)
    whole = turn[:windows] == turn[n - 1 :] if windows else np.zeros(0, np.bool_)
    values = np.zeros(0, np.uint64)
    if windows:
        values = _segment_sums(words, np.arange(windows), np.arange(n, windows + n), WINDOW_MULTIPLIER)
        values = np.maximum(mix(values[whole]), np.uint64(1))
    dialogue = np.searchsorted(turns, turn[:windows][whole], side="right")
    return Hashes(values, np.searchsorted(dialogue, np.arange(len(turns)), side="right"))


def _numpy_words(data: UInt8[np.ndarray, " N"]) -> tuple[UInt64[np.ndarray, " W"], Int64[np.ndarray, " W"]]:
    """The hash and the first byte of every word."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], _is_space(data), [True]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    words = np.empty(len(starts), np.uint64)
    for first, last in _pieces(starts, ends):
        offset = starts[first]
        piece = data[offset : ends[last - 1]].astype(np.uint64) + np.uint64(1)
        words[first:last] = _segment_sums(piece, starts[first:last] - offset, ends[first:last] - offset)
    return mix(words), starts


def _pieces(starts: Int64[np.ndarray, " W"], ends: Int64[np.ndarray, " W"]) -> Iterator[tuple[int, int]]:
    """Ranges of words that span about _PIECE bytes, at least one word each."""
    first = 0
    while first < len(starts):
        last = max(int(np.searchsorted(ends, starts[first] + _PIECE, side="right")), first + 1)
        yield first, last
        first = last


def _is_space(data: UInt8[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    classes = BYTE_CLASS[data]
    space = classes == _SPACE
    leads = np.flatnonzero(classes == _LEAD)
    leads = leads[leads + 2 < len(data)]  # every turn ends in a newline, so no wide space is cut off by this
    code = data[leads].astype(np.int32) << 16 | data[leads + 1].astype(np.int32) << 8 | data[leads + 2]
    for wide in (space.encode() for space in _WIDE_SPACES):
        found = leads[code >> 8 * (3 - len(wide)) == int.from_bytes(wide, "big")]
        for k in range(len(wide)):
            space[found + k] = True
    return space


def _segment_sums(
    items: UInt64[np.ndarray, " I"],
    starts: Int64[np.ndarray, " S"],
    ends: Int64[np.ndarray, " S"],
    multiplier: int = WORD_MULTIPLIER,
) -> UInt64[np.ndarray, " S"]:
    """Sum of item * multiplier^(items after it) over items[start:end], modulo 2^64, for each of the segments.

    Prefix sums of item_i * multiplier^-i; an odd multiplier has an inverse modulo 2^64.
    """
    inverse = _powers(pow(multiplier, -1, 1 << 64), len(items))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(items * inverse)])
    return (sums[ends] - sums[starts]) * _powers(multiplier, len(items))[ends - 1]


def _powers(multiplier: int, count: int) -> UInt64[np.ndarray, " I"]:
    """multiplier^0 .. multiplier^(count - 1) modulo 2^64."""
    room = 1 << max(count - 1, 1).bit_length()
    return (_power_table if room <= 2 * _PIECE else _power_table.__wrapped__)(multiplier, room)[:count]


@cache
def _power_table(multiplier: int, count: int) -> UInt64[np.ndarray, " I"]:
    powers = np.full(count, multiplier, np.uint64)
    powers[0] = 1
    return np.cumprod(powers)
