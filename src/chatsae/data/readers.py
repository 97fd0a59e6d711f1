"""Rows of JSON Lines, Parquet and hub data sets, one at a time; every error names the file and the row."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chatsae.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_ROWS = 256  # rows decoded at a time
_TIMEOUT = 10.0  # seconds for the one request that tells whether the hub answers


class Row(NamedTuple):
    """One row, its file (or hub id) and its number there, counted from 1."""

    file: str
    number: int
    value: Any


def local_files(path: Path) -> list[Path]:
    """The file itself, or the data files below a directory, sorted.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: expected a {kinds} file, or a directory of them")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    if not files:
        raise UserError(f"directory {path} holds no {kinds} file")
    return files


def local_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of one file, streamed; of a Parquet file only the named columns.

    Raises:
        UserError: the file cannot be read or is cut short, a line is no JSON or no UTF-8, no named column is there.
    """
    try:
        yield from _parquet_rows(path, columns) if path.suffix == ".parquet" else _json_rows(path)
    except (OSError, EOFError) as error:  # a truncated .gz is an EOFError
        raise UserError(f"{path} cannot be read: {error}") from None


def _json_rows(path: Path) -> Iterator[Row]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, row {number}: not UTF-8 ({error.reason} at byte {error.start})") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, row {number}: not valid JSON ({error})") from None
            yield Row(str(path), number, value)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            wanted = [name for name in present if name in columns]
            if not wanted:
                raise UserError(f"{path}: no field {', '.join(columns)} (found: {', '.join(present)})")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, value)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}, after row {number}: not valid Parquet ({' '.join(str(error).split())})") from None


def hub_rows(hub_id: str, config: str | None, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a hub data set's train split, streamed; only the named columns where its schema is known.

    Raises:
        UserError: the hub cannot be reached, the set does not exist, is gated, needs a configuration or is broken.
    """
    import datasets

    try:
        if not Path(hub_id).is_dir():
            _ask_hub(hub_id)
        stream = datasets.load_dataset(hub_id, config, split="train", streaming=True)
        present = stream.column_names
        if present is not None:
            wanted = [name for name in present if name in columns]
            if not wanted:
                raise UserError(f"{hub_id}: no field {', '.join(columns)} (found: {', '.join(present)})")
            stream = stream.select_columns(wanted)
        for number, value in enumerate(stream, start=1):
            yield Row(hub_id, number, value)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_hub_advice(hub_id, error)) from None


def _ask_hub(hub_id: str) -> None:
    """One request that fails at once, where the streaming reader would retry for half a minute.

    Raises:
        OSError: the data set is not to be had (a ConnectionError when the hub does not answer).
    """
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(hub_id, timeout=_TIMEOUT)
    except errors.HfHubHTTPError:
        raise
    except errors.HTTPError as error:
        raise ConnectionError(str(error)) from None


def _hub_advice(hub_id: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    page = f"https://huggingface.co/datasets/{hub_id}"
    if isinstance(error, ConnectionError):
        return (
            f"{hub_id}: the Hugging Face Hub cannot be reached; connect, or give the path of a local copy "
            f"({', '.join(SUFFIXES)}) instead"
        )
    if "gated" in said:
        return f"{hub_id} is gated: accept its terms at {page}, then `hf auth login`"
    if "exist" in said:
        return f"{hub_id}: no such data set on the Hugging Face Hub, or no access to it (see {page}; `hf auth login`)"
    if "Config name is missing" in said:
        return f"{hub_id} has several configurations: write {hub_id}:NAME. {said}"
    return f"{hub_id} cannot be read: {said}"
