"""How well single features tell the two prompts of a pair apart, and how much of that is due to choosing among many.

Features are chosen on one half of the pairs; every number that is shown is measured on the other half. Letters in
shapes: S pairs, M candidates (features times places), R draws, K chosen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from chatsae.statistics import bootstrap

_COLUMNS = 4096  # candidates that are ranked together
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Choice:
    """Candidates that separate best on the half to choose on, best first.

    column: index among the M candidates. auroc: on that half. p_value: chance that the best of all M candidates
    is as far from 0.5 when the two prompts of random pairs are swapped (family-wise, max statistic).
    """

    column: int
    auroc: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Separation:
    """A chosen candidate on the half that it was not chosen on.

    auroc: chance that a random positive prompt is above a random negative one, ties counting half; its 95 % interval
    is Newcombe's (`auroc_interval`). difference: mean of positive minus negative, 95 % by bootstrap over pairs.
    p_value: by swapping the prompts of random pairs, in the direction found on the other half; p_holm: corrected for
    the number of chosen candidates.
    """

    auroc: float
    auroc_interval: tuple[float, float]
    positive_mean: float
    negative_mean: float
    difference: float
    difference_interval: tuple[float, float] | None
    p_value: float
    p_holm: float

    @property
    def significant(self) -> bool:
        """Whether it holds on the half that it was not chosen on: corrected p value, and interval clear of 0.5.

        The p value is of the prompts within pairs, the interval of prompts at large; both are asked for.
        """
        low, high = self.auroc_interval
        return self.p_holm <= ALPHA and not low <= 0.5 <= high


def average_ranks(values: Float[np.ndarray, "N M"]) -> Float[np.ndarray, "N M"]:
    """The rank of each value in its column, from 1; equal values share the mean of their ranks."""
    n = len(values)
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    new = np.vstack([np.ones((1, values.shape[1]), bool), ordered[1:] != ordered[:-1]])
    index = np.arange(n, dtype=np.float64)[:, None]
    first = np.maximum.accumulate(np.where(new, index, 0), axis=0)
    last_of = np.vstack([new[1:], np.ones((1, values.shape[1]), bool)])
    last = np.minimum.accumulate(np.where(last_of, index, n)[::-1], axis=0)[::-1]
    ranks = np.empty_like(first)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=0)
    return ranks


def aurocs(positive: Float[np.ndarray, "Sp M"], negative: Float[np.ndarray, "Sn M"]) -> Float[np.ndarray, " M"]:
    """AUROC of each column: the chance that a positive is above a negative, ties counting half (Mann-Whitney)."""
    n = len(positive)
    ranks = average_ranks(np.vstack([positive, negative]).astype(np.float64))
    return (ranks[:n].sum(0) - n * (n + 1) / 2) / (n * len(negative))


def auroc_interval(
    auroc: float, n_positive: int, n_negative: int, *, z: float = 1.959963984540054
) -> tuple[float, float]:
    """A score interval of an AUROC, 95 % by default, which keeps a width where the sample separates perfectly.

    Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic. Part 2" (2006),
    method 5: the values whose own standard error reaches what was found. It takes prompts as independent; pairs that
    share their subject mostly make it wider than needed.
    """

    def root(far: float, sign: float) -> float:
        near, edge = auroc - sign * 1e-12, far
        for _ in range(80):
            middle = (near + edge) / 2
            gap = abs(auroc - middle) - z * math.sqrt(_variance(middle, n_positive, n_negative))
            near, edge = (middle, edge) if gap < 0 else (near, middle)
        return (near + edge) / 2

    return (root(0.0, 1.0) if auroc > 0 else 0.0, root(1.0, -1.0) if auroc < 1 else 1.0)


def choose(
    positive: Float[np.ndarray, "S M"],
    negative: Float[np.ndarray, "S M"],
    *,
    top: int,
    per_candidate: Float[np.ndarray, " M"] | None = None,
    draws: int = 1000,
    seed: int = 0,
    groups: int = 1,
) -> list[Choice]:
    """The `top` features farthest from AUROC 0.5; of equal ones that with the larger mean difference.

    Columns are features times `groups` places, the place varying slowest; a feature is taken once, at its best place.
    `per_candidate` scales mean differences, where columns are in different units.
    """
    m = positive.shape[1]
    found, widest = np.zeros(m), np.zeros(draws)
    for start, values, null in _nulls(positive, negative, draws, seed):
        found[start : start + len(values)] = values
        widest = np.maximum(widest, np.abs(null - 0.5).max(axis=1))
    difference = np.abs(positive.mean(0) - negative.mean(0)) * (1 if per_candidate is None else per_candidate)
    distance = np.abs(found - 0.5)
    taken: dict[int, int] = {}
    for column in np.lexsort((-difference, -distance)).tolist():
        if len(taken) == top or not distance[column]:
            break
        taken.setdefault(column % (m // groups), column)
    return [
        Choice(column, float(found[column]), float(1 + (widest >= distance[column] - 1e-12).sum()) / (1 + draws))
        for column in taken.values()
    ]


def confirm(
    positive: Float[np.ndarray, "S K"],
    negative: Float[np.ndarray, "S K"],
    above: list[bool],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> list[Separation]:
    """The chosen candidates on pairs they were not chosen on; `above`: which were higher on positive prompts there."""
    n, k = positive.shape
    if not k:
        return []
    found, null = np.zeros(k), np.zeros((draws, k))
    for start, values, drawn in _nulls(positive, negative, draws, seed + 1):
        found[start : start + len(values)], null[:, start : start + len(values)] = values, drawn
    sign = np.where(above, 1.0, -1.0)
    p_values = (1 + (sign * null >= sign * found - 1e-12).sum(axis=0)) / (1 + draws)
    ones = np.ones(n)
    between = bootstrap({str(i): (positive[:, i] - negative[:, i], ones) for i in range(k)}, seed=seed)
    return [
        Separation(
            auroc=float(found[i]),
            auroc_interval=auroc_interval(float(found[i]), n, n),
            positive_mean=float(positive[:, i].mean()),
            negative_mean=float(negative[:, i].mean()),
            difference=float((positive[:, i] - negative[:, i]).mean()),
            difference_interval=between[str(i)],
            p_value=float(p_values[i]),
            p_holm=p_holm,
        )
        for i, p_holm in enumerate(holm(p_values.tolist()))
    ]


def holm(p_values: list[float]) -> list[float]:
    """P values corrected for their number, by Holm's step-down rule."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _nulls(
    positive: Float[np.ndarray, "S M"], negative: Float[np.ndarray, "S M"], draws: int, seed: int
) -> Iterator[tuple[int, Float[np.ndarray, " m"], Float[np.ndarray, "R m"]]]:
    """For some columns at a time: where they start, their AUROC, and that with the prompts of random pairs swapped.

    All columns see the same swaps. Ranks do not change with a swap, so a draw is one row of a matrix product.
    """
    n, m = positive.shape
    kept = (np.random.default_rng(seed).random((draws, n)) < 0.5).astype(np.float64)
    for start in range(0, m, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        ranks = average_ranks(np.vstack([positive[:, part], negative[:, part]]).astype(np.float64))
        own, other = ranks[:n], ranks[n:]
        least = n * (n + 1) / 2
        drawn = (other.sum(0) + kept @ (own - other) - least) / (n * n)
        yield start, (own.sum(0) - least) / (n * n), drawn


def _variance(theta: float, n_positive: int, n_negative: int) -> float:
    """Of an AUROC of `theta` (Hanley and McNeil 1982, with both samples' sizes replaced by their mean)."""
    half = (n_positive + n_negative) / 2 - 1
    spread = 1 + half * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    return max(0.0, theta * (1 - theta) * spread / (n_positive * n_negative))
