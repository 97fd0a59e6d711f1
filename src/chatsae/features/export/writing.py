"""Export directories: written as a whole or not at all, and never over files that are no export."""

import gzip
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from chatsae.errors import UserError

MARK = "export.json"
"""Says what a directory holds, and that it may be replaced."""

_T = TypeVar("_T")


@contextmanager
def directory(path: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A temporary directory that takes the place of `path` at the end, with `facts` (read then) in its MARK.

    Raises:
        UserError: it cannot be written, or holds files that are no export.
    """
    if path.exists() and not (path / MARK).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} holds other files than an export (no {MARK}); choose another --out")
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        write_json(temporary / MARK, dict(facts))
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """Write JSON, for people or, `compact`, without a space.

    Raises:
        ValueError: a number in it is NaN or infinite.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(value, indent=None if compact else 2, separators=separators, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines, gzipped where the name ends in .gz; errors are those of `write_json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def in_batches(rows: Iterable[_T], size: int) -> Iterator[Sequence[_T]]:
    """Consecutive lists of `size` rows; the last may be shorter."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch
