"""Whole files and directories: several writers, kills, modes, what dead writers leave, checksums."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatsae.errors import UserError
from chatsae.files import Lock, read_object, settle, whole, with_checksum, write_json, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def killed(code: str, folder: Path) -> None:
    """Run code that kills its own process in `folder`."""
    code = f"import os, signal\nfrom pathlib import Path\nimport chatsae.files as files\n{code}"
    process = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def test_many_writers_of_one_file_all_succeed(tmp_path):
    failed = []

    def write(n: int) -> None:
        try:
            for i in range(15):
                write_text(tmp_path / "file.txt", f"{n} {i} " * 1000)
        except UserError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert names(tmp_path) == {"file.txt"}
    assert len(set((tmp_path / "file.txt").read_text().split())) in (1, 2)


def test_many_writers_of_one_directory_all_succeed(tmp_path):
    failed = []

    def write(n: int) -> None:
        try:
            for _ in range(15):
                with whole(tmp_path / "store") as new:
                    new.mkdir()
                    for name in ("a", "b"):
                        (new / name).write_text(str(n))
        except UserError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert names(tmp_path) == {"store"}
    assert (tmp_path / "store" / "a").read_text() == (tmp_path / "store" / "b").read_text()


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole(tmp_path / "x.safetensors") as new:
            save_file({"x": torch.zeros(1)}, new)  # which makes 0600
        with whole(tmp_path / "folder") as new:
            new.mkdir()
            save_file({"x": torch.zeros(1)}, new / "y.safetensors")
        write_text(tmp_path / "z.txt", "z")
    finally:
        os.umask(before)
    for name in ("x.safetensors", "folder/y.safetensors", "z.txt"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640, name
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_an_error_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file", "before")

    def write(fails: bool) -> None:
        with whole(tmp_path / "file", "; so there") as new:
            if fails:
                new.write_text("half")
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(fails=True)
    with pytest.raises(UserError, match=r"file cannot be written: No such file or directory; so there"):
        write(fails=False)
    assert (tmp_path / "file").read_text() == "before"
    assert names(tmp_path) == {"file"}


def test_what_a_killed_writer_leaves_goes_with_the_next_write_beside_it(tmp_path):
    killed(f"with files.whole(Path('big')) as new:\n    new.write_text('half')\n    {KILL}", tmp_path)
    assert len(names(tmp_path)) == 1
    write_text(tmp_path / "other", "text")
    assert names(tmp_path) == {"other"}


def test_what_a_living_writer_has_begun_stays(tmp_path):
    with whole(tmp_path / "slow") as new:
        new.write_text("begun")
        settle(tmp_path)
        write_text(tmp_path / "other", "text")
        Lock(tmp_path, "directory").close()
    assert (tmp_path / "slow").read_text() == "begun"


STORE = "with files.whole(Path('store')) as new:\n    new.mkdir()\n    (new / 'n').write_text('2')\n"


@pytest.mark.parametrize(
    "moment",
    [
        f"real = os.rename\ndef rename(a, b):\n    real(a, b)\n    {KILL}\nos.rename = rename\n",
        f"real, n = os.rename, []\ndef rename(a, b):\n    n.append(0)\n    len(n) == 2 and {KILL}\n    real(a, b)\n"
        "os.rename = rename\n",
    ],
    ids=["after the old one was moved away", "before the new one takes its place"],
)
def test_a_kill_between_the_two_renames_of_a_directory_loses_neither(tmp_path, moment):
    with whole(tmp_path / "below" / "store") as new:
        new.mkdir()
        (new / "n").write_text("1")
    killed(moment + STORE, tmp_path / "below")
    assert not (tmp_path / "below" / "store").exists()
    settle(tmp_path)
    assert names(tmp_path / "below") == {"store"}
    assert (tmp_path / "below" / "store" / "n").read_text() == "2"


def test_an_interrupt_between_the_two_renames_loses_neither(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "n").write_text("1")
    real, calls = os.rename, []

    def rename(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(a, b)

    def write() -> None:
        with whole(tmp_path / "store") as new:
            new.mkdir()
            (new / "n").write_text("2")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == {"store"}
    assert (tmp_path / "store" / "n").read_text() == "2"


def test_a_changed_value_is_noticed(tmp_path):
    path, facts = tmp_path / "state.json", {"step": 50, "x": 0.1, "of": {"b": None, "a": [1, 2]}}
    write_json(path, with_checksum(facts))
    assert read_object(path) == facts
    path.write_text(path.read_text().replace('"step": 50', '"step": 150'))
    with pytest.raises(UserError, match=r"state.json is damaged \(its content does not match its checksum\)"):
        read_object(path)
    path.write_text(json.dumps(facts))  # as it was written before there were checksums
    assert read_object(path) == facts
