"""A run's model, tokenizer and template are those that it was trained on, or they are refused by name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatsae.audit.command import Ask as AuditAsk
from chatsae.audit.command import audit_run
from chatsae.config import DataConfig, ModelConfig, RunConfig
from chatsae.errors import UserError
from chatsae.evals.session import evaluate_run
from chatsae.features.session import RunFeatures
from chatsae.lm import identity
from chatsae.lm.checkpoint import locate
from chatsae.lm.identity import model_identity, weights_digest
from chatsae.lm.load import load_model
from chatsae.run_model import remember_model, trained_model
from chatsae.runs import Checkpoint, Run
from chatsae.sae.init import init_sae
from chatsae.steering.command import prepare, tokens_run
from chatsae.training.session import train_run
from sae_samples import spec
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tiny_model(tmp_path_factory.mktemp("original"), "qwen2", shard_size="60KB"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    config = RunConfig(model=ModelConfig(name=str(model), layers=(1,)), data=DataConfig(sources=("pydocs",)))
    run = Run.open(tmp_path / "run", config)
    remember_model(run, resumes=False)
    run.close()
    return run


def other_weight(path: Path) -> None:
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] += 1e-4
    save_file(tensors, path, metadata={"format": "pt"})


def some_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[1]


def edit(name: str, old: str, new: str) -> Callable[[Path], str]:
    def change(model: Path) -> str:
        text = (model / name).read_text()
        assert old in text
        (model / name).write_text(text.replace(old, new))
        return f"{name} has changed"

    return change


def spoil_weight(model: Path) -> str:
    other_weight(some_shard(model))
    return f"{some_shard(model).name} has changed"


def add_template(model: Path) -> str:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("x")
    return "additional_chat_templates/rag.jinja is new"


def drop_template(model: Path) -> str:
    (model / "chat_template.jinja").unlink()
    return "chat_template.jinja is missing"


CHANGES = {
    "weight": spoil_weight,
    "config": edit("config.json", '"rms_norm_eps": ', '"rms_norm_eps": 1'),
    "template": edit("chat_template.jinja", "im_start", "im_begin"),
    "tokenizer": edit("tokenizer.json", '"version"', '"version" '),
    "new template": add_template,
    "no template": drop_template,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_named(run: Run, model: Path, change: str) -> None:
    assert trained_model(run) == run.config.model
    what = CHANGES[change](model)
    with pytest.raises(UserError, match=f"is not the model that it was trained on: {what}; put the files") as error:
        trained_model(run)
    assert str(error.value).endswith(f"or delete {run.path / 'model.json'} to use the one that is there")
    with pytest.raises(UserError, match=f"{what}; .* or delete the run directory to begin again"):
        remember_model(run, resumes=True)
    (run.path / "model.json").unlink()
    assert trained_model(run) == run.config.model  # as in a run from before models were recorded


def test_files_that_decide_nothing_may_change(run: Run, model: Path) -> None:
    (model / "README.md").write_text("new")
    (model / "own.py").write_text("not run without trust_remote_code")
    assert trained_model(run) == run.config.model


def test_code_of_a_model_is_guarded_where_it_runs(original: Path, model: Path) -> None:
    trusted = locate(model, trust_remote_code=True)
    before = model_identity(trusted)
    (model / "own.py").write_text("pass")
    assert set(model_identity(trusted)["files"]) == {*before["files"], "own.py"}


def test_the_file_names_no_path_of_the_machine(run: Run, tmp_path: Path) -> None:
    text = (run.path / "model.json").read_text()
    assert str(tmp_path) not in text
    assert "chat_template.jinja" in json.loads(text)["files"]
    (run.path / "model.json").write_text(text.replace("chat_template.jinja", "chat_template.json"))
    with pytest.raises(UserError, match="does not match its checksum"):
        trained_model(run)


def test_large_files_are_known_by_a_piece_of_every_tensor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = some_shard(model)
    whole = weights_digest(path)
    monkeypatch.setattr(identity, "_WHOLE", 0)
    before = weights_digest(path)
    assert before != whole
    tensors = load_file(path)
    for name in tensors:
        save_file({**tensors, name: tensors[name] * 1.001 + 1e-3}, path, metadata={"format": "pt"})
        assert weights_digest(path) != before
    save_file(tensors, path, metadata={"format": "pt"})
    assert weights_digest(path) == before


def test_a_hub_model_is_kept_at_its_commit(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo, first, second = tmp_path / "hub" / "models--nobody--tiny", "a" * 40, "b" * 40
    shutil.copytree(original, repo / "snapshots" / first)
    shutil.copytree(original, repo / "snapshots" / second)
    other_weight(some_shard(repo / "snapshots" / second))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(first)
    config = RunConfig(model=ModelConfig(name="nobody/tiny", layers=(1,)))
    run = Run.open(tmp_path / "run", config)
    assert remember_model(run, resumes=False).revision == first
    (repo / "refs" / "main").write_text(second)  # the branch moves on
    assert locate("nobody/tiny").revision == second
    assert trained_model(run) == replace(config.model, revision=first) == remember_model(run, resumes=True)
    weights = [
        load_model(replace(config.model, revision=revision)).model.state_dict() for revision in (None, first, second)
    ]
    same = [all(torch.equal(weights[0][k], other[k]) for k in other) for other in weights[1:]]
    assert same == [False, True]
    run.close()


def test_a_directory_in_place_of_a_hub_model_is_refused(run: Run) -> None:
    (run.path / "model.json").write_text('{"commit": "abc"}')
    with pytest.raises(UserError, match="it was commit abc of the hub and is a directory"):
        trained_model(run)
    (run.path / "model.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"model\.json is damaged"):
        trained_model(run)


VERBS: dict[str, Callable[[Path], object]] = {
    "eval": evaluate_run,
    "features": lambda path: RunFeatures(path).lm,
    "tokens": tokens_run,
    "steer": lambda path: prepare(path, None, 0, 8),
    "audit": lambda path: audit_run(path, AuditAsk()),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_another_model(run: Run, model: Path, verb: str) -> None:
    init_sae(spec(32, layer=1)).save(run.path / "saes" / "L1-8x-standard")
    what = CHANGES["template"](model)
    with pytest.raises(UserError, match=what):
        VERBS[verb](run.path)


def test_a_training_does_not_go_on_with_another_model(run: Run, model: Path) -> None:
    opened = Run.open(run.path, run.config)
    opened.save_checkpoint(Checkpoint(5, {}, {}))
    opened.close()
    what = CHANGES["weight"](model)
    with pytest.raises(UserError, match=f"{what}; .* begin again"):
        train_run(run.config, run.path)
