import io
import subprocess
import sys

import pytest
from rich.console import Console

from chatsae import console
from chatsae.console import Column, table

COLUMNS = [
    Column("name"),
    Column("mse", best="min", beside="log2_mse"),
    Column("ev", "explained\nvariance", best="max"),
]
ROWS = [
    {"name": "a", "group": 1, "mse": 0.5, "log2_mse": -1.0, "ev": 0.9},
    {"name": "b", "group": 1, "mse": 0.25, "log2_mse": -2.0, "ev": 0.8},
    {"name": "c", "group": 2, "mse": None, "log2_mse": None, "ev": 123456.0},
]


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if f"│ {name} " in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_best_of_each_group_is_marked_and_nothing_else():
    text = table("T", COLUMNS, ROWS, group="group")
    assert cells(text, "a") == ["a", "0.5 (-1)", "0.9*"]
    assert cells(text, "b") == ["b", "0.25 (-2)*", "0.8"]
    assert cells(text, "c") == ["c", "- (-)", "1.23e+05"]  # alone in its group: nothing to compare
    assert text.count("├") == 1


def test_ties_are_all_marked():
    rows = [{"name": n, "mse": 1.0} for n in "xy"]
    text = table("T", [Column("name"), Column("mse", best="min")], rows)
    assert cells(text, "x")[1] == cells(text, "y")[1] == "1*"


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "_people", Console(file=out, force_terminal=False, soft_wrap=True))
    monkeypatch.setattr(console, "_LOG_SECONDS", 0.0)
    with console.progress("work", 4) as advance:
        advance(1, "first")
        advance(3)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("work: 25% after 0 s, ETA")
    assert lines[0].endswith("first")
    assert lines[1].startswith("work: 100%")
    assert lines[2].startswith("work: done in")


def test_on_a_terminal_there_is_a_bar_with_an_eta(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "_people", Console(file=out, force_terminal=True, width=100))
    with console.progress("work", 2) as advance:
        advance(2, "mse 0.5")
    assert "work" in out.getvalue()
    assert "100%" in out.getvalue()
    assert "ETA" in out.getvalue()
    assert "mse 0.5" in out.getvalue()


def test_people_read_stderr_and_programs_stdout(capsys):
    console.say("hello [bold]not markup[/bold]")
    console.warn("careful")
    console.result({"a": 1})
    captured = capsys.readouterr()
    assert captured.err == "hello [bold]not markup[/bold]\nwarning: careful\n"
    assert captured.out == '{\n  "a": 1\n}\n'


@pytest.mark.parametrize("value", ["text", {"a": [1, 2]}])
def test_results_are_not_wrapped_or_coloured(value, capsys):
    console.result(value)
    assert "\x1b" not in capsys.readouterr().out


SHELL = {
    "a reader that has gone": "{python} -m chatsae.cli --help | head -1 >{out}",
    "a full disk": "{python} -m chatsae.cli --version >/dev/full",
    "a terminal of ASCII": "PYTHONIOENCODING=ascii {python} -m chatsae.cli show {run}/é",
    "an escape in a path": "{python} -m chatsae.cli show \"{run}/$(printf '\\033[31mred')\"",
}


@pytest.mark.parametrize("case", SHELL)
def test_a_process_ends_without_a_traceback(case, tmp_path):
    script = SHELL[case].format(python=sys.executable, run=tmp_path / "run", out=tmp_path / "out")
    done = subprocess.run(["bash", "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "\x1b" not in done.stderr
    if case == "a reader that has gone":
        assert done.stderr == ""
        assert (tmp_path / "out").read_text()
    else:
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.isascii()
