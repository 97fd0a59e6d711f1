"""What the answers of a judge say; one that does not have the form that was asked for is no answer."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chatsae.features.judge.asking import Unreadable
from chatsae.features.judge.client import Answer

_WORD = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|analysis|scratchpad|(?:inner_)?monologue)"
_OPEN = re.compile(
    rf"<\|?(?!end_)(?:ant|\w+[:_])?{_WORD}(?:\s[^<>]*)?\|?>"
    r"|\[think(?:ing)?\]|◁think▷|<unused94>|<\|inner_prefix\|>|<\|channel\|?>\s*(?:analysis|commentary|thought)",
    re.IGNORECASE,
)
_CLOSE = re.compile(
    rf"<\|?\s*/\s*(?:ant|\w+[:_])?{_WORD}\s*\|?>|<\|?end_(?:of_)?{_WORD}\|?>"
    r"|\[/think(?:ing)?\]|◁/think▷|<unused95>|<\|inner_suffix\|>|<channel\|>"
    r"|<\|channel\|>\s*final\s*(?:<\|message\|>)?|assistantfinal",  # the latter: the same without special tokens
    re.IGNORECASE,
)
_LEAD = re.compile(r"(?:\s|```\w*|<\|?\w+\|?>)*")  # what may precede the object of an answer that was cut off
_SCORE = re.compile(r"score\W{0,8}([1-5])(?![\d.,]?\d)(?!\s*(?:/|or\b|to\b|-))", re.IGNORECASE)

_LONGEST = 20_000  # characters that are searched for objects: more braces take quadratic time


def verdict(answer: Answer, key: str) -> tuple[dict[str, Any] | None, str]:
    """The JSON object with `key` that is the verdict of an answer, None without one; and the text without thoughts.

    Thoughts are everything up to the last mark that closes one, whether or not a mark opens it, and everything behind
    one that is never closed. Marks inside an object with the key are quotations. Of several objects the last counts;
    of an answer that was cut off only one it begins with, since any other may be a draft.

    Raises:
        Unreadable: the answer was cut off before its verdict.
    """
    text = _without_thoughts(answer.text, key)
    if not answer.cut:
        found = [value for _, _, value in _objects(text[-_LONGEST:], key)]
        return (found[-1] if found else None), text
    lead = _LEAD.match(text)
    first = _decoded(text, lead.end() if lead else 0)
    if first is None or key not in first[0]:
        raise Unreadable("cut off before a verdict")
    return first[0], text


@dataclass(frozen=True, slots=True)
class Rating:
    """An answer to the rubric; `deviating` are numbers of examples, from 1."""

    score: int
    explanation: str
    deviating: tuple[int, ...]


def rating(answer: Answer, n: int) -> Rating:
    """A score of 1 to 5, with the explanation and the examples that deviate; without JSON, the one score it names.

    Raises:
        Unreadable: there is none, or an example is named that is not one of `n`.
    """
    facts, text = verdict(answer, "score")
    if facts is None:
        scores = set(_SCORE.findall(text))
        if len(scores) != 1:
            raise Unreadable("no JSON object with a score" if not scores else "several scores")
        return Rating(int(scores.pop()), " ".join(text.split())[:500], ())
    score = _whole(facts["score"])
    if not 1 <= score <= 5:
        raise Unreadable(f"a score of {score}")
    explanation = facts.get("explanation", "")
    if not isinstance(explanation, str):
        raise Unreadable("an explanation that is no text")
    if explanation.strip() in ("...", "…"):
        raise Unreadable("the example of the form, not a verdict")
    return Rating(score, " ".join(explanation.split()), _numbers(facts.get("deviating", []), n))


def active(answer: Answer, n: int) -> frozenset[int]:
    """Numbers of the examples that an answer takes for active.

    Raises:
        Unreadable: there is no list of them.
    """
    facts, _ = verdict(answer, "active")
    if facts is None:
        raise Unreadable("no JSON object with a list of active examples")
    return frozenset(_numbers(facts["active"], n))


def intruder(answer: Answer, n: int) -> int:
    """Number of the example that an answer takes for the intruder.

    Raises:
        Unreadable: there is none.
    """
    facts, _ = verdict(answer, "intruder")
    if facts is None:
        raise Unreadable("no JSON object with an intruder")
    (found,) = _numbers([facts["intruder"]], n)
    return found


def grade(answer: Answer, most: int) -> int:
    """A rating of 0 to `most`.

    Raises:
        Unreadable: there is none.
    """
    facts, _ = verdict(answer, "rating")
    if facts is None:
        raise Unreadable("no JSON object with a rating")
    found = _whole(facts["rating"])
    if not 0 <= found <= most:
        raise Unreadable(f"a rating of {found}")
    return found


def _without_thoughts(text: str, key: str) -> str:
    offset = max(0, len(text) - _LONGEST)
    quoted = [(offset + start, offset + stop) for start, stop, _ in _objects(text[offset:], key)]

    def found(marks: re.Pattern[str]) -> list[re.Match[str]]:
        return [m for m in marks.finditer(text) if not any(start <= m.start() < stop for start, stop in quoted)]

    begin = max((mark.end() for mark in found(_CLOSE)), default=0)
    return text[begin : min((mark.start() for mark in found(_OPEN) if mark.start() >= begin), default=len(text))]


def _objects(text: str, key: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Start, end and value of the outermost JSON objects in a text that have a key."""
    start = 0
    while (start := text.find("{", start)) >= 0:
        found = _decoded(text, start)
        if found is not None and key in found[0]:
            yield start, found[1], found[0]
        start = start + 1 if found is None else found[1]


def _decoded(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object that begins at a place in a text, and where it ends."""
    try:
        value, stop = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return (value, stop) if isinstance(value, dict) else None


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
