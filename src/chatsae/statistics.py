"""Intervals and tests. The dialogue is the unit: tokens of one dialogue are not independent of each other.

Letters in shapes: S dialogues, R resamples.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Ratio = tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]
"""A figure by its parts: the sum of the first over dialogues, divided by the sum of the second."""

_CELLS = 2**22  # of dialogues by resamples, drawn at a time


@dataclass(frozen=True, slots=True)
class Paired:
    """The difference of a figure between two methods on the same dialogues, first minus second.

    `interval`: 95 %, by bootstrap over dialogues. `p_value`: two-sided, by a permutation test that swaps the two
    methods in random dialogues.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    n_dialogues: int


def ratio(parts: Ratio) -> float | None:
    """The figure that parts stand for; None where its denominator is 0."""
    below = float(parts[1].sum())
    return float(parts[0].sum()) / below if below else None


def bootstrap(
    figures: Mapping[str, Ratio], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals of figures, dialogues drawn with replacement; all figures from the same draws.

    None where there are fewer than 2 dialogues, or draws without a denominator.
    """
    found = resample(figures, resamples=resamples, seed=seed)
    return {name: interval(values, level) for name, values in found.items()}


def resample(
    figures: Mapping[str, Ratio], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Float[np.ndarray, " R"]]:
    """Figures on dialogues drawn with replacement; NaN in draws without a denominator.

    The draws follow from `seed` and the number of dialogues alone, so figures from several calls go together.
    """
    names = list(figures)
    if not names:
        return {}
    found = _resampled(np.stack([np.stack(figures[name]) for name in names]), resamples, seed)
    return dict(zip(names, found, strict=True))


def interval(values: Float[np.ndarray, " R"], level: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval of resampled values; None where one of them is not finite."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(first: Ratio, second: Ratio, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> Paired | None:
    """The paired comparison of one figure; entry i of both is the same dialogue. None where it is not defined."""
    parts = np.stack([np.stack(first), np.stack(second)])
    n = parts.shape[-1]
    whole = parts.sum(axis=-1)
    if n < 2 or not whole[:, 1].all():
        return None
    difference = float(whole[0, 0] / whole[0, 1] - whole[1, 0] / whole[1, 1])
    boot = _resampled(parts, resamples, seed)
    between = interval(boot[0] - boot[1], level)
    if between is None:
        return None
    swapped = np.concatenate(list(_swaps(parts, resamples, seed + 1)))
    slack = 1e-9 * abs(difference)  # sums in another order
    beyond = int((np.abs(swapped) >= abs(difference) - slack).sum())
    return Paired(difference, between, (1 + beyond) / (1 + len(swapped)), n)


def wilson(successes: int, n: int, *, z: float = 1.959963984540054) -> tuple[float, float] | None:
    """The Wilson score interval of a share, 95 % by default; None of nothing."""
    if n == 0:
        return None
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def quadratic_kappa(pairs: Sequence[tuple[int, int]]) -> float | None:
    """Cohen's kappa of two ratings with quadratic weights; None of nothing, or where chance would always agree."""
    if not pairs:
        return None
    first, second = np.array(pairs, dtype=np.float64).T
    observed = np.square(first - second).mean()
    by_chance = np.square(first[:, None] - second[None, :]).mean()
    return float(1 - observed / by_chance) if by_chance else None


def _resampled(parts: Float[np.ndarray, "M 2 S"], resamples: int, seed: int) -> Float[np.ndarray, "M R"]:
    n_figures, _, n = parts.shape
    if n < 2:
        return np.full((n_figures, resamples), np.nan)
    columns = np.ascontiguousarray(parts.reshape(2 * n_figures, n).T)
    sums = np.concatenate([weights @ columns for weights in _draws(n, resamples, seed)])  # [R, 2 M]
    above, below = sums.T.reshape(n_figures, 2, resamples).transpose(1, 0, 2)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


def _draws(n: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "r S"]]:
    """How often each dialogue is drawn, for some resamples at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn: Int[np.ndarray, "r S"] = rng.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _swaps(parts: Float[np.ndarray, "2 2 S"], resamples: int, seed: int) -> Iterator[Float[np.ndarray, " r"]]:
    """The difference with the two methods swapped in half of the dialogues."""
    rng = np.random.default_rng(seed)
    n = parts.shape[-1]
    whole, moved = parts.sum(axis=-1), (parts[1] - parts[0]).T  # [2, 2] and [S, 2]
    step = max(1, _CELLS // n)
    for start in range(0, resamples, step):
        chosen = (rng.random((min(step, resamples - start), n)) < 0.5).astype(np.float64)
        shift = chosen @ moved
        a, b = whole[0] + shift, whole[1] - shift
        with np.errstate(divide="ignore", invalid="ignore"):
            found = a[:, 0] / a[:, 1] - b[:, 0] / b[:, 1]
        yield found[np.isfinite(found)]
