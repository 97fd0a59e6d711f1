"""Whatever kills a verb, the same command ends in the same files; the harness itself notices what does not."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two of CPU time; the machine may be busy with other things
def test_twelve_kills_lose_nothing():
    argv = [sys.executable, str(TOOLS / "kill.py"), "--n", "12", "--seed", "0"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 of 12 equal after a kill" in done.stdout


def test_what_differs_is_told_file_by_file_but_for_times(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    from killing.trees import differences, tree

    for folder, step, seconds in (("a", 1, 2.0), ("b", 2, 3.0)):
        (tmp_path / folder / "empty").mkdir(parents=True)
        (tmp_path / folder / "x.json").write_text(f'{{"step": [{step}], "seconds": {seconds}}}')
        (tmp_path / folder / "environment.json").write_text(folder)
        (tmp_path / folder / "y.bin").write_bytes(folder.encode())
        (tmp_path / folder / f"{folder}.txt").write_text("")
    (tmp_path / "b" / "x.json").chmod(0o600)
    assert differences(tree(tmp_path / "a"), tree(tmp_path / "a")) == []
    lines = differences(tree(tmp_path / "a"), tree(tmp_path / "b"))
    assert [line.split(" is ")[0] for line in lines] == [
        "a.txt: missing",
        "b.txt: left over",
        "x.json: .content[0].step[0]",
        "x.json: .mode",
        "y.bin: .content",
    ]
