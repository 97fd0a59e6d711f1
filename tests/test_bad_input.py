"""Bad input ends with exit code 2 and one message that names the thing: tables of rows (bad_*.py), one test."""

import time
from collections import Counter
from importlib import import_module

import pytest

from bad_calls import CALL_ROWS
from bad_files import FILE_ROWS
from bad_inputs import ROWS as VALUE_ROWS
from bad_inputs import Place, Row
from chatsae.cli import _VERBS, main
from chatsae.errors import UserError

SECONDS = 10.0
"""Of CPU time for a row; the most that one needs is about one, for the bundled model."""

ROWS = (*VALUE_ROWS, *FILE_ROWS, *CALL_ROWS)

VERBS = ("training.session", "evals.session", "features.judge.command", "steersweep.command", "audit.command")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    for name in VERBS:  # what the verbs import is not a row's time
        import_module(f"chatsae.{name}")
    return tmp_path_factory.mktemp("bad") / "run"


def test_every_row_has_its_own_name_and_there_are_enough():
    assert max(Counter(row.name for row in ROWS).values()) == 1
    assert len(ROWS) >= 150


def test_every_verb_has_a_row(tmp_path, shared):
    verbs = set()
    for number, row in enumerate(ROWS):
        (place := tmp_path / str(number)).mkdir()
        made = row.make(Place(place, shared))
        verbs |= set() if callable(made) else {made[0]}
    assert verbs == set(_VERBS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input(row: Row, tmp_path, shared, capsys, monkeypatch):
    monkeypatch.setenv("CHATSAE_CACHE", str(tmp_path / "cache"))
    place = Place(tmp_path, shared)
    made = row.make(place)
    capsys.readouterr()
    start = time.process_time()
    message = error_of(made, capsys)
    took = time.process_time() - start
    assert not (missing := [word for word in row.words if word not in message]), f"{missing} not in: {message}"
    assert "Traceback" not in message
    assert len(message) < 1500  # one message, whatever the value was
    assert took < SECONDS


def error_of(made, capsys) -> str:
    """The one error of a command or a call."""
    if callable(made):
        with pytest.raises(UserError) as raised:
            made()
        return str(raised.value)
    status, boxed = 0, False
    try:
        status = main([str(word) for word in made])
    except SystemExit as refused:  # by the parser, which draws a box
        status, boxed = refused.code, True
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    if boxed:
        return " ".join(printed.err.split())
    lines = printed.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, printed.err
    assert lines[-1] == errors[0], printed.err  # nothing after it, and no message of several lines
    return errors[0]
