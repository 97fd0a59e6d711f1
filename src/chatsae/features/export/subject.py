"""What an export is made of: one SAE, its features, and the names that other tools know them by."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from chatsae.exporting import check_identifier
from chatsae.features.keeper import value_bins
from chatsae.features.records import VALUE_BINS, VALUE_EDGES, VALUES_PER_OCTAVE, Context, Feature
from chatsae.features.store import FeatureStore
from chatsae.sae.base import SAE

MAX_TOKENS = 1024
"""Of a context, on the other side."""
MAX_LOGITS = 20
MAX_TEXT = 512
"""Characters of an explanation."""


@dataclass(frozen=True, slots=True)
class Names:
    """Ids on the other side, lower-case; a source is one SAE of a set.

    Raises:
        UserError: an id holds something else than lower-case letters, digits, dots, dashes and single underscores.
    """

    model_id: str
    set_name: str
    creator_id: str = ""

    def __post_init__(self) -> None:
        for flag, value in (("--model-id", self.model_id), ("--set-name", self.set_name)):
            check_identifier(flag, value)

    def source(self, layer: int) -> str:
        """`LAYER-SET`, the id of an SAE's source."""
        return f"{layer}-{self.set_name}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a judge says a feature responds to."""

    text: str
    notes: str
    """The judge, its contexts and its score."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A context as other tools hold it: tokens, values of five digits, and the activations it stands for."""

    context: Context
    tokens: list[str]
    values: list[float]
    peak: int
    """Index of the token it was taken for."""
    interval: tuple[float, float, float] | None
    """Bounds of an interval of activations, and the share of all activations in it; None: of the strongest contexts."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One SAE that is exported; what is left out is counted in `tally`."""

    store: FeatureStore
    sae: SAE
    names: Names
    features: tuple[int, ...]
    dataset: str
    when: datetime
    explanations: Mapping[int, Sequence[Explanation]] = field(default_factory=dict)
    method: str = ""
    n_layers: int | None = None
    """Blocks of the language model, where known."""
    tally: Counter[str] = field(default_factory=Counter)

    @property
    def source(self) -> str:
        return self.names.source(self.sae.spec.layer)

    @property
    def created(self) -> str:
        """The time of the export, ISO 8601 with milliseconds."""
        return self.when.isoformat(timespec="milliseconds")

    def each(self) -> Iterator[Feature]:
        """Its features, in order."""
        return map(self.store.feature, self.features)

    def samples(self, feature: Feature) -> list[Sample]:
        """The strongest contexts and then the sampled ones; one with an activation that is not finite is left out."""
        found = [_sample(feature, context, self.tally) for context in (*feature.contexts, *feature.sampled)]
        return [sample for sample in found if sample is not None]

    def logits(self, ranked: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
        """At most `MAX_LOGITS` tokens with their values; those that are not finite are left out."""
        found = [(printable(token), number(value)) for token, value in ranked]
        self.count("logits that are not finite, left out", sum(value is None for _, value in found))
        return [(token, value) for token, value in found if value is not None][:MAX_LOGITS]

    def explained(self, feature: Feature) -> list[Explanation]:
        """The explanations of a feature, each of 1 to `MAX_TEXT` characters."""
        found = []
        for explanation in self.explanations.get(feature.index, ()):
            text = printable(explanation.text).strip()
            if len(text) > MAX_TEXT:
                self.count(f"explanations cut to {MAX_TEXT} characters")
                text = text[: MAX_TEXT - 1] + "…"
            if text:
                found.append(Explanation(text, printable(explanation.notes)))
        return found

    def count(self, reason: str, n: int = 1) -> None:
        """Count what was left out."""
        if n:
            self.tally[reason] += n


def number(value: float, digits: int = 5) -> float | None:
    """A number to so many decimals; None where it is NaN or infinite."""
    return round(float(value), digits) if math.isfinite(value) else None


def printable(text: str) -> str:
    """Text that every JSON reader and PostgreSQL take: U+FFFD for NUL and for halves of surrogate pairs."""
    return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in text)


def interval_of(feature: Feature, value: float) -> tuple[float, float, float]:
    """The octave of activations that a value lies in, cut at the largest, and the share of all activations there."""
    octave = int(value_bins(np.array([value]))[0]) // VALUES_PER_OCTAVE
    first, last = octave * VALUES_PER_OCTAVE, (octave + 1) * VALUES_PER_OCTAVE
    low = 0.0 if octave == 0 else VALUE_EDGES[first]
    high = feature.max_act if last == VALUE_BINS else min(VALUE_EDGES[last], feature.max_act)
    inside, total = sum(feature.value_counts[first:last]), sum(feature.value_counts)
    # a forward may round a value that is looked at again across an edge
    return low, max(high, value), inside / max(total, 1)


def histogram(feature: Feature) -> tuple[list[float], list[float]]:
    """Heights (shares of the activations) and values (middles of the bins) of the bins of activations that hold any."""
    total = sum(feature.value_counts)
    bins = [i for i, n in enumerate(feature.value_counts) if n]
    middles = [round((VALUE_EDGES[i] + VALUE_EDGES[i + 1]) / 2, 5) for i in bins]
    return [round(feature.value_counts[i] / total, 5) for i in bins], middles


def _sample(feature: Feature, context: Context, tally: Counter[str]) -> Sample | None:
    values = [number(value) for value in context.acts]
    finite = [value for value in values if value is not None]
    if len(finite) < len(values) or not math.isfinite(context.value):
        tally["contexts with an activation that is not finite, left out"] += 1
        return None
    start = 0
    if len(finite) > MAX_TOKENS:
        tally[f"contexts cut to {MAX_TOKENS} tokens"] += 1
        start = min(max(0, context.peak - MAX_TOKENS * 3 // 4), len(finite) - MAX_TOKENS)
    stop = min(start + MAX_TOKENS, len(finite))
    return Sample(
        context=context,
        tokens=[printable(token) for token in context.tokens[start:stop]],
        values=finite[start:stop],
        peak=context.peak - start,
        interval=None if context.quantile is None else interval_of(feature, context.value),
    )
