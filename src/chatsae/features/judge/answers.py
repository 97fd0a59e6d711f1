"""What the answers of a judge say; one that does not have the form that was asked for is no answer."""

import json
import re
from dataclasses import dataclass
from typing import Any

from chatsae.features.judge.asking import Unreadable

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_SCORE = re.compile(r"score\W{0,8}([1-5])(?![\d.,]?\d)(?!\s*(?:/|or\b|to\b|-))", re.IGNORECASE)

_LONGEST = 20_000  # characters of an answer that are looked at: more braces take quadratic time


@dataclass(frozen=True, slots=True)
class Rating:
    """An answer to the rubric; `deviating` are numbers of examples, from 1."""

    score: int
    explanation: str
    deviating: tuple[int, ...]


def rating(text: str, n: int) -> Rating:
    """A score of 1 to 5, with the explanation and the examples that deviate; without JSON, the one score it names.

    Raises:
        Unreadable: there is none, or an example is named that is not one of `n`.
    """
    facts = _object(text, "score")
    if facts is None:
        scores = set(_SCORE.findall(_plain(text)))
        if len(scores) != 1:
            raise Unreadable("no JSON object with a score" if not scores else "several scores")
        return Rating(int(scores.pop()), " ".join(_plain(text).split())[:500], ())
    score = _whole(facts["score"])
    if not 1 <= score <= 5:
        raise Unreadable(f"a score of {score}")
    explanation = facts.get("explanation", "")
    if not isinstance(explanation, str):
        raise Unreadable("an explanation that is no text")
    return Rating(score, " ".join(explanation.split()), _numbers(facts.get("deviating", []), n))


def active(text: str, n: int) -> frozenset[int]:
    """Numbers of the examples that an answer takes for active.

    Raises:
        Unreadable: there is no list of them.
    """
    facts = _object(text, "active")
    if facts is None:
        raise Unreadable("no JSON object with a list of active examples")
    return frozenset(_numbers(facts["active"], n))


def intruder(text: str, n: int) -> int:
    """Number of the example that an answer takes for the intruder.

    Raises:
        Unreadable: there is none.
    """
    facts = _object(text, "intruder")
    if facts is None:
        raise Unreadable("no JSON object with an intruder")
    (found,) = _numbers([facts["intruder"]], n)
    return found


def grade(text: str, most: int) -> int:
    """A rating of 0 to `most`.

    Raises:
        Unreadable: there is none.
    """
    facts = _object(text, "rating")
    if facts is None:
        raise Unreadable("no JSON object with a rating")
    found = _whole(facts["rating"])
    if not 0 <= found <= most:
        raise Unreadable(f"a rating of {found}")
    return found


def _plain(text: str) -> str:
    return _THOUGHT.sub("", text)


def _object(text: str, key: str) -> dict[str, Any] | None:
    """The last JSON object in a text that has a key."""
    text, found, start = _plain(text)[-_LONGEST:], None, 0
    decoder = json.JSONDecoder()
    while (start := text.find("{", start)) >= 0:
        try:
            value, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start += 1
            continue
        found = value if isinstance(value, dict) and key in value else found
        start = stop
    return found


def _whole(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*", value, re.ASCII):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unreadable(f"{json.dumps(value)[:40]} in place of a whole number")
    return value


def _numbers(values: Any, n: int) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise Unreadable("no list of examples")
    found = sorted({_whole(value) for value in values})
    if any(not 1 <= value <= n for value in found):
        raise Unreadable(f"an example that is not one of {n}")
    return tuple(found)
