"""The answers of a sweep in numbers: by arm and strength, against the controls, and the window.

Letters in shapes: S strengths, Q questions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from chatsae.statistics import Ratio, bootstrap, paired, ratio
from chatsae.steering.measures import MEASURES, against_base
from chatsae.steering.sweep import ARMS, UNSTEERED
from chatsae.steering.sweep_window import Quality, ends_apart, window

Facts = dict[str, Any]
COMPARED = ("kl_first", "kl_mean", "log_perplexity_ratio", "repetition", "length", "reread_mean")
"""Measures of which the feature's answers are set against the controls'."""


class Answers:
    """The answers of a sweep by arm, strength and question; the unsteered ones are strength 0 of every arm."""

    def __init__(self, answers: Sequence[Facts], alphas: Sequence[float], quality: Quality) -> None:
        """Adds to each answer what sets it beside the unsteered one: `strength`, `holds`, and two measures."""
        self.alphas = tuple(alphas)
        base = {a["question"]: a for a in answers if a["arm"] == UNSTEERED}
        self.n = len(base)
        self._found: dict[tuple[str, int, int], Facts] = {}
        self.rows = [self._beside(answer, base[answer["question"]], quality) for answer in answers]
        for row in self.rows:
            for arm in ARMS if row["arm"] == UNSTEERED else (row["arm"],):
                self._found[arm, row["strength"], row["question"]] = row

    def _beside(self, answer: Facts, base: Facts, quality: Quality) -> Facts:
        values = against_base(answer["measures"], answer["token_ids"], base["measures"], base["token_ids"])
        strength = self.alphas.index(answer["alpha"])
        return answer | {
            "strength": strength,
            "measures": values,
            "holds": answer is base or quality.holds(values, base["measures"]),
        }

    def of(self, arm: str, strength: int) -> list[Facts]:
        """The answers to all questions."""
        return [self._found[arm, strength, q] for q in range(self.n)]

    def values(self, arm: str, strength: int, measure: str) -> Ratio:
        """A measure of all questions: the values, and whether it is defined."""
        found = [row["measures"][measure] for row in self.of(arm, strength)]
        known = np.array([value is not None for value in found], dtype=np.float64)
        return np.array([0.0 if value is None else value for value in found]), known

    def table(self, arm: str, key: str) -> Bool[np.ndarray, "S Q"]:
        """Whether answers hold (`holds`), or have `changed`."""
        rows = [self.of(arm, s) for s in range(len(self.alphas))]
        if key == "holds":
            return np.array([[row["holds"] for row in own] for own in rows])
        return np.array([[row["measures"]["changed"] > 0 for row in own] for own in rows])


def summary(answers: Answers, *, seed: int = 0) -> list[Facts]:
    """Means over the questions with 95 % intervals, by arm and strength."""
    figures: dict[str, Ratio] = {}
    keys = [(arm, s) for arm in ARMS for s in range(len(answers.alphas))]
    for arm, s in keys:
        held = np.array([row["holds"] for row in answers.of(arm, s)], dtype=np.float64)
        figures[f"{arm} {s} holds"] = held, np.ones_like(held)
        figures |= {f"{arm} {s} {measure}": answers.values(arm, s, measure) for measure in MEASURES}
    intervals = bootstrap(figures, seed=seed)

    def figure(name: str) -> Facts:
        between = intervals[name]
        known = int(figures[name][1].sum())
        return {"mean": ratio(figures[name]), "interval": None if between is None else list(between), "n": known}

    return [
        {
            "arm": arm,
            "strength": s,
            "n": answers.n,
            "measures": {measure: figure(f"{arm} {s} {measure}") for measure in MEASURES},
            "holds": figure(f"{arm} {s} holds"),
            "finish": dict(Counter(row["finish_reason"] for row in answers.of(arm, s))),
        }
        for arm, s in keys
    ]


def against(answers: Answers, *, seed: int = 0) -> list[Facts]:
    """The feature minus each control, paired over the questions for which both are defined."""
    found = []
    for control in ARMS[1:]:
        for s in range(1, len(answers.alphas)):
            differences = {}
            for measure in COMPARED:
                (mine, known), (other, known_too) = (answers.values(arm, s, measure) for arm in ("feature", control))
                both = known * known_too
                differences[measure] = _difference((mine * both, both), (other * both, both), seed)
            found.append({"control": control, "strength": s, "measures": differences})
    return found


def _difference(first: Ratio, second: Ratio, seed: int) -> Facts | None:
    some = first[1] > 0
    compared = paired((first[0][some], first[1][some]), (second[0][some], second[1][some]), seed=seed)
    if compared is None:
        return None
    return {
        "difference": compared.difference,
        "interval": list(compared.interval),
        "p_value": compared.p_value,
        "n": compared.n_dialogues,
    }


def windows(answers: Answers, quality: Quality, median_norm: float, *, seed: int = 0) -> Facts:
    """The window of each arm, and how much further the feature's reaches than the controls'."""
    alphas: Float[np.ndarray, " S"] = np.array(answers.alphas)
    held = {arm: answers.table(arm, "holds") for arm in ARMS}
    by_arm = {
        arm: window(alphas, held[arm], answers.table(arm, "changed"), quality, seed=seed).facts(median_norm)
        for arm in ARMS
    }
    apart = {
        arm: ends_apart(alphas, held["feature"], held[arm], quality.share, seed=seed) for arm in ARMS if arm != ARMS[0]
    }
    return {"windows": by_arm, "windows_against": apart}


def examples(answers: Answers, questions: Sequence[str], labels: Sequence[str]) -> list[Facts]:
    """The feature's answers in the form of docs/report.md."""
    base = {row["question"]: row["text"] for row in answers.of(ARMS[0], 0)}
    return [
        {
            "label": f"alpha {labels[s]}",
            "prompt": questions[row["question"]],
            "base": base[row["question"]],
            "steered": row["text"],
        }
        for s in range(1, len(answers.alphas))
        for row in answers.of(ARMS[0], s)
    ]


def numbers(
    kept: Sequence[Facts],
    steps: Sequence[Mapping[str, Any]],
    questions: Sequence[str],
    quality: Quality,
    median_norm: float,
    *,
    seed: int = 0,
) -> Facts:
    """Everything that follows from the answers of a sweep, as JSON holds it; `steps` are its strengths, ascending."""
    answers = Answers(kept, [step["alpha"] for step in steps], quality)
    return {
        "measures": {name: {"label": m.label, "unit": m.unit} for name, m in MEASURES.items()},
        "answers": answers.rows,
        "summary": summary(answers, seed=seed),
        "against": against(answers, seed=seed),
        "quality": quality.facts(),
        **windows(answers, quality, median_norm, seed=seed),
        "examples": examples(answers, questions, [step["label"] for step in steps]),
    }
