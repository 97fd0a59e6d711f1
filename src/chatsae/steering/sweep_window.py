"""The window of strengths in which steering acts and answers keep their quality, with an interval over questions.

Letters in shapes: S strengths, Q questions, R resamples.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from chatsae.errors import UserError
from chatsae.steering.measures import NGRAM, Values

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """When the quality of an answer holds: set against the unsteered answer to the same question."""

    max_perplexity_ratio: float = 2.0
    """Of the answer's perplexity under the unsteered model."""
    max_repetition: float = 0.2
    """By which the share of repeated n-grams may be larger."""
    share: float = 0.8
    """Of the questions for which it must hold at every strength of the window, and below."""
    acts: float = 0.5
    """Of the questions whose answer must differ from the unsteered one, for the window to begin."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_perplexity_ratio < float("inf"):
            raise UserError(f"--max-perplexity-ratio must be at least 1, not {self.max_perplexity_ratio:g}")
        if not 0 <= self.max_repetition <= 1:
            raise UserError(f"--max-repetition must be between 0 and 1, not {self.max_repetition:g}")
        for name in ("share", "acts"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name} must be above 0 and at most 1, not {getattr(self, name):g}")

    def holds(self, values: Values, base: Values) -> bool:
        """Of the measures of an answer, and of those of the unsteered one; an answer has to be there."""
        ratio = values["log_perplexity_ratio"]
        assert ratio is not None
        more = (values["repetition"] or 0.0) - (base["repetition"] or 0.0)
        there = bool(values["length"]) or not base["length"]
        return there and ratio <= math.log(self.max_perplexity_ratio) + 1e-9 and more <= self.max_repetition + 1e-9

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        words = (
            f"an answer holds if its perplexity under the unsteered model is at most {self.max_perplexity_ratio:g} "
            f"times that of the unsteered answer to the question, the share of its {NGRAM}-grams that repeat is at "
            f"most {self.max_repetition:g} larger, and it is not empty"
        )
        return asdict(self) | {"words": words}


@dataclass(frozen=True, slots=True)
class Window:
    """Strengths of a window, always tested ones; an edge of None: no tested strength."""

    start: float | None
    """The smallest strength at which enough answers differ from the unsteered ones (`Quality.acts`)."""
    end: float
    """The largest strength up to which, at it and all below, enough answers hold (`Quality.share`)."""
    start_interval: tuple[float | None, float | None] | None
    """95 %, by bootstrap over questions; None with fewer than two."""
    end_interval: tuple[float, float] | None

    def facts(self, median_norm: float) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "from": self.start,
            "to": self.end,
            "from_interval": None if self.start_interval is None else list(self.start_interval),
            "to_interval": None if self.end_interval is None else list(self.end_interval),
            "open": self.start is not None and self.start <= self.end,
            "rel_from": None if self.start is None else self.start / median_norm,
            "rel_to": self.end / median_norm,
        }


def window(
    alphas: Float[np.ndarray, " S"],
    holds: Bool[np.ndarray, "S Q"],
    changed: Bool[np.ndarray, "S Q"],
    quality: Quality,
    *,
    seed: int = 0,
) -> Window:
    """The window from what holds, and what has changed, at ascending strengths, the first of which is 0."""
    whole = np.arange(holds.shape[1])[None]
    starts, ends = _starts(alphas, changed, quality.acts, whole), _ends(alphas, holds, quality.share, whole)
    low = high = None
    if holds.shape[1] > 1:
        drawn = _draws(holds.shape[1], seed)
        low = _edges(_starts(alphas, changed, quality.acts, drawn))
        high = _edges(_ends(alphas, holds, quality.share, drawn))
    start_interval = None if low is None else (_finite(low[0]), _finite(low[1]))
    return Window(_finite(float(starts[0])), float(ends[0]), start_interval, high)


def ends_apart(
    alphas: Float[np.ndarray, " S"],
    first: Bool[np.ndarray, "S Q"],
    second: Bool[np.ndarray, "S Q"],
    share: float,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """How much further the window of the first reaches than that of the second, with a paired interval."""
    whole = np.arange(first.shape[1])[None]
    difference = float((_ends(alphas, first, share, whole) - _ends(alphas, second, share, whole))[0])
    if first.shape[1] < 2:
        return {"difference": difference, "interval": None}
    drawn = _draws(first.shape[1], seed)
    return {
        "difference": difference,
        "interval": list(_edges(_ends(alphas, first, share, drawn) - _ends(alphas, second, share, drawn))),
    }


def _starts(
    alphas: Float[np.ndarray, " S"], changed: Bool[np.ndarray, "S Q"], share: float, drawn: Int[np.ndarray, "R Q"]
) -> Float[np.ndarray, " R"]:
    enough = _enough(changed, share, drawn)
    return np.where(enough.any(0), alphas[enough.argmax(0)], np.inf)


def _ends(
    alphas: Float[np.ndarray, " S"], holds: Bool[np.ndarray, "S Q"], share: float, drawn: Int[np.ndarray, "R Q"]
) -> Float[np.ndarray, " R"]:
    """The unsteered answers, the first strength, hold by themselves."""
    up_to = np.logical_and.accumulate(_enough(holds, share, drawn), axis=0).sum(0)
    return alphas[np.maximum(up_to, 1) - 1]


def _enough(values: Bool[np.ndarray, "S Q"], share: float, drawn: Int[np.ndarray, "R Q"]) -> Bool[np.ndarray, "S R"]:
    return values[:, drawn].mean(-1) >= share - 1e-9


def _draws(n: int, seed: int) -> Int[np.ndarray, "R Q"]:
    return np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))


def _edges(values: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """The 95 % percentile interval; its edges are among the values."""
    low, high = np.quantile(values, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
