"""Scores that need no scale: whether an explanation tells where a feature is active, and which context does not belong.

Both set contexts of a feature against windows around random tokens of the same dialogues on which it is silent.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from chatsae.batch import TokenBatch
from chatsae.features.collect import Reading, harvest
from chatsae.features.firings import narrow
from chatsae.features.judge import prompts
from chatsae.features.judge.answers import active, intruder
from chatsae.features.judge.asking import Asker
from chatsae.features.judge.client import Request
from chatsae.features.judge.rubric import PARAMS
from chatsae.features.records import Context, Feature
from chatsae.features.scores import share
from chatsae.features.verdict import Verdict
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.statistics import bootstrap

POOL = 200
"""Windows around random tokens among which those are found on which a feature is silent."""

HALF = 5
"""Windows with the feature, and as many without it, of which detection has to tell the first."""

INTRUDED = 4
"""Contexts of a feature beside an intruder."""

_UNKNOWN = "x" * 180  # stands for an explanation that is not there yet, in an estimate


@dataclass(frozen=True, slots=True)
class Trial:
    """Contexts in the order in which they are shown; `wanted` are numbers, from 1, of those to be named."""

    feature: int
    contexts: tuple[Context, ...]
    wanted: frozenset[int]


@dataclass(frozen=True)
class Tasks:
    """Detection and intruder trials, put to the model behind `asker`."""

    asker: Asker
    params: Mapping[str, Any] = field(default_factory=lambda: dict(PARAMS))
    seed: int = 0

    def detection(
        self, features: Sequence[Feature], verdicts: Sequence[Verdict], silent: Mapping[int, Sequence[Context]]
    ) -> dict[str, Any]:
        """Balanced accuracy of telling windows by the explanations of `verdicts`; by feature, and its mean.

        Raises:
            UserError: the model cannot be asked, or the budget is spent.
        """

        def one(pair: tuple[Feature, Verdict]) -> tuple[float | None, str | None]:
            feature, verdict = pair
            trial = detection_trial(feature, silent[feature.index], verdict.n_contexts, self.seed)
            if not verdict.explanation:
                return None, "no explanation"
            if trial is None:
                return None, "too few windows"
            n = len(trial.contexts)
            request = self._detection(trial, verdict.explanation)
            named, reason, _ = self.asker.read(request, lambda answer: active(answer, n), prompts.DETECTION_REMINDER)
            return (None, reason) if named is None else (balanced_accuracy(named, trial.wanted, n), None)

        found = list(self.asker.each(one, zip(features, verdicts, strict=True)))
        scores = np.array([score for score, _ in found if score is not None])
        between = bootstrap({"mean": (scores, np.ones_like(scores))})["mean"] if len(scores) else None
        mean = float(scores.mean()) if len(scores) else None
        return {"n": len(scores), "mean": mean, "interval": list(between) if between else None} | _rows(features, found)

    def intruder(
        self, features: Sequence[Feature], n_contexts: int, silent: Mapping[int, Sequence[Context]]
    ) -> dict[str, Any]:
        """The share of features whose contexts are told from an intruder; chance is one in five.

        Raises:
            UserError: the model cannot be asked, or the budget is spent.
        """

        def one(feature: Feature) -> tuple[float | None, str | None]:
            trial = intruder_trial(feature, silent[feature.index], n_contexts, self.seed)
            if trial is None:
                return None, "too few windows"
            n = len(trial.contexts)
            request = self._intruder(trial)
            named, reason, _ = self.asker.read(request, lambda answer: intruder(answer, n), prompts.INTRUDER_REMINDER)
            return (None, reason) if named is None else (float(named in trial.wanted), None)

        found = list(self.asker.each(one, features))
        right = share(score == 1 for score, _ in found if score is not None)
        return {"right": right, "chance": 1 / (INTRUDED + 1)} | _rows(features, found)

    def requests(
        self,
        tasks: Iterable[str],
        features: Sequence[Feature],
        n_contexts: int,
        silent: Mapping[int, Sequence[Context]],
    ) -> Iterator[Request]:
        """What these tasks would ask, with a text of usual length in place of explanations."""
        for task in tasks:
            make, ask = _MAKE[task]
            for feature in features:
                if (trial := make(feature, silent[feature.index], n_contexts, self.seed)) is not None:
                    yield ask(self, trial)

    def _detection(self, trial: Trial, explanation: str = _UNKNOWN) -> Request:
        shown = prompts.listed(trial.contexts, marked=False)
        told = f"Explanation: {' '.join(explanation.split())}"
        parts = prompts.messages(prompts.DETECTION_SYSTEM, told, shown, prompts.DETECTION_FORM)
        return Request(parts, {"seed": 0, **self.params})

    def _intruder(self, trial: Trial) -> Request:
        shown = prompts.listed(trial.contexts)
        parts = prompts.messages(prompts.INTRUDER_SYSTEM, shown, prompts.INTRUDER_FORM)
        return Request(parts, {"seed": 0, **self.params})


def detection_trial(feature: Feature, silent: Sequence[Context], n_contexts: int, seed: int) -> Trial | None:
    """Windows over all values of the feature, of dialogues that the judge has not seen, and silent ones; None: none."""
    seen = {context.dialogue for context in feature.contexts[:n_contexts]}
    own = [context for context in feature.sampled if context.dialogue not in seen]
    n = min(HALF, len(own), len(silent))
    if not n:
        return None
    rng = np.random.default_rng([seed, 1, feature.index % 2**32])
    spread = [own[i] for i in np.linspace(0, len(own) - 1, n).round().astype(int)]
    return _shuffled(rng, feature.index, spread, _drawn(rng, silent, n), wanted=range(n))


def intruder_trial(feature: Feature, silent: Sequence[Context], n_contexts: int, seed: int) -> Trial | None:
    """Some of the strongest contexts and a silent window; None where there are too few."""
    own = feature.contexts[:n_contexts]
    if len(own) < INTRUDED or not silent:
        return None
    rng = np.random.default_rng([seed, 2, feature.index % 2**32])
    return _shuffled(rng, feature.index, _drawn(rng, own, INTRUDED), _drawn(rng, silent, 1), wanted=[INTRUDED])


_MAKE: dict[str, tuple[Callable[..., Trial | None], Callable[[Tasks, Trial], Request]]] = {
    "detection": (detection_trial, Tasks._detection),
    "intruder": (intruder_trial, Tasks._intruder),
}


def balanced_accuracy(named: frozenset[int], wanted: frozenset[int], n: int) -> float:
    """The mean of the shares that are right among the wanted and among the other numbers up to `n`."""
    right = len(named & wanted) / len(wanted)
    return (right + 1 - len(named - wanted) / (n - len(wanted))) / 2


def silent_windows(
    sae: SAE,
    lm: LanguageModel,
    tokens: TokenBatch,
    reading: Reading,
    features: Sequence[Feature],
    windows: Sequence[Context],
    *,
    seed: int = 0,
) -> dict[int, list[Context]]:
    """For each feature those of `POOL` windows, drawn by a seed, on all tokens of which it is silent.

    The model runs once. Windows are of dialogues of `tokens`, by their index.
    """
    chosen = np.random.default_rng(seed).permutation(len(windows))[:POOL]
    pool = [windows[i] for i in sorted(chosen.tolist())]
    fires = fires_in(sae, lm, tokens, reading, [feature.index for feature in features], pool)
    rows = {feature.index: fires[:, column].tolist() for column, feature in enumerate(features)}
    return {index: [w for w, on in zip(pool, row, strict=True) if not on] for index, row in rows.items()}


def fires_in(
    sae: SAE, lm: LanguageModel, tokens: TokenBatch, reading: Reading, features: Sequence[int], pool: Sequence[Context]
) -> Bool[np.ndarray, "W K"]:
    """Whether each of K features fires in each of W windows; as if it did where a dialogue could not be read."""
    found = np.ones((len(pool), len(features)), dtype=bool)
    if not pool or not features:
        return found
    part = narrow(sae, np.array(features))
    shown = sorted({window.index for window in pool})
    tally: Counter[str] = Counter()
    for batch, acts, index, _ in harvest(lm, tokens.select(shown), reading, tally=tally):
        bounds = batch.cu_seqlens.tolist()
        for i, local in enumerate(index.tolist()):
            x = acts[lm.layers.index(sae.spec.layer), bounds[i] : bounds[i + 1]]
            with torch.no_grad():
                on = (part.encode(x.to(part.W_enc.device)) > 0).cpu().numpy()  # [T, K]
            for row, window in enumerate(pool):
                if window.index == shown[local]:
                    found[row] = on[window.start : window.start + len(window)].any(axis=0)
    return found


def _shuffled(
    rng: np.random.Generator, feature: int, own: Sequence[Context], others: Sequence[Context], wanted: Iterable[int]
) -> Trial:
    both, places = [*own, *others], set(wanted)
    order = rng.permutation(len(both)).tolist()
    numbers = frozenset(number for number, i in enumerate(order, 1) if i in places)
    return Trial(feature, tuple(both[i] for i in order), numbers)


def _drawn(rng: np.random.Generator, contexts: Sequence[Context], n: int) -> list[Context]:
    return [contexts[i] for i in rng.permutation(len(contexts))[:n].tolist()]


def _rows(features: Sequence[Feature], found: Sequence[tuple[float | None, str | None]]) -> dict[str, Any]:
    """Scores by feature, and how many have none, by reason."""
    rows = zip(features, found, strict=True)
    return {
        "without_score": dict(Counter(reason for _, reason in found if reason is not None)),
        "scores": [{"feature": f.index, "score": score, "reason": reason} for f, (score, reason) in rows],
    }
