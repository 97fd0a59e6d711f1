"""What the page takes from the other commands: special tokens, steering, controls, the comparison of runs."""

import json
import shutil
from pathlib import Path

import pytest

from chatsae.errors import UserError
from chatsae.features.session import Ask, RunFeatures
from chatsae.features.store import FeatureStore
from chatsae.page.data import Wanted, find_runs, page_data
from chatsae.page.pack import Dialogues, packed_feature
from chatsae.page.special import special_tokens
from chatsae.page.steered import steering
from chatsae.runs import Run
from feature_samples import START, TOKEN, plain_model
from page_samples import hostile_run, steer

SAE = "L1-1x-standard"
FEW = Wanted(features=1, contexts=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def steered(folder: Path) -> tuple[Path, dict, dict]:
    run = hostile_run(folder / "hostile", plain_model(folder / "model"))
    return run, *steer(run)


@pytest.fixture(scope="module")
def sae(steered: tuple[Path, dict, dict]) -> dict:
    """Of a page that draws one feature only."""
    return page_data(find_runs([steered[0]]), FEW)["saes"][0]


def test_the_table_of_special_tokens_is_made_and_shown(steered: tuple[Path, dict, dict], sae: dict) -> None:
    written = json.loads((steered[0] / "special_tokens.json").read_text())["saes"][SAE]
    rows = sae["special"]["rows"]
    assert len(rows) == len(written)
    for row, facts in zip(rows, written, strict=True):
        assert (row["token"], row["place"], row["n"]) == (facts["token"], facts["place"], facts["occurrences"])
        assert [f[0] for f in row["features"]] == [f["feature"] for f in facts["features"]]
        for packed, own in zip(row["features"], facts["features"], strict=True):
            assert packed[1:] == pytest.approx([own[k] for k in ("mean", "elsewhere", "density", "exclusivity")], 1e-3)
    known = {(row["token"], row["place"]): row["features"] for row in rows}
    assert known["<|im_end|>", "id"][0][0] == TOKEN
    assert known["<|im_end|>", "id"][0][4] == 1  # it fires nowhere else
    assert START in [f[0] for f in known["<|im_start|>", "template"]]


def test_features_that_tables_name_have_contexts_and_verdicts_but_do_not_count(
    steered: tuple[Path, dict, dict], sae: dict, tmp_path: Path
) -> None:
    run = steered[0]
    drawn = FeatureStore.load(run / "features" / SAE).indices.tolist()
    assert sae["drawn"] == len(drawn) == 1
    shown = {f["i"]: f for f in sae["features"]}
    named = {TOKEN, START} - set(drawn)
    assert named <= set(shown)
    assert all(facts["summary"]["n"] + sum(facts["summary"]["without_score"].values()) == 1 for facts in sae["judges"])

    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("page"))
    session = RunFeatures(other)
    store = session.stores(Ask(only=tuple(named)))[SAE]
    pattern = next(i for i, facts in enumerate(sae["judges"]) if facts["judge"] == "pattern")
    for index in named:
        feature = store.feature(index, contexts=FEW.contexts, sampled=5)
        slow = packed_feature(feature, Dialogues(), "split", [])
        keys = ("density", "max", "role_n", "values", "up", "near")
        given = shown[index] | {"up": [[0, logit] for _, logit in shown[index]["up"]]}
        slow["up"] = [[0, logit] for _, logit in slow["up"]]
        assert {key: given[key] for key in keys} == {key: slow[key] for key in keys}
        assert [c[1:] for c in shown[index]["top"]] == [c[1:] for c in slow["top"]]
        assert shown[index]["verdicts"][pattern][0] is not None

    again = page_data(find_runs([run]), Wanted(features=1, contexts=6, build=False))["saes"][0]
    assert again["features"] == sae["features"]  # kept in RUN/page, made once


def test_more_contexts_than_are_kept_of_named_features_are_made_anew(steered: tuple[Path, dict, dict]) -> None:
    run = steered[0]
    few = {f["i"]: len(f["top"]) for f in page_data(find_runs([run]), FEW)["saes"][0]["features"]}
    more = page_data(find_runs([run]), Wanted(features=1, contexts=30))["saes"][0]["features"]
    assert len(next(f for f in more if f["i"] == TOKEN)["top"]) > 20 > few[TOKEN] == 6


def test_steering_is_shown_as_it_was_written(steered: tuple[Path, dict, dict], sae: dict) -> None:
    _, examples, sweep = steered
    found = sae["steering"]
    assert found["left_out"] == {}
    (shown,) = found["examples"][str(TOKEN)]
    said = [(row["prompt"], row["base"], row["steered"]) for row in examples["examples"]]
    assert [(prompt, base, a[1]) for prompt, base, answers in shown["prompts"] for a in answers] == said
    assert [one[1] for one in shown["strengths"]] == pytest.approx([s["alpha"] for s in examples["strengths"]], 1e-3)

    (own,) = found["sweeps"]
    assert (own["feature"], own["questions"]) == (TOKEN, sweep["questions"])
    for row in sweep["answers"]:
        assert own["answers"][row["arm"]][row["strength"]][row["question"]][0] == row["text"]
    seen = 0
    for row in sweep["summary"]:
        for key, value in row["measures"].items():
            packed = own["curves"][row["arm"]][key][row["strength"]]
            if value is None or value["mean"] is None:
                assert packed is None
            else:
                assert packed == pytest.approx([value["mean"], *(value["interval"] or ())], rel=1e-3)
                seen += 1
    assert seen > 30
    assert own["windows"] == sweep["windows"]


def test_steering_files_of_another_shape_are_counted(steered: tuple[Path, dict, dict], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(steered[0], run, ignore=shutil.ignore_patterns("page", "features", "steer"))
    (run / "steer").mkdir()
    example = {"label": "+8", "prompt": "Hi", "base": "Hello", "steered": "<b>Zero</b>"}
    files = {
        "a": {"sae": SAE, "feature": 2, "examples": [example]},
        "b": [],
        "c": {"sae": SAE, "feature": 2, "kind": "sweep"},
        "d": {"sae": SAE, "feature": 2, "examples": [1]},
        "e": {"sae": "another", "feature": 2, "examples": []},
    }
    for name, facts in files.items():
        (run / "steer" / f"{name}.json").write_text(json.dumps(facts))
    found = steering(Run.read(run), SAE)
    assert found["examples"] == {
        "2": [{"strengths": [], "prompts": [["Hi", "Hello", [["+8", "<b>Zero</b>", None, 0]]]]}]
    }
    assert (found["sweeps"], found["left_out"]) == ([], {"steering files of another shape": 3})


def test_a_damaged_table_of_special_tokens_is_told(steered: tuple[Path, dict, dict], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(steered[0], run, ignore=shutil.ignore_patterns("page", "features"))
    for text in ("[", "[]", json.dumps({"saes": {SAE: [{}]}})):
        (run / "special_tokens.json").write_text(text)
        with pytest.raises(UserError, match=r"special_tokens.json is damaged.*chatsae tokens"):
            page_data(find_runs([run]), Wanted(build=False))


def test_a_table_that_cannot_be_made_is_left_out_with_a_warning(
    steered: tuple[Path, dict, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(steered[0], run, ignore=shutil.ignore_patterns("page", "features", "special_tokens.json"))
    recipe = (run / "config.yaml").read_text()
    source = Run.read(run).config.data.sources[0]
    empty = tmp_path / "one.jsonl"  # a dialogue that is not held out for steering
    empty.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]})
    )
    (run / "config.yaml").write_text(recipe.replace(source, str(empty)))
    assert special_tokens(Run.read(run), [SAE], dialogues=5, build=True) == {}
    assert "no table of special tokens" in capsys.readouterr().err
    assert special_tokens(Run.read(run), [SAE], dialogues=5, build=False) == {}


def test_controls_and_differences_are_in_the_page(steered: tuple[Path, dict, dict], tmp_path: Path) -> None:
    both = tmp_path / "both"
    for name, method in (("one", "fast"), ("two", "bt-f")):
        shutil.copytree(steered[0], both / name)
        recipe = (both / name / "config.yaml").read_text()
        assert recipe.count("method: fast") == 1
        (both / name / "config.yaml").write_text(recipe.replace("method: fast", f"method: {method}"))
    data = page_data(find_runs([both]), Wanted(features=1, contexts=6))
    (compared,) = data["comparison"]
    assert [m["label"] for m in compared["methods"]] == ["fast", "bt-f"]
    assert compared["pairs"][0]["high"]["difference"] == 0
    written = json.loads((both / "one" / "judge" / SAE / "pattern-20.json").read_text())
    (judge,) = data["saes"][0]["judges"]
    assert judge["summary"] == written["summary"]
    controls = judge["calibration"]["controls"]
    assert (
        controls["random_directions"]["summary"] == written["calibration"]["controls"]["random_directions"]["summary"]
    )
    assert all("verdicts" not in control for control in controls.values())
    assert page_data(find_runs([both / "one"]), Wanted(features=1, contexts=6))["comparison"] == []
