"""Figures of scores, with 95 % intervals over features: shares, means, agreement, differences of two sets of features.

`share` and `mean` are what the summaries hold; a difference is {"difference", "interval"}.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from chatsae.features.verdict import Verdict
from chatsae.statistics import interval, quadratic_kappa, resample, wilson

HIGH = 3.5
"""From here on a score counts as 4 or 5: those of a judge that gives its mean score need not be whole."""

ABOVE_CHANCE = 2
"""A null that scores more is a false positive."""

_UNDEFINED = 0.05  # share of draws without an agreement, beyond which it has no interval

Between = list[float] | None
"""An interval as JSON holds it."""


def share(holds: Iterable[bool]) -> dict[str, Any]:
    """Of how many something holds: n, of, share, and the 95 % Wilson interval of the share."""
    values = [bool(value) for value in holds]
    n, of = sum(values), len(values)
    return {"n": n, "of": of, "share": n / of if of else None, "interval": _listed(wilson(n, of))}


def scores_of(verdicts: Iterable[Verdict | Mapping[str, Any]]) -> list[float]:
    """The scores that there are."""
    found = (v.score if isinstance(v, Verdict) else v["score"] for v in verdicts)
    return [score for score in found if score is not None]


def mean(scores: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return float(np.mean(scores)) if scores else None


def mean_interval(scores: Sequence[float]) -> Between:
    """Of the mean, by bootstrap over features; None of fewer than two."""
    return _listed(interval(_resampled_means(scores, seed=0)))


def high(scores: Iterable[float]) -> dict[str, Any]:
    """The share of scores of 4 and 5."""
    return share(score >= HIGH for score in scores)


def distribution(scores: Sequence[float], without_score: Mapping[str, int] | None = None) -> dict[str, Any]:
    """How many there are of each score (rounded), their mean, the share of 4 and 5, and why others are missing."""
    return {
        "n": len(scores),
        "mean": mean(scores),
        "mean_interval": mean_interval(scores),
        "counts": {str(k): sum(round(score) == k for score in scores) for k in range(1, 6)},
        "high": high(scores),
        "without_score": dict(without_score or {}),
    }


def reasons(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many verdicts have no score, by the reason."""
    return dict(Counter(v.reason or "unknown" for v in verdicts if v.score is None))


def kappa(pairs: Sequence[tuple[int, int]]) -> tuple[float | None, Between]:
    """Cohen's kappa with quadratic weights, and its interval by bootstrap over pairs.

    Draws in which all ratings are equal leave it undefined: they are left out, and where they are more than one in 20,
    there is no interval.
    """
    value = quadratic_kappa(pairs)
    if value is None or len(pairs) < 2:
        return value, None
    a, b = np.array(pairs, dtype=np.float64).T
    ones = np.ones_like(a)
    drawn = resample({"a": (a, ones), "b": (b, ones), "squares": (a * a + b * b, ones), "both": (a * b, ones)})
    observed = drawn["squares"] - 2 * drawn["both"]
    by_chance = drawn["squares"] - 2 * drawn["a"] * drawn["b"]
    defined = by_chance > 1e-9
    if (~defined).mean() > _UNDEFINED:
        return value, None
    return value, _listed(interval(1 - observed[defined] / by_chance[defined]))


def difference_of_shares(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first `share` minus the second, with Newcombe's interval (1998, method 10) of independent samples.

    None where one is of nothing.
    """
    if first["share"] is None or second["share"] is None:
        return None
    p, (low_p, high_p) = first["share"], first["interval"]
    q, (low_q, high_q) = second["share"], second["interval"]
    below, above = math.hypot(p - low_p, high_q - q), math.hypot(high_p - p, q - low_q)
    return {"difference": p - q, "interval": [p - q - below, p - q + above]}


def difference_of_means(first: Sequence[float], second: Sequence[float]) -> dict[str, Any] | None:
    """The first mean minus the second, both resampled by themselves; None where one is of nothing."""
    if not first or not second:
        return None
    drawn = _resampled_means(first, seed=0) - _resampled_means(second, seed=1)
    return {"difference": float(np.mean(first) - np.mean(second)), "interval": _listed(interval(drawn))}


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Of the means and of the shares of 4 and 5 of two independent samples of features, the first minus the second."""
    return {"mean": difference_of_means(first, second), "high": difference_of_shares(high(first), high(second))}


def _resampled_means(scores: Sequence[float], seed: int) -> np.ndarray:
    values = np.array(scores, dtype=np.float64)
    return resample({"mean": (values, np.ones_like(values))}, seed=seed)["mean"]


def _listed(between: tuple[float, float] | None) -> Between:
    return None if between is None else list(between)
