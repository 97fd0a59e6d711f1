"""The only place that prints: people read stderr, programs read stdout."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_people = Console(stderr=True, highlight=False, soft_wrap=True)
_results = Console(highlight=False, soft_wrap=True)
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
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_people, refresh_per_second=4) as bar:
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


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    *,
    best: Mapping[str, str] | None = None,
    group: str | None = None,
    caption: str | None = None,
) -> str:
    """A text table; `best` maps a column to "min" or "max" and marks its best value per `group` with a star."""
    grid = Table(title=title, caption=caption, title_justify="left", caption_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i == 0 or isinstance(rows[0].get(column), str) else "right")
    marked = {id(row): _best_columns(row, rows, best or {}, group) for row in rows}
    previous = rows[0].get(group) if rows and group else None
    for row in rows:
        if group and row.get(group) != previous:
            grid.add_section()
            previous = row.get(group)
        cells = [_cell(row.get(column)) + ("*" if column in marked[id(row)] else "") for column in columns]
        grid.add_row(*cells)
    console = Console(width=200, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return capture.get().rstrip("\n")


def _best_columns(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], best: Mapping[str, str], group: str | None
) -> set[str]:
    peers = [r for r in rows if group is None or r.get(group) == row.get(group)]
    marked = set()
    for column, direction in best.items():
        values = [r[column] for r in peers if isinstance(r.get(column), (int, float))]
        if len(peers) > 1 and values and row.get(column) == (min if direction == "min" else max)(values):
            marked.add(column)
    return marked


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
