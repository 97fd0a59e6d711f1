"""Files that are written as a whole or not at all, their digests, and directories that one process owns."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatsae.errors import UserError

_TEXT_BYTES = 256 << 20  # of a text file that is read as a whole


def read_text(path: Path | str, what: str = "", *, most: int = _TEXT_BYTES) -> str:
    """The text of a file; `what` says in messages what the file is.

    Raises:
        UserError: it does not exist, is no file (a named pipe would block), has over `most` bytes, or is not UTF-8.
    """
    path, name = Path(path), f"{what} {path}".strip()
    try:
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise UserError(f"{name} is {kind}; a file is expected")
        if (size := path.stat().st_size) > most:
            raise UserError(f"{name} cannot be read: {size:,} bytes are more than the {most:,} that are taken")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} cannot be read: not UTF-8 ({error.reason} at byte {error.start:,})") from None
    except (OSError, ValueError) as error:  # ValueError: a zero character in the path
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"{name} cannot be read: {reason or error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all.

    Raises:
        UserError: it cannot be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON as a whole or not at all; errors are those of `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, advice: str = "") -> Any:
    """The JSON value of a file; `advice` ends the message about a damaged one: what to do.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or JSON, or is nested too deeply.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise damaged(path, error, advice) from None


def read_object(path: Path, advice: str = "", keys: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The JSON object of a file, in which each of `keys` has a value of its type; see `read_json`.

    Raises:
        UserError: see `read_json`; or it is no object, or a key is missing or has a value of another type.
    """
    value = read_json(path, advice)
    if not isinstance(value, dict):
        raise damaged(path, f"an object was expected, not {_kind(value)}", advice)
    for key, kind in (keys or {}).items():
        if key not in value:
            raise damaged(path, f"{key!r} is missing", advice)
        if type(value[key]) is not kind:
            raise damaged(path, f"{key!r} is {_kind(value[key])}, {_KINDS[kind]} was expected", advice)
    return value


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "a flag",
}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null")


def damaged(path: Path, problem: object, advice: str = "") -> UserError:
    """The error of a file that does not hold what was written there."""
    return UserError(f"{path} is damaged ({problem})" + (f"; {advice}" if advice else ""))


def check_memory(n_bytes: int, what: str) -> None:
    """Refuse what the machine's memory cannot hold; `what` begins the message.

    Raises:
        UserError: it is larger than all of the memory.
    """
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # a system that does not tell
        return
    if n_bytes > there:
        raise UserError(f"{what} would take {n_bytes / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f} GiB")


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """Keeps a directory to one process, as long as that lives or until `close`.

    Raises:
        UserError: another process has it, or it cannot be written.
    """

    def __init__(self, directory: Path, what: str) -> None:
        try:
            self._file = (directory / ".lock").open("w")
        except OSError as error:
            raise UserError(f"{what} {directory} cannot be written: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"{what} {directory} is in use by another process") from None

    def close(self) -> None:
        """Let another process have the directory."""
        self._file.close()
