"""JSON lines and batches of rows."""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines, gzipped where the name ends in .gz.

    Raises:
        ValueError: a number in it is NaN or infinite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def in_batches(rows: Iterable[_T], size: int) -> Iterator[Sequence[_T]]:
    """Consecutive lists of `size` rows; the last may be shorter."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch
