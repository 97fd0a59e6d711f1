"""Which hashes occur twice: two bit maps, and a superset of the answer."""

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64

from chatsae.data.hashing import compiled, home, pick_engine

_MOST = 1 << 36  # bytes: fewer than 2^40 bits, which `home` can tell apart


class Suspects:
    """The hashes that occur at least twice in `chunks`, and some others.

    The bit of a hash is set in a first map, and in a second one when the first has it already. A hash that occurs
    twice always finds its bit set; one that occurs once does so only when it shares the bit with another. The first
    map is dropped at the end. Each map takes `nbytes`.
    """

    def __init__(self, chunks: Iterable[UInt64[np.ndarray, " C"]], *, nbytes: int, engine: str | None = None) -> None:
        self._loops = compiled() if pick_engine(engine) == "numba" else None
        self._again = np.zeros(min(max(nbytes, 1), _MOST), np.uint8)
        self._bits = 8 * len(self._again)
        seen = np.zeros_like(self._again)
        marked = sum(self._mark(seen, values) for values in chunks)
        clear = self._bits - marked
        self.distinct = self._bits * math.log(self._bits / clear) if clear else math.inf
        """About how many different hashes there were (linear counting); infinity when the first map is full."""

    @property
    def nbytes(self) -> int:
        return self._again.nbytes

    def __call__(self, values: UInt64[np.ndarray, " H"]) -> Bool[np.ndarray, " H"]:
        """True for every value that occurs twice."""
        if self._loops is None:
            return _bits_of(self._again, home(values, self._bits))
        found = np.empty(len(values), np.bool_)
        self._loops.marked(self._again, np.uint64(self._bits), values, found)
        return found

    def _mark(self, seen: UInt8[np.ndarray, " M"], values: UInt64[np.ndarray, " C"]) -> int:
        """How many bits of `seen` are new."""
        if self._loops is not None:
            return self._loops.mark(seen, self._again, np.uint64(self._bits), values)
        places, counts = np.unique(home(values, self._bits), return_counts=True)
        old = _bits_of(seen, places)
        _set(self._again, places[(counts > 1) | old])
        _set(seen, places)
        return len(places) - int(old.sum())


def _bits_of(bitmap: UInt8[np.ndarray, " M"], places: Int64[np.ndarray, " H"]) -> Bool[np.ndarray, " H"]:
    return (bitmap[places >> 3] >> (places & 7).astype(np.uint8) & 1).astype(np.bool_)


def _set(bitmap: UInt8[np.ndarray, " M"], places: Int64[np.ndarray, " H"]) -> None:
    np.bitwise_or.at(bitmap, places >> 3, np.left_shift(1, places & 7).astype(np.uint8))
