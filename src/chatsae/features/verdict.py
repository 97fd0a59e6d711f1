"""What a judge says of a feature."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from chatsae.features.records import Feature


@dataclass(frozen=True, slots=True)
class Verdict:
    """A score of 1 to 5 for the strongest contexts of a feature (the paper's rubric), or the reason why there is none.

    A judge that answers with a distribution over scores gives its mean, so a score need not be whole.
    """

    feature: int
    judge: str
    n_contexts: int
    """Contexts that were looked at."""
    repeat: int
    score: float | None
    reason: str | None = None
    """Why there is no score."""
    explanation: str = ""
    deviating: tuple[int, ...] = ()
    """Contexts, by their rank, that do not fit the explanation."""
    distribution: tuple[float, ...] | None = None
    """Probabilities of the scores 1 to 5, of a judge that has them."""
    details: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Judge(Protocol):
    """Gives verdicts on features; `name` tells judges of one run apart and is a file name."""

    @property
    def name(self) -> str: ...

    def verdicts(self, features: Iterable[Feature], *, n_contexts: int, repeat: int = 0) -> Iterator[Verdict]:
        """A verdict on each feature, in their order, from its `n_contexts` strongest contexts.

        A `repeat` is another opinion of the same judge, where it can have one.
        """
        ...
