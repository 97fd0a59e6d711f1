"""Tokenised sequences in Parquet shards: a kill loses nothing that was promised, and only whole files are read."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from chatsae.data.blocks import Tokens, in_prefix
from chatsae.data.labels import Labels
from chatsae.errors import UserError
from chatsae.files import sha256, whole

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("role", pa.list_(pa.uint8())),
        ("kind", pa.list_(pa.uint8())),
        ("special", pa.list_(pa.bool_())),
        ("prefix", pa.list_(pa.bool_())),
    ]
)
"""One whole dialogue or document per row; the lists' offsets are those of the sequences. `kind` has no FIRST: which
token comes first is known when the sequences are cut or joined."""

SHARD_TOKENS = 48_000_000  # about 64 MB
SEGMENT_TOKENS = 1_000_000  # held in memory per split, and the size of a shard's row groups
_READ_ROWS = 256


@dataclass(frozen=True, slots=True)
class File:
    """A file and its digest, as manifest and state name it."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Shard(File):
    """A file of sequences."""

    sequences: int
    tokens: int


class ShardWriter:
    """The shards of one split. What `state_dict` names is on the disk, and `state` goes on from there.

    Rows gather in memory, then in segments below `scratch`, and become a shard when there are SHARD_TOKENS of them:
    the bytes of a shard follow from its rows alone, however often the writing was interrupted.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        scratch: Path,
        prefix: Sequence[int],
        *,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._name, self._directory, self._scratch, self._prefix = name, directory, scratch, prefix
        self._rows: list[tuple[str, Tokens]] = []
        self._pending = 0  # tokens in _rows
        self._segments: list[Shard] = []
        self.shards: list[Shard] = []
        self._saved = 0
        if state is not None:
            self._load(state)

    def add(self, source: str, tokens: Tokens) -> None:
        """Append a sequence."""
        self._rows.append((source, tokens))
        self._pending += len(tokens)
        if self._pending >= SEGMENT_TOKENS:
            self._segments.append(self._write_rows(f"{self._name}-{self._number()}-{len(self._segments):03}.parquet"))
            self._rows, self._pending = [], 0
        if sum(segment.tokens for segment in self._segments) >= SHARD_TOKENS:
            self._finish_shard()

    def state_dict(self) -> dict[str, Any]:
        """Write what is in memory to the disk, and name the files that hold everything so far."""
        self._saved += 1
        pending = self._write_rows(f"{self._name}-pending-{self._saved}.parquet") if self._rows else None
        return {
            "shards": [asdict(shard) for shard in self.shards],
            "segments": [asdict(segment) for segment in self._segments],
            "pending": pending and asdict(pending),
            "saved": self._saved,
        }

    def close(self) -> list[Shard]:
        """Finish the last shard; all shards."""
        if self._rows:
            self._segments.append(self._write_rows(f"{self._name}-{self._number()}-{len(self._segments):03}.parquet"))
            self._rows, self._pending = [], 0
        if self._segments:
            self._finish_shard()
        return self.shards

    @staticmethod
    def scratch_files(state: dict[str, Any]) -> set[str]:
        """The names of the scratch files that a state needs."""
        pending = [state["pending"]] if state["pending"] else []
        return {segment["file"] for segment in [*state["segments"], *pending]}

    def _load(self, state: dict[str, Any]) -> None:
        self.shards = [Shard(**shard) for shard in state["shards"]]
        self._segments = [Shard(**segment) for segment in state["segments"]]
        self._saved = state["saved"]
        for shard in self.shards:
            check_file(self._directory, shard)
        for segment in self._segments:
            check_file(self._scratch, segment)
        if state["pending"]:
            pending = Shard(**state["pending"])
            self._rows = list(read_shard(self._scratch, pending))
            self._pending = pending.tokens

    def _number(self) -> str:
        return f"{len(self.shards):05}"

    def _write_rows(self, file: str) -> Shard:
        path = self._scratch / file
        write_parquet(path, SCHEMA, [_record_batch(self._rows, self._prefix)])
        tokens = sum(len(tokens) for _, tokens in self._rows)
        return Shard(**asdict(whole_file(path)), sequences=len(self._rows), tokens=tokens)

    def _finish_shard(self) -> None:
        file = f"{self._name}-{self._number()}.parquet"
        write_parquet(self._directory / file, SCHEMA, self._batches())
        sequences = sum(segment.sequences for segment in self._segments)
        tokens = sum(segment.tokens for segment in self._segments)
        whole = asdict(whole_file(self._directory / file))
        self.shards.append(Shard(**whole, sequences=sequences, tokens=tokens))
        self._segments = []

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for segment in self._segments:
            with pq.ParquetFile(self._scratch / segment.file) as file:
                yield from file.iter_batches(segment.sequences)


def read_shard(directory: Path, shard: Shard) -> Iterator[tuple[str, Tokens]]:
    """The rows of a shard, in order: each one's source and tokens.

    Raises:
        UserError: the file is missing, or its bytes are not those that were written.
    """
    check_file(directory, shard)
    with pq.ParquetFile(directory / shard.file) as file:
        for batch in file.iter_batches(_READ_ROWS):
            yield from _rows(batch)


def check_file(directory: Path, file: File) -> None:
    """Compare a file with its digest.

    Raises:
        UserError: it is missing, or its bytes are not those that were written.
    """
    path = directory / file.file
    if not path.is_file():
        raise UserError(f"{path} is missing; delete {directory} and prepare the data again")
    if path.stat().st_size != file.bytes or sha256(path) != file.sha256:
        raise UserError(
            f"{path} is not what was written ({path.stat().st_size:,} bytes, {file.bytes:,} expected, sha256 "
            f"{file.sha256[:12]}...); delete {directory} and prepare the data again"
        )


def whole_file(path: Path) -> File:
    """The file with its digest."""
    return File(path.name, sha256(path), path.stat().st_size)


def write_parquet(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a file as a whole or not at all, a row group per batch.

    Raises:
        UserError: it cannot be written (a full disk, say).
    """
    hint = "; make room, then the same command goes on where it stopped"
    with (
        whole(path, hint) as new,
        pq.ParquetWriter(new, schema, compression="zstd", compression_level=1, use_dictionary=["source"]) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch, row_group_size=batch.num_rows)


def _record_batch(rows: Sequence[tuple[str, Tokens]], prefix: Sequence[int]) -> pa.RecordBatch:
    offsets = pa.array(np.cumsum([0, *(len(tokens) for _, tokens in rows)]), pa.int32())

    def joined(arrays: Iterator[np.ndarray], kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(list(arrays)), kind))

    columns = [
        pa.array([tokens.name for _, tokens in rows], pa.string()),
        pa.array([source for source, _ in rows], pa.string()),
        joined((tokens.ids.astype(np.int32) for _, tokens in rows), pa.int32()),
        joined((tokens.labels.role for _, tokens in rows), pa.uint8()),
        joined((tokens.labels.kind for _, tokens in rows), pa.uint8()),
        joined((tokens.labels.special for _, tokens in rows), pa.bool_()),
        joined((in_prefix(tokens.ids, prefix) for _, tokens in rows), pa.bool_()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[str, Tokens]]:
    def flat(name: str) -> np.ndarray:
        return batch.column(name).flatten().to_numpy(zero_copy_only=False)

    offsets = batch.column("input_ids").offsets.to_numpy()
    offsets = offsets - offsets[0]
    ids, role, kind, special = flat("input_ids").astype(np.int64), flat("role"), flat("kind"), flat("special")
    names, sources = batch.column("id").to_pylist(), batch.column("source").to_pylist()
    for name, source, start, stop in zip(names, sources, offsets[:-1], offsets[1:], strict=True):
        labels = Labels(role[start:stop], kind[start:stop], special[start:stop])
        yield source, Tokens(name, ids[start:stop], labels)
