"""Where the turns of a chat row stand, in every common shape of row, and the reasons why a row has none."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, NoReturn

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
"""Columns that hold a list of turns, the preferred one first."""

PAIR_COLUMNS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "chosen"),
    ("query", "response"),
    ("prompt", "output"),
    ("question", "output"),
    ("query", "output"),
    ("input", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
)
"""Columns that hold one question and its answer."""

EXTRA_COLUMNS = (
    *("chosen", "input", "context", "choices", "options", "history", "system", "system_prompt", "text"),
    *("images", "image"),
)
"""Columns that change the meaning of the ones above, and `text`, which may hold a whole "Human: Assistant:" chat."""

NOT_OBJECT = "row is not an object"
NO_FIELD = "no chat field"
WRONG_TYPE = "field of the wrong type"
MISSING = "field missing"
NO_TURN = "no turn"
CHOICES = "question with choices beside it"

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
"""Names of roles, in small letters, and what they are called here."""

_INPUTS = ("input", "context")  # what a question or an instruction is about: Alpaca's and Dolly's word
_CHOICES = ("choices", "options")  # without which a question and the letter of its answer say nothing
_DEPTH = 4  # lists, objects and strings of JSON around the turns
_SHOWN = 60  # characters of a name that are shown
_HH = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")
_HASHES = re.compile(r"\s*### (Human|Assistant): ?")


class Turn(NamedTuple):
    """A turn as the row has it, and where it stands there."""

    where: str
    value: Any


@dataclass(frozen=True, slots=True)
class Reject:
    """Why a row is no dialogue; `wrong_field` when its fields are not those of a chat corpus at all.

    `reason` is one of few; `detail` tells more of this one row (the unknown role, say), in one line.
    """

    reason: str
    detail: str = ""
    wrong_field: bool = False


class RejectedError(Exception):
    """Carries a Reject from where it is found to `normalise`."""

    def __init__(self, reason: str, detail: str = "", *, wrong_field: bool = False) -> None:
        self.reject = Reject(reason, detail, wrong_field)


def wrong_type(where: str, expected: str, value: Any) -> NoReturn:
    """Rejects a row for the type of a field."""
    raise RejectedError(WRONG_TYPE, f"{where!r} expected {expected}, got {type(value).__name__}", wrong_field=True)


def missing(where: str, found: Iterable[Any]) -> NoReturn:
    """Rejects a row for a field that is not there."""
    raise RejectedError(MISSING, f"{where!r} (found: {names(found)})", wrong_field=True)


def shown(value: Any) -> str:
    """A name out of a row, fit for one line of a message."""
    if not isinstance(value, str):
        return type(value).__name__
    text = " ".join(value[: 2 * _SHOWN].split()).encode("utf-8", "replace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def names(keys: Iterable[Any]) -> str:
    """The names of some fields, fit for one line of a message."""
    return ", ".join(sorted(shown(key) for key in islice(keys, 10))) or "nothing"


def turns_of(row: Any) -> list[Turn]:
    """The turns of a row, in order, as they stand there.

    Raises:
        RejectedError: the row has no field of a chat, or one of another type.
    """
    if not isinstance(row, dict):
        turns = _as_turns("row", _json(row) if isinstance(row, str) else row)
        if not turns:
            raise RejectedError(NOT_OBJECT, f"got {type(row).__name__}", wrong_field=True)
        return turns
    system = [Turn(c, {"role": "system", "content": row[c]}) for c in ("system", "system_prompt") if row.get(c)]
    turns = _chat(row)
    return system + turns if system else turns


def _chat(row: dict[Any, Any]) -> list[Turn]:
    column = _filled(row, CHAT_COLUMNS)
    if column is not None:
        return _with_answer(_listed(column, row[column]), row.get("chosen"))
    pair = _filled_pair(row)
    if pair is not None:
        return _paired("", row, *pair)
    for name in ("chosen", "text"):
        turns = _whole(name, row.get(name))
        if turns is not None:
            return turns
    if any(c in row for c in CHAT_COLUMNS):
        raise RejectedError(NO_TURN)
    for name, value in row.items():
        if isinstance(value, dict) and _filled(value, CHAT_COLUMNS) is not None:
            return _listed(shown(name), value)
    expected = f"{', '.join(CHAT_COLUMNS)}, or prompt and completion"
    raise RejectedError(NO_FIELD, f"found: {names(row)}; expected one of {expected}", wrong_field=True)


def _filled(row: dict[Any, Any], columns: Sequence[str]) -> str | None:
    """The first of the columns that holds something."""
    for column in columns:
        if row.get(column):
            return column
    return None


def _filled_pair(row: dict[Any, Any]) -> tuple[str, str] | None:
    present = [p for p in PAIR_COLUMNS if p[0] in row and p[1] in row]
    filled = (p for p in present if row[p[0]] is not None and row[p[1]] is not None)
    return next(filled, present[0] if present else None)


def _listed(where: str, turns: Any, depth: int = 0) -> list[Turn]:
    """The turns of a list, or of what is wrapped around one: an object, a list of one list, JSON in a string."""
    if isinstance(turns, str):
        parsed = _json(turns)
        turns = turns if parsed is None else parsed
    if depth >= _DEPTH:
        wrong_type(where, "a list of turns", turns)
    if isinstance(turns, str) and (chat := _human_assistant(where, turns)) is not None:
        return chat
    if isinstance(turns, dict):
        if _role_of(turns) is not None:
            return [Turn(where, turns)]
        column = _filled(turns, CHAT_COLUMNS)
        if column is not None:
            return _listed(f"{where}.{column}", turns[column], depth + 1)
    if not isinstance(turns, list | tuple):
        wrong_type(where, "a list", turns)
    if len(turns) == 1 and isinstance(turns[0], list | tuple) and not _is_exchange(turns[0]) and not _by_role(turns):
        return _listed(f"{where}[0]", turns[0], depth + 1)
    if _by_role(turns):
        return [_said_by(f"{where}[{index}]", turn) for index, turn in enumerate(turns)]
    found: list[Turn] = []
    for index, turn in enumerate(turns):
        found += _one(f"{where}[{index}]", turn)
    return found


def _by_role(turns: Sequence[Any]) -> bool:
    """Whether the first of some lists is a role and what is said in it, not a question and its answer."""
    first = turns[0] if turns else None
    return isinstance(first, list | tuple) and len(first) == 2 and _role_of({"role": first[0]}) is not None


def _said_by(where: str, turn: Any) -> Turn:
    if isinstance(turn, list | tuple) and len(turn) == 2:
        return Turn(where, {"role": turn[0], "content": turn[1]})
    wrong_type(where, "a role and a text", turn)


def _one(where: str, turn: Any) -> list[Turn]:
    """A turn, or the turns of an exchange: a question and its answer in one object or list."""
    if isinstance(turn, dict):
        if "role" not in turn and "from" not in turn and (pair := _filled_pair(turn)) is not None:
            system = turn.get("system")
            first = [Turn(f"{where}.system", {"role": "system", "content": system})] if system else []
            return first + _paired(f"{where}.", turn, *pair)
    elif isinstance(turn, list | tuple) and _is_exchange(turn):
        return _exchange(where, *turn)
    return [Turn(where, turn)]


def _is_exchange(turn: Sequence[Any]) -> bool:
    return len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _exchange(where: str, asked: Any, answered: Any) -> list[Turn]:
    asked_where, answered_where = f"{where}[0]", f"{where}[1]"
    return [_said("user", asked_where, asked), _said("assistant", answered_where, answered)]


def _said(role: str, where: str, content: Any) -> Turn:
    return Turn(where, {"role": role, "content": content})


def _with_answer(turns: list[Turn], chosen: Any) -> list[Turn]:
    """The turns of a preference pair, where the preferred answer stands apart from the turns before it."""
    if not chosen or (turns and _role_of(turns[-1].value) == "assistant"):
        return turns
    return _answered(turns, "chosen", chosen, spelled=True)


def _answered(turns: list[Turn], where: str, answer: Any, *, spelled: bool) -> list[Turn]:
    """The turns with an answer: a text, a turn, a list of turns, or a chat that repeats the turns.

    `spelled`: a string may stand for turns; else it is the text of the answer, whatever it looks like.
    """
    found = _spelled(where, answer) if spelled and isinstance(answer, str) else _as_turns(where, answer)
    if found is None:
        return [*turns, _said("assistant", where, answer)]
    if found and _role_of(found[0].value) in ("user", "system"):
        return found
    return turns + found


def _paired(path: str, row: dict[Any, Any], question: str, answer: str) -> list[Turn]:
    asked, where = row[question], path + question
    before = _as_turns(where, asked)
    spelled = before is None and question == "prompt" and isinstance(asked, str)
    if spelled:
        before = _spelled(where, asked)
        spelled = before is not None
        if before and before[-1].value == {"role": "assistant", "content": ""}:
            before.pop()  # the cue for the answer
    if before is None:
        if (beside := _filled(row, _CHOICES)) is not None:
            raise RejectedError(CHOICES, repr(path + beside))
        for given in _INPUTS:
            if given == question or not row.get(given):
                continue
            if not isinstance(row[given], str):
                wrong_type(path + given, "text", row[given])
            known = question != "instruction" and isinstance(asked, str) and row[given].strip() in asked
            if isinstance(asked, str) and not known and row[given].strip():
                asked = f"{asked}\n\n{row[given]}"
        before = [_said("user", where, asked)]
    turns = _history(path, row.get("history")) + before
    return _answered(turns, path + answer, row[answer], spelled=spelled or answer == "chosen")


def _history(path: str, history: Any) -> list[Turn]:
    if not history:
        return []
    if not isinstance(history, list | tuple):
        wrong_type(f"{path}history", "a list", history)
    if _by_role(history):
        return [_said_by(f"{path}history[{index}]", turn) for index, turn in enumerate(history)]
    turns: list[Turn] = []
    for index, exchange in enumerate(history):
        where = f"{path}history[{index}]"
        if isinstance(exchange, dict) and _role_of(exchange) is not None:
            turns.append(Turn(where, exchange))
        elif isinstance(exchange, list | tuple) and len(exchange) == 2:
            turns += _exchange(where, *exchange)
        else:
            wrong_type(where, "a question and an answer", exchange)
    return turns


def _whole(where: str, value: Any) -> list[Turn] | None:
    """The turns of a value that is a chat by itself; None for a plain text and for all else."""
    if isinstance(value, dict) and _role_of(value) is None and _filled(value, CHAT_COLUMNS) is None:
        return None
    if isinstance(value, str):
        return _as_turns(where, _json(value)) or _human_assistant(where, value)
    return None if value is None else _listed(where, value)


def _as_turns(where: str, value: Any) -> list[Turn] | None:
    """The turns of a list of objects with roles, or of one such object; None for all else."""
    if isinstance(value, dict):
        return None if _role_of(value) is None else [Turn(where, value)]
    if not isinstance(value, list | tuple) or not all(isinstance(turn, dict) for turn in value):
        return None
    if not all("role" in turn or "from" in turn for turn in value):
        return None
    return [Turn(f"{where}[{index}]", turn) for index, turn in enumerate(value)]


def _spelled(where: str, text: str) -> list[Turn] | None:
    """The turns that a text spells as JSON, or as human and assistant in turn; None for any other text."""
    found = _as_turns(where, _json(text))
    if found is None and "Human:" in text and "Assistant:" in text:
        return _human_assistant(where, text)
    return found


def _role_of(turn: Any) -> str | None:
    """The role of a turn as it is called here, where it has a known one."""
    if not isinstance(turn, dict):
        return None
    name = turn.get("role") or turn.get("from")
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def _json(text: str) -> Any:
    """The list or object that the text spells as JSON; None for any other text."""
    plain = text.strip()
    if plain[:1] + plain[-1:] not in ("[]", "{}"):
        return None
    try:
        return json.loads(plain)
    except (ValueError, RecursionError):
        return None


def _human_assistant(where: str, text: str) -> list[Turn] | None:
    """The turns of a text that begins with "Human:", as in hh-rlhf, or "### Human:"; None for any other text."""
    start = text[:40].lstrip()
    if start.startswith(("Human:", "Assistant:")):
        pieces = _HH.split(text)
    elif start.startswith(("### Human:", "### Assistant:")):
        pieces = _HASHES.split(text)
    else:
        return None
    return [_said(name.lower(), where, content) for name, content in zip(pieces[1::2], pieces[2::2], strict=True)]
