"""What an audit computes from activations: separation, corrected for choosing, and probes."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.audit.probe import fit_logistic, logistic_probe, mean_probe, probe_table, top_features
from chatsae.audit.roles import FIRST, LATER, PLAIN, median_reach, role_features
from chatsae.audit.separation import auroc_interval, aurocs, average_ranks, choose, confirm, holm

Array = np.ndarray


def slow_auroc(positive: Array, negative: Array) -> float:
    """Pair by pair."""
    above = [1.0 if a > b else 0.5 if a == b else 0.0 for a in positive for b in negative]
    return sum(above) / len(above)


def sparse(rng: np.random.Generator, *shape: int) -> Array:
    """Activations as those of an SAE: mostly zero, some columns never active."""
    rarity = np.random.default_rng(99).uniform(-1, 2, size=shape[-1])  # of each column, in every call the same
    values = np.maximum(rng.normal(size=shape) - rarity, 0)
    values[..., :3] = 0
    return values


# --- separation -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_an_auroc_is_its_slow_twin(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    positive, negative = (rng.integers(0, 4, size=(k, 5)).astype(float) for k in (n, m))
    expected = [slow_auroc(positive[:, i], negative[:, i]) for i in range(5)]
    assert aurocs(positive, negative) == pytest.approx(expected, abs=1e-12)
    assert aurocs(negative, positive) == pytest.approx([1 - e for e in expected], abs=1e-12)
    ranks = average_ranks(positive)
    for value in range(4):
        assert all(len(set(ranks[positive[:, i] == value, i])) <= 1 for i in range(5))


def test_the_choice_and_its_p_value_are_those_of_swapping_pairs_one_draw_at_a_time() -> None:
    rng = np.random.default_rng(0)
    n, features, places, draws = 12, 7, 3, 39
    positive, negative = sparse(rng, n, features * places), sparse(rng, n, features * places)
    positive[:, features + 4] += 0.4  # feature 4 at place 1
    found = choose(positive, negative, top=4, draws=draws, seed=5, groups=places)
    own = np.array([slow_auroc(positive[:, i], negative[:, i]) for i in range(features * places)])
    best = {f: max(range(f, features * places, features), key=lambda c: abs(own[c] - 0.5)) for f in range(features)}
    order = sorted(best.values(), key=lambda c: -abs(own[c] - 0.5))
    assert [round(abs(c.auroc - 0.5), 12) for c in found] == [round(abs(own[c] - 0.5), 12) for c in order[:4]]
    assert len({c.column % features for c in found}) == 4
    assert found[0].column == features + 4
    kept = np.random.default_rng(5).random((draws, n)) < 0.5
    widest = []
    for row in kept:
        a, b = np.where(row[:, None], positive, negative), np.where(row[:, None], negative, positive)
        widest.append(max(abs(slow_auroc(a[:, i], b[:, i]) - 0.5) for i in range(features * places)))
    for choice in found:
        as_far = sum(w >= abs(choice.auroc - 0.5) - 1e-12 for w in widest)
        assert choice.p_value == pytest.approx((1 + as_far) / (1 + draws))


def test_equal_candidates_are_told_apart_by_their_mean_difference_in_common_units() -> None:
    negative, positive = np.zeros((8, 3)), np.tile([1.0, 2.0, 3.0], (8, 1))
    assert [c.column for c in choose(positive, negative, top=3, draws=19)] == [2, 1, 0]
    lengths = np.array([9.0, 1.0, 1.0])
    assert [c.column for c in choose(positive, negative, top=3, draws=19, per_candidate=lengths)] == [0, 2, 1]
    assert choose(negative, negative, top=3, draws=19) == []


def test_a_planted_feature_is_confirmed_and_its_numbers_are_right() -> None:
    rng = np.random.default_rng(1)
    positive, negative = sparse(rng, 60, 300), sparse(rng, 60, 300)
    positive[:, 77] = rng.normal(4, 1, 60)
    negative[:, 77] = rng.normal(0, 1, 60)
    chosen = choose(positive[:30], negative[:30], top=5, draws=199)
    assert chosen[0].column == 77
    assert chosen[0].p_value == 1 / 200
    found = confirm(
        positive[30:][:, [c.column for c in chosen]],
        negative[30:][:, [c.column for c in chosen]],
        [c.auroc > 0.5 for c in chosen],
        draws=999,
    )
    assert found[0].significant
    assert not any(one.significant for one in found[1:])
    assert found[0].auroc == pytest.approx(slow_auroc(positive[30:, 77], negative[30:, 77]))
    assert found[0].auroc > 0.98
    assert found[0].difference == pytest.approx(found[0].positive_mean - found[0].negative_mean)
    assert found[0].difference_interval is not None
    assert found[0].difference_interval[0] < 4 < found[0].difference_interval[1]
    assert found[0].p_value == 1 / 1000
    assert found[0].p_holm == pytest.approx(5 / 1000)
    below = confirm(negative[30:][:, [77]], positive[30:][:, [77]], [True], draws=99)
    assert below[0].p_value == 1  # it is asked in the direction found before
    assert not below[0].significant


def test_of_sets_without_a_difference_few_have_a_feature_that_holds() -> None:
    """Choosing and reporting on the same pairs would find one in most of them."""
    n_sets, wrong, chosen_wrong, naive = 100, 0, 0, 0
    for seed in range(n_sets):
        rng = np.random.default_rng(seed)
        shared = sparse(rng, 40, 200)  # the two prompts of a pair have their subject in common
        positive, negative = shared + sparse(rng, 40, 200), shared + sparse(rng, 40, 200)
        chosen = choose(positive[:20], negative[:20], top=5, draws=99, seed=seed)
        columns = [c.column for c in chosen]
        above = [c.auroc > 0.5 for c in chosen]
        found = confirm(positive[20:][:, columns], negative[20:][:, columns], above, draws=199, seed=seed)
        wrong += any(one.p_holm <= 0.05 for one in found)
        assert not any(one.significant for one in found) or any(one.p_holm <= 0.05 for one in found)
        chosen_wrong += chosen[0].p_value <= 0.05
        same = confirm(positive[:20][:, columns], negative[:20][:, columns], above, draws=199, seed=seed)
        naive += any(one.p_holm <= 0.05 for one in same)
    bound = 0.05 + 3 * (0.05 * 0.95 / n_sets) ** 0.5
    assert wrong / n_sets <= bound
    assert chosen_wrong / n_sets <= bound
    assert naive / n_sets > 0.5


def test_the_interval_of_an_auroc_covers_it_and_keeps_a_width_at_its_ends() -> None:
    truth, covered = 0.9, 0
    shift = 2**0.5 * 1.2815515655446004  # AUROC of two unit normals that far apart: 0.9
    for seed in range(400):
        rng = np.random.default_rng(seed)
        found = aurocs(rng.normal(shift, 1, (20, 1)), rng.normal(0, 1, (20, 1)))
        low, high = auroc_interval(float(found[0]), 20, 20)
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.99
    for value in (0.0, 0.3, 0.5, 0.97, 1.0):
        low, high = auroc_interval(value, 40, 40)
        assert 0 <= low <= value <= high <= 1
        assert high - low > 0.04
        mirrored = auroc_interval(1 - value, 40, 40)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
    low, _ = auroc_interval(0.8, 30, 30)
    spread = 1 + 29 * ((1 - low) / (2 - low) + low / (1 + low))
    assert 0.8 - low == pytest.approx(1.959964 * (low * (1 - low) * spread / 900) ** 0.5, rel=1e-5)


def test_holm_corrects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# --- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 4), (12, 40)])
def test_a_logistic_fit_is_the_minimum_that_another_solver_finds(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=shape), rng.random(shape[0]) < 0.5
    sign = np.where(y, 1, -1)

    def loss(theta: Array) -> float:
        margin = sign * (x @ theta[:-1] + theta[-1])
        return float(np.logaddexp(0, -margin).sum() + 0.35 * theta[:-1] @ theta[:-1])

    expected = scipy.optimize.minimize(loss, np.zeros(shape[1] + 1), tol=1e-10)
    weights, bias = fit_logistic(x, y, 0.7)
    assert np.append(weights, bias) == pytest.approx(expected.x, abs=1e-4)
    assert loss(np.append(weights, bias)) <= expected.fun + 1e-9


def test_a_planted_direction_is_found_by_dense_probes_and_missed_by_features_that_lack_it() -> None:
    rng = np.random.default_rng(3)
    direction = rng.normal(size=50)
    direction /= np.linalg.norm(direction)
    negative, positive = rng.normal(size=(2, 120, 50))
    positive = positive + 3 * direction
    probe, _ = logistic_probe(positive[:60], negative[:60], seed=0)
    means = mean_probe(positive[:60], negative[:60])
    for found in (probe.weights, means.weights):
        assert found @ direction / np.linalg.norm(found) > 0.75
    middle = (positive[:60].mean(0) + negative[:60].mean(0)) / 2
    assert means.scores(middle[None])[0] == pytest.approx(0, abs=1e-9)
    noise = sparse(rng, 120, 80), sparse(rng, 120, 80)
    half, rest = list(range(60)), list(range(60, 120))
    rows = {row.name: row for row in probe_table(noise, (positive, negative), half, rest)}
    assert list(rows) == [
        *("1 feature", "2 features", "4 features", "8 features", "16 features"),
        *("stream, dense", "stream, difference of means"),
    ]
    dense = rows["stream, dense"]
    scores = probe.scores(positive[60:]), probe.scores(negative[60:])
    assert dense.auroc == pytest.approx(slow_auroc(*scores))
    assert dense.auroc > 0.95
    right = (scores[0] > 0).sum() + (scores[1] <= 0).sum()
    assert dense.accuracy == pytest.approx(right / 120)
    bar = sorted(scores[0])[3]  # 57 of 60 positive prompts are at or above it
    assert dense.fpr_at_95_tpr == pytest.approx(float((scores[1] >= bar).mean()))
    assert dense.minus_dense is None
    lost = rows["4 features"]
    assert 0.3 < lost.auroc < 0.7
    assert lost.minus_dense == pytest.approx(lost.auroc - dense.auroc)
    assert lost.minus_dense_interval is not None
    assert lost.minus_dense_interval[1] < 0


def test_a_feature_that_holds_the_direction_is_the_first_probe_and_shuffled_labels_teach_nothing() -> None:
    rng = np.random.default_rng(4)
    positive, negative = sparse(rng, 100, 40), sparse(rng, 100, 40)
    positive[:, 21] = rng.normal(5, 1, 100)
    negative[:, 21] = 0
    half, rest = list(range(50)), list(range(50, 100))
    stream = rng.normal(size=(2, 100, 10))
    rows = probe_table((positive, negative), (stream[0], stream[1]), half, rest)
    assert rows[0].features == (21,)
    assert rows[0].auroc == 1
    assert rows[0].accuracy > 0.97
    assert rows[0].fpr_at_95_tpr == 0
    assert 21 in rows[3].features
    assert top_features(np.zeros((4, 5)), np.ones((4, 5)) * [0, 1, 0, 3, 2], 16).tolist() == [3, 4, 1]
    swap = rng.random(100)[:, None] < 0.5
    mixed = np.where(swap, positive, negative), np.where(swap, negative, positive)
    for row in probe_table(mixed, (stream[0], stream[1]), half, rest):
        assert row.auroc_interval[0] < 0.55
        assert 0.2 < row.auroc < 0.75


# --- role confusion ---------------------------------------------------------------------------------------------------


def test_reach_is_the_share_of_what_sets_a_user_turn_apart() -> None:
    rng = np.random.default_rng(5)
    conditions = (FIRST, LATER, PLAIN, "document: text", "document: special")
    acts = np.stack([sparse(rng, 40, 30) for _ in conditions])
    level = rng.uniform(1, 2, 40)
    for row, share in zip(acts, (1.5, 1.0, 0.0, 0.4, 1.0), strict=True):
        row[:, 9] = 0.5 + share * level
    acts[:2, :, 10] = 0
    acts[2, :, 10] = 4  # a feature of documents is none of users
    acts[0, :, 11] = 9
    acts[1:, :, 11] = 0  # nor is one that only the first turn has
    found = role_features(conditions, acts, top=3, draws=199)
    assert found[0].feature == 9
    assert not {10, 11} & {one.feature for one in found}
    assert found[0].separation.auroc == 1
    assert found[0].separation.significant
    assert not any(one.separation.significant for one in found[1:])
    assert found[0].means["document: text"] > found[0].means[PLAIN]
    assert found[0].reach["document: text"][0] == pytest.approx(0.4)
    assert found[0].reach["document: text"][1] == pytest.approx((0.4, 0.4))
    assert found[0].reach["document: special"][0] == pytest.approx(1.0)
    assert found[0].auroc["document: text"][0] == 1
    assert median_reach(found) == pytest.approx({FIRST: 1.5, LATER: 1, "document: text": 0.4, "document: special": 1})
    assert role_features(conditions, np.zeros((5, 40, 30))) == []
    assert median_reach([]) == {}
