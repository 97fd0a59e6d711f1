"""The shards and counts of one kind of data, while they are written."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from chatsae.batch import SPLITS
from chatsae.data.render import Tokenised
from chatsae.data.sources import Kind, Source
from chatsae.data.store.selection import Chunk, Resume
from chatsae.data.store.shards import File, ShardWriter, check_file, whole_file, write_parquet

TEXT = "text"
"""The name of the documents for bt-p, beside the splits of the dialogues."""

_HASHES = pa.schema([("hash", pa.uint64())])


class Writing:
    """Kept samples, as they become shards. `state_dict` names files that are on the disk; `state` goes on from them.

    `stop` is a `stop_rule`; `counted` the training tokens so far, as it counts them.
    """

    def __init__(
        self,
        directory: Path,
        kind: Kind,
        sources: Sequence[Source],
        prefix: Sequence[int],
        stop: dict[str, int] | None,
        state: dict[str, Any] | None,
    ) -> None:
        self._stop = stop
        self._max_length = sys.maxsize if stop is None else stop["max_length"]
        self.counted = 0 if state is None else state["counted"]
        self._scratch = directory / "state"
        self._kind = kind
        self._names = [source.label for source in sources]
        splits = SPLITS if kind == "dialogues" else (TEXT,)
        self._writers = {
            name: ShardWriter(
                name, directory, self._scratch, prefix, state=None if state is None else state["writers"][name]
            )
            for name in splits
        }
        self._hash_files: list[dict[str, Any]] = [] if state is None else list(state["hash_files"])
        self._new: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self._selection: dict[str, Any] | None = None if state is None else state["selection"]
        counts = [{}] * len(sources) if state is None else state["counts"]
        self._sequences = [Counter(c.get("sequences", {})) for c in counts]
        self._tokens = [Counter(c.get("tokens", {})) for c in counts]
        self._skipped = [Counter(c.get("skipped", {})) for c in counts]

    @property
    def enough(self) -> bool:
        """Whether the training tokens that were asked for are there."""
        return self._stop is not None and self.counted >= self._stop["tokens"]

    def add(self, chunk: Chunk, results: Sequence[Tokenised]) -> None:
        """Write a chunk, up to the sequence with which there is enough."""
        for sample, (tokens, note) in zip(chunk.samples, results, strict=True):
            if note:
                self._skipped[sample.source][note] += 1
            if tokens is None:
                continue
            split = sample.split if self._kind == "dialogues" else TEXT
            self._writers[split].add(self._names[sample.source], tokens)
            self._sequences[sample.source][split] += 1
            self._tokens[sample.source][split] += len(tokens)
            self.counted += min(len(tokens), self._max_length) if split in ("train", TEXT) else 0
            if self.enough:
                break
        self._new[chunk.narrowed].append(chunk.hashes)
        self._selection = chunk.state

    def note(self) -> str:
        """Progress in a few words."""
        tokens = sum(tokens.total() for tokens in self._tokens)
        return f"{sum(n.total() for n in self._sequences):,} {self._kind}, {tokens / 1e6:,.1f} M tokens kept"

    def state_dict(self) -> dict[str, Any]:
        """Put everything so far on the disk, and name it."""
        for narrowed, arrays in self._new.items():
            if sum(map(len, arrays)):
                file = f"hashes-{len(self._hash_files):05}.parquet"
                write_hashes(self._scratch / file, np.concatenate(arrays))
                self._hash_files.append({**asdict(whole_file(self._scratch / file)), "narrowed": narrowed})
            arrays.clear()
        return {
            "done": False,
            "writers": {name: writer.state_dict() for name, writer in self._writers.items()},
            "hash_files": self._hash_files,
            "selection": self._selection,
            "counts": self._counts(),
            "counted": self.counted,
        }

    def close(self) -> dict[str, Any]:
        """Finish the shards; what the manifest says of this kind."""
        assert self._selection is not None
        selection = self._selection
        rows = zip(self._names, selection["readings"], self._counts(), strict=True)
        sources = [
            {
                "name": name,
                "rows": reading["rows"],
                "rejected": reading["rejected"],
                "dropped": selection["dropped"][i],
                "surplus": selection["surplus"][i],
                **counts,
            }
            for i, (name, reading, counts) in enumerate(rows)
        ]
        splits = {}
        for name, writer in self._writers.items():
            shards = writer.close()
            splits[name] = {
                "sequences": sum(shard.sequences for shard in shards),
                "tokens": sum(shard.tokens for shard in shards),
                "shards": [asdict(shard) for shard in shards],
            }
        examples = [example for reading in selection["readings"] for example in reading["examples"]]
        kept = selection["kept_sha256"]
        return {"done": True, "sources": sources, "splits": splits, "kept_sha256": kept, "examples": examples}

    def _counts(self) -> list[dict[str, dict[str, int]]]:
        counts = zip(self._sequences, self._tokens, self._skipped, strict=True)
        return [{"sequences": dict(s), "tokens": dict(t), "skipped": dict(k)} for s, t, k in counts]


def scratch_files(state: dict[str, Any]) -> set[str]:
    """The scratch files that a state needs."""
    if state["done"]:
        return set()
    hashes = {file["file"] for file in state["hash_files"]}
    return hashes.union(*(ShardWriter.scratch_files(writer) for writer in state["writers"].values()))


def resume_of(scratch: Path, state: dict[str, Any]) -> Resume:
    """Where the selection of a state goes on.

    Raises:
        UserError: a file that it needs is missing or changed.
    """
    found: dict[bool, list[np.ndarray]] = {False: [np.empty(0, np.uint64)], True: [np.empty(0, np.uint64)]}
    for file in state["hash_files"]:
        found[file["narrowed"]].append(read_hashes(scratch, file))
    return Resume(state["selection"], np.concatenate(found[False]), np.concatenate(found[True]))


def write_hashes(path: Path, hashes: np.ndarray) -> None:
    """A Parquet file with one column, `hash`."""
    write_parquet(path, _HASHES, [pa.RecordBatch.from_arrays([pa.array(hashes, pa.uint64())], schema=_HASHES)])


def read_hashes(scratch: Path, file: dict[str, Any]) -> np.ndarray:
    """The hashes in a file that `write_hashes` wrote.

    Raises:
        UserError: it is missing or changed.
    """
    check_file(scratch, File(file["file"], file["sha256"], file["bytes"]))
    return pq.read_table(scratch / file["file"]).column("hash").to_numpy()
