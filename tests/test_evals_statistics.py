"""Intervals cover the truth as often as they say, and tests reject as often as they say."""

import time

import numpy as np
import pytest

from chatsae.statistics import bootstrap, paired, ratio, wilson


def ratio_of(rng: np.random.Generator, n: int, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Dialogues of many lengths, whose tokens have the mean 2 + effect and are alike within a dialogue."""
    lengths = rng.integers(1, 40, n).astype(np.float64)
    return lengths * (2 + effect + rng.normal(0, 0.5, n)), lengths


def test_bootstrap_intervals_cover_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(400):
        low, high = bootstrap({"a": ratio_of(rng, 100)}, resamples=300, seed=i)["a"] or (np.nan, np.nan)
        hits += low <= 2 <= high
    assert 0.915 <= hits / 400 <= 0.98  # 95 % but for chance (3 standard errors) and the bootstrap's own bias


def test_intervals_that_take_tokens_for_independent_would_be_too_narrow() -> None:
    above, below = ratio_of(np.random.default_rng(1), 400)
    low, high = bootstrap({"a": (above, below)})["a"] or (0, 0)
    tokens = np.repeat(above / below, below.astype(int))
    assert high - low > 2 * (2 * 1.96 * tokens.std() / np.sqrt(len(tokens)))


def test_all_figures_share_the_draws_and_a_seed_repeats_them() -> None:
    a = ratio_of(np.random.default_rng(2), 50)
    found = bootstrap({"a": a, "twice": (2 * a[0], a[1])})
    assert found["twice"] == pytest.approx([2 * v for v in found["a"] or ()], rel=1e-12)
    assert bootstrap({"a": a}) == {"a": found["a"]}
    assert bootstrap({"a": a}, seed=1) != {"a": found["a"]}


def test_a_thousand_resamples_of_the_papers_evaluation_set_take_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    figures = {str(i): ratio_of(rng, 5000) for i in range(30)}
    start = time.process_time()
    bootstrap(figures)
    assert time.process_time() - start < 1.5  # 0.3 s where it was measured


def test_one_dialogue_or_no_denominator_has_no_interval() -> None:
    assert bootstrap({"a": (np.ones(1), np.ones(1))}) == {"a": None}
    assert bootstrap({"a": (np.ones(5), np.zeros(5))}) == {"a": None}
    assert bootstrap({}) == {}
    assert ratio((np.ones(5), np.zeros(5))) is None
    assert paired((np.ones(1), np.ones(1)), (np.ones(1), np.ones(1))) is None


def test_paired_tests_reject_5_times_in_100_where_nothing_differs_and_see_small_effects() -> None:
    rng = np.random.default_rng(3)
    rejected = covered = 0
    for i in range(300):
        above, below = ratio_of(rng, 60)
        other = above + below * rng.normal(0, 0.1, 60)
        test = paired((above, below), (other, below), resamples=199, seed=i)
        assert test is not None
        rejected += test.p_value <= 0.05
        covered += test.interval[0] <= 0 <= test.interval[1]
    assert 0.01 <= rejected / 300 <= 0.09
    assert 0.90 <= covered / 300 <= 0.98
    above, below = ratio_of(rng, 60)
    shifted = above + below * (0.1 + rng.normal(0, 0.1, 60))  # a fifth of the spread between dialogues
    test = paired((shifted, below), (above, below))
    assert test is not None
    assert test.p_value < 0.01
    assert test.interval[0] > 0
    assert test.difference == pytest.approx((shifted.sum() - above.sum()) / below.sum())
    unpaired = bootstrap({"a": (above, below)})["a"] or (0, 0)
    assert test.interval[1] - test.interval[0] < (unpaired[1] - unpaired[0]) / 2


def test_equal_methods_do_not_differ() -> None:
    a = ratio_of(np.random.default_rng(4), 30)
    test = paired(a, a)
    assert test is not None
    assert (test.difference, test.interval, test.p_value, test.n_dialogues) == (0, (0, 0), 1, 30)


def test_wilson_intervals_are_the_published_ones() -> None:
    """Of the paper's 27, 13 and 9 features in 128: [14.9, 29.0], [6.0, 16.6], [3.7, 12.8] %."""
    for successes, low, high in ((27, 14.9, 29.0), (13, 6.0, 16.6), (9, 3.7, 12.8)):
        assert wilson(successes, 128) == pytest.approx((low / 100, high / 100), abs=5.1e-4)
    assert wilson(0, 0) is None
    zero = wilson(0, 10)
    assert zero is not None
    assert zero[0] == 0 < zero[1]
