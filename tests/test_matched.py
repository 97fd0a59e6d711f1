"""Reading methods off at equal L0: known answers."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatsae.cli import main
from chatsae.errors import UserError
from chatsae.evals.curves import FIGURES, curves
from chatsae.evals.matched import matched, place, shared_l0s
from chatsae.evals.report import compare, load_reports
from curve_samples import config, names, run, table

L0S = (80.0, 40.0, 20.0)  # of the coefficients 1, 2, 4


def line(l0: float) -> float:
    """An error that is linear in log L0."""
    return 10 - 2 * math.log2(l0)


def both(tmp_path, **options):
    """fast and bt-f: at every L0 fast has half of bt-f's error, but its SAEs are sparser."""
    one = {n: table(l0, line(l0) / 2, noise=0.3, seed=i) for i, (n, l0) in enumerate(zip(names(), L0S, strict=True))}
    two = {n: table(2 * l0, line(2 * l0), noise=0.3, seed=9) for n, l0 in zip(names(), L0S, strict=True)}
    return [run(tmp_path / "fast", config(), one, **options), run(tmp_path / "bt-f", config("bt-f"), two, **options)]


def test_points_on_a_line_are_read_off_exactly(tmp_path):
    runs = both(tmp_path)
    (fast, _) = curves(load_reports(runs))
    assert fast.covers == (20, 80)
    l0s = (20.0, 23.7, 40.0, 66.6, 80.0)
    rows = matched([fast], l0s).rows
    for row, l0 in zip(rows, l0s, strict=True):
        assert row["mse"] == pytest.approx(line(l0) / 2, rel=1e-12)
        assert row["explained_variance"] == pytest.approx(1 - row["mse"] / 10, rel=1e-12)
    there = matched([fast], [p.l0 for p in fast.points]).rows
    assert [row["mse"] for row in there] == [p.figures["mse"] for p in fast.points]
    assert rows[1]["between"] == ["L3-8x-standard-l1_4", "L3-8x-standard-l1_2"]
    assert rows[1]["weight"] == pytest.approx(math.log2(23.7 / 20), rel=1e-12)


def test_nothing_is_read_off_beyond_the_saes_of_a_method(tmp_path):
    rows = matched(curves(load_reports(both(tmp_path))), [19.9, 30.0]).rows
    below = {row["method"]: row for row in rows if row["l0"] == 19.9}
    for row in below.values():
        assert [row[name] for name in FIGURES] == [None] * len(FIGURES)
    assert below["fast"]["reasons"]["mse"] == "its SAEs cover L0 20 to 80, and nothing is extrapolated"
    inside = {row["method"]: row for row in rows if row["l0"] == 30.0}
    assert inside["fast"]["mse"] is not None
    assert inside["bt-f"]["mse"] is None
    assert inside["bt-f"]["reasons"]["mse"].startswith("its SAEs cover L0 40 to 160")
    assert inside["fast"]["mse_st_no_prefix"] is None
    assert "has no mse_st_no_prefix" in inside["fast"]["reasons"]["mse_st_no_prefix"]


def test_a_method_that_is_better_at_equal_l0_wins_though_its_raw_error_is_worse(tmp_path):
    a = {n: table(l0, 30 / l0, delta_loss=0.4) for n, l0 in zip(names(), (20.0, 15.0, 10.0), strict=True)}
    b = {n: table(l0, 40 / l0) for n, l0 in zip(names(), (60.0, 30.0, 15.0), strict=True)}
    runs = [run(tmp_path / "a", config(), a), run(tmp_path / "b", config("bt-f"), b)]
    found = curves(load_reports(runs))
    for fast, blocks in zip(reversed(found[0].points), reversed(found[1].points), strict=True):
        raw, other = fast.figures["mse"], blocks.figures["mse"]
        assert raw is not None
        assert other is not None
        assert raw > other  # coefficient by coefficient fast looks worse
    at = matched(found, [16.0, 20.0])
    for l0 in (16.0, 20.0):
        value = {row["method"]: row["mse"] for row in at.rows if row["l0"] == l0}
        assert value["fast"] < value["bt-f"]
    test = next(d for d in at.differences if d["figure"] == "mse" and d["l0"] == 20)
    assert test["first"] == ["L3-8x-standard", "fast"]
    assert test["difference"] < 0
    assert test["interval"][1] < 0
    marked = [text for text in at.table().splitlines() if "*" in text and "│" in text]
    assert marked
    assert all("fast" in text and "bt-f" not in text for text in marked)


def test_intervals_agree_with_a_bootstrap_by_hand(tmp_path):
    """The slow way: draw dialogues, compute both SAEs' L0 and error anew, interpolate; one draw at a time."""
    (fast, _) = curves(load_reports(both(tmp_path)))
    low, high = matched([fast], [30.0], resamples=400).rows[0]["intervals"]["mse"]
    upper, lower = (table(l0, line(l0) / 2, noise=0.3, seed=i) for i, l0 in ((1, 40.0), (2, 20.0)))
    rng, values = np.random.default_rng(5), []
    for _ in range(4000):
        drawn = rng.integers(0, len(upper["mse"]), len(upper["mse"]))
        a, b = (t["l0"][drawn].sum() / t["n_tokens"][drawn].sum() for t in (lower, upper))
        weight = min(max(math.log(30 / a) / math.log(b / a), 0), 1)
        values.append((1 - weight) * lower["mse"][drawn].mean() + weight * upper["mse"][drawn].mean())
    expected = np.quantile(values, [0.025, 0.975])
    assert low == pytest.approx(expected[0], abs=0.1 * (expected[1] - expected[0]))
    assert high == pytest.approx(expected[1], abs=0.1 * (expected[1] - expected[0]))


def test_without_sums_by_dialogue_there_are_figures_but_no_intervals(tmp_path):
    row = matched(curves(load_reports(both(tmp_path, sums=False))), [30.0]).rows[0]
    assert row["mse"] == pytest.approx(line(30) / 2, rel=1e-12)
    assert row["intervals"]["mse"] is None
    assert "report.parquet" in row["reasons"]["intervals/mse"]


def test_the_same_dialogues_drawn_for_both_make_a_difference_narrower_than_its_parts(tmp_path):
    same = {n: table(l0, line(l0), noise=0.5) for n, l0 in zip(names(), L0S, strict=True)}
    half = {n: table(l0, line(l0) / 2, noise=0.5) for n, l0 in zip(names(), L0S, strict=True)}
    runs = [run(tmp_path / "a", config(), half), run(tmp_path / "b", config("bt-f"), same)]
    at = matched(curves(load_reports(runs)), [40.0])
    low, high = next(d["interval"] for d in at.differences if d["figure"] == "mse")
    widths = [row["intervals"]["mse"][1] - row["intervals"]["mse"][0] for row in at.rows]
    assert high - low == pytest.approx(widths[1] - widths[0], rel=1e-6)  # their noise is the same


def test_seeds_and_learning_rates_make_curves_of_their_own(tmp_path):
    tables = {n: table(l0, line(l0)) for n, l0 in zip(names(), L0S, strict=True)}
    runs = [run(tmp_path / f"s{seed}", config(seed=seed), tables) for seed in (42, 43)]
    more = {n.replace("_1", "_3"): t for n, t in list(tables.items())[:1]}
    runs.append(run(tmp_path / "wide", config(l1=(3.0, 9.0), log_every=7), more))
    found = curves(load_reports(runs))
    assert [(c.label, len(c.points)) for c in found] == [("fast", 4), ("fast, seed 43", 3)]


def test_an_sae_without_active_features_is_left_out(tmp_path):
    tables = {n: table(l0, 1.0) for n, l0 in zip(names(), (20.0, 10.0, 0.0), strict=True)}
    (curve,) = curves(load_reports([run(tmp_path / "a", config(), tables)]))
    assert curve.covers == (10, 20)


@given(
    st.lists(st.floats(0.5, 500), min_size=2, max_size=6, unique=True).map(sorted),
    st.floats(0.1, 1000),
)
def test_a_place_is_between_its_neighbours(l0s, l0):
    where = place(l0s, l0)
    if where is None:
        assert l0 < l0s[0] or l0 > l0s[-1]
    else:
        assert 0 <= where.weight < 1
        assert l0s[where.lower] <= l0 <= l0s[where.upper]
        again = l0s[where.lower] ** (1 - where.weight) * l0s[where.upper] ** where.weight
        assert again == pytest.approx(l0, rel=1e-9)


def test_shared_l0s_lie_where_most_curves_are(tmp_path):
    found = curves(load_reports(both(tmp_path)))
    values = shared_l0s(found)
    assert len(values) == 5
    assert all(40 <= value <= 80 for value in values)
    assert shared_l0s(found[:1], n=2) == [28, 57]


def test_methods_without_a_common_l0_are_a_mistake_that_says_how_far_they_reach(tmp_path):
    a, b = ({names((1.0,))[0].removesuffix("-l1_1"): table(l0, 1.0)} for l0 in (10.0, 30.0))
    runs = [run(tmp_path / "a", config(l1=(1.0,)), a), run(tmp_path / "b", config("bt-f", l1=(1.0,)), b)]
    with pytest.raises(UserError, match=r"L3-8x-standard fast 10 to 10; L3-8x-standard bt-f 30 to 30.*chatsae sweep"):
        matched(curves(load_reports(runs)))
    with pytest.raises(UserError, match="positive numbers, not -3"):
        matched(curves(load_reports(runs)), [-3.0])


def test_the_command_prints_tables_and_json(tmp_path, capsys):
    paths = [str(r.path) for r in both(tmp_path)]
    assert main(["compare", *paths, "--matched-l0", "50", "60"]) == 0
    text = capsys.readouterr().out
    assert "At equal L0" in text
    assert "linear in log L0" in text
    assert main(["compare", *paths, "--matched-l0", "--json", "--out", str(tmp_path / "c.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "c.json").read_text())
    assert len(printed["matched"]["rows"]) == 10
    assert main(["compare", *paths, "--json"]) == 0
    assert "matched" not in json.loads(capsys.readouterr().out)
    assert main(["compare", *paths, "--matched-l0", "0"]) == 2
    assert "above 0" in capsys.readouterr().err


def test_a_control_stands_beside_its_sae_and_is_no_point_of_a_curve(tmp_path):
    tables = {n: table(l0, line(l0)) for n, l0 in zip(names(), L0S, strict=True)}
    control = f"{names()[0]}~pca"
    made = run(tmp_path / "a", config(), tables | {control: table(80, 1.0)})
    path = made.path / "report.json"
    data = json.loads(path.read_text())
    data["saes"][control]["control"] = {"kind": "pca", "of": names()[0], "made": "80 components"}
    path.write_text(json.dumps(data))
    rows = compare([made]).rows
    assert [(row["SAE"], row["method"]) for row in rows[:2]] == [(names()[0], "fast"), (names()[0], "fast~pca")]
    (curve,) = curves(load_reports([made]))
    assert len(curve.points) == 3
