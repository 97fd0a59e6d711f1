"""A guard over steered generation: it lowers the strength of a row whose text falls apart."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """When a row's strength is lowered. A limit of 0 is off; every sign looks at the last `window` tokens."""

    min_entropy: float = 0.02
    """Mean entropy of the steered predictions in nats, below which they have collapsed."""
    max_repetition: float = 0.5
    """Share of the n-grams that stood before in the window."""
    max_kl: float = 3.0
    """Mean KL(steered || unsteered) of the predictions in nats; asks for an unsteered row beside each."""
    ngram: int = 3
    window: int = 16
    decay: float = 0.5
    """Each time a sign shows the row's strength is multiplied by this; not again within `window` tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"guard.decay: at least 0 and below 1 is needed, {self.decay} given")
        if not 1 <= self.ngram < self.window:
            raise UserError(f"guard.ngram: 1 to below the window of {self.window} is needed, {self.ngram} given")
        for name in ("min_entropy", "max_repetition", "max_kl"):
            if getattr(self, name) < 0:
                raise UserError(f"guard.{name}: at least 0 is needed, {getattr(self, name)} given")


@dataclass(frozen=True, slots=True)
class GuardEvent:
    """One lowering: after which generated token, why, what was measured, and the row's factor from then on."""

    token: int
    sign: str
    value: float
    factor: float

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


class Watch:
    """A guard on the rows of one batch; `factors` and `events` are per row."""

    def __init__(self, guard: Guard, n_rows: int) -> None:
        self.guard = guard
        self.factors: Float[Tensor, " B"] = torch.ones(n_rows)
        self.events: list[list[GuardEvent]] = [[] for _ in range(n_rows)]
        self._ids: list[list[int]] = [[] for _ in range(n_rows)]
        self._entropy: list[list[float]] = [[] for _ in range(n_rows)]
        self._kl: list[list[float]] = [[] for _ in range(n_rows)]
        self._since = [0] * n_rows

    def see(
        self, steered: Float[Tensor, "B V"], unsteered: Float[Tensor, "B V"] | None, ids: Sequence[int | None]
    ) -> Float[Tensor, " B"]:
        """The factors after one more token of each row; None: the row is done.

        Args:
            steered: the logits that the token was taken from.
            unsteered: those of the same text without steering, or None.
            ids: the tokens.
        """
        log_p = steered.float().log_softmax(-1)
        p = log_p.exp()
        entropy = (-p * log_p).nan_to_num().sum(-1).tolist()
        kl = None
        if unsteered is not None:
            kl = (p * (log_p - unsteered.float().log_softmax(-1))).nan_to_num().sum(-1).tolist()
        for row, token in enumerate(ids):
            if token is None:
                continue
            self._ids[row].append(token)
            self._entropy[row].append(entropy[row])
            if kl is not None:
                self._kl[row].append(kl[row])
            self._since[row] += 1
            if self._since[row] >= self.guard.window:
                self._look(row)
        return self.factors

    def _look(self, row: int) -> None:
        if self.factors[row] == 0:  # nothing is left to lower
            return
        guard, window = self.guard, self.guard.window
        entropy = _mean(self._entropy[row][-window:])
        repeated = repetition(self._ids[row][-window:], guard.ngram)
        kl = _mean(self._kl[row][-window:]) if self._kl[row] else 0.0
        signs = (
            ("entropy", entropy, guard.min_entropy > 0 and entropy < guard.min_entropy),
            ("repetition", repeated, guard.max_repetition > 0 and repeated > guard.max_repetition),
            ("kl", kl, guard.max_kl > 0 and kl > guard.max_kl),
        )
        for sign, value, shows in signs:
            if shows:
                self.factors[row] *= guard.decay
                event = GuardEvent(len(self._ids[row]), sign, value, float(self.factors[row]))
                self.events[row].append(event)
                self._since[row] = 0
                return


def repetition(ids: Sequence[int], n: int) -> float:
    """The share of n-grams that stood before in the sequence; 0 where there is none."""
    grams = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    total = grams.total()
    return 1 - len(grams) / total if total else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
