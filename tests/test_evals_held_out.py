"""What a run is evaluated on: its held-out part, other corpora, and none that it was trained on unless told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from chatsae.cli import main
from chatsae.data.reading import split_of
from chatsae.errors import UserError
from chatsae.evals.held_out import fit_tokens, held_out
from chatsae.evals.report import Report
from chatsae.evals.schema import report_schema
from chatsae.lm.load import LanguageModel, load_model
from chatsae.recipe import load_recipe
from chatsae.runs import Run
from chatsae.training.prepare import prepare_data
from chatsae.training.session import train_run
from test_evals_pass import check
from tiny_models import tiny_model, tiny_tokenizer

Turns = list[dict[str, str]]


def said(word: str, n: int) -> list[Turns]:
    return [[{"role": r, "content": f"{word} {i} of the {r}"} for r in ("user", "assistant")] for i in range(n)]


def split(turns: Turns) -> str:
    return split_of("\x1e".join(f"{m['role']}\x1f{m['content']}" for m in turns))


def write(path: Path, dialogues: list[Turns]) -> Path:
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in dialogues))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that streamed and that read prepared data of the same dialogues."""
    root = tmp_path_factory.mktemp("world")
    tiny_tokenizer(tiny_model(root / "model"))
    write(root / "chat.jsonl", said("corpus", 300))
    (root / "recipe.yaml").write_text(
        f"""
model: {{name: {root / "model"}, layers: [1]}}
data: {{sources: [{root / "chat.jsonl"}], text_sources: [], workers: 1}}
harvest: {{pool: 32}}
buffer: {{capacity: 600}}
sae: {{architectures: [standard], expansion_factors: [2], lrs: [1.0e-3]}}
train: {{tokens: 2000, batch_size: 50}}
eval: {{dialogues: 50}}
"""
    )
    config = load_recipe(root / "recipe.yaml")
    train_run(config, root / "streamed")
    prepare_data(replace(config, data=replace(config.data, max_tokens=0)), root / "data")
    train_run(replace(config, data=replace(config.data, prepared=str(root / "data"))), root / "prepared")
    return root


@pytest.fixture(scope="module")
def lm(world: Path) -> LanguageModel:
    return load_model(Run.read(world / "streamed").config.model, head=True)


def texts(lm: LanguageModel, data) -> set[str]:
    found = set()
    for batch in data:
        for ids in batch.input_ids.split(batch.lengths.tolist()):
            found.add(lm.tokenizer.decode(ids).split("\n")[1].removesuffix("<|im_end|>"))
    return found


RUNS = ["streamed", "prepared"]


@pytest.mark.parametrize("name", RUNS)
def test_by_default_the_held_out_part_is_read(world: Path, lm: LanguageModel, name: str) -> None:
    found = held_out(Run.read(world / name), lm, 500)
    expected = {turns[0]["content"] for turns in said("corpus", 300) if split(turns) == "eval"}
    assert texts(lm, found.tokens) == expected
    assert len(expected) > 5
    assert found.facts == {}


@pytest.mark.parametrize("name", RUNS)
def test_another_corpus_is_read_whole(world: Path, lm: LanguageModel, name: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", said("other", 40))
    found = held_out(Run.read(world / name), lm, 500, sources=[str(other)])
    assert texts(lm, found.tokens) == {turns[0]["content"] for turns in said("other", 40)}
    assert found.facts == {"sources": other.name, "overlap": 0}
    assert len(texts(lm, held_out(Run.read(world / name), lm, 7, sources=[str(other)]).tokens)) == 7


@pytest.mark.parametrize("name", RUNS)
def test_dialogues_that_were_trained_on_are_refused_unless_told(
    world: Path, lm: LanguageModel, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.read(world / name)
    trained = [turns for turns in said("corpus", 300) if split(turns) == "train"][:3]
    free = [turns for turns in said("corpus", 300) if split(turns) == "interpret"][:4]
    mixed = write(tmp_path / "mixed.jsonl", [*said("other", 20), *trained, *free])
    with pytest.raises(UserError, match=r"3 of 27 dialogues of .*mixed.jsonl are in the training data of .*mixed.*:21"):
        held_out(run, lm, 500, sources=[str(mixed)])
    found = held_out(run, lm, 500, sources=[str(mixed)], allow_overlap=True)
    assert found.facts["overlap"] == 3
    assert sum(map(len, found.tokens)) == 27
    assert "3 of 27 dialogues" in capsys.readouterr().err
    assert held_out(run, lm, 20, sources=[str(mixed)]).facts["overlap"] == 0  # those that are not read do not count


@pytest.mark.parametrize("name", RUNS)
def test_a_corpus_that_was_trained_on_gives_its_held_out_part_under_any_name(
    world: Path, lm: LanguageModel, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.read(world / name)
    renamed = tmp_path / "renamed.jsonl"
    shutil.copy(world / "chat.jsonl", renamed)
    expected = texts(lm, held_out(run, lm, 500).tokens)
    for path in (world / "chat.jsonl", renamed):
        found = held_out(run, lm, 500, sources=[str(path)])
        assert texts(lm, found.tokens) == expected
        assert found.facts["overlap"] == 0
        assert "was trained on: its held-out dialogues are taken" in capsys.readouterr().err
    longer = write(tmp_path / "longer.jsonl", [*said("corpus", 300), *said("new", 1)])  # other bytes
    with pytest.raises(UserError, match=r"2\d\d of 301 dialogues of .*longer.jsonl are in the training data"):
        held_out(run, lm, 500, sources=[str(longer)])


def test_training_data_that_is_gone_must_be_allowed(
    world: Path, lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other.jsonl", said("other", 40))
    shutil.copytree(world / "streamed", tmp_path / "run")
    run = Run.read(tmp_path / "run")
    gone = replace(run.config, data=replace(run.config.data, sources=("/no/such/chat.jsonl",)))
    run = Run(run.path, gone)
    with pytest.raises(UserError, match=r"/no/such/chat.jsonl"):
        held_out(run, lm, 500, sources=[str(other)])
    found = held_out(run, lm, 500, sources=[str(other)], allow_overlap=True)
    assert found.facts["overlap"] is None
    assert "whether the run was trained on these dialogues cannot be told" in capsys.readouterr().err


def test_controls_are_fitted_on_the_training_split(world: Path, lm: LanguageModel) -> None:
    expected = {turns[0]["content"] for turns in said("corpus", 300) if split(turns) == "train"}
    for name in RUNS:
        found = list(fit_tokens(Run.read(world / name), lm, 1500))
        assert texts(lm, found) <= expected
        lengths = [n for batch in found for n in batch.lengths.tolist()]
        assert sum(lengths[:-1]) < 1500 <= sum(lengths)


def test_the_command_prints_what_it_writes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in RUNS:
        shutil.copytree(world / name, tmp_path / "both" / name)
    one = tmp_path / "both" / "prepared"
    assert main(["eval", str(one), "--json", "--control", "pca", "random-sae"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((one / "report.json").read_text())
    check(printed, report_schema())
    assert list(printed["saes"]) == ["L1-2x-standard", "L1-2x-standard~pca", "L1-2x-standard~random-sae"]
    assert printed["saes"]["L1-2x-standard"]["gsnr"]["unit"] == "token"
    assert main(["eval", str(one)]) == 0
    assert "Held-out dialogues" in capsys.readouterr().out

    assert main(["eval", str(tmp_path / "both"), "--json", "--dialogues", "4"]) == 0
    several = json.loads(capsys.readouterr().out)["runs"]
    assert list(several) == [str(tmp_path / "both" / name) for name in sorted(RUNS)]
    for path, report in several.items():
        assert report["facts"]["n_dialogues"] == 4
        assert report == json.loads((Path(path) / "report.json").read_text())
        check(report, report_schema())
    assert main(["eval", str(tmp_path / "both"), "--dialogues", "4"]) == 0
    assert capsys.readouterr().out.count("Held-out dialogues") == 2

    known = json.loads((one / "norms.json").read_text())["layers"]
    assert main(["eval", str(one), "--dialogues", "4", "--sinks-pass", "yes", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    check(printed, report_schema())
    assert printed["facts"]["sinks_pass"] == {str(norms["layer"]): 10 * norms["median"] for norms in known}

    other = write(tmp_path / "other.jsonl", said("other", 9))
    assert main(["eval", str(one), "--sources", str(other), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    check(printed, report_schema())
    assert printed["facts"]["sources"] == other.name
    copied = write(tmp_path / "copied.jsonl", said("corpus", 9))
    assert main(["eval", str(one), "--sources", str(copied)]) == 2
    assert "are in the training data" in capsys.readouterr().err
    assert main(["eval", str(one), "--sources", str(copied), "--allow-overlap"]) == 0
    assert Report.load(one / "report.json").facts["overlap"] > 3
    with pytest.raises(SystemExit):
        main(["eval", str(one), "--control", "random-model"])
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
