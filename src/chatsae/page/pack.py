"""Features and their contexts in little room: tokens are shared between contexts, activations are 8 bits.

A window is a stretch of a dialogue, and many features show the same dialogues. So the page holds each token of a
dialogue once, and of a context where it lies and what is active in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from chatsae.batch import Kind
from chatsae.features.records import Context, Feature
from chatsae.features.store import FeatureStore

SAMPLED = 5
"""Contexts over the quantiles of a feature's activations that the page shows beside the strongest."""

LEVELS = 255
"""Steps of an activation; the largest is the feature's maximum."""

_GAP = -1  # a token between two windows that no context shows


@dataclass
class Dialogues:
    """The dialogues that contexts are windows of, each token once; `facts` is what the page reads."""

    texts: dict[str, int] = field(default_factory=dict)
    _numbers: dict[tuple[str, str, int], int] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list)
    _tokens: list[dict[int, tuple[int, int, int]]] = field(default_factory=list)

    def text(self, text: str) -> int:
        """The number of a text in the shared table."""
        return self.texts.setdefault(text, len(self.texts))

    def add(self, split: str, context: Context) -> int:
        """Take in the tokens of a context of a `split`; the number of its dialogue."""
        number = self._numbers.setdefault((split, context.dialogue, context.index), len(self._numbers))
        if number == len(self._names):
            self._names.append(context.dialogue)
            self._tokens.append({})
        own = self._tokens[number]
        per_token = zip(context.tokens, context.role, context.kind, context.prefix, context.turn, strict=True)
        for i, (text, role, kind, prefix, turn) in enumerate(per_token, start=context.start):
            if i not in own:
                own[i] = (self.text(text), (role * len(Kind) + kind) * 2 + prefix, turn)
        return number

    def facts(self) -> list[dict[str, Any]]:
        """Of each dialogue: name, first position, text of each token (-1: not shown), runs of codes and of turns."""
        found = []
        for name, own in zip(self._names, self._tokens, strict=True):
            start = min(own)
            rows = [own.get(i, (_GAP, _GAP, _GAP)) for i in range(start, max(own) + 1)]
            texts, codes, turns = zip(*rows, strict=True)
            found.append({"name": name, "start": start, "t": list(texts), "c": _runs(codes), "u": _runs(turns)})
        return found


def packed(context: Context, number: int, max_act: float) -> list[Any]:
    """A context as the page reads it: [dialogue, start, length, peak, value, quantile, acts].

    acts: for each active token how many tokens it lies behind the one before (behind -1 the first), and its activation
    in `LEVELS` of the feature's largest, at least 1.
    """
    acts, last = [], -1
    for i, act in enumerate(context.acts):
        if act > 0:
            level = max(1, round(LEVELS * act / max_act)) if max_act > 0 else 1
            acts += [i - last, min(level, LEVELS)]
            last = i
    quantile = None if context.quantile is None else short(context.quantile)
    return [number, context.start, len(context), context.peak, short(context.value), quantile, acts]


def packed_feature(
    feature: Feature, dialogues: Dialogues, split: str, verdicts: Sequence[Mapping[str, Any] | None]
) -> dict[str, Any]:
    """A feature as the page reads it; docs/report.md has the keys. A verdict for each judge, or None."""

    def shown(contexts: Sequence[Context]) -> list[list[Any]]:
        return [packed(context, dialogues.add(split, context), feature.max_act) for context in contexts]

    def lens(tokens: Sequence[tuple[str, float]]) -> list[list[float]]:
        return [[dialogues.text(text), short(value)] for text, value in tokens]

    return {
        "i": feature.index,
        "density": short(feature.density),
        "max": short(feature.max_act),
        "mean": short(feature.mean_act),
        "role": _shorts(feature.role_means),
        "kind": _shorts(feature.kind_means),
        "position": _shorts(feature.position_means),
        "role_n": list(feature.role_counts),
        "kind_n": list(feature.kind_counts),
        "position_n": list(feature.position_counts),
        "values": _trimmed(feature.value_counts),
        "up": lens(feature.promoted),
        "down": lens(feature.suppressed),
        "near": [[i, short(cosine)] for i, cosine in feature.decoder_neighbours],
        "with": [[i, short(phi), short(share)] for i, phi, share in feature.cofiring],
        "top": shown(feature.contexts),
        "sampled": shown(feature.sampled),
        "verdicts": [None if v is None else _verdict(v) for v in verdicts],
    }


def firing_histograms(store: FeatureStore) -> dict[str, Any]:
    """Of all features of an SAE: active features per sampled token, and features by density.

    `l0`: [active features, tokens] ascending. `density`: [bin, features], a bin being a quarter of a decade, and its
    number the floor of 4 log10 density; with the features that never fired.
    """
    bits = store.kept["bits"]
    n = min(int(store.facts["sampled_tokens"]), int(store.facts["n_tokens"]))
    l0 = np.zeros(bits.shape[1] * 8, np.int64)
    for start in range(0, len(bits), 1024):
        l0 += np.unpackbits(bits[start : start + 1024], axis=1).sum(axis=0, dtype=np.int64)
    density = store.columns["density"]
    bins = np.floor(4 * np.log10(density[density > 0])).astype(int)
    return {
        "sampled_tokens": n,
        "l0": _counted(l0[:n]),
        "density": _counted(bins),
        "dead": int((density == 0).sum()),
        "d_sae": len(density),
    }


def short(value: float) -> float:
    """Four digits of a number are as many as a page shows."""
    return float(f"{value:.4g}")


def _shorts(values: Sequence[float]) -> list[float]:
    return [short(value) for value in values]


def _verdict(verdict: Mapping[str, Any]) -> list[Any]:
    score = verdict["score"]
    explanation = verdict["explanation"] if score is not None else verdict["reason"]
    return [None if score is None else short(score), explanation or "", list(verdict["deviating"])]


def _counted(values: np.ndarray) -> list[list[int]]:
    return [[int(v), int(n)] for v, n in zip(*np.unique(values, return_counts=True), strict=True)]


def _trimmed(counts: Sequence[int]) -> list[Any]:
    """[first bin that is not empty, [counts up to the last such bin]]."""
    filled = np.flatnonzero(counts)
    return [int(filled[0]), list(counts[filled[0] : filled[-1] + 1])] if len(filled) else [0, []]


def _runs(values: Sequence[int]) -> list[int]:
    """[value, how often, value, how often, ...]."""
    return [number for value, run in groupby(values) for number in (value, len(list(run)))]
