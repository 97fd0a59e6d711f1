"""Features whose score is known, judged beside those of an SAE: how far a judge can be believed.

planted: contexts that share a pattern of the run's own dialogues, but for 0, 1, 2, 3 or 5 of 20 that deviate. random:
the contexts are windows around random tokens. shuffled: the contexts of the SAE's features, dealt out anew. Beside them
stand controls, whose score is not known but should be lower than the SAE's (`chatsae.features.controls`).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from chatsae.errors import UserError
from chatsae.features.controls import Control
from chatsae.features.patterns.background import Background
from chatsae.features.patterns.families import Pattern, patterns_of
from chatsae.features.patterns.judge import MAX_RATE
from chatsae.features.records import Context, Feature
from chatsae.features.scores import ABOVE_CHANCE, difference, distribution, kappa, mean, reasons, scores_of, share
from chatsae.features.verdict import Judge, Verdict

EXPECTED = {5: {0: 5, 1: 4, 2: 4, 3: 3}, 20: {0: 5, 1: 4, 2: 4, 3: 3, 5: 3}}
"""The rubric's score, by the number of contexts and of those among them that deviate."""

_PLANTED_IN = ("end of turn", "first content", "header", "word", "after", "class")


@dataclass(frozen=True, slots=True)
class Planted:
    """A feature with contexts of a pattern, of which `deviating` do not have it."""

    feature: Feature
    pattern: Pattern
    deviating: int
    expected: int


@dataclass(frozen=True, slots=True)
class Pack:
    """Features with a known score."""

    planted: tuple[Planted, ...]
    random: tuple[Feature, ...]
    shuffled: tuple[Feature, ...]

    def __len__(self) -> int:
        return len(self.planted) + len(self.random) + len(self.shuffled)


def make_pack(
    background: Background,
    features: Sequence[Feature],
    *,
    n_contexts: int = 20,
    planted: int = 4,
    nulls: int = 20,
    seed: int = 0,
) -> Pack:
    """`planted` features for each number of deviating contexts, and `nulls` of each of the two kinds of nulls.

    Raises:
        UserError: the background has too few tokens to plant anything in, or there is no rubric for `n_contexts`.
    """
    if n_contexts not in EXPECTED:
        raise UserError(f"contexts: {n_contexts} given; a judge is calibrated on {' or '.join(map(str, EXPECTED))}")
    rng = np.random.default_rng(seed)
    places = _places(background, n_contexts)
    if not places:
        raise UserError(
            f"a background of {len(background.contexts):,} tokens has no pattern that holds for {n_contexts} of them; "
            "more dialogues are needed to calibrate a judge"
        )
    known, families = sorted(places, key=str), sorted({pattern.family for pattern in places})
    sown = []
    for deviating, expected in EXPECTED[n_contexts].items():
        for i in range(planted):
            family = families[(len(sown) + i) % len(families)]
            own = [pattern for pattern in known if pattern.family == family]
            pattern = own[int(rng.integers(len(own)))]
            contexts = _plant(rng, background, pattern, places[pattern], n_contexts, deviating)
            sown.append(Planted(_feature(-1 - len(sown), contexts), pattern, deviating, expected))
    pool = [context for feature in features for context in feature.contexts[:n_contexts]]
    index = -1 - len(sown)
    drawn = [_drawn(rng, source, n_contexts, nulls) for source in (background.contexts, pool)]
    dealt = [_feature(index - i, contexts) for i, contexts in enumerate([*drawn[0], *drawn[1]])]
    return Pack(tuple(sown), tuple(dealt[: len(drawn[0])]), tuple(dealt[len(drawn[0]) :]))


def calibrate(judge: Judge, pack: Pack, controls: Sequence[Control] = (), *, n_contexts: int = 20) -> dict[str, Any]:
    """What a judge makes of a pack and of controls: shares with Wilson intervals, its agreement with itself."""
    features = [p.feature for p in pack.planted]
    planted, again = (list(judge.verdicts(features, n_contexts=n_contexts, repeat=r)) for r in (0, 1))
    expected = [p.expected for p in pack.planted]
    nulls = {kind: list(judge.verdicts(getattr(pack, kind), n_contexts=n_contexts)) for kind in ("random", "shuffled")}
    scores = {kind: scores_of(found) for kind, found in nulls.items()}
    right = whole_pairs([v.score for v in planted], expected)
    known, known_interval = kappa(right)
    retest, retest_interval = kappa(whole_pairs([v.score for v in planted], [v.score for v in again]))
    return {
        "judge": judge.name,
        "n_contexts": n_contexts,
        "accuracy": share(score == wanted for score, wanted in right),
        "planted_kappa": known,
        "planted_kappa_interval": known_interval,
        "retest_kappa": retest,
        "retest_kappa_interval": retest_interval,
        "false_positives": {kind: share(score > ABOVE_CHANCE for score in found) for kind, found in scores.items()},
        "null_mean": {kind: mean(found) for kind, found in scores.items()},
        "null_scores": scores,
        "controls": {control.kind: control.judged(judge, n_contexts) for control in controls},
        "planted": [
            {"pattern": p.pattern.name, "deviating": p.deviating, "expected": p.expected, "score": v.score}
            for p, v in zip(pack.planted, planted, strict=True)
        ],
        "without_score": sum(v.score is None for found in (planted, *nulls.values()) for v in found),
    }


def summary(verdicts: Sequence[Verdict], calibration: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The scores of an SAE: how many of each, the share of 4 and 5 with its interval, and how far above each null.

    above_null: the mean above that of windows around random tokens. above: mean and share above every null and
    control, with intervals.
    """
    scores = scores_of(verdicts)
    found = distribution(scores, reasons(verdicts))
    if calibration is not None:
        null = mean(calibration["null_scores"]["random"])
        found["above_null"] = None if null is None or not scores else found["mean"] - null
        nulls = dict(calibration["null_scores"])
        nulls |= {kind: scores_of(control["verdicts"]) for kind, control in calibration["controls"].items()}
        found["above"] = {kind: difference(scores, null) for kind, null in nulls.items()}
    return found


def whole_pairs(first: Sequence[float | int | None], second: Sequence[float | int | None]) -> list[tuple[int, int]]:
    """Whole scores, where both are there."""
    both = zip(first, second, strict=True)
    return [(round(a), round(b)) for a, b in both if a is not None and b is not None]


def _places(background: Background, n: int) -> dict[Pattern, list[int]]:
    """Patterns that are rare and hold for at least `n` tokens of the background, in different dialogues; and those."""
    found: dict[Pattern, dict[int, int]] = defaultdict(dict)
    rare = {p for p in background.counts if p.family in _PLANTED_IN and background.rate(p) <= MAX_RATE}
    for i, context in enumerate(background.contexts):
        for pattern in patterns_of(context) & rare:
            found[pattern].setdefault(context.index, i)
    return {pattern: list(places.values()) for pattern, places in found.items() if len(places) >= n}


def _plant(
    rng: np.random.Generator, background: Background, pattern: Pattern, places: Sequence[int], n: int, deviating: int
) -> list[Context]:
    chosen = [background.contexts[places[i]] for i in rng.permutation(len(places))[:n]]
    for slot in rng.permutation(n)[:deviating]:
        while pattern in patterns_of(other := background.contexts[int(rng.integers(len(background.contexts)))]):
            continue
        chosen[slot] = other
    return chosen


def _drawn(rng: np.random.Generator, pool: Sequence[Context], n: int, times: int) -> list[list[Context]]:
    """`n` contexts of the pool, none twice, as often as asked; none where the pool is too small."""
    if len(pool) < n:
        return []
    return [[pool[int(i)] for i in rng.choice(len(pool), size=n, replace=False)] for _ in range(times)]


def _feature(index: int, contexts: Sequence[Context]) -> Feature:
    """A feature that was never in an SAE, active at the peak of each context only."""
    shown = []
    for rank, context in enumerate(contexts):
        value = 10.0 - 0.1 * rank
        acts = tuple(value if i == context.peak else 0.0 for i in range(len(context)))
        shown.append(replace(context, feature=index, value=value, acts=acts))
    return Feature(index, 0.0, 10.0, tuple(shown), (), (), ())
