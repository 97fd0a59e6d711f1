"""Probes that tell the two prompts of a pair apart: few features, beside the whole stream and a difference of means.

Letters in shapes: N prompts, K inputs of a probe, S pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from chatsae.audit.separation import auroc_interval, aurocs
from chatsae.statistics import interval, wilson

SPARSE = (1, 2, 4, 8, 16)
"""Numbers of features of the sparse probes."""
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
_FOLDS = 5
_NEWTON = 100  # steps at most; some 10 are taken


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear score of raw inputs: positive above 0."""

    weights: Float[np.ndarray, " K"]
    bias: float
    columns: Int[np.ndarray, " k"] | None = None
    """The inputs that it reads; None: all."""

    def scores(self, x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
        """One number per prompt."""
        return (x if self.columns is None else x[:, self.columns]) @ self.weights + self.bias


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe on pairs that it was not trained on.

    accuracy: share of prompts on the right side of 0, with its Wilson interval. fpr_at_95_tpr: negative prompts above
    the score that 95 % of the positive ones reach. minus_dense: AUROC minus that of the dense probe, with a 95 %
    bootstrap over pairs; None for the dense probe itself.
    """

    name: str
    inputs: int
    auroc: float
    auroc_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float] | None
    fpr_at_95_tpr: float
    minus_dense: float | None
    minus_dense_interval: tuple[float, float] | None
    l2: float | None
    features: tuple[int, ...] = ()


def fit_logistic(
    x: Float[np.ndarray, "N K"], y: Bool[np.ndarray, " N"], l2: float
) -> tuple[Float[np.ndarray, " K"], float]:
    """Weights and bias that minimise the summed log loss plus l2 / 2 |weights|^2, by Newton's method with halving.

    With more inputs than prompts it is solved in the span of the prompts, where the minimum lies.
    """
    n, k = x.shape
    if k > n:
        vt = np.linalg.svd(x, full_matrices=False)[2]
        inner, bias = fit_logistic(x @ vt.T, y, l2)
        return vt.T @ inner, bias
    z = np.hstack([x, np.ones((n, 1))])
    penalty = np.append(np.full(k, l2), 0.0)
    theta, sign = np.zeros(k + 1), np.where(y, 1.0, -1.0)

    def loss(at: Float[np.ndarray, " p"]) -> float:
        return float(np.logaddexp(0, -sign * (z @ at)).sum() + 0.5 * (penalty * at * at).sum())

    value = loss(theta)
    for _ in range(_NEWTON):
        p = 1 / (1 + np.exp(-np.clip(z @ theta, -500, 500)))
        gradient = z.T @ (p - y) + penalty * theta
        hessian = (z * (p * (1 - p))[:, None]).T @ z + np.diag(penalty + 1e-12)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-6 and (tried := loss(theta - size * step)) > value:
            size /= 2
        if size <= 1e-6:
            break
        theta, before, value = theta - size * step, value, tried
        if before - value <= 1e-12 * max(1.0, value):
            break
    return theta[:-1], float(theta[-1])


def logistic_probe(
    positive: Float[np.ndarray, "S K"], negative: Float[np.ndarray, "S K"], seed: int
) -> tuple[Linear, float]:
    """A probe on standardised inputs, and its L2 strength: that of the least log loss over five folds of the pairs."""
    n = len(positive)
    fold = np.random.default_rng(seed).permutation(n) % min(_FOLDS, n)
    losses = dict.fromkeys(_STRENGTHS, 0.0)
    for f in range(int(fold.max()) + 1):
        inside, outside = fold != f, fold == f
        x, y = _stacked(positive[outside], negative[outside])
        for l2 in _STRENGTHS:
            margin = np.where(y, 1, -1) * _fitted(positive[inside], negative[inside], l2).scores(x)
            losses[l2] += float(np.logaddexp(0, -margin).sum())
    best = min(_STRENGTHS, key=lambda l2: (losses[l2], -l2))
    return _fitted(positive, negative, best), best


def mean_probe(positive: Float[np.ndarray, "S D"], negative: Float[np.ndarray, "S D"]) -> Linear:
    """Difference of means: the projection on it, from half way between the two."""
    a, b = positive.mean(0), negative.mean(0)
    return Linear(a - b, float(-(a - b) @ (a + b) / 2))


def top_features(
    positive: Float[np.ndarray, "S F"], negative: Float[np.ndarray, "S F"], k: int
) -> Int[np.ndarray, " k"]:
    """The k features of largest difference of mean activation, as the sparse probes of arXiv 2502.16681 choose them."""
    difference = np.abs(positive.mean(0) - negative.mean(0))
    return np.argsort(-difference, kind="stable")[: min(k, int((difference > 0).sum()))]


def probe_table(
    features: tuple[Float[np.ndarray, "S F"], Float[np.ndarray, "S F"]],
    stream: tuple[Float[np.ndarray, "S D"], Float[np.ndarray, "S D"]],
    chosen: Sequence[int],
    report: Sequence[int],
    *,
    seed: int = 0,
) -> list[Probed]:
    """Sparse probes of 1 to 16 features, the dense probe and the difference of means, all on the same pairs.

    Positive first, then negative; trained on the pairs `chosen`, measured on the pairs `report`.
    """
    train, test = [side[list(chosen)] for side in features], [side[list(report)] for side in features]
    dense_train, dense_test = [side[list(chosen)] for side in stream], [side[list(report)] for side in stream]
    dense, l2 = logistic_probe(dense_train[0], dense_train[1], seed)
    reference = dense.scores(dense_test[0]), dense.scores(dense_test[1])
    rows = []
    for k in SPARSE:
        columns = top_features(train[0], train[1], k)
        if len(columns) < k:
            break
        inner, own = logistic_probe(train[0][:, columns], train[1][:, columns], seed)
        probe = Linear(inner.weights, inner.bias, columns)
        found = probe.scores(test[0]), probe.scores(test[1])
        rows.append(_probed(f"{k} feature{'s' * (k > 1)}", k, found, reference, own, tuple(columns.tolist()), seed))
    d_in = stream[0].shape[1]
    rows.append(_probed("stream, dense", d_in, reference, None, l2, (), seed))
    means = mean_probe(dense_train[0], dense_train[1])
    found = means.scores(dense_test[0]), means.scores(dense_test[1])
    rows.append(_probed("stream, difference of means", d_in, found, reference, None, (), seed))
    return rows


def _probed(
    name: str,
    inputs: int,
    found: tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]],
    reference: tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]] | None,
    l2: float | None,
    features: tuple[int, ...],
    seed: int,
) -> Probed:
    positive, negative = found
    n = len(positive)
    auroc = _auroc(positive, negative)
    right = int((positive > 0).sum() + (negative <= 0).sum())
    bar = np.sort(positive)[int(np.floor(0.05 * n))]
    below = None if reference is None else auroc - _auroc(*reference)
    return Probed(
        name=name,
        inputs=inputs,
        auroc=auroc,
        auroc_interval=auroc_interval(auroc, n, n),
        accuracy=right / (2 * n),
        accuracy_interval=wilson(right, 2 * n),
        fpr_at_95_tpr=float((negative >= bar).mean()),
        minus_dense=below,
        minus_dense_interval=None if reference is None else _difference_interval(found, reference, seed),
        l2=l2,
        features=features,
    )


def _difference_interval(
    first: tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]],
    second: tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]],
    seed: int,
    draws: int = 1000,
) -> tuple[float, float] | None:
    """Of the difference of two AUROCs on the same pairs, pairs drawn with replacement."""
    n = len(first[0])
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    above = _above(*first) - _above(*second)
    return interval(((weights @ above) * weights).sum(1) / (n * n))


def _above(positive: Float[np.ndarray, " S"], negative: Float[np.ndarray, " S"]) -> Float[np.ndarray, "S S"]:
    """1 where the positive of the row is above the negative of the column, 0.5 where they are equal."""
    return (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)


def _auroc(positive: Float[np.ndarray, " S"], negative: Float[np.ndarray, " S"]) -> float:
    return float(aurocs(positive[:, None], negative[:, None])[0])


def _fitted(positive: Float[np.ndarray, "S K"], negative: Float[np.ndarray, "S K"], l2: float) -> Linear:
    x, y = _stacked(positive, negative)
    mean, spread = x.mean(0), x.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    weights, bias = fit_logistic((x - mean) / spread, y, l2)
    return Linear(weights / spread, bias - float((weights / spread) @ mean))


def _stacked(
    positive: Float[np.ndarray, "S K"], negative: Float[np.ndarray, "S K"]
) -> tuple[Float[np.ndarray, "N K"], Bool[np.ndarray, " N"]]:
    y = np.zeros(len(positive) + len(negative), bool)
    y[: len(positive)] = True
    return np.vstack([positive, negative]), y
