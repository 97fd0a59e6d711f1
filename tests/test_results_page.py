"""The sentences and tables of docs/results.md follow from the numbers, whichever way they fall."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from chatsae.evals.matched import Matched

VARIANTS = ("mse_st", "mse_st_template", "mse_st_no_first", "mse_st_no_prefix")


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
        yield importlib.import_module("results_tables")


@pytest.fixture(scope="module")
def scores(tables) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
        yield importlib.import_module("results_scores")


def found(logs: dict[str, tuple[float, float, float, float]]) -> dict:
    """Two seeds per method, whose errors on special tokens are these, in log2, +- 0.1."""
    return {
        ("L3-8x-standard", method): [
            {f"log2_{name}": value + shift for name, value in zip(VARIANTS, values, strict=True)}
            | {name: 2 ** (value + shift) for name, value in zip(VARIANTS, values, strict=True)}
            | {"mse": 2.0}
            for shift in (-0.1, 0.1)
        ]
        for method, values in logs.items()
    }


LOGS = {"bt-p": (6.0, 6.0, 5.0, 2.0), "bt-f": (2.0, 2.0, 1.5, 0.75), "bt-f-isolated": (1.0, 1.0, 1.0, 1.0)}
LOGS |= {"fast": (1.0, 1.0, 1.0, 1.0)}


def test_the_paragraph_says_what_remains_of_the_gain(tables):
    rows = found(LOGS)
    for method in ("bt-p", "bt-f", "fast"):
        excess = {"bt-p": (10, 4, 1), "bt-f": (2, 1, 0.5), "fast": (1, 1, 1)}[method]
        parts = zip(VARIANTS[1:], excess, (30, 20, 10), strict=True)
        special = {name: {"n_tokens": n, "mse_token": error} for name, error, n in parts}
        for row in rows["L3-8x-standard", method]:
            row["groups"] = {"special": special}
    blocks, chat = " ".join(tables.gain_paragraph(rows).split()).split("From ")[1:]
    assert "MSE_st by template position falls by 5.00 bits" in blocks
    assert (
        "Of these, 4.00 (80%) remain without position 0, and 1.00 (20%) without position 0 and the constant" in blocks
    )
    assert "which make up the other 80%" in blocks
    # 30 x (10 - 1) = 270 in excess, 20 x (4 - 1) = 60 of it not at position 0, 10 x (1 - 1) = 0 nowhere of both
    assert "22% of what BT(P) has in excess of FAST on special tokens is not at position 0, and 0% is neither" in blocks
    assert "Of these, 0.50 (50%) remain without position 0, and -0.25 (-25%) without" in chat
    assert "0% of what BT(F) has in excess" in chat


def test_shares_of_no_gain_are_not_given(tables):
    rows = tables.gain_table(found(LOGS)).splitlines()
    assert rows[2] == "| L3-8x-standard | bt-p → fast | 5 | 5 | 4 (80%) | 1 (20%) |"
    assert rows[4] == "| L3-8x-standard | bt-f-isolated → fast | 0 | 0 | 0 | 0 |"


@pytest.mark.parametrize(
    ("values", "text"),
    [([1.0, 1.2], "1.10 ± 0.14"), ([123.0, 150.0], "136 ± 19"), ([0.5, 0.5], "0.5"), ([2.0], "2")],
)
def test_a_mean_has_as_many_digits_as_its_spread_deserves(tables, values, text):
    assert tables.spread(values) == text


def at() -> Matched:
    """At L0 20 JumpReLU is surely better and at 40 it is not; bt-f has no standard SAE at 40."""
    rows, differences = [], []
    mse = {("standard", "fast"): (4.0, 2.0), ("jumprelu", "fast"): (3.0, 2.5)}
    mse |= {("standard", "bt-f"): (5.0, None), ("jumprelu", "bt-f"): (3.5, 2.6)}
    for (architecture, method), values in mse.items():
        for l0, value in zip((20.0, 40.0), values, strict=True):
            figures = dict.fromkeys(("mse", "mse_st", "mse_st_no_prefix", "explained_variance", "delta_loss"), value)
            where = {"SAE": f"L3-8x-{architecture}", "architecture": architecture, "method": method, "l0": l0}
            reasons = {} if value is not None else {"mse": "its SAEs cover L0 1 to 30"}
            rows.append(where | figures | {"intervals": dict.fromkeys(figures), "reasons": reasons})
    for l0, difference, interval in ((20.0, 1.0, [0.8, 1.2]), (40.0, -0.5, [-0.9, 0.1])):
        pair = {"first": ["L3-8x-standard", "fast"], "second": ["L3-8x-jumprelu", "fast"]}
        differences.append(pair | {"l0": l0, "figure": "mse", "difference": difference, "interval": interval})
    pair = {"first": ["L3-8x-standard", "bt-f"], "second": ["L3-8x-standard", "fast"]}
    differences.append(pair | {"l0": 20.0, "figure": "mse", "difference": 1.0, "interval": [0.5, 1.5]})
    return Matched(rows, differences)


def test_l0_against_l1_counts_who_is_better_and_how_surely(tables):
    text = " ".join(tables.architecture_sentence(at()).split())
    # 3/4 and 2.5/2 for fast, 3.5/5 for bt-f
    assert "mse × 0.87, lower in 1 of 2 (surely 1);" in text
    assert "No method is an exception in mse." in text
    assert "fast: at L0 20 mse 3 against 4 and Delta Loss 3 against 4" in text


def test_methods_are_compared_from_fast_to_the_baseline(tables):
    lines = tables.method_table(at()).splitlines()
    (line,) = (text for text in lines if "fast over bt-f |" in text)
    # 4/5 for standard SAEs, 3/3.5 and 2.5/2.6 for JumpReLU ones
    assert line.startswith("| fast over bt-f | × 0.87, lower in 1 of 1 (surely 1) |")
    assert "| fast over bt-p | – |" in "\n".join(lines)


def test_the_best_of_an_sae_and_l0_is_bold_and_what_is_missing_explained(tables):
    rows = tables.matched_table(at()).splitlines()
    assert "| L3-8x-standard | 20 | fast | **4** |" in "\n".join(rows)
    assert "| L3-8x-standard | 40 | bt-f | – |" in "\n".join(rows)
    assert tables.missing_sentence(at()) == (
        "No figure (–) for bt-f of L3-8x-standard elsewhere: its SAEs cover L0 1 to 30."
    )


def test_shares_of_scores_are_counted_over_the_seeds(scores):
    def facts(high: int, right: int = 20, wrong: int = 0) -> dict:
        share = {"n": high, "of": 500}
        planted, nulls = {"n": right, "of": 20}, {"n": wrong, "of": 20}
        calibration = {"accuracy": planted, "false_positives": {"random": nulls}}
        return {"summary": {"high": share}, "calibration": calibration}

    high = {"bt-p": 100, "bt-f": 200, "bt-f-isolated": 240, "fast": 250}
    found = {
        ("L3-8x-standard", method, n_contexts): [facts(n), facts(n, 19, 1)]
        for method, n in high.items()
        for n_contexts in (5, 20)
    }
    five, twenty = scores.score_table(found).splitlines()[2:]
    assert five.startswith("| L3-8x-standard | 5 | 20.0% [17.6%, 22.6%] |")
    assert twenty.endswith("| 50.0% [46.9%, 53.1%] |")
    sentence = scores.score_sentence(found)
    assert "L3-8x-standard: BT(P) +30.0 ± 4.0, BT(F) +10.0" in sentence
    assert "BT(F)-isolated +2.0 ± 4.4" in sentence
    assert "156 of 160 planted features right and 4 of 160 of random tokens above 2" in sentence
