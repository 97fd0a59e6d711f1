"""The paper's greedy n-gram deduplication (its Algorithm 1): exact, in one pass, within a given memory."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, UInt64

from chatsae import console
from chatsae.batch import Dialogue
from chatsae.config import Role
from chatsae.data.bitmaps import Suspects
from chatsae.data.hashing import Hashes, ngram_hashes, pick_engine
from chatsae.data.hashset import HashSet, MemoryFullError, hash_set
from chatsae.errors import UserError
from chatsae.typed import convert

__all__ = ["Greedy", "MemoryFullError", "dedup", "dedup_reference", "ngrams"]

Values: TypeAlias = UInt64[np.ndarray, " H"]
_FIRST_BATCH, _LARGEST_BATCH = 32, 1024  # dialogues; the first results come soon
_BATCH_CHARS = 1 << 22
_MAP_BYTES = 1 << 26  # of each bit map, when memory_gb is not given
_SLOW_AFTER = 200_000  # dialogues without numba


def ngrams(dialogue: Dialogue, n: int, roles: Collection[str] = ()) -> set[tuple[str, ...]]:
    """Every window of n whitespace words within one turn (of the roles, if given); shorter turns have none."""
    turns = [m.content.split() for m in dialogue.messages if not roles or m.role in roles]
    return {tuple(words[i : i + n]) for words in turns for i in range(len(words) - n + 1)}


def dedup_reference(dialogues: Iterable[Dialogue], n: int, roles: Collection[str] = ()) -> list[bool]:
    """Which dialogues `dedup` keeps, by definition and without hashes: what every fast path is held against."""
    seen: set[tuple[str, ...]] = set()
    keep = []
    for dialogue in dialogues:
        windows = ngrams(dialogue, n, roles)
        keep.append(seen.isdisjoint(windows))
        if keep[-1]:
            seen |= windows
    return keep


def dedup(
    dialogues: Iterable[Dialogue],
    *,
    ngram: int = 20,
    roles: Collection[str] = (),
    memory_gb: float | None = None,
    tally: Counter[str] | None = None,
) -> Iterator[Dialogue]:
    """The dialogues that share no n-gram with an earlier kept one, in order (the paper's Algorithm 1).

    The n-grams of a dropped dialogue are not remembered. The seen ones are held as 64-bit hashes (11 to 16 bytes each,
    86 without numba), so that memory grows with what is kept. When that would pass `memory_gb`, what is left of
    `dialogues` is read once more, to find out what need not be remembered; the result is the same. `ngram=0` passes
    everything on. `roles` are those whose turns count; empty: all. Drops are counted in `tally`. Reads ahead by a
    batch: 32 dialogues at first, 1,024 at most.

    Raises:
        UserError: ngram is negative, a role is unknown; or memory_gb is used up, and `dialogues` is an iterator, which
            cannot be read twice, or even what occurs twice does not fit.
    """
    if ngram < 0:
        raise UserError(f"data.ngram: expected 0 (off) or a number of words, got {ngram}")
    for role in roles:
        convert(role, Role, "data.ngram_roles")
    if ngram == 0:
        return iter(dialogues)
    stream = iter(dialogues)
    again = None if stream is dialogues else dialogues
    greedy = Greedy(ngram, roles=roles, memory_gb=memory_gb, narrows=again is not None)
    return _kept(stream, again, greedy, tally)


def _kept(
    stream: Iterator[Dialogue], again: Iterable[Dialogue] | None, greedy: "Greedy", tally: Counter[str] | None
) -> Iterator[Dialogue]:
    position = 0
    for batch in _batches(stream):
        try:
            keep = greedy.keep(batch)
        except MemoryFullError:
            if again is None:
                raise
            greedy.narrow(_batches(_from(again, position, batch[0])))
            keep = greedy.keep(batch)
        position += len(batch)
        for dialogue, new in zip(batch, keep, strict=True):
            if new:
                yield dialogue
            elif tally is not None:
                tally[f"shares {greedy.ngram} words in a row with an earlier dialogue"] += 1


def _from(dialogues: Iterable[Dialogue], position: int, expected: Dialogue) -> Iterator[Dialogue]:
    """Another reading, from a position on."""
    rest = islice(dialogues, position, None)
    first = next(rest, None)
    if first != expected:
        raise UserError(
            f"memory_gb is used up after {position:,} dialogues, and reading the rest once more gives another one "
            "there: the source must give the same order each time; or raise `memory_gb`"
        )
    return chain([expected], rest)


def _batches(stream: Iterator[Dialogue]) -> Iterator[list[Dialogue]]:
    """Batches that grow; what was read before an error is passed on before the error is."""
    size, chars, batch = _FIRST_BATCH, 0, []
    try:
        for dialogue in stream:
            batch.append(dialogue)
            chars += sum(len(message.content) for message in dialogue.messages)
            if len(batch) == size or chars >= _BATCH_CHARS:
                yield batch
                size, chars, batch = min(2 * size, _LARGEST_BATCH), 0, []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _unsigned(values: np.ndarray) -> Values:
    """Hashes as they are compared; files and engines that know no unsigned integers keep the same 64 bits."""
    return np.ascontiguousarray(values).astype(np.uint64, copy=False)


class Greedy:
    """Greedy decisions, batch by batch; what `dedup` and `chatsae prepare` run on.

    `memory_gb` (10^9 bytes) bounds what is remembered between batches; the working memory of a batch, about ten times
    its text, and what waits for `take_new` come on top. With `narrows` half of it is left for `narrow`.
    `engine`: numba or numpy; None: numba where it is installed. Both decide alike.

    Raises:
        UserError: a number is not positive, or see `hashing.pick_engine`.
    """

    def __init__(
        self,
        ngram: int,
        *,
        roles: Collection[str] = (),
        memory_gb: float | None = None,
        engine: str | None = None,
        narrows: bool = True,
    ) -> None:
        if ngram < 1:
            raise UserError(f"ngram: expected a number of words, got {ngram}")
        if memory_gb is not None and not memory_gb > 0:
            raise UserError(f"memory_gb: expected a number above 0, got {memory_gb}")
        self.ngram, self.roles, self.memory_gb = ngram, frozenset(roles), memory_gb
        self.engine = pick_engine(engine)
        self.full = False
        """Whether `keep` has refused a batch and `narrow` has not been called since."""
        self._hint = engine is None and self.engine == "numpy"
        self._bytes = None if memory_gb is None else int(memory_gb * 1e9)
        share = None if self._bytes is None else self._bytes // 2 if narrows else self._bytes
        self._seen: HashSet = hash_set(self.engine, share)
        self._filters: list[Callable[[Values], Bool[np.ndarray, " H"]]] = []
        self._allowed: HashSet | None = None
        self._suspects: Suspects | None = None
        self._new: list[Values] | None = None
        self._read = 0

    def __len__(self) -> int:
        """Hashes remembered."""
        return len(self._seen)

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered: the table, the bit map, the shared hashes, what waits for `take_new`."""
        parts = [self._seen, self._allowed, self._suspects, *(self._new or [])]
        return sum(part.nbytes for part in parts if part is not None)

    def keep(self, dialogues: Sequence[Dialogue]) -> list[bool]:
        """For each dialogue, in order: whether it shares no n-gram with a kept one. One without n-grams is kept.

        Raises:
            MemoryFullError: the n-grams of this batch might not fit; nothing of it was remembered. Call `narrow`, or
                give up.
        """
        hashes = self._hashes(dialogues)
        if not self._seen.fits(len(hashes.values)):
            self.full = True
            raise MemoryFullError(self._full_message())
        keep, new = self._seen.greedy(hashes.values, hashes.bounds)
        if self._new is not None and len(new):
            self._new.append(new.copy())
        self._read += len(dialogues)
        if self._hint and self._read > _SLOW_AFTER:
            self._hint = False
            console.warn("deduplicating without numba: several times faster with pip install 'chatsae[fast]'")
        return keep.tolist()

    def take_new(self) -> Values:
        """The hashes inserted since the last call, for a checkpoint; the first call gives all there are."""
        chunks = list(self._seen.keys()) if self._new is None else self._new
        self._new = []
        return np.concatenate([np.zeros(0, np.uint64), *chunks])

    def restore(self, values: Values) -> None:
        """Remembers hashes that `take_new` gave, in this or another process; it does not give them again.

        Raises:
            MemoryFullError: they do not fit, and nothing is remembered now; call `narrow` with `known`.
        """
        if self._new is None:
            self._new = list(self._seen.keys())
        try:
            self._seen.add(_unsigned(values))
        except MemoryFullError:
            self.full = True
            self._seen = hash_set(self.engine, self._seen.limit)
            raise MemoryFullError(self._full_message()) from None

    def only(self, values: Values) -> None:
        """From now on nothing but these hashes counts: those that occur in two or more dialogues, found elsewhere.

        All of memory_gb is then used, since `narrow` could forget nothing more.

        Raises:
            MemoryFullError: they do not fit into memory_gb.
        """
        allowed = hash_set(self.engine, self._bytes)
        try:
            allowed.add(_unsigned(values))
        except MemoryFullError:
            raise MemoryFullError(
                f"memory_gb = {self.memory_gb} cannot hold the {len(values):,} shared n-grams; raise it"
            ) from None
        self._allowed = allowed
        self._filters.append(allowed.contains)
        if self._bytes is not None:
            self._seen.limit = self._bytes - allowed.nbytes

    def narrow(
        self, rest: Iterable[Sequence[Dialogue]], known: Iterable[Values] = (), *, map_bytes: int | None = None
    ) -> None:
        """Forgets all n-grams that occur once only, and from now on remembers none of them: decisions stay the same.

        `rest` are all dialogues that are still to come, in batches, the refused one first: a second reading. What two
        dialogues share occurs twice, in `rest` or among what is remembered, and is found with two bit maps of
        `map_bytes` each (a quarter of memory_gb); a collision there only makes too much be remembered.
        `known` are hashes kept earlier that are not remembered now (see `restore`), readable twice.

        Raises:
            UserError: called a second time, or after `only`: memory_gb is too small for what occurs twice.
        """
        if self._suspects is not None or self._allowed is not None:
            raise UserError(self._full_message())
        if map_bytes is None:
            map_bytes = _MAP_BYTES if self._bytes is None else self._bytes // 4
        coming = (self._hashes(batch).values for batch in rest)
        suspects = Suspects(
            chain(self._seen.keys(), map(_unsigned, known), coming), nbytes=map_bytes, engine=self.engine
        )
        self._seen.retain(suspects)
        self._suspects = suspects
        self._filters.append(suspects)
        if self._bytes is not None:
            self._seen.limit = self._bytes - suspects.nbytes
        for values in map(_unsigned, known):
            self.restore(values[suspects(values)])
        self.full = False

    def _hashes(self, dialogues: Sequence[Dialogue]) -> Hashes:
        hashes = ngram_hashes(dialogues, self.ngram, self.roles, engine=self.engine)
        for wanted in self._filters:
            hashes = hashes.where(wanted(hashes.values))
        return hashes

    def _full_message(self) -> str:
        """What happened and what helps; bytes per n-gram as `hashset` has them."""
        text = f"memory_gb = {self.memory_gb} is used up after {self._read:,} dialogues by {len(self):,} n-grams"
        if self._allowed is not None:
            return f"{text} that occur twice; raise it"
        if self._suspects is None:
            return f"{text}; raise it, give a source that can be read twice, or use `--engine spark`"
        enough = (16 if self.engine == "numba" else 128) * self._suspects.distinct / 1e9
        need = f"at most {enough:.3g}" if enough < 1e6 else "many times more"
        return f"{text} that may occur twice; raise it ({need} GB are needed), or use `--engine spark`"
