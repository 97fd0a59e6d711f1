"""What `chatsae steer` left in RUN/steer, as the page reads it: completions side by side, and sweeps of alpha."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from chatsae.errors import UserError
from chatsae.files import read_object
from chatsae.page.pack import short
from chatsae.runs import Run

_STRENGTH = ("alpha", "rel_norm", "rel_maxact", "kl", "log_ratio")
_SWEEP = ("seed", "max_new_tokens", "median_norm", "max_act", "question_set", "questions", "arms", "others", "auto")


def steering(run: Run, sae: str) -> dict[str, Any]:
    """Completions and sweeps of an SAE's features.

    `examples`: by feature, a list of {`strengths`: [label, alpha, alpha/norm, alpha/max, KL, log perplexity ratio],
    `prompts`: [prompt, answer without steering, [label, answer, finish reason, times the guard lowered it]]}, of the
    shape in docs/report.md. `sweeps`: a list, see `_sweep`. `left_out`: files of another shape are counted.
    """
    examples: dict[str, list[dict[str, Any]]] = {}
    sweeps: list[dict[str, Any]] = []
    tally: Counter[str] = Counter()
    for path in sorted((run.path / "steer").glob("*.json")):
        try:
            facts = read_object(path)
            if facts["sae"] != sae:
                continue
            if facts.get("kind") == "sweep":
                sweeps.append(_sweep(facts))
            else:
                examples.setdefault(str(int(facts["feature"])), []).append(_examples(facts))
        except (UserError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            tally["steering files of another shape"] += 1
    return {"examples": examples, "sweeps": sweeps, "left_out": dict(tally)}


def steered_features(found: Mapping[str, Any]) -> list[int]:
    """The features that `steering` found something of."""
    return [*map(int, found["examples"]), *(sweep["feature"] for sweep in found["sweeps"])]


def _examples(facts: Mapping[str, Any]) -> dict[str, Any]:
    prompts: dict[tuple[str, str], list[list[Any]]] = {}
    for row in facts["examples"]:
        answer = [str(row["label"]), str(row["steered"]), row.get("finish_reason"), len(row.get("events", ()))]
        prompts.setdefault((str(row["prompt"]), str(row["base"])), []).append(answer)
    strengths = [_strength(row) for row in facts.get("strengths", ())]
    return {"strengths": strengths, "prompts": [[*said, answers] for said, answers in prompts.items()]}


def _sweep(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep in little room.

    `strengths`: [label, alpha, alpha/norm, alpha/max, KL, log perplexity ratio]. `curves`: by arm and measure (and
    `holds`), [mean, low, high] or null at each strength. `answers`: by arm (and `unsteered`), at each strength and
    question [text, finish reason, whether quality holds]. `against`: by control and measure, [difference, low, high,
    p] or null. `graded`: by arm and grade, as `curves`.
    """
    n, questions = len(facts["strengths"]), len(facts["questions"])
    curves: dict[str, dict[str, list[Any]]] = {}
    for row in facts["summary"]:
        own = curves.setdefault(row["arm"], {})
        for key, value in {**row["measures"], "holds": row["holds"]}.items():
            own.setdefault(key, [None] * n)[row["strength"]] = _mean(value)
    answers: dict[str, list[list[Any]]] = {}
    for row in facts["answers"]:
        own_answers = answers.setdefault(row["arm"], [[None] * questions for _ in range(n)])
        own_answers[row["strength"]][row["question"]] = [row["text"], row["finish_reason"], row["holds"]]
    against: dict[str, dict[str, list[Any]]] = {}
    for row in facts["against"]:
        for key, value in row["measures"].items():
            against.setdefault(row["control"], {}).setdefault(key, [None] * n)[row["strength"]] = _difference(value)
    grades = facts.get("grades")
    return {
        "feature": int(facts["feature"]),
        **{key: facts[key] for key in _SWEEP},
        "strengths": [_strength(row) for row in facts["strengths"]],
        "measures": {key: [what["label"], what["unit"]] for key, what in facts["measures"].items()},
        "curves": curves,
        "answers": answers,
        "against": against,
        "quality": facts["quality"],
        "windows": facts["windows"],
        "windows_against": facts["windows_against"],
        "grades": None if grades is None else _grades(grades, n),
    }


def _grades(grades: Mapping[str, Any], n: int) -> dict[str, Any]:
    curves: dict[str, dict[str, list[Any]]] = {}
    for row in grades["means"]:
        own = curves.setdefault(row["arm"], {})
        for key in ("concept", "instruction", "fluency", "harmonic_mean"):
            own.setdefault(key, [None] * n)[row["strength"]] = _mean(row.get(key))
    return {key: grades[key] for key in ("judge", "concept", "missing", "chosen")} | {"curves": curves}


def _strength(row: Mapping[str, Any]) -> list[Any]:
    return [str(row["label"]), *(_short(row.get(key)) for key in _STRENGTH)]


def _mean(value: Mapping[str, Any] | None) -> list[float] | None:
    if value is None or value["mean"] is None:
        return None
    return [short(value["mean"]), *map(short, value["interval"] or ())]


def _difference(value: Mapping[str, Any] | None) -> list[float | None] | None:
    if value is None:
        return None
    low, high = value["interval"] or (None, None)
    return [_short(number) for number in (value["difference"], low, high, value.get("p_value"))]


def _short(value: float | None) -> float | None:
    return None if value is None else short(value)
