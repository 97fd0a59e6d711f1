"""Rows of JSON Lines, Parquet and hub data sets, one at a time and in flat memory; errors name the file and the row."""

import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from chatsae.data.hub import HubSet, hub_rows, hub_set
from chatsae.data.rows import SUFFIXES, Broken, Row, one_line
from chatsae.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = [
    "MAX_LINE",
    "SUFFIXES",
    "Broken",
    "HubSet",
    "Row",
    "estimated_rows",
    "hub_rows",
    "hub_set",
    "local_files",
    "local_rows",
]

MAX_LINE = 32 << 20
"""Bytes of the longest line that is read."""

_BOM = b"\xef\xbb\xbf"
_BUFFER = 1 << 20
_SAMPLE, _PACKED_SAMPLE = 1 << 20, 8 << 20  # bytes from which the number of lines is estimated
_BATCH_BYTES, _BATCH_ROWS = 8 << 20, 1024  # of Parquet, decoded at a time


def local_files(path: Path, skipped: Counter[str] | None = None) -> list[Path]:
    """The file itself, or the data files below a directory, sorted.

    Hidden files, those in hidden directories (editors and systems keep copies there) and directories that are links
    are left out of a directory and counted in `skipped`.

    Raises:
        UserError: nothing is there, nothing that can be read, or a link to nothing.
    """
    kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    skipped = Counter() if skipped is None else skipped
    if not path.is_dir():
        _check_regular(path)
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: expected a {kinds} file, or a directory of them")
        return [path]
    files = []
    for found in sorted(path.rglob("*")):
        if found.is_dir():
            skipped["linked directory"] += found.is_symlink()
        elif found.name.endswith(SUFFIXES):
            if any(part.startswith(".") for part in found.relative_to(path).parts):
                skipped["hidden file"] += 1
                continue
            _check_regular(found)
            files.append(found)
    if not files:
        beside = "".join(f"; {n:,} × {reason} left out" for reason, n in skipped.items() if n)
        raise UserError(f"directory {path} holds no {kinds} file{beside}")
    return files


def _check_regular(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {path.readlink()}, which does not exist")
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")


def local_rows(path: Path, columns: Sequence[str], start: int = 0) -> Iterator[Row]:
    """The rows of one file after its first `start`, streamed; of a Parquet file only the named columns.

    Blank lines are no rows. A line that is no UTF-8, no JSON or longer than MAX_LINE has the value Broken.

    Raises:
        UserError: the file cannot be read or is cut short, or none of the columns is in it.
    """
    number = start
    try:
        for row in (_parquet_rows if path.suffix == ".parquet" else _json_rows)(path, columns, start):
            number = row.number
            yield row
    except _errors() as error:
        raise UserError(_advice(path, number, error)) from None


def estimated_rows(path: Path) -> int:
    """The rows of a file: exact for Parquet and short files, else by the length of the first lines.

    Raises:
        UserError: the file cannot be read.
    """
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows if path.suffix == ".parquet" else _estimated_lines(path)
    except _errors() as error:
        raise UserError(_advice(path, 0, error)) from None


def _json_rows(path: Path, _columns: Sequence[str], start: int) -> Iterator[Row]:
    name = str(path)
    with path.open("rb") as file, _unpacked(path, file) as stream:
        for number, line in enumerate(_lines(stream), start=1):
            if number > start:
                yield Row(name, number, _value(line))


def _unpacked(path: Path, file: io.BufferedReader) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER)
    if path.suffix == ".zst":
        import pyarrow as pa

        # reads all frames, and tells it when the last one has no end
        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(file, "zstd")), _BUFFER)
    return file


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Every line that is not blank; None for one that is too long, of which no more than that is held."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(_BUFFER)
            yield None
            continue
        line = line.removeprefix(_BOM)
        if line and not line.isspace():
            yield line


def _value(line: bytes | None) -> Any:
    if line is None:
        return Broken(f"line over {MAX_LINE >> 20} MiB", "")
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Broken("not UTF-8", f"{error.reason} at byte {error.start}")
    except RecursionError:
        return Broken("not JSON", "nested too deeply")
    except json.JSONDecodeError as error:
        return Broken("not JSON", f"{error.msg} at character {error.pos}")
    except ValueError as error:  # an integer of thousands of digits
        return Broken("not JSON", one_line(error))


def _estimated_lines(path: Path) -> int:
    plain = path.suffix == ".jsonl"
    size = _SAMPLE if plain else _PACKED_SAMPLE
    with path.open("rb") as file, _unpacked(path, file) as stream:
        head = stream.read(size + 1)
        lines = sum(1 for _ in _lines(io.BytesIO(head)))
        if len(head) <= size:
            return lines
        whole = path.stat().st_size
        if not plain:
            unpacked = len(head) + len(stream.peek())
            whole = whole * unpacked / file.tell()
    return max(lines, round(lines * whole / len(head)))


def _parquet_rows(path: Path, columns: Sequence[str], start: int) -> Iterator[Row]:
    import pyarrow.parquet as pq

    name = str(path)
    # unbuffered and unthreaded reads keep memory to about one batch, however large a row group is
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True) as file:
        present = file.schema_arrow.names
        wanted = [column for column in present if column in columns]
        if not wanted:
            raise UserError(f"{path}: no field {', '.join(columns)} (found: {', '.join(present)})")
        number = 0
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            if number + group.num_rows > start:
                size = _batch_rows(group, wanted)
                for batch in file.iter_batches(size, [index], wanted, use_threads=False):
                    skipped = min(max(start - number, 0), batch.num_rows)
                    for at, value in enumerate(_values(batch.slice(skipped)), start=number + skipped + 1):
                        yield Row(name, at, value)
                    number += batch.num_rows
            else:
                number += group.num_rows


def _batch_rows(group: "pq.RowGroupMetaData", wanted: Sequence[str]) -> int:
    """Rows whose columns are about _BATCH_BYTES in memory."""
    columns = [group.column(index) for index in range(group.num_columns)]
    taken = [c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in wanted]
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, sum(taken))))


def _values(batch: "pa.RecordBatch") -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "value out of range"
            return [Broken(reason, one_line(error))]
    return [value for index in range(batch.num_rows) for value in _values(batch.slice(index, 1))]


def _errors() -> tuple[type[Exception], ...]:
    """All that reading a file may raise."""
    import pyarrow as pa

    return (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError)


def _advice(path: Path, number: int, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and number == 0:
        return f"{path} cannot be read: {os.strerror(error.errno)}"
    kind = "not valid Parquet" if path.suffix == ".parquet" else "cut short or damaged"
    return (
        f"{path} cannot be read beyond row {number:,}: {kind} ({one_line(error)}); put a whole copy of the file in its "
        f"place, or leave it out"
    )
