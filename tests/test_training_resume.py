"""What a training that was stopped at a bad moment remembers, refuses and clears away."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from chatsae.cli import main
from chatsae.config import RunConfig
from chatsae.errors import UserError
from chatsae.files import read_object
from chatsae.recipe import load_recipe
from chatsae.runs import Run
from chatsae.training import session
from chatsae.training.session import train_run
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model, dialogues some of which are cut, and a recipe whose last checkpoint is a step before the end."""
    root = tmp_path_factory.mktemp("world")
    tiny_tokenizer(tiny_model(root / "model"))
    rng = random.Random(0)
    with (root / "chat.jsonl").open("w") as file:
        for i in range(120):
            words = " ".join(rng.choices(["alpha", "beta", "gamma"], k=rng.randint(1, 30)))
            turns = [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": words}]
            file.write(json.dumps({"messages": turns}) + "\n")
    recipe = {
        "model": {"name": str(root / "model"), "layers": [0]},
        "data": {"sources": [str(root / "chat.jsonl")], "max_length": 60, "epochs": 0},
        "harvest": {"token_budget": 256, "pool": 32, "overlap": "off"},
        "buffer": {"capacity": 600},
        "sae": {"architectures": ["standard"], "expansion_factors": [1], "lrs": [1.0e-3]},
        "train": {"tokens": 3000, "batch_size": 50, "log_every": 5, "checkpoint_every": 59, "step": "plain"},
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    return root


def config_of(world: Path) -> RunConfig:
    return load_recipe(world / "recipe.yaml")


class Killed(BaseException):
    pass


def killed_at_the_end(config: RunConfig, out: Path, monkeypatch) -> None:
    """Train to the end, and die before the SAEs are saved."""

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(session, "manifest_digest", die)
        with pytest.raises(Killed):
            train_run(config, out)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_what_the_data_dropped_is_counted_once_whatever_came_in_between(world, tmp_path, monkeypatch, overlap):
    config = config_of(world)
    config = replace(config, harvest=replace(config.harvest, overlap=overlap))
    train_run(config, tmp_path / "whole")
    dropped = read_object(tmp_path / "whole" / "summary.json")["dropped"]
    assert dropped["cut at 60 tokens"] > 10
    killed_at_the_end(config, tmp_path / "late", monkeypatch)
    assert [path.name for path in (tmp_path / "late" / "checkpoints").iterdir()] == ["step-000000059"]
    train_run(config, tmp_path / "late")
    assert read_object(tmp_path / "late" / "summary.json")["dropped"] == dropped
    early = replace(config, train=replace(config.train, checkpoint_every=20))
    killed_at_the_end(early, tmp_path / "early", monkeypatch)  # goes on from step 40, with more data to come
    train_run(early, tmp_path / "early")
    assert read_object(tmp_path / "early" / "summary.json")["dropped"] == dropped


@pytest.mark.parametrize("checked", [True, False], ids=["with a checksum", "of before there were checksums"])
def test_a_way_to_read_the_model_that_does_not_exist_is_refused(world, tmp_path, monkeypatch, checked):
    killed_at_the_end(config_of(world), tmp_path / "run", monkeypatch)
    path = tmp_path / "run" / "harvest.json"
    facts = json.loads(path.read_text())
    if not checked:
        del facts["chatsae_sha256"]
    path.write_text(json.dumps(facts | {"way": "zigzag"}))
    says = "does not match its checksum" if checked else "way must be one of padded, packed, single"
    with pytest.raises(UserError, match=rf"harvest.json is damaged.*{says}"):
        train_run(config_of(world), tmp_path / "run")


def test_a_finished_run_frees_the_disk_and_leaves_files_of_others(world, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "notes.txt").write_text("mine")
    (out / "checkpoints" / "step-notes.txt").write_text("mine")
    argv = ["train", str(world / "recipe.yaml"), "--out", str(out)]
    assert main(argv) == 0
    (out / "checkpoints" / "step-000000059").mkdir()  # of a kill while they were removed
    assert main(argv) == 0
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["notes.txt", "step-notes.txt"]
    assert len({p.stat().st_mode for p in Run.read(out).path.glob("saes/*/*")}) == 1
