"""A sweep trains what is missing and nothing else, and ends in a comparison at equal L0."""

import json
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml

import chatsae as cs
from chatsae.cli import main
from chatsae.demo.walkthrough import RECIPE
from chatsae.errors import UserError
from chatsae.runs import Run
from chatsae.sweep import geometric, sweep_config

METHODS = ("fast", "bt-f")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A short sweep on a handful of dialogues."""
    root = tmp_path_factory.mktemp("sweep")
    chats = [
        [
            {"role": "user", "content": f"What is {a} and {b}?"},
            {"role": "assistant", "content": f"{a} is {b} " * (a % 7)},
        ]
        for a, b in product(range(16), repeat=2)
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    data["data"] |= {"sources": [str(root / "chats.jsonl")], "block_size": 64}
    data["harvest"] = {"pool": 64, "way": "padded"}
    data["train"] |= {"tokens": 5120, "log_every": 10, "step": "plain"}
    data["buffer"] = {"capacity": 2000}
    data["sae"] |= {"expansion_factors": [1]}
    data["eval"] = {"dialogues": 8}
    (root / "short.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return root / "short.yaml"


def command(recipe: Path, *more: str) -> list[str]:
    return ["sweep", str(recipe), "--out", str(recipe.parent / "out"), "--methods", *METHODS, "--points", "2", *more]


@pytest.fixture(scope="module")
def out(recipe) -> Path:
    """A finished sweep that was stopped once: by Ctrl-C, in the middle of its first pass."""
    real, calls = Run.log, []

    def log(run: Run, record: dict) -> None:
        real(run, record)
        calls.append(record)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        assert main(command(recipe)) == 130
    assert list((recipe.parent / "out" / "fast" / "checkpoints").iterdir())
    assert not (recipe.parent / "out" / "bt-f").exists()
    assert main(command(recipe)) == 0
    return recipe.parent / "out"


def test_every_method_and_coefficient_is_trained_evaluated_and_compared(out):
    comparison = json.loads((out / "compare.json").read_text())
    found = {(row["method"], row["SAE"]) for row in comparison["rows"]}
    coefficients = ("standard-l1_1.25", "standard-l1_20", "jumprelu-l0_1.25", "jumprelu-l0_20")
    assert found == {(m, f"L3-1x-{c}") for m in METHODS for c in coefficients}
    matched = json.loads((out / "matched.json").read_text())
    assert {row["SAE"] for row in matched["rows"]} == {"L3-1x-standard", "L3-1x-jumprelu"}
    assert any(row["mse"] is not None and row["intervals"]["mse"] is not None for row in matched["rows"])
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "pareto.svg").read_text().startswith("<?xml")


def test_after_ctrl_c_the_run_went_on_where_it_stopped(out):
    steps = [record["step"] for record in Run.read(out / "fast").metrics()]
    assert steps == [10, 20, 30, 40]


def test_a_second_sweep_only_does_what_is_missing(out, recipe, capsys):
    reports = {method: (out / method / "report.json").read_bytes() for method in METHODS}
    (out / "bt-f" / "report.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in [*out.rglob("*.safetensors"), out / "fast" / "report.json"]}
    assert main(command(recipe, "--json")) == 0
    printed = capsys.readouterr()
    assert printed.err.count("already trained") == 2
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (out / "bt-f" / "report.json").read_bytes() == reports["bt-f"]
    facts = json.loads(printed.out)
    assert facts["matched"] == json.loads((out / "matched.json").read_text())
    assert [Path(path).name for path in facts["figures"]] == ["pareto.png", "pareto.svg"]


def test_another_grid_does_not_overwrite_it(out, recipe, capsys):
    assert main(command(recipe, "--span", "2")) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_the_grid_is_geometric_around_the_recipe():
    assert geometric(5, 5, 4) == (1.25, 2.5, 5, 10, 20)
    assert geometric(0.01, 2, 10) == (0.001, 0.1)
    swept = sweep_config(cs.RunConfig(), points=3, span=2).sae
    assert swept.l1_coefficients == (2.5, 5, 10)
    assert swept.l0_coefficients == (0.005, 0.01, 0.02)


def test_several_coefficients_are_taken_as_they_are_and_absent_architectures_left_alone():
    base = cs.RunConfig()
    own = replace(base, sae=replace(base.sae, architectures=("standard",), l1_coefficients=(1.0, 7.0)))
    assert sweep_config(own) == own


@pytest.mark.parametrize(
    ("options", "sae", "message"),
    [
        ({"points": 1}, {}, "--points must be at least 2, not 1"),
        ({"span": 1.0}, {}, "--span must be above 1, not 1"),
        ({"span": float("nan")}, {}, "--span must be above 1, not nan"),
        ({}, {"l0_coefficients": (0.0,)}, r"sae.l0_coefficients is 0; a sweep needs a value above 0"),
    ],
)
def test_grids_that_cannot_be(options, sae, message):
    base = cs.RunConfig()
    with pytest.raises(UserError, match=message):
        sweep_config(replace(base, sae=replace(base.sae, **sae)), **options)


def test_no_method_is_a_mistake(recipe, capsys):
    assert main(["sweep", str(recipe), "--methods"]) == 2
    assert "--methods is empty" in capsys.readouterr().err
