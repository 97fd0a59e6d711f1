import json
import multiprocessing
import resource
from dataclasses import replace

import pytest
import torch

from chatsae.config import RunConfig, TrainConfig
from chatsae.errors import UserError
from chatsae.runs import Checkpoint, Run
from serve_process import small_run

CONFIG = RunConfig(train=TrainConfig(tokens=1280))


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(step, {"a/b": torch.rand(3, 4, generator=generator)}, {"n": step, "x": 0.1})


def test_a_run_is_read_back_and_taken_up_again(tmp_path):
    run = Run.open(tmp_path / "run", CONFIG)
    run.log({"step": 1, "mse": 0.5})
    run.close()
    again = Run.open(tmp_path / "run", CONFIG)
    assert again.metrics() == [{"step": 1, "mse": 0.5}]
    assert Run.read(tmp_path / "run").config == CONFIG
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    again.close()


def test_another_recipe_in_the_same_directory_is_refused(tmp_path):
    run = Run.open(tmp_path, CONFIG)
    run.log({"step": 1})
    run.close()
    with pytest.raises(UserError, match=r"another recipe.*train.tokens: 1280 -> 2560"):
        Run.open(tmp_path, replace(CONFIG, train=TrainConfig(tokens=2560)))
    Run.open(tmp_path, CONFIG).close()


def test_a_directory_in_which_nothing_was_trained_takes_another_recipe(tmp_path):
    Run.open(tmp_path, CONFIG).close()
    other = replace(CONFIG, train=TrainConfig(tokens=2560))
    Run.open(tmp_path, other).close()
    assert Run.read(tmp_path).config == other


def _elsewhere(function, path) -> str:
    """What a function says in another process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(path, queue))
    process.start()
    said = queue.get(timeout=600)
    process.join()
    return said


def _try_open(path, queue):
    try:
        Run.open(path, CONFIG)
        queue.put("opened")
    except UserError as error:
        queue.put(str(error))


def test_a_second_process_is_kept_out(tmp_path):
    run = Run.open(tmp_path, CONFIG)
    assert "in use by another process" in _elsewhere(_try_open, tmp_path)
    run.close()


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run directory .*file/run cannot be written"):
        Run.open(tmp_path / "file" / "run", CONFIG)


def test_reading_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Run.read(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no run \(no config.yaml\)"):
        Run.read(tmp_path)


def test_checkpoints_come_back_exactly_and_only_two_are_kept(tmp_path):
    run = Run.open(tmp_path, CONFIG)
    for step in (5, 10, 15):
        run.save_checkpoint(checkpoint(step))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000000010", "step-000000015"]
    loaded = run.load_checkpoint()
    assert loaded is not None
    assert (loaded.step, loaded.facts) == (15, {"n": 15, "x": 0.1})
    assert torch.equal(loaded.tensors["a/b"], checkpoint(15).tensors["a/b"])
    run.close()


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "no json", "bad json", "deep json", "a list", "step", "missing"]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, capsys):
    run = Run.open(tmp_path, CONFIG)
    run.save_checkpoint(checkpoint(5))
    run.save_checkpoint(checkpoint(10))
    newest = tmp_path / "checkpoints" / "step-000000010"
    file, facts = newest / "state.safetensors", newest / "state.json"
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-7])
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "no json":
        facts.unlink()
    elif damage == "step":
        facts.write_text(facts.read_text().replace('"step": 10', '"step": 150'))
    elif damage in ("bad json", "deep json", "a list"):
        facts.write_text({"bad json": "{", "deep json": "[" * 100_000, "a list": "[1]"}[damage])
    else:
        file.unlink()
    loaded = run.load_checkpoint()
    assert loaded is not None
    assert loaded.step == 5
    assert "step-000000010 is damaged" in capsys.readouterr().err
    run.close()


def test_an_unfinished_checkpoint_is_never_read(tmp_path):
    run = Run.open(tmp_path, CONFIG)
    run.save_checkpoint(checkpoint(5))
    half = tmp_path / "checkpoints" / ".step-000000010.0123456789abcdef.tmp"  # of a writer that died
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    loaded = run.load_checkpoint()
    assert loaded is not None
    assert loaded.step == 5
    run.save_checkpoint(checkpoint(10))
    assert not half.exists()
    run.close()


def _save_with_little_room(path, queue):
    run = Run.open(path, CONFIG)
    run.save_checkpoint(checkpoint(5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # files cannot grow beyond this: as on a full disk
    try:
        run.save_checkpoint(Checkpoint(10, {"a": torch.zeros(100_000)}, {}))
        queue.put("saved")
    except UserError as error:
        queue.put(str(error))


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path):
    assert "step-000000010 cannot be written" in _elsewhere(_save_with_little_room, tmp_path)
    run = Run.read(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]
    loaded = run.load_checkpoint()
    assert loaded is not None
    assert loaded.step == 5


def test_metrics_of_repeated_steps_are_dropped_and_a_cut_line_too(tmp_path):
    run = Run.open(tmp_path, CONFIG)
    for step in (10, 20, 30):
        run.log({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    run.forget_after(20)
    assert run.metrics() == [{"step": 10}, {"step": 20}]
    run.close()


@pytest.mark.parametrize(
    "line", [b'{"step', b"[1]", b'{"step": "x"}', b"{}", b'{"step": 2, "\xff": 1}', b"[" * 100_000]
)
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    run = Run.open(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged"):
        run.metrics()
    run.close()


def test_a_run_of_which_an_sae_is_gone_says_so(tmp_path, capsys):
    run = Run.read(small_run(tmp_path / "run"))
    assert [path.name for path in run.sae_directories()] == ["L3-2x-standard", "L3-2x-jumprelu"]
    assert capsys.readouterr().err == ""
    (run.path / "saes" / "L3-2x-standard" / "cfg.json").unlink()
    assert [path.name for path in run.sae_directories()] == ["L3-2x-jumprelu"]
    assert "is not whole: no cfg.json of L3-2x-standard" in capsys.readouterr().err
