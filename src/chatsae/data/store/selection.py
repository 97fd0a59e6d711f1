"""Which samples are kept: deduplicated, split, and no more held out than is asked for; resumable after every chunk."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from chatsae import console
from chatsae.batch import Dialogue, Split
from chatsae.config import DataConfig
from chatsae.data.dedup import Greedy, MemoryFullError
from chatsae.data.reading import Reading, Sample, samples
from chatsae.data.render import CHARACTERS, characters_of
from chatsae.data.sources import Kind, Source
from chatsae.data.stream import RowStream

CHUNK = 512  # usable samples that are compared, and tokenised, together


@dataclass(frozen=True, slots=True)
class Chunk:
    """The kept ones of some samples; `state` goes on behind them, with the `hashes` of this and all earlier chunks.

    `narrowed`: the hashes are those of shared n-grams only (`Greedy.narrow`).
    """

    samples: list[Sample]
    state: dict[str, Any]
    hashes: np.ndarray
    narrowed: bool

    @property
    def n_rows(self) -> int:
        """Rows of the sources up to here, the rejected ones included."""
        return sum(reading["rows"] for reading in self.state["readings"])


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a selection goes on: a chunk's state, and all hashes up to it, those before and those after narrowing."""

    state: dict[str, Any]
    hashes: np.ndarray
    narrowed_hashes: np.ndarray


class Selection(Iterator[Chunk]):
    """The kept samples of some sources, chunk by chunk.

    Dialogues go through the greedy deduplication, documents do not. Of held-out splits the first `held_out` are kept
    (none of documents); what comes later is left out, never trained on, so that a dialogue's split follows from its
    content alone. `shared`: the hashes that more than one sample has, where they are known already.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        kind: Kind,
        config: DataConfig,
        *,
        seed: int,
        special: re.Pattern[str],
        shared: np.ndarray | None = None,
        resume: Resume | None = None,
    ) -> None:
        self._sources, self._kind, self._config, self._seed, self._special = sources, kind, config, seed, special
        self.readings = [Reading() for _ in sources]
        self.dropped = [0] * len(sources)
        self.surplus = [0] * len(sources)
        self._selected: Counter[str] = Counter()
        self._kept_sha256 = ""
        self._narrowed_at: dict[str, Any] | None = None
        self._greedy: Greedy | None = None
        if kind == "dialogues" and config.ngram:
            self._greedy = Greedy(config.ngram, roles=config.ngram_roles, memory_gb=config.memory_gb or None)
            if shared is not None:
                self._greedy.only(shared)
        held_out = config.held_out if kind == "dialogues" else (0, 0, 0)
        held_out_splits: tuple[Split, ...] = ("eval", "interpret", "steer")
        self._quota = dict(zip(held_out_splits, held_out, strict=True))
        if resume is not None:
            self._load(resume)
        self.stream = self._rows(None if resume is None else resume.state["stream"])
        self._samples = samples(self.stream, kind, self.readings, special)

    def __next__(self) -> Chunk:
        before = self.stream.state_dict()
        batch = self._batch()
        if not batch:
            raise StopIteration
        kept = []
        for sample, keep in zip(batch, self._keep(batch, before), strict=True):
            if not keep:
                self.dropped[sample.source] += 1
            elif self._selected[sample.split] >= self._quota.get(sample.split, 1 << 62):
                self.surplus[sample.source] += 1
            else:
                self._selected[sample.split] += 1
                kept.append(sample)
        chained = self._kept_sha256.encode() + b"".join(sample.digest for sample in kept)
        self._kept_sha256 = hashlib.sha256(chained).hexdigest()
        hashes = np.empty(0, np.uint64) if self._greedy is None else self._greedy.take_new()
        return Chunk(kept, self.state_dict(), hashes, self._narrowed_at is not None)

    def _batch(self) -> list[Sample]:
        """The next samples: at most CHUNK, and not much more text than a million characters, for a book is one too."""
        batch: list[Sample] = []
        characters = 0
        for sample in self._samples:
            batch.append(sample)
            characters += characters_of(sample.item)
            if len(batch) == CHUNK or characters > CHARACTERS:
                break
        return batch

    @property
    def n_rows(self) -> int:
        """Rows read so far."""
        return sum(reading.rows for reading in self.readings)

    def state_dict(self) -> dict[str, Any]:
        """Where the selection stands, as JSON can hold it; the hashes are apart."""
        return {
            "stream": self.stream.state_dict(),
            "readings": [
                {"rows": r.rows, "usable": r.usable, "rejected": dict(r.rejected), "examples": list(r.examples)}
                for r in self.readings
            ],
            "dropped": list(self.dropped),
            "surplus": list(self.surplus),
            "selected": dict(self._selected),
            "kept_sha256": self._kept_sha256,
            "narrowed_at": self._narrowed_at,
        }

    def _load(self, resume: Resume) -> None:
        state = resume.state
        self.readings = [
            Reading(r["rows"], r["usable"], Counter(r["rejected"]), list(r["examples"])) for r in state["readings"]
        ]
        self.dropped, self.surplus = list(state["dropped"]), list(state["surplus"])
        self._selected, self._kept_sha256 = Counter(state["selected"]), state["kept_sha256"]
        self._narrowed_at = state["narrowed_at"]
        if self._greedy is not None:
            known: tuple[np.ndarray, ...] = ()
            try:
                self._greedy.restore(resume.hashes)
            except MemoryFullError:  # memory_gb is less than it was
                known = (resume.hashes,)
                self._narrowed_at = self._narrowed_at or state["stream"]
            if self._narrowed_at is not None:
                self._narrow(self._narrowed_at, known)
                self._greedy.restore(resume.narrowed_hashes)

    def _keep(self, batch: Sequence[Sample], before: dict[str, Any]) -> list[bool]:
        if self._greedy is None:
            return [True] * len(batch)
        dialogues = _dialogues(batch)
        try:
            return self._greedy.keep(dialogues)
        except MemoryFullError:
            self._narrowed_at = before
            self._narrow(before)
            return self._greedy.keep(dialogues)

    def _narrow(self, state: dict[str, Any], known: Sequence[np.ndarray] = ()) -> None:
        """Read what is to come a first time, to find the n-grams that more than one sample has."""
        assert self._greedy is not None
        console.say(f"the n-grams fill {self._config.memory_gb:g} GB: reading ahead for those that are shared")
        readings = [Reading() for _ in self._sources]
        ahead = samples(self._rows(state), self._kind, readings, self._special)
        total = sum(source.rows or 0 for source in self._sources) or None
        with console.progress("read ahead", total) as advance:

            def batches() -> Iterator[list[Dialogue]]:
                done = 0
                while batch := list(islice(ahead, CHUNK)):
                    rows = sum(reading.rows for reading in readings)
                    advance(rows - done)
                    done = rows
                    yield _dialogues(batch)

            self._greedy.narrow(batches(), known)

    def _rows(self, state: dict[str, Any] | None) -> RowStream:
        return RowStream(self._sources, order=self._config.order, seed=self._seed, state=state)


def _dialogues(batch: Sequence[Sample]) -> list[Dialogue]:
    return [sample.item for sample in batch if isinstance(sample.item, Dialogue)]
