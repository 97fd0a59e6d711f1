"""Files and directories that are written as a whole or not at all, their digests, and directories one process owns."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chatsae.errors import UserError

_TEXT_BYTES = 256 << 20  # of a text file that is read as a whole
_SCRATCH = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
_LOCK, _OLD, _CHECKSUM = ".lock", ".old", "chatsae_sha256"


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


@contextmanager
def whole(path: Path, hint: str = "") -> Iterator[Path]:
    """A path at which to create a file or a directory; it then takes the place of `path` as a whole, or not at all.

    Directories above it are made. A kill at any moment leaves a whole copy, the old one or the new one; `settle` puts
    it in place where that was interrupted. Several processes and threads may write the same path: the last one wins.
    Modes follow the umask.

    Raises:
        UserError: it cannot be written (`hint` says what then); what was there before still is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _settle_in(path.parent)
        scratch, lock = _scratch(path)
        try:
            new = scratch / path.name
            yield new
            _durable(new, stat.S_IMODE(os.fstat(lock).st_mode))
            _put(new, path, scratch)
            _sync_directory(path.parent)
        finally:
            _end(scratch, path)
            os.close(lock)
    except _write_errors() as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written: {reason}{hint}") from None


def settle(directory: Path, *, below: bool = True) -> None:
    """Finish or remove what killed writers left in a directory, and anywhere below it; that of living writers stays."""
    if not below:
        _settle_in(directory)
        return
    for folder, names, _ in os.walk(directory):
        if any(_SCRATCH.fullmatch(name) for name in names):
            _settle_in(Path(folder))
            names[:] = [name for name in names if not _SCRATCH.fullmatch(name)]


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; errors are those of `whole`."""
    with whole(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON as a whole or not at all; errors are those of `whole`."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """JSON for people."""
    return json.dumps(value, indent=2) + "\n"


def with_checksum(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON file holds so that `read_object` notices every change of a value."""
    return {**facts, _CHECKSUM: _checksum(facts)}


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

    Where it was written `with_checksum`, that is compared and left out.

    Raises:
        UserError: see `read_json`; or it is no object, or a key is missing or has a value of another type, or a value
            is not what was written.
    """
    value = read_json(path, advice)
    if not isinstance(value, dict):
        raise damaged(path, f"an object was expected, not {_kind(value)}", advice)
    checksum = value.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(value):
        raise damaged(path, "its content does not match its checksum", advice)
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


def shared_name(name: str, *, apart: bool = False) -> str:
    """What files that travel call a model, a corpus or a run: the last part of a path that is not relative to the
    working directory, since the folders of this machine are nobody's business; `apart`, with a digest of the path."""
    path = os.path.expanduser(name)
    if not Path(path).is_absolute() and ".." not in Path(path).parts:
        return name
    last = os.path.basename(os.path.abspath(path)) or name
    return f"{last}~{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}" if apart else last


def shared_names(names: Sequence[str]) -> list[str]:
    """The `shared_name` of each, apart where two would be called alike."""
    short = [shared_name(name) for name in names]
    return [shared_name(name, apart=short.count(one) > 1) for name, one in zip(names, short, strict=True)]


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """Keeps a directory to one process, as long as that lives or until `close`, and settles what others left in it.

    Raises:
        UserError: another process has it, or it cannot be written.
    """

    def __init__(self, directory: Path, what: str) -> None:
        try:
            self._file = (directory / _LOCK).open("w")
        except OSError as error:
            raise UserError(f"{what} {directory} cannot be written: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"{what} {directory} is in use by another process") from None
        settle(directory)

    def close(self) -> None:
        """Let another process have the directory."""
        self._file.close()


def _checksum(facts: Mapping[str, Any]) -> str:
    read = json.loads(json.dumps(dict(facts)))  # keys as a reader finds them
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _scratch(path: Path) -> tuple[Path, int]:
    """A directory of this writer's own beside `path`, and its lock, which the kernel lets go of when the writer dies.

    The writer's files are named by others inside it (safetensors makes a temporary file of its own), so the lock is a
    file beside them.
    """
    while True:
        scratch = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
        scratch.mkdir()
        with suppress(FileNotFoundError):  # whoever settles may take it for a dead writer's until it is locked
            if (lock := _locked(scratch)) is not None:
                return scratch, lock


def _locked(scratch: Path) -> int | None:
    """The lock of a scratch directory, or None where another has it or had it and removed the directory."""
    lock = os.open(scratch / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), (scratch / _LOCK).stat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _settle_in(directory: Path) -> None:
    """`settle` for what lies in the directory itself."""
    try:
        found = [(entry.name, match) for entry in os.scandir(directory) if (match := _SCRATCH.fullmatch(entry.name))]
    except OSError:
        return  # it is not there, and whoever needs it says so
    for name, match in found:
        scratch, path = directory / name, directory / match[1]
        with suppress(OSError):  # another settles it too, or it may only be read
            if (lock := _locked(scratch)) is not None:
                _end(scratch, path)
                os.close(lock)


def _end(scratch: Path, path: Path) -> None:
    """Remove a scratch directory; where it was about to replace a directory, that is finished first."""
    old, new = sorted(scratch.glob(f"{_OLD}*")), scratch / path.name
    if old and new.exists() and not path.exists():
        try:
            os.rename(new, path)
        except OSError:
            os.rename(old[-1], path)
    shutil.rmtree(scratch, ignore_errors=True)


def _write_errors() -> tuple[type[Exception], ...]:
    """Safetensors is looked up, not imported: this module needs the standard library only."""
    safetensors = sys.modules.get("safetensors")
    return (OSError,) if safetensors is None else (OSError, safetensors.SafetensorError)


def _put(new: Path, path: Path, scratch: Path) -> None:
    """Rename a file or directory; no system call replaces a directory, so the old one is moved into `scratch` first."""
    if not new.is_dir():
        os.replace(new, path)
        return
    for n in range(1000):
        with suppress(FileNotFoundError):
            os.rename(path, scratch / (f"{_OLD}{n}" if n else _OLD))
        try:
            os.rename(new, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return  # else another writer of the same directory was first
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _durable(new: Path, mode: int) -> None:
    """Give files the mode they would have had from `open` (safetensors makes them 0600), and wait for the disk."""
    for path in sorted(new.rglob("*")) if new.is_dir() else [new]:
        if path.is_file():
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _sync_directory(path)
    if new.is_dir():
        _sync_directory(new)


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # not every file system does it
        opened = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
