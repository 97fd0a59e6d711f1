import subprocess
import sys
import time

import pytest

from chatsae.cli import main


def best_seconds(code: list[str], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, *code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_help_answers_in_under_0_3_seconds():
    assert best_seconds(["-m", "chatsae.cli", "--help"]) < 0.3


def test_the_import_costs_under_0_15_seconds():
    assert best_seconds(["-c", "import chatsae as cs"]) - best_seconds(["-c", "pass"]) < 0.15


def test_no_verb_prints_the_help_and_wrong_verbs_are_told_the_right_ones(capsys):
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 0
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        main(["trian"])
    assert raised.value.code == 2
    assert "demo, prepare, train, eval, compare" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "nothing.yaml"], "recipe nothing.yaml does not exist"),
        (["eval", "nothing"], "run directory nothing does not exist"),
        (["compare", "nothing"], "run directory nothing does not exist"),
        (["show", "nothing"], "nothing does not exist"),
        (["plan", "nothing.yaml"], "recipe nothing.yaml does not exist"),
        (["sweep", "nothing.yaml"], "recipe nothing.yaml does not exist"),
    ],
)
def test_what_does_not_exist_is_named(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_show_says_what_an_empty_directory_is_not(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2
    assert "holds no SAE (cfg.json), run (config.yaml)" in capsys.readouterr().err
