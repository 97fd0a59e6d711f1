"""The only place that prints: people read stderr, programs read stdout."""

import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import rich.table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chatsae.errors import UserError

T = TypeVar("T")

_people = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
_results = Console(highlight=False, soft_wrap=True, emoji=False)
_WIDTH = 240  # of tables at most; wide enough that none is cut
_LOG_SECONDS = 15.0  # between progress lines where there is no terminal


_ESCAPES = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (
        *(set(range(0x20)) - set(b"\n\t")),
        *range(0x7F, 0xA0),
        *(0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)),  # separators, and what turns text round
        *range(0xD800, 0xE000),  # bytes of a path that are no UTF-8, halves of a pair
    )
}


def visible(text: str) -> str:
    r"""Text without what a terminal obeys or cannot show: an escape sequence of a corpus becomes \x1b[31m."""
    return text.translate(_ESCAPES)


def say(text: str = "") -> None:
    """A line for people."""
    _tell(text)


def warn(text: str) -> None:
    """A line about something that needs attention but stops nothing."""
    _tell(f"warning: {text}", style="yellow")


def fail(text: str) -> None:
    """The one line that explains why a command gives up."""
    _tell(f"error: {text}", style="bold red")


def _tell(text: str, style: str | None = None) -> None:
    with suppress(OSError):  # a full disk behind stderr: nobody can be told, and no training ends over it
        _people.print(visible(text), style=style, markup=False)


def result(value: Any) -> None:
    """A result on stdout: text as it is, anything else as JSON."""
    _results.print(visible(value) if isinstance(value, str) else json.dumps(value, indent=2), markup=False)


@contextmanager
def streams() -> Iterator[None]:
    """stdout and stderr as a command needs them: what they cannot encode is escaped, a closed pipe ends it quietly.

    Raises:
        UserError: a full disk, behind stdout (say) or a file without a name.
        SystemExit: the reader of a pipe has gone; 1, as in Python's own tools.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF):
            raise
        _discard_stdout()
        raise UserError(f"the output cannot be written: {error.strerror}") from None


@contextmanager
def told_visibly(words: Sequence[str]) -> Iterator[None]:
    """Let what a parser of these words prints on stderr through `visible`, where they need it."""
    if all(visible(word) == word for word in words):
        yield
        return
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            yield
    finally:
        if told.getvalue():
            _tell(told.getvalue().rstrip("\n"))


def _discard_stdout() -> None:
    """Let the interpreter's own flush at its end succeed."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress(task: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A progress bar with elapsed and remaining time; yields `advance(n, note="")`, where n may be a fraction.

    Without a terminal a line is printed every 15 seconds instead.
    """
    task = visible(task)
    if not _people.is_terminal:
        with _progress_lines(task, total) as advance:
            yield advance
        return
    whole = rich.table.Column(no_wrap=True, min_width=7)  # a long note never squeezes the times
    columns = (
        TextColumn("{task.description}", table_column=rich.table.Column(no_wrap=True, min_width=len(task))),
        BarColumn(bar_width=12, table_column=rich.table.Column(min_width=12)),
        TextColumn("{task.percentage:>3.0f}%", table_column=rich.table.Column(no_wrap=True, min_width=4)),
        TimeElapsedColumn(table_column=whole),
        TextColumn("ETA", table_column=rich.table.Column(no_wrap=True, min_width=3)),
        TimeRemainingColumn(table_column=whole),
        TextColumn("{task.fields[note]}", table_column=rich.table.Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=_people, refresh_per_second=4, expand=True) as bar:
        bar_id = bar.add_task(task, total=total, note="")

        def advance(n: float = 1, note: str | None = None) -> None:
            bar.update(bar_id, advance=n)
            if note is not None:
                bar.update(bar_id, note=visible(note))

        yield advance


@contextmanager
def _progress_lines(task: str, total: int | None) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()
    done, text = 0.0, ""

    def advance(n: float = 1, note: str | None = None) -> None:
        nonlocal done, last, text
        done, now = done + n, time.monotonic()
        text = text if note is None else note
        if now - last >= _LOG_SECONDS:
            last = now
            left = "" if not total or not done else f", ETA {(now - start) * max(total - done, 0) / done:.0f} s"
            share = f"{100 * done / total:.0f}%" if total else f"{done:,.0f}"
            say(f"{task}: {share} after {now - start:.0f} s{left}  {text}".rstrip())

    yield advance
    if time.monotonic() - start >= _LOG_SECONDS:
        say(f"{task}: done in {time.monotonic() - start:.0f} s")


def tracked(task: str, total: int | None, items: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
    """The same items under a progress bar that each advances by its size."""
    with progress(task, total) as advance:
        for item in items:
            yield item
            advance(size(item))


@contextmanager
def stop_requested(what: str) -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that no step is cut in half; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(signum: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say(f"stopping after {what}; press Ctrl-C again to stop at once")

    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: the row's `key`, with the value of `beside` in brackets; `best` is "min" or "max"."""

    key: str
    header: str = ""
    best: str | None = None
    beside: str | None = None

    def cell(self, row: Mapping[str, Any]) -> str:
        text = _text(row.get(self.key))
        return f"{text} ({_text(row.get(self.beside))})" if self.beside else text


def table(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    *,
    group: str | None = None,
    unranked: str | None = None,
    caption: str | None = None,
) -> str:
    """A text table, a rule between rows with different `group`, the best value of each group marked with a star.

    Rows that are true under the key `unranked` are shown, but neither marked nor compared with.
    """
    grid = rich.table.Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", header_style="bold"
    )
    for column in columns:
        words = any(isinstance(row.get(column.key), str) for row in rows)
        grid.add_column(column.header or column.key, justify="left" if words else "right", no_wrap=True)
    ranked = [row for row in rows if unranked is None or not row.get(unranked)]
    for before, row in zip([None, *rows], rows, strict=False):
        if group and before is not None and before.get(group) != row.get(group):
            grid.add_section()
        peers = [other for other in ranked if group is None or other.get(group) == row.get(group)]
        grid.add_row(*(c.cell(row) + ("*" if _is_best(c, row, peers) else "") for c in columns))
    console = Console(width=_WIDTH, highlight=False, color_system=None, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _is_best(column: Column, row: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> bool:
    if column.best is None or len(peers) < 2 or row.get(column.key) is None or not any(row is peer for peer in peers):
        return False
    values = [peer[column.key] for peer in peers if peer.get(column.key) is not None]
    return row[column.key] == (min if column.best == "min" else max)(values)


def _text(value: Any, digits: int = 3) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 1e5 else f"{value:.{digits - 1}e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
