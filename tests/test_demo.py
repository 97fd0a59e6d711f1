import json
from pathlib import Path

import pytest

from chatsae.cli import main
from chatsae.config import RunConfig
from chatsae.demo.walkthrough import METHODS, RECIPE, demo, verdict
from chatsae.page.data import Wanted
from chatsae.recipe import load_recipe
from chatsae.sae.base import SAE

PAGE = Wanted(features=4, contexts=5, dialogues=12)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The demo with its own recipe, cut short."""
    root = tmp_path_factory.mktemp("demo")
    text = RECIPE.read_text(encoding="utf-8")
    shorter = {"400000": "6400", "50000": "4000", "pool: 1024": "pool: 32", "dialogues: 300": "dialogues: 12"}
    shorter |= {"expansion_factors: [8]": "expansion_factors: [2]"}
    for old, new in shorter.items():  # a pool is read whole before the first step
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (root / "short.yaml").write_text(text, encoding="utf-8")
    demo(root / "out", root / "short.yaml", PAGE)
    return root / "out"


def test_the_recipe_of_the_demo_differs_from_the_defaults_only_where_a_short_run_needs_it():
    config, paper = load_recipe(RECIPE), RunConfig()
    assert config.sae.architectures == paper.sae.architectures
    assert config.train.batch_size == paper.train.batch_size
    assert config.train.lr_warmup_share == paper.train.lr_warmup_share


def test_every_method_and_architecture_has_a_row_and_files(out):
    comparison = json.loads((out / "compare.json").read_text())
    config = load_recipe(out.parent / "short.yaml")
    assert {(r["method"], r["SAE"]) for r in comparison["rows"]} == {
        (m, f"L{config.model.layers[0]}-2x-{a}") for m in METHODS for a in config.sae.architectures
    }
    for row in comparison["rows"]:
        sae = SAE.load(out / row["run"] / "saes" / row["SAE"])
        assert sae.metadata["method"] == row["method"]
        assert row["n_dialogues"] == 12
        assert row["mse"] > 0
        assert row["mse_st"] > 0
        assert row["explained_variance"] <= 1
        assert row["delta_loss"] != 0
    assert comparison["facts"]["n_dialogues"] == 12


def test_a_second_demo_in_the_same_directory_only_shows_the_table(out, capsys):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    demo(out, out.parent / "short.yaml", PAGE)
    printed = capsys.readouterr()
    assert "already trained" in printed.err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before
    assert "mse_st" in printed.out
    assert "chatsae train recipes/qwen2.5-0.5b.yaml" in printed.err


def test_it_ends_with_a_page_that_opens_offline(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert page.count("<script") >= 1
    assert [p.parent.name for p in sorted(out.glob("*/features"))] == ["bt-f", "bt-p", "fast"]


def test_another_recipe_does_not_overwrite_it(out, capsys):
    assert main(["demo", "--out", str(out)]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_show_explains_the_demo_a_run_and_an_sae(out, capsys):
    assert main(["show", str(out)]) == 0
    text = capsys.readouterr().out
    assert "3 runs" in text
    assert "explained" in text
    assert main(["show", str(out / "fast")]) == 0
    assert "trained, fast on demo, 6,400 tokens" in capsys.readouterr().out
    sae = next((out / "fast" / "saes").iterdir())
    assert main(["show", str(sae), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["d_sae"] == 2 * SAE.load(sae).spec.d_in


def test_eval_and_compare_print_json(out, capsys):
    assert main(["eval", str(out / "fast"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "fast" / "report.json").read_text(encoding="utf-8"))
    assert set(report) == {"schema", "facts", "saes"}
    assert main(["compare", str(out / "fast"), str(out / "bt-f"), "--json"]) == 0
    assert {r["method"] for r in json.loads(capsys.readouterr().out)["rows"]} == {"fast", "bt-f"}


def test_the_verdict_follows_the_numbers():
    def row(sae, method, mse, mse_st, l0):
        return {"SAE": sae, "method": method, "mse": mse, "mse_st": mse_st, "l0": l0}

    rows = [row("a", "fast", 2.0, 1.0, 30), row("a", "bt-f", 1.0, 3.0, 40), row("a", "bt-p", 4.0, 2.0, 50)]
    text = verdict(rows)
    special, overall = text.splitlines()
    assert "fast is best for a (bt-p 2.00 times that, bt-f 3.00 times that)" in special
    assert "bt-f is best for a (fast 2.00 times that, bt-p 4.00 times that)" in overall
    assert "l0 (a fast 30, bt-f 40, bt-p 50)" in overall
    without = {"sink_share": 0.01, "mse_st_no_first": 1.0, "mse_no_sinks": 2.0, "l0_no_sinks": 20}
    rows = [row | without for row in rows[:2]]
    rows[1]["mse_no_sinks"] = 1.0
    special, overall = verdict(rows).splitlines()
    assert special.startswith("Error on special tokens beyond position 0 (mse_st_no_first): fast is best for a")
    assert "all tokens but sinks (mse_no_sinks): bt-f is best for a (fast 2.00 times that)" in overall
    assert "l0 (a fast 20, bt-f 20)" in overall
