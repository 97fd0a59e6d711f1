import subprocess
import sys

import pytest

from chatsae.cli import main


@pytest.mark.parametrize("code", ["import chatsae", "from chatsae.cli import main; assert main(['--help']) == 0"])
def test_help_and_import_load_nothing_that_takes_long(code):
    """What they cost is what they import. The seconds depend on the machine: 0.2 for the help on an idle one."""
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'numba', 'tyro', 'rich', 'yaml', 'jinja2'}"
    code = f"{code}; import sys; found = {heavy} & {{*sys.modules}}; assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_verb_prints_the_help_and_wrong_verbs_are_told_the_right_ones(capsys):
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 0
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        main(["trian"])
    assert raised.value.code == 2
    assert "demo, fetch, norms, prepare, train, eval, compare" in capsys.readouterr().err


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
