"""Figures of scores: intervals against published values and slow twins, and runs set side by side."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatsae.config import DataConfig, Method, ModelConfig, RunConfig, TrainConfig
from chatsae.errors import UserError
from chatsae.features.comparison import (
    Judged,
    cdf,
    cdf_band,
    compare_judged,
    compare_scores,
    student_interval,
    student_quantile,
)
from chatsae.features.score_tables import comparison_table
from chatsae.features.scores import difference_of_means, difference_of_shares, high, kappa, mean_interval, share
from chatsae.recipe import to_yaml
from chatsae.runs import Run
from chatsae.statistics import quadratic_kappa

# intervals


@pytest.mark.parametrize(
    ("first", "second", "interval"),
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),  # Newcombe 1998, Table II, method 10
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((6, 7), (2, 7), (0.0582, 0.8062)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ],
)
def test_a_difference_of_shares_has_the_published_interval(first, second, interval):
    a, b = (share([True] * n + [False] * (of - n)) for n, of in (first, second))
    found = difference_of_shares(a, b)
    assert found["difference"] == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert found["interval"] == pytest.approx(interval, abs=5e-5)
    assert difference_of_shares(a, share([])) is None


def test_intervals_of_agreement_are_those_of_drawing_pairs_again():
    rng = np.random.default_rng(3)
    a = rng.integers(1, 6, 60)
    b = np.clip(a + rng.integers(-1, 2, 60), 1, 5)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    drawn = np.random.default_rng(0).integers(0, 60, size=(1000, 60))
    slow = [quadratic_kappa([pairs[i] for i in rows]) for rows in drawn.tolist()]
    value, between = kappa(pairs)
    assert value == quadratic_kappa(pairs)
    assert between == pytest.approx(np.quantile(slow, [0.025, 0.975]).tolist())
    assert kappa([(1, 1), (3, 3), (5, 5)] * 5) == (1, [1, 1])
    assert kappa([(2, 2), (2, 2)]) == (None, None)
    assert kappa([(1, 1), (5, 5)]) == (1, None)  # half of the draws have one rating only
    assert kappa([]) == (None, None)


def test_differences_of_means_resample_both():
    rng = np.random.default_rng(1)
    a, b = rng.normal(4, 1, 40), rng.normal(3, 1, 25)
    slow = []
    for values, seed in ((a, 0), (b, 1)):
        rows = np.random.default_rng(seed).integers(0, len(values), size=(1000, len(values)))
        slow.append(values[rows].mean(axis=1))
    found = difference_of_means(a.tolist(), b.tolist())
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert found["interval"] == pytest.approx(np.quantile(slow[0] - slow[1], [0.025, 0.975]).tolist())
    assert mean_interval(a.tolist()) == pytest.approx(np.quantile(slow[0], [0.025, 0.975]).tolist())
    assert difference_of_means([], [1.0]) is None
    assert difference_of_means([2.0], [1.0, 1.0]) == {"difference": 1.0, "interval": None}
    assert mean_interval([]) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (30, 2.0423), (1000, 1.9623)]
)
def test_students_t_is_that_of_the_tables(freedom, quantile):
    assert student_quantile(freedom, 0.975) == pytest.approx(quantile, abs=1e-4)


def test_an_interval_over_seeds():
    low, top = student_interval([1.0, 2.0, 3.0])
    assert (low + top) / 2 == pytest.approx(2)
    assert (top - low) / 2 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert student_interval([1.0]) is None


@given(st.lists(st.floats(1, 5), min_size=1, max_size=60))
def test_a_cdf_counts_what_is_not_above(scores):
    found = cdf(scores)
    rounded = [round(float(s), 2) for s in np.round(scores, 2)]
    assert found["score"] == sorted(set(rounded))
    for value, part in zip(found["score"], found["share"], strict=True):
        assert part == pytest.approx(sum(s <= value for s in rounded) / len(scores))
    assert found["share"][-1] == pytest.approx(1)


def test_the_band_of_a_cdf():
    assert cdf_band(128) == pytest.approx(1.3581 / math.sqrt(128), abs=1e-4)  # as in Kolmogorov's tables
    assert cdf_band(0) is None


# runs side by side


def judged(label: str, seed: int, scores: np.ndarray, density: np.ndarray | None = None) -> Judged:
    return Judged(label, f"{label}-{seed}", seed, scores.astype(np.float64), density, {})


def test_methods_are_set_against_each_other_by_density_and_by_seed():
    rng = np.random.default_rng(0)
    groups = []
    for seed in (1, 2, 3):
        density = rng.permutation(np.arange(1, 201) / 2000)
        base = 1 + 3 * (density > 0.05)  # rare features score 1, frequent ones 4
        other = rng.permutation(200)
        groups += [
            judged("bt-f", seed, base[other], density[other]),
            judged("fast", seed, base + (density > 0.09), density),
            judged("bt-p", seed, np.minimum(base, 3), density),
        ]
    found = compare_judged(groups)
    assert [m["label"] for m in found["methods"]] == ["fast", "bt-f", "bt-p"]
    assert [(p["first"], p["second"]) for p in found["pairs"]] == [("fast", "bt-f"), ("fast", "bt-p"), ("bt-f", "bt-p")]
    fast = found["methods"][0]
    assert (fast["n"], fast["seeds"], fast["runs"]) == (600, [1, 2, 3], ["fast-1", "fast-2", "fast-3"])
    assert fast["counts"]["5"] == 60
    over, _, third = found["pairs"]
    assert over["high"]["difference"] == 0
    assert over["mean"]["difference"] == pytest.approx(0.1)
    low, top = over["mean"]["interval"]
    assert low < 0 < top  # lost among what density does to the scores ...
    paired = over["by_density"]["mean"]
    assert over["by_density"]["n_pairs"] == 600
    assert paired["difference"] == pytest.approx(0.1)
    assert 0 < paired["interval"][0] < 0.1 < paired["interval"][1]  # ... which pairing takes out
    assert paired["p_value"] < 0.01
    assert over["by_seed"]["seeds"] == [1, 2, 3]
    assert over["by_seed"]["mean"]["differences"] == pytest.approx([0.1, 0.1, 0.1])
    assert over["by_seed"]["mean"]["interval"] == pytest.approx([0.1, 0.1])
    assert third["high"]["difference"] == pytest.approx(0.5)
    assert third["by_seed"]["high"]["differences"] == pytest.approx([0.5] * 3)
    assert "fast - bt-f" in comparison_table([{"sae": "S", "judge": "pattern", "n_contexts": 20, **found}])


def test_pairs_are_of_equal_rank_whatever_the_numbers():
    density = np.arange(1, 8) / 10
    first = judged("fast", 1, np.array([1, 2, 3, 4, 5, 5, 5]), density)
    second = judged("bt-p", 1, np.array([5, 1, 3]), np.array([0.9, 0.1, 0.5]))
    (pair,) = compare_judged([second, first])["pairs"]
    assert pair["by_density"]["n_pairs"] == 3
    assert pair["by_density"]["mean"]["difference"] == pytest.approx(((1 - 1) + (4 - 3) + (5 - 5)) / 3)
    assert pair["by_seed"] is None
    unknown = replace(second, density=None)
    assert compare_judged([unknown, first])["pairs"][0]["by_density"] is None
    other_seed = replace(second, seed=2)
    (pooled,) = compare_judged([other_seed, first])["pairs"]
    assert pooled["by_density"] == pair["by_density"]
    assert pooled["by_seed"] is None


def a_run(path: Path, method: Method, seed: int, scores: list[float | None], *, tokens: str = "t", **model) -> Run:
    """A run directory with the scores of one SAE, and the densities of its features."""
    config = RunConfig(
        model=ModelConfig(name="demo", **model), data=DataConfig(method=method), train=TrainConfig(seed=seed)
    )
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(config))
    store = {"model": "demo", "sae_sha256": f"{method}{seed}", "tokens_sha256": tokens, "n_dialogues": 3}
    rows = [{"feature": i, "score": s, "reason": None if s else "refused"} for i, s in enumerate(scores)]
    judge = path / "judge" / "S"
    judge.mkdir(parents=True)
    facts = {"schema_version": 1, "sae": "S", "judge": "pattern", "n_contexts": 20, "store": store, "verdicts": rows}
    (judge / "pattern-20.json").write_text(json.dumps(facts))
    (path / "features" / "S").mkdir(parents=True)
    (path / "features" / "S" / "facts.json").write_text(json.dumps(store))
    pq.write_table(pa.table({"density": np.linspace(1, 0, len(scores))}), path / "features" / "S" / "features.parquet")
    return Run.read(path)


def test_runs_are_compared_from_their_files(tmp_path):
    fast = a_run(tmp_path / "a", "fast", 1, [5.0, 4.0, None, 1.0])
    base = a_run(tmp_path / "b", "bt-p", 1, [2.0, 1.0, 1.0, 1.0])
    other = a_run(tmp_path / "c", "bt-f", 1, [5.0] * 4, tokens="u")
    (found,) = compare_scores([base, other, fast])
    assert (found["sae"], found["judge"], found["n_contexts"]) == ("S", "pattern", 20)
    assert found["left_out"] == {"judged on other dialogues": 1}
    first, second = found["methods"]
    assert (first["label"], first["n"], first["without_score"]) == ("fast", 3, {"refused": 1})
    assert first["high"]["n"] == 2
    assert second["runs"] == [str(tmp_path / "b")]
    (pair,) = found["pairs"]
    assert pair["high"]["difference"] == pytest.approx(2 / 3)
    # ascending density: 1, 4, 5 of the first; of 1, 1, 1, 2 the ranks 0, 2 (1.5 rounded), 3
    assert pair["by_density"]["mean"]["difference"] == pytest.approx((0 + 3 + 3) / 3)
    assert json.loads(json.dumps(found)) == found
    assert compare_scores([fast]) == compare_scores([fast, base], ["T"]) == []
    (tmp_path / "a" / "features" / "S" / "features.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="features/S is damaged"):
        compare_scores([fast, base])
    (tmp_path / "a" / "features" / "S" / "facts.json").unlink()
    assert compare_scores([fast, base])[0]["pairs"][0]["by_density"] is None


def test_runs_of_one_method_and_seed_are_told_apart_by_their_path(tmp_path):
    runs = [a_run(tmp_path / name, "fast", 1, [5.0, 4.0]) for name in ("x", "y")]
    (found,) = compare_scores(runs)
    assert [m["label"] for m in found["methods"]] == [str(tmp_path / "x"), str(tmp_path / "y")]
    seeds = [runs[0], a_run(tmp_path / "w", "fast", 2, [1.0, 2.0])]
    (found,) = compare_scores(seeds)
    assert (found["methods"][0]["seeds"], found["methods"][0]["n"], found["pairs"]) == ([1, 2], 4, [])
    assert "Scores by method" in comparison_table([found])
    null = a_run(tmp_path / "z", "fast", 1, [1.0, 2.0], random_weights=0)
    (found,) = compare_scores([runs[0], null])
    assert [m["label"] for m in found["methods"]] == ["fast", "fast (random weights)"]
    assert high([3.5, 3.4])["n"] == 1
