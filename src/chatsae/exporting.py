"""What every export shares: directories that are written as a whole, and ids that other sides accept."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatsae.errors import UserError
from chatsae.files import shared_names, whole

MARK = "export.json"
"""Says what a directory holds, and that it may be replaced."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_NOT_NAME = re.compile(r"[^a-z0-9._-]+")


def check_replaceable(path: Path) -> None:
    """Refuse what is no export, before anything is computed for one.

    Raises:
        UserError: there is a file, or a directory with other files.
    """
    if path.exists() and not (path / MARK).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} holds other files than an export (no {MARK}); choose another --out")
    if (file := next((p for p in path.parents if p.is_file()), None)) is not None:
        raise UserError(f"{path} cannot be written: {file} is a file; choose another --out")


@contextmanager
def directory(path: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A temporary directory that takes the place of `path` at the end, with `facts` (read then) in its MARK.

    Raises:
        UserError: it cannot be written, or holds files that are no export.
    """
    check_replaceable(path)
    with whole(path) as new:
        new.mkdir()
        yield new
        write_json(new / MARK, dict(facts))


def listed(target: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with the files that were written and their bytes."""
    files = sorted(p for p in target.rglob("*") if p.is_file() and p.name != MARK)
    sizes = {p.relative_to(target).as_posix(): p.stat().st_size for p in files}
    return {**facts, "left_out": dict(facts["left_out"]), "directory": str(target), "files": sizes}


def write_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """Write JSON, for people or, `compact`, without a space.

    Raises:
        ValueError: a number in it is NaN or infinite.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(value, indent=None if compact else 2, separators=separators, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def identifier(text: str) -> str:
    """Text as an id: lower case, with dashes for what an id cannot hold."""
    return re.sub("_+", "_", _NOT_NAME.sub("-", text.lower())).strip("-._") or "unnamed"


def public(names: str) -> str:
    """Models or corpora, separated by commas, as others may know them."""
    return ", ".join(shared_names(names.split(", ")))


def check_identifier(flag: str, value: str) -> None:
    """Refuse what no id can be.

    Raises:
        UserError: it holds something else than lower-case letters, digits, dots, dashes and single underscores.
    """
    if not _NAME.fullmatch(value) or "__" in value:
        raise UserError(
            f"{flag}: lower-case letters, digits, '.', '-' and single '_' were expected, "
            f"beginning with a letter or a digit; {value!r} was given"
        )
