"""How often patterns hold for any token: what a feature's patterns are measured against."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from chatsae.batch import TokenBatch
from chatsae.errors import UserError
from chatsae.features.patterns.families import Pattern, patterns_of
from chatsae.features.records import Context
from chatsae.features.text import TokenText, message_index

SAMPLE = 20_000
"""Tokens of a background."""

DIALOGUES = 2000
"""Dialogues they come from."""

_BEFORE = 0.75  # as in the windows of features


@dataclass(frozen=True)
class Background:
    """Windows around random tokens of a split, and for each pattern how many of these tokens have it."""

    contexts: tuple[Context, ...]
    counts: Counter[Pattern]
    next_tokens: Counter[str]

    @staticmethod
    def of(contexts: Sequence[Context]) -> "Background":
        """Count the patterns of random contexts.

        Raises:
            UserError: there is none.
        """
        if not contexts:
            raise UserError("a background needs at least one token")
        counts: Counter[Pattern] = Counter()
        for context in contexts:
            counts.update(patterns_of(context))
        behind = Counter(c.tokens[c.peak + 1] for c in contexts if c.peak + 1 < len(c))
        return Background(tuple(contexts), counts, behind)

    def rate(self, pattern: Pattern, promoted: frozenset[str] = frozenset()) -> float:
        """The share of tokens that have a pattern, counted as if one more had it: no rate is known to be 0."""
        n = sum(self.next_tokens[t] for t in promoted) if pattern.family == "predicts" else self.counts[pattern]
        return (n + 1) / (len(self.contexts) + 1)


def random_contexts(
    tokens: TokenBatch, text: TokenText, *, n: int = SAMPLE, window: int = 64, seed: int = 0
) -> list[Context]:
    """Windows around `n` random tokens of up to `DIALOGUES` random dialogues, in order; all where they are fewer."""
    rng = np.random.default_rng(seed)
    dialogues = np.sort(rng.choice(len(tokens), size=min(DIALOGUES, len(tokens)), replace=False))
    some = tokens.select(dialogues.tolist())
    n_tokens = len(some.input_ids)
    chosen = np.sort(rng.choice(n_tokens, size=min(n, n_tokens), replace=False))
    bounds = some.cu_seqlens.tolist()
    columns = {name: getattr(some, name).tolist() for name in ("input_ids", "role", "kind", "prefix")}
    columns["turn"] = message_index(some).tolist()
    found = []
    for d, (first, last) in enumerate(pairwise(bounds)):
        own = {name: tuple(values[first:last]) for name, values in columns.items()}
        own["tokens"] = tuple(text.of(own["input_ids"]))
        for token in chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, last)].tolist():
            position = token - first
            start = max(0, min(position - int(window * _BEFORE), last - first - window))
            stop = min(last - first, start + window)
            found.append(
                Context(
                    feature=-1,
                    dialogue=some.names[d],
                    value=0.0,
                    quantile=None,
                    start=start,
                    peak=position - start,
                    acts=(0.0,) * (stop - start),
                    index=int(dialogues[d]),
                    **{name: values[start:stop] for name, values in own.items()},
                )
            )
    return found
