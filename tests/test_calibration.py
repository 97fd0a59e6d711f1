"""Features whose score is known: the pattern judge gets them right, and a judge that guesses is found out."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from chat_tokenizer import chat_tokenizer
from chatsae.errors import UserError
from chatsae.features.calibration import EXPECTED, Pack, calibrate, make_pack, summary
from chatsae.features.controls import Control
from chatsae.features.patterns.background import Background, random_contexts
from chatsae.features.patterns.families import patterns_of
from chatsae.features.patterns.judge import PatternJudge
from chatsae.features.records import Feature
from chatsae.features.scores import share
from chatsae.features.text import TokenText
from chatsae.features.verdict import Verdict
from chatsae.statistics import quadratic_kappa
from test_patterns import dialogues


@pytest.fixture(scope="module")
def background() -> Background:
    return Background.of(random_contexts(dialogues(90), TokenText(chat_tokenizer()), n=8000))


class Guess:
    """Judges by a die."""

    name = "guess"

    def verdicts(self, features: Iterable[Feature], *, n_contexts: int, repeat: int = 0) -> Iterator[Verdict]:
        rng = np.random.default_rng(repeat)
        for feature in features:
            score = float(rng.integers(1, 6))
            refused = feature.index % 10 == 0
            yield Verdict(
                feature.index, self.name, n_contexts, repeat, None if refused else score, "refused" if refused else None
            )


def pack(background: Background, n_contexts: int = 20, **sizes: int) -> Pack:
    ends = [c for c in background.contexts if c.tokens[c.peak] == "<|im_end|>"]
    features = [Feature(i, 0.1, 1.0, tuple(ends[20 * i : 20 * i + 20]), (), (), ()) for i in range(3)]
    return make_pack(background, features, n_contexts=n_contexts, **sizes)


@pytest.mark.parametrize("n_contexts", [5, 20])
def test_a_pack_is_what_it_says(background: Background, n_contexts: int) -> None:
    made = pack(background, n_contexts, planted=2, nulls=3)
    assert [p.deviating for p in made.planted] == [d for d in EXPECTED[n_contexts] for _ in range(2)]
    for planted in made.planted:
        contexts = planted.feature.contexts
        assert len(contexts) == n_contexts
        assert sum(planted.pattern not in patterns_of(c) for c in contexts) == planted.deviating
        values = [c.value for c in contexts]
        assert values == sorted(values, reverse=True)
        assert all(c.acts[c.peak] == c.value and sum(c.acts) == c.value for c in contexts)
    assert len({p.pattern.family for p in made.planted}) > 2
    assert len(made.random) == len(made.shuffled) == 3
    assert all(c.tokens[c.peak] == "<|im_end|>" for f in made.shuffled for c in f.contexts)
    assert len({f.index for f in (*(p.feature for p in made.planted), *made.random, *made.shuffled)}) == len(made)
    assert made == pack(background, n_contexts, planted=2, nulls=3)
    assert made != pack(background, n_contexts, planted=2, nulls=3, seed=1)


def test_the_pattern_judge_is_calibrated(background: Background) -> None:
    found = calibrate(PatternJudge(background), pack(background, planted=6, nulls=40))
    assert found["accuracy"]["share"] >= 0.95
    assert found["planted_kappa"] > 0.95
    assert (found["retest_kappa"], found["retest_kappa_interval"]) == (1, [1, 1])
    low, high = found["planted_kappa_interval"]
    assert 0.85 < low <= found["planted_kappa"] <= high <= 1
    assert found["controls"] == {}
    assert found["false_positives"]["random"]["n"] == 0
    assert found["false_positives"]["shuffled"]["share"] == 1  # three features that are alike: nothing to tell apart
    assert 1 <= found["null_mean"]["random"] <= 2
    assert found["without_score"] == 0


def test_a_guess_is_found_out(background: Background) -> None:
    found = calibrate(Guess(), pack(background, planted=12, nulls=40))
    assert found["accuracy"]["interval"][1] < 0.5
    assert abs(found["retest_kappa"]) < 0.5
    low, high = found["retest_kappa_interval"]
    assert -1 <= low < found["retest_kappa"] < high < 0.8
    assert found["false_positives"]["random"]["interval"][0] > 0.3
    assert found["without_score"] == sum(f.index % 10 == 0 for f in _all(pack(background, planted=12, nulls=40)))


def _all(made: Pack) -> list[Feature]:
    return [*(p.feature for p in made.planted), *made.random, *made.shuffled]


def test_controls_are_judged_and_set_against_the_sae(background: Background) -> None:
    ends = [c for c in background.contexts if c.tokens[c.peak] == "<|im_end|>"]
    alike = [Feature(i, 0.01, 1.0, tuple(ends[20 * i : 20 * i + 20]), (), (), ()) for i in range(3)]
    alone = Feature(9, 0.01, 1.0, alike[0].contexts[:2], (), (), ())
    drawn = pack(background, nulls=12).random
    control = Control("random_directions", "how", (*drawn, alike[0], alone), {"sae": [1.0], "control": None})
    judge = PatternJudge(background)
    found = calibrate(judge, pack(background, nulls=12), [control])
    own = found["controls"]["random_directions"]
    assert (own["what"], own["run"], own["density"]) == ("how", None, {"sae": [1.0], "control": None})
    assert [v["feature"] for v in own["verdicts"]] == [f.index for f in control.features]
    assert own["summary"]["without_score"] == {"2 contexts, at least 5 are needed": 1}
    assert (own["summary"]["high"]["n"], own["false_positives"]["n"], own["summary"]["n"]) == (1, 1, 13)
    above = summary(list(judge.verdicts(alike, n_contexts=20)), found)["above"]
    assert set(above) == {"random", "shuffled", "random_directions"}
    assert above["random_directions"]["high"]["difference"] == pytest.approx(1 - 1 / 13)
    assert above["random_directions"]["mean"]["difference"] == pytest.approx(5 - own["summary"]["mean"])
    assert above["shuffled"]["high"]["difference"] == 0


def test_a_small_background_cannot_calibrate(background: Background) -> None:
    with pytest.raises(UserError, match="background of 30 tokens has no pattern that holds for 20"):
        make_pack(Background.of(background.contexts[:30]), [])
    with pytest.raises(UserError, match="contexts: 7 given; a judge is calibrated on 5 or 20"):
        make_pack(background, [], n_contexts=7)
    assert make_pack(background, [], nulls=2).shuffled == ()


def test_a_summary_counts_what_has_no_score() -> None:
    scores = [5.0, 4.0, 4.0, 2.0, 1.0, None, None]
    verdicts = [Verdict(i, "x", 20, 0, s, None if s else "refused") for i, s in enumerate(scores)]
    found = summary(verdicts, {"null_scores": {"random": [1.0, 1.0, 1.6]}, "controls": {}})
    assert (found["n"], found["mean"], found["counts"]) == (5, 3.2, {"1": 1, "2": 1, "3": 0, "4": 2, "5": 1})
    assert found["above_null"] == pytest.approx(2.0)
    assert found["above"]["random"]["mean"]["difference"] == pytest.approx(2.0)
    assert found["above"]["random"]["high"]["difference"] == pytest.approx(0.6)
    assert found["without_score"] == {"refused": 2}
    assert (found["high"]["n"], found["high"]["of"]) == (3, 5)
    nothing = summary(verdicts[-2:])
    assert (nothing["mean"], nothing["high"]["share"], nothing["high"]["interval"]) == (None, None, None)


def test_shares_are_those_of_the_paper() -> None:
    found = share([True] * 27 + [False] * 101)
    assert found["share"] == pytest.approx(0.211, abs=5e-4)
    assert found["interval"] == pytest.approx([0.149, 0.290], abs=1e-3)


def test_kappa_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 6, 200), rng.integers(1, 6, 200)
    weights = np.square(np.subtract.outer(np.arange(1, 6), np.arange(1, 6))) / 16
    observed = np.zeros((5, 5))
    np.add.at(observed, (a - 1, b - 1), 1 / 200)
    expected = np.outer(np.bincount(a - 1, minlength=5), np.bincount(b - 1, minlength=5)) / 200**2
    exact = 1 - (weights * observed).sum() / (weights * expected).sum()
    assert quadratic_kappa(list(zip(a.tolist(), b.tolist(), strict=True))) == pytest.approx(exact)
    assert quadratic_kappa([(1, 1), (5, 5)]) == 1
    assert quadratic_kappa([(3, 3), (3, 3)]) is None
    assert quadratic_kappa([]) is None
