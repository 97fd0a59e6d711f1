"""An exact set of 64-bit hashes within a number of bytes: one flat table, or a Python set where numba is missing."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from chatsae.data.hashing import compiled, pick_engine
from chatsae.errors import UserError

_LOAD = 0.77  # keys per slot before the table grows
_GROWTH = 1.5  # so that just after growth a key has 8 * 1.5 / 0.77 = 15.6 bytes
_SMALLEST = 64  # slots
_MOST = 1 << 40  # slots that `home` can tell apart
_CHUNK = 1 << 20
_PYTHON_BYTES = 128  # per key of a Python set while it is being enlarged; 86 on average


class MemoryFullError(UserError):
    """Nothing more can be remembered within memory_gb; what was remembered before is unharmed."""


class HashSet(Protocol):
    """A set of uint64 other than 0. `limit` is the number of bytes that it may take; None: no limit."""

    limit: int | None

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes taken now."""
        ...

    def fits(self, more: int) -> bool:
        """Whether so many more keys can be held within `limit`."""
        ...

    def add(self, values: UInt64[np.ndarray, " H"]) -> None:
        """Inserts values; MemoryFullError when they do not fit, with some of them inserted.

        Sorted values belong into one call: one range of them after the other is slow.
        """
        ...

    def contains(self, values: UInt64[np.ndarray, " H"]) -> Bool[np.ndarray, " H"]:
        """Which of the values are in the set."""
        ...

    def keys(self, chunk: int = _CHUNK) -> Iterator[UInt64[np.ndarray, " C"]]:
        """All keys, rising, at most `chunk` at a time."""
        ...

    def retain(self, wanted: Callable[[UInt64[np.ndarray, " C"]], Bool[np.ndarray, " C"]]) -> None:
        """Removes the keys that are not wanted, and gives their memory back."""
        ...

    def greedy(
        self, values: UInt64[np.ndarray, " H"], bounds: Int64[np.ndarray, " B1"]
    ) -> tuple[Bool[np.ndarray, " B"], UInt64[np.ndarray, " K"]]:
        """Of each dialogue values[bounds[i] : bounds[i + 1]]: inserts all its values if none of them is in the set.

        Returns which dialogues were inserted, and the new keys in order. `values` is overwritten. Call `fits` before.
        """
        ...


def hash_set(engine: str | None = None, limit: int | None = None) -> HashSet:
    """An empty set: a FlatSet with numba, else a PythonSet."""
    return FlatSet(limit) if pick_engine(engine) == "numba" else PythonSet(limit)


class FlatSet:
    """One array in which the keys lie in rising order, each at or after its home: linear probing, kept sorted.

    The home of a key is proportional to it, so the order of the homes is the order of the keys. A look-up stops at the
    first empty slot or larger key. There is no wrap-around: some slots at the end are the home of no key. The content
    does not depend on the order of insertion. Growth enlarges the array itself, so there are never two tables.
    """

    def __init__(self, limit: int | None = None) -> None:
        loops = compiled()
        if loops is None:
            raise UserError("engine: numba cannot be imported; pip install 'chatsae[fast]', or use engine numpy")
        self.limit = limit
        self._loops: Any = loops
        self._slots = min(1 << 12, self._most_slots())
        self._table = np.zeros(self._slots + _slack(self._slots), np.uint64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        return self._table.nbytes

    def fits(self, more: int) -> bool:
        return self._size + more <= int(max(self._most_slots(), self._slots) * _LOAD)

    def add(self, values: UInt64[np.ndarray, " H"]) -> None:
        # sorted values in their order would crowd a table that is still to grow; a golden stride spreads them evenly
        step = next(s for s in range(int(len(values) * 0.618034) + 1, 0, -1) if math.gcd(s, len(values)) <= 1)
        state = np.array([0, 0, self._size], np.int64)
        while reason := self._loops.insert(*self._places, values, step, state):
            self._size = int(state[2])
            self._enlarge(reason)
        self._size = int(state[2])

    def contains(self, values: UInt64[np.ndarray, " H"]) -> Bool[np.ndarray, " H"]:
        found = np.empty(len(values), np.bool_)
        self._loops.contains(self._table, np.uint64(self._slots), values, found)
        return found

    def keys(self, chunk: int = _CHUNK) -> Iterator[UInt64[np.ndarray, " C"]]:
        for start in range(0, len(self._table), chunk):
            slots = self._table[start : start + chunk]
            yield slots[slots != 0]

    def retain(self, wanted: Callable[[UInt64[np.ndarray, " C"]], Bool[np.ndarray, " C"]]) -> None:
        size = 0
        for keys in self.keys():  # what is written lies before the slots that are still to be read
            keys = keys[wanted(keys)]
            self._table[size : size + len(keys)] = keys
            size += len(keys)
        self._table[size:] = 0
        self._size = size
        self._slots = min(max(int(size * _GROWTH / _LOAD), _SMALLEST), self._slots)
        self._rebuild(self._slots + _slack(self._slots))

    def greedy(
        self, values: UInt64[np.ndarray, " H"], bounds: Int64[np.ndarray, " B1"]
    ) -> tuple[Bool[np.ndarray, " B"], UInt64[np.ndarray, " K"]]:
        keep = np.empty(len(bounds) - 1, np.bool_)
        state = np.array([0, -1, self._size, 0], np.int64)
        while reason := self._loops.greedy(*self._places, values, bounds, keep, state):
            self._size = int(state[2])
            self._enlarge(reason)
        self._size = int(state[2])
        return keep, values[: state[3]]

    @property
    def _places(self) -> tuple[UInt64[np.ndarray, " S"], np.uint64, int]:
        """What every loop is given: the table, the slots that are homes, and the keys it may hold."""
        return self._table, np.uint64(self._slots), int(self._slots * _LOAD)

    def _most_slots(self) -> int:
        length = _MOST if self.limit is None else max(self.limit // 8, _SMALLEST)
        return length - _slack(length)

    def _enlarge(self, reason: int) -> None:
        slack = len(self._table) - self._slots
        if reason == self._loops.CROWDED:
            self._rebuild(len(self._table) + slack)
            return
        slots = min(int(self._slots * _GROWTH), self._most_slots())
        if slots <= self._slots:
            raise MemoryFullError(f"{self._size:,} n-grams fill the {self.nbytes:,} bytes that they may take")
        self._slots = slots
        self._rebuild(slots + max(slack, _slack(slots)))

    def _rebuild(self, length: int) -> None:
        """The same keys in an array of this length; if that is less than now, they are all at the front.

        When the keys crowd at the end the array becomes longer still, whatever the limit: by some hundred bytes,
        and never seen with hashes.
        """
        held = min(len(self._table), length)
        while True:
            _resize(self._table, length)
            if self._loops.spread(self._table, np.uint64(self._slots), self._loops.compact(self._table, held)):
                return
            held, length = length, 2 * length - self._slots


class PythonSet:
    """The same on a Python set, of about 86 bytes per key."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._keys: set[int] = set()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        return len(self) * _PYTHON_BYTES

    def fits(self, more: int) -> bool:
        return self.limit is None or (len(self) + more) * _PYTHON_BYTES <= self.limit

    def add(self, values: UInt64[np.ndarray, " H"]) -> None:
        for start in range(0, len(values), _CHUNK):
            chunk = set(values[start : start + _CHUNK].tolist())
            if not self.fits(len(chunk - self._keys)):
                raise MemoryFullError(f"{len(self):,} n-grams fill the {self.limit:,} bytes that they may take")
            self._keys |= chunk

    def contains(self, values: UInt64[np.ndarray, " H"]) -> Bool[np.ndarray, " H"]:
        return np.fromiter(map(self._keys.__contains__, values.tolist()), np.bool_, len(values))

    def keys(self, chunk: int = _CHUNK) -> Iterator[UInt64[np.ndarray, " C"]]:
        ordered = np.fromiter(self._keys, np.uint64, len(self))
        ordered.sort()
        for start in range(0, len(ordered), chunk):
            yield ordered[start : start + chunk]

    def retain(self, wanted: Callable[[UInt64[np.ndarray, " C"]], Bool[np.ndarray, " C"]]) -> None:
        kept: set[int] = set()
        for keys in self.keys():
            kept.update(keys[wanted(keys)].tolist())
        self._keys = kept

    def greedy(
        self, values: UInt64[np.ndarray, " H"], bounds: Int64[np.ndarray, " B1"]
    ) -> tuple[Bool[np.ndarray, " B"], UInt64[np.ndarray, " K"]]:
        keep, new = np.empty(len(bounds) - 1, np.bool_), []
        for i in range(len(keep)):
            hashes = dict.fromkeys(values[bounds[i] : bounds[i + 1]].tolist())
            keep[i] = self._keys.isdisjoint(hashes)
            if keep[i]:
                self._keys.update(hashes)
                new += hashes
        return keep, np.array(new, np.uint64)


def _slack(slots: int) -> int:
    """More slots at the end, for the keys that find no room between their home and the last slot."""
    return min(max(slots // 64, 16), 4096)


def _resize(table: UInt64[np.ndarray, " S"], length: int) -> None:
    """Changes the array's own memory: realloc, which moves pages and copies nothing where the system can.

    Raises:
        UserError: there is not so much memory, or not so many slots.
    """
    if length > _MOST:
        raise UserError("more than 2^40 slots are needed for the n-grams; use `--engine spark`")
    try:
        table.resize(length, refcheck=False)
    except MemoryError:
        raise UserError(
            f"no memory for {8 * length / 1e9:.1f} GB of n-gram hashes; give `memory_gb`, or use `--engine spark`"
        ) from None
