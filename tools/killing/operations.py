"""File operations of a process, counted, with a kill before, in the middle of or after a chosen one.

Python's own operations are caught where they reach the system (a write is what leaves the buffers). Files that
safetensors and Arrow write in native code count as one operation each, and the middle of one leaves half of the file.
"""

import builtins
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch

T = TypeVar("T")

When = Literal["before", "middle", "after"]

_RENAMES = ("rename", "replace")
_OTHERS = ("unlink", "remove", "mkdir", "rmdir", "chmod", "truncate")


@dataclass(frozen=True)
class Kill:
    """Where a process dies: at its n-th file operation, or after some seconds of its CPU time."""

    operation: int = 0
    when: When = "before"
    cpu_seconds: float = 0.0

    def __str__(self) -> str:
        if self.operation:
            return f"{self.when} operation {self.operation}"
        return f"after {self.cpu_seconds:.3f} s of CPU time"


class Operations:
    """Counts what a process does to files below a directory, and kills it at the chosen one; for a forked child."""

    def __init__(self, root: Path, kill: Kill | None) -> None:
        self._root, self._kill = f"{root}/", kill
        self.n = 0
        self.last = ""

    def install(self) -> None:
        """Take the place of the functions that write; there is no way back."""
        if self._kill is not None and self._kill.cpu_seconds:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends a process as SIGKILL does
            signal.setitimer(signal.ITIMER_PROF, self._kill.cpu_seconds)
        for name in (*_RENAMES, *_OTHERS):
            setattr(os, name, self._of_path(name, getattr(os, name), place=1 if name in _RENAMES else 0))
        vars(os).update(fsync=self._fsync(os.fsync), open=self._os_open(os.open))
        io.open = builtins.open = self._open(builtins.open)
        for module in (safetensors.torch, safetensors.numpy):
            _replace_everywhere(module, "save_file", self._save_file(module.save_file))
        pq.ParquetWriter.write_batch = self._parquet("write_batch", pq.ParquetWriter.write_batch)
        pq.ParquetWriter.close = self._parquet("close", pq.ParquetWriter.close)

    def do(self, name: str, path: Any, real: Callable[[], T], half: Callable[[], object] | None = None) -> T:
        """An operation, if it is below the directory; it may be the last one."""
        path = os.path.abspath(os.fspath(path))
        if not path.startswith(self._root):
            return real()
        self.n += 1
        self.last = f"{name} {path.removeprefix(self._root)}"
        if self._kill is None or self.n != self._kill.operation:
            return real()
        with suppress(OSError):  # one may die after an operation that fails, too: a mkdir of what exists
            if self._kill.when == "middle" and half is not None:
                half()
            elif self._kill.when == "after":
                real()
        print(f"killed {self._kill}: {self.last}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def _of_path(self, name: str, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            path = args[place] if len(args) > place else options.get("dst", options.get("path"))
            if options.get("dir_fd") is not None:  # shutil.rmtree
                path = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), os.fspath(path))
            return self.do(name, path, lambda: real(*args, **options))

        return operation

    def _fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def operation(fd: Any) -> None:
            number = fd if isinstance(fd, int) else fd.fileno()
            self.do("fsync", os.readlink(f"/proc/self/fd/{number}"), lambda: real(number))

        return operation

    def _os_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def operation(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if not flags & os.O_CREAT:
                return real(path, flags, *args, **options)
            return self.do("create", path, lambda: real(path, flags, *args, **options))

        return operation

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        operations = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                whole = memoryview(data).cast("B")
                write = super().write
                return operations.do(
                    "write", str(self.name), lambda: write(whole), lambda: write(whole[: len(whole) // 2])
                )

        def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wxa+"):
                return real(file, mode, buffering, *args, **options)
            names = ("encoding", "errors", "newline", "closefd", "opener")
            given = dict(zip(names, args, strict=False)) | options
            raw = self.do("open", file, lambda: File(file, mode.replace("t", ""), opener=given.get("opener")))
            if "b" in mode and buffering == 0:
                return raw
            size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
            buffer = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
            if "b" in mode:
                return buffer
            text: dict[str, Any] = {name: given.get(name) for name in ("encoding", "errors", "newline")}
            return io.TextIOWrapper(buffer, **text, line_buffering=buffering == 1)

        return opened

    def _save_file(self, real: Callable[..., None]) -> Callable[..., None]:
        def operation(tensors: Any, filename: Any, metadata: Any = None) -> None:
            def whole() -> None:
                real(tensors, filename, metadata)

            self.do("save", filename, whole, lambda: _half(whole, filename))

        return operation

    def _parquet(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(writer: Any, *args: Any, **options: Any) -> Any:
            if not writer.is_open:
                return real(writer, *args, **options)

            def whole() -> Any:
                return real(writer, *args, **options)

            return self.do(f"parquet {name}", writer.where, whole, lambda: _half(whole, writer.where))

        return operation


def _half(write: Callable[[], object], path: Any) -> None:
    write()
    with io.FileIO(path, "r+") as file:
        file.truncate(os.path.getsize(path) // 2)


def _replace_everywhere(module: Any, name: str, new: Any) -> None:
    """In the module, and where chatsae has imported it by its name."""
    old = getattr(module, name)
    for other in [module, *(m for key, m in list(sys.modules.items()) if key.startswith("chatsae"))]:
        if vars(other).get(name) is old:
            setattr(other, name, new)
