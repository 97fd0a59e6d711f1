"""Files that are written as a whole or not at all, their digests, and directories that one process owns."""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from chatsae.errors import UserError


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
