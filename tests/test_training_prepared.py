"""Runs on prepared data: the manifest's digest in run and SAE card, and no other data when a run goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from chatsae.cli import main
from chatsae.config import RunConfig
from chatsae.data.store.summary import warnings
from chatsae.errors import UserError
from chatsae.evals.session import evaluate_run
from chatsae.files import read_object
from chatsae.recipe import load_recipe, to_yaml
from chatsae.training.pipeline import token_batches
from chatsae.training.prepare import prepare_data
from chatsae.training.session import train_run

RECIPE = {
    "model": {"name": "demo", "layers": [1]},
    "data": {"ngram": 0, "max_length": 256, "block_size": 64, "workers": 1, "held_out": [20, 5, 5]},
    "harvest": {"pool": 64, "token_budget": 1024},
    "buffer": {"capacity": 2000},
    "sae": {"architectures": ["standard"], "expansion_factors": [1]},
    "train": {"tokens": 6400, "batch_size": 64, "log_every": 10, "checkpoint_every": 20},
    "eval": {"dialogues": 4},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A recipe, and its data in `data` beside it."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "recipe.yaml").write_text(json.dumps(RECIPE))
    prepare_data(load_recipe(root / "recipe.yaml"), root / "data")
    return root


def config_of(root: Path, **data) -> RunConfig:
    config = load_recipe(root / "recipe.yaml")
    return replace(config, data=replace(config.data, prepared=str(root / "data"), **data))


def test_the_verb_prints_a_table_and_the_next_command(prepared, tmp_path, capsys):
    out = str(tmp_path / "data")
    assert main(["prepare", str(prepared / "recipe.yaml"), "--out", out]) == 0
    printed = capsys.readouterr()
    assert "pydocs" in printed.out
    digest = json.loads((tmp_path / "data" / "manifest.json").read_text())["recipe"]["tokenizer"]["sha256"]
    assert len(digest) == 64
    assert f"--data.prepared {out}" in printed.err
    assert main(["prepare", str(prepared / "recipe.yaml"), "--out", out, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["splits"]["train"]["tokens"] >= 6400
    assert "is prepared already" in printed.err
    assert main(["show", out]) == 0
    assert "manifest sha256" in capsys.readouterr().out
    for flags, says in (
        (["--data.held-out", "1", "-2", "3"], "data.held_out[1] must be at least 0, not -2"),
        (["--data.memory-gb", "-1"], "data.memory_gb must be at least 0, not -1"),
        (["--data.sources", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data.max-tokens", "7"], "holds other data"),
    ):
        assert main(["prepare", str(prepared / "recipe.yaml"), "--out", out, *flags]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fast", "bt-f", "bt-p"])
def test_every_method_trains_on_one_preparation(prepared, tmp_path, method):
    config = config_of(prepared, method=method)
    summary = train_run(config, tmp_path / method)
    assert summary.tokens == 6400
    digest = json.loads((tmp_path / method / "summary.json").read_text())["manifest_sha256"]
    facts = read_object(tmp_path / method / "data.json")
    assert facts == {"prepared": "data", "manifest_sha256": digest}
    card = json.loads((tmp_path / method / "saes" / "L1-1x-standard" / "cfg.json").read_text())
    assert card["metadata"]["manifest_sha256"] == digest
    report = evaluate_run(tmp_path / method)
    assert report.facts["n_dialogues"] == 4


def test_a_second_pass_repeats_the_first(prepared):
    config = config_of(prepared, epochs=2)
    from chatsae.lm.checkpoint import load_tokenizer

    names = [name for batch in token_batches(config.data, load_tokenizer("demo"), seed=1) for name in batch.names]
    assert len(names) % 2 == 0
    assert names[: len(names) // 2] == names[len(names) // 2 :]


def test_a_run_does_not_go_on_with_other_data(prepared, tmp_path, monkeypatch):
    config = config_of(prepared)
    config = replace(config, data=replace(config.data, prepared=str(tmp_path / "data")))
    (tmp_path / "data").mkdir()
    for file in (prepared / "data").iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    stop = "chatsae.training.loop.train_step"
    import chatsae.training.loop as loop

    real, calls = loop.train_step, 0

    def fails(*args, **options):
        nonlocal calls
        calls += 1
        if calls > 30:
            raise RuntimeError("stop")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stop, fails)
        with pytest.raises(RuntimeError, match="stop"):
            train_run(config, tmp_path / "run")
    manifest = tmp_path / "data" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text + "\n")
    with pytest.raises(UserError, match=r"data of .*run is not what it began with: manifest_sha256"):
        train_run(config, tmp_path / "run")
    manifest.write_text(text)
    assert train_run(config, tmp_path / "run").ending == "done"


def test_a_run_on_sources_has_a_digest_too(prepared, tmp_path):
    config = load_recipe(prepared / "recipe.yaml")
    train_run(replace(config, train=replace(config.train, tokens=640)), tmp_path / "a")
    facts = json.loads((tmp_path / "a" / "data.json").read_text())
    assert facts["sources"][0]["name"] == "pydocs"
    assert len(json.loads((tmp_path / "a" / "summary.json").read_text())["manifest_sha256"]) == 64


def test_what_a_person_should_know_is_said(tmp_path):
    header = "You are an assistant that answers in one short sentence and never says more than it knows about anything "
    rows = [
        {
            "messages": [
                {"role": "system", "content": header + "at all times, please do."},
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
        for i in range(100)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE | {"data": {"sources": [str(path)], "text_sources": [], "workers": 1}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    config = load_recipe(tmp_path / "recipe.yaml")
    lines = warnings(prepare_data(config, tmp_path / "out"))
    assert any("keeps 1 of 100 dialogues" in line and "ngram_roles" in line for line in lines)
    assert any("train has" in line and "of 6,400 tokens" in line for line in lines)
    roles = replace(config, data=replace(config.data, ngram_roles=("user", "assistant")))
    assert not any("keeps" in line for line in warnings(prepare_data(roles, tmp_path / "roles")))
    assert "ngram_roles" in to_yaml(config)
