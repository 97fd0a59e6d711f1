"""A judge without a model: the paper's rubric, applied to patterns that are listed beforehand.

What it cannot name ("refusals", "sadness") gets a low score, so its scores are a lower bound.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from chatsae.features.patterns.background import Background
from chatsae.features.patterns.families import BROAD, CHAT, TOPICAL, Pattern, patterns_of
from chatsae.features.records import Context, Feature
from chatsae.features.verdict import Verdict

MAX_RATE = 0.02
"""Most tokens of the background that may have a pattern, but for those of the chat's structure."""

LEVEL = 0.01
"""Chance at most that any of the patterns tried would hold so often for random tokens."""

LISTED = (*CHAT, *BROAD, "class", "predicts", "script around", "code around")
"""Families whose values are few and known before a context is seen."""

PROMOTED = 10
"""Tokens a feature promotes most that count as promoted."""

LEAST = 5
"""Contexts of the paper's rubric; fewer are no evidence."""

_PAIRED = 30  # patterns that are tried in pairs
_PRECISE = 0.5  # share of a broad pattern's tokens on which a feature fires, from which it is more than a theme


@dataclass(frozen=True, slots=True)
class Finding:
    """A pattern, and how well it tells what a feature fires on.

    surprise: -log10 of the chance that random tokens have the pattern so often. recall: share of the feature's
    activations, sampled over all its values, that have the pattern; precision: share of the tokens with the pattern on
    which the feature fires; detection: the balanced accuracy of the pattern as a detector. None where not known.
    """

    pattern: Pattern
    matches: int
    deviating: tuple[int, ...]
    rate: float
    surprise: float
    recall: float | None
    precision: float | None
    detection: float | None

    @property
    def broad(self) -> bool:
        """Whether it is a theme only, not a pattern of tokens."""
        if self.pattern.family in TOPICAL:
            return True
        return self.pattern.family in BROAD and not (self.precision is not None and self.precision >= _PRECISE)

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"pattern": self.pattern.name, "family": self.pattern.family, "value": self.pattern.value}


@dataclass(frozen=True)
class PatternJudge:
    """Scores a feature by the pattern that most of its contexts share, among `patterns.families`."""

    background: Background
    name: str = "pattern"

    def verdicts(self, features: Iterable[Feature], *, n_contexts: int, repeat: int = 0) -> Iterator[Verdict]:
        """A verdict on each feature; a repeat is the same again."""
        for feature in features:
            yield self._verdict(feature, n_contexts, repeat)

    def findings(self, feature: Feature, n_contexts: int) -> list[Finding]:
        """The patterns that are more frequent than chance, the best first.

        Patterns of the families in `LISTED` are known beforehand; any other is tried because a context has it. Both
        kinds together are found for random tokens with a chance of at most `LEVEL`.
        """
        contexts = feature.contexts[:n_contexts]
        promoted = frozenset(token for token, _ in feature.promoted[:PROMOTED])
        rows = [_patterns(context, promoted) for context in contexts]
        counts = Counter(pattern for row in rows for pattern in row)
        rates = {pattern: self.background.rate(pattern, promoted) for pattern in counts}
        tried = [p for p in counts if rates[p] <= MAX_RATE or p.family in (*CHAT, *BROAD)]
        needed = {True: _needed(self._n_listed), False: _needed(sum(p.family not in LISTED for p in tried))}
        sampled = [_patterns(context, promoted) for context in feature.sampled]
        found = []
        for pattern in tried:
            # a pattern that was read off one of the contexts has to be found in the others
            seen = 0 if pattern.family in LISTED else 1
            surprise = -log10_tail(len(contexts) - seen, counts[pattern] - seen, rates[pattern])
            if surprise > needed[not seen]:
                deviating = tuple(i for i, row in enumerate(rows) if pattern not in row)
                checked = _held_out(pattern, sampled, rates[pattern], feature.density)
                found.append(Finding(pattern, counts[pattern], deviating, rates[pattern], surprise, *checked))
        return sorted(found, key=_better)

    @cached_property
    def _n_listed(self) -> int:
        return sum(pattern.family in LISTED for pattern in self.background.counts)

    def _verdict(self, feature: Feature, n_contexts: int, repeat: int) -> Verdict:
        n = min(n_contexts, len(feature.contexts))
        if n < LEAST:
            return Verdict(feature.index, self.name, n, repeat, None, f"{n} contexts, at least {LEAST} are needed")
        found = self.findings(feature, n)
        details: dict[str, Any] = {"union": _union([f for f in found if not f.broad], n)}
        best = max(found, key=lambda finding: rubric(finding, n), default=None)
        score = 1 if best is None else rubric(best, n)
        if best is None or score == 1:
            return Verdict(feature.index, self.name, n, repeat, 1.0, explanation="no pattern", details=details)
        details |= best.facts()
        return Verdict(
            feature.index,
            self.name,
            n,
            repeat,
            float(score),
            explanation=best.pattern.name,
            deviating=best.deviating,
            details=details,
        )


def _better(finding: Finding) -> tuple[Any, ...]:
    """Sorts the best first; of equal ones a family that says more, and in it the longer value."""
    pattern = finding.pattern
    return finding.broad, -finding.matches, -finding.surprise, pattern.rank, -len(pattern.value), pattern.value


def rubric(finding: Finding, n: int) -> int:
    """The score of a pattern that is more frequent than chance in `n` contexts, by the paper's five lines.

    5: no context deviates. 4: one or two do. 3: of up to ten contexts three deviate; of more, up to 45 % (9 of 20).
    2: a theme only, in at least 40 % of the contexts.
    """
    deviating = n - finding.matches
    if finding.broad:
        return 2 if finding.matches >= 0.4 * n else 1
    if deviating <= 2:
        return 4 if deviating else 5
    return 3 if (deviating == 3 if n <= 10 else finding.matches >= 0.55 * n) else 1


def _needed(patterns: int) -> float:
    """The surprise that one of so many patterns needs, half of `LEVEL` to be shared by them (Bonferroni)."""
    return math.log10(max(patterns, 1) / (LEVEL / 2))


def log10_tail(n: int, m: int, p: float) -> float:
    """log10 of the chance of at least `m` successes in `n` trials of probability `p`."""
    if m <= 0 or p >= 1:
        return 0.0
    terms = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(m, n + 1)]
    total = math.fsum(terms)
    return math.log10(total) if total > 0 else n * math.log10(p)


def _patterns(context: Context, promoted: frozenset[str]) -> set[Pattern]:
    found = patterns_of(context)
    behind = context.peak + 1
    if behind < len(context) and context.tokens[behind] in promoted:
        found.add(Pattern("predicts", ""))
    return found


def _held_out(
    pattern: Pattern, sampled: Sequence[set[Pattern]], rate: float, density: float
) -> tuple[float | None, float | None, float | None]:
    """Recall, precision and balanced accuracy; precision by Bayes' rule from density and rate."""
    if not sampled or not 0 < density < 1:
        return None, None, None
    recall = sum(pattern in row for row in sampled) / len(sampled)
    precision = min(1.0, recall * density / rate)
    false_positives = max(0.0, rate - recall * density) / (1 - density)
    return recall, precision, (recall + 1 - min(1.0, false_positives)) / 2


def _union(sharp: Sequence[Finding], n: int) -> dict[str, Any] | None:
    """Two patterns that together hold where one does not: the mark of a feature with two meanings."""
    if not sharp or not sharp[0].deviating:
        return None
    pairs = combinations(sharp[:_PAIRED], 2)
    both = [(len(set(a.deviating) & set(b.deviating)), a, b) for a, b in pairs]
    deviating, first, second = min(both, key=lambda pair: pair[0], default=(n, sharp[0], sharp[0]))
    if deviating >= min(len(first.deviating), len(second.deviating)):
        return None
    return {"patterns": [first.pattern.name, second.pattern.name], "matches": n - deviating}
