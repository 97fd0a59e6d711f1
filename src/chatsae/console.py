"""The only place that prints: people read stderr, programs read stdout."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_people = Console(stderr=True, highlight=False, soft_wrap=True)
_results = Console(highlight=False, soft_wrap=True)
_WIDTH = 200
_LOG_SECONDS = 15.0  # between progress lines where there is no terminal


def say(text: str = "") -> None:
    """A line for people."""
    _people.print(text, markup=False)


def warn(text: str) -> None:
    """A line about something that needs attention but stops nothing."""
    _people.print(f"warning: {text}", style="yellow", markup=False)


def fail(text: str) -> None:
    """The one line that explains why a command gives up."""
    _people.print(f"error: {text}", style="bold red", markup=False)


def result(value: Any) -> None:
    """A result on stdout: text as it is, anything else as JSON."""
    _results.print(value if isinstance(value, str) else json.dumps(value, indent=2), markup=False)


@contextmanager
def progress(task: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A progress bar with elapsed and remaining time; yields `advance(n, note="")`.

    Without a terminal a line is printed every 15 seconds instead.
    """
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

        def advance(n: int = 1, note: str | None = None) -> None:
            bar.update(bar_id, advance=n)
            if note is not None:
                bar.update(bar_id, note=note)

        yield advance


@contextmanager
def _progress_lines(task: str, total: int | None) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()
    done, text = 0, ""

    def advance(n: int = 1, note: str | None = None) -> None:
        nonlocal done, last, text
        done, now = done + n, time.monotonic()
        text = text if note is None else note
        if now - last >= _LOG_SECONDS:
            last = now
            left = "" if not total or not done else f", ETA {(now - start) * max(total - done, 0) / done:.0f} s"
            share = f"{100 * done / total:.0f}%" if total else str(done)
            say(f"{task}: {share} after {now - start:.0f} s{left}  {text}".rstrip())

    yield advance
    if time.monotonic() - start >= _LOG_SECONDS:
        say(f"{task}: done in {time.monotonic() - start:.0f} s")


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
    console = Console(width=_WIDTH, highlight=False, color_system=None, markup=False)
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
