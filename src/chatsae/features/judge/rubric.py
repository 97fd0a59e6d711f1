"""The paper's rubric, put to a language model."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from chatsae.features.judge import prompts
from chatsae.features.judge.answers import rating
from chatsae.features.judge.asking import Asker
from chatsae.features.judge.client import Request
from chatsae.features.records import Context, Feature
from chatsae.features.verdict import Verdict

PARAMS = {"temperature": 0.1, "max_tokens": 256}
"""Sampling of the judge's answers; the repeat is the seed."""


@dataclass(frozen=True)
class RubricJudge:
    """Has a language model rate and explain features from their strongest contexts, in an order drawn per repeat."""

    asker: Asker
    name: str
    params: Mapping[str, Any] = field(default_factory=lambda: dict(PARAMS))
    activations: bool = False
    """Show how active the feature is on each marked token."""
    seed: int = 0

    def verdicts(self, features: Iterable[Feature], *, n_contexts: int, repeat: int = 0) -> Iterator[Verdict]:
        """A verdict on each feature, in their order; several are asked for at once.

        Raises:
            UserError: the model cannot be asked, or the budget is spent.
        """
        yield from self.asker.each(partial(self._verdict, n_contexts=n_contexts, repeat=repeat), features)

    def requests(self, features: Iterable[Feature], *, n_contexts: int, repeat: int = 0) -> Iterator[Request]:
        """What `verdicts` asks, if no answer has to be asked for again."""
        for feature in features:
            if feature.contexts:
                yield self._request(feature, shuffled(feature, n_contexts, self.seed, repeat), repeat)

    def _request(self, feature: Feature, order: list[int], repeat: int) -> Request:
        shown = [feature.contexts[i] for i in order]
        return rubric_request(shown, prompts.RUBRIC_FORM, self.params, repeat, activations=self.activations)

    def _verdict(self, feature: Feature, *, n_contexts: int, repeat: int) -> Verdict:
        order = shuffled(feature, n_contexts, self.seed, repeat)
        n = len(order)
        if not n:
            return Verdict(feature.index, self.name, 0, repeat, None, "no contexts")
        request = self._request(feature, order, repeat)
        found, reason, answer = self.asker.read(request, lambda answer: rating(answer, n), prompts.RUBRIC_REMINDER)
        details = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        if found is None:
            return Verdict(feature.index, self.name, n, repeat, None, reason, details=details)
        deviating = tuple(sorted(order[number - 1] for number in found.deviating))
        return Verdict(
            feature.index,
            self.name,
            n,
            repeat,
            float(found.score),
            explanation=found.explanation,
            deviating=deviating,
            details=details,
        )


def rubric_request(
    contexts: list[Context], form: str, params: Mapping[str, Any], repeat: int, *, activations: bool = False
) -> Request:
    """The rubric on contexts in the order given."""
    strength = max(context.value for context in contexts) if activations else None
    shown = prompts.listed(contexts, strength=strength)
    return Request(prompts.messages(prompts.RUBRIC_SYSTEM, shown, form), {"seed": repeat, **params}, repeat)


def shuffled(feature: Feature, n_contexts: int, seed: int, repeat: int) -> list[int]:
    """Ranks of the strongest contexts, in the order in which they are shown."""
    rng = np.random.default_rng([seed, repeat, feature.index % 2**32])
    return rng.permutation(min(n_contexts, len(feature.contexts))).tolist()


def file_name(model: str) -> str:
    """The name of a model as part of a file's name; of a directory its last part."""
    name = model.rstrip("/").rpartition("/")[2] if model.startswith(("/", ".", "~")) else model
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "model"
