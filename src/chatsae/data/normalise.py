"""One row of a chat corpus, in any common shape -> a Dialogue, or the reason why it is none."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from chatsae.batch import Dialogue, Message

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a list of turns, the preferred one first."""

PAIR_COLUMNS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
)
"""Columns that hold one question and its answer."""

EXTRA_COLUMNS = ("chosen", "input", "history", "system", "system_prompt", "images", "image")
"""Columns that change the meaning of the ones above."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
_TOOL_ROLES = {"tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation"}
_TOOL_ROLES |= {"ipython"}

Turn = tuple[str, object]
"""Where the turn stands in the row, for messages, and the turn itself."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Why a row is no dialogue; `wrong_field` when its fields are not those of a chat corpus at all.

    `detail` tells more of this one row (the unknown role, say) than belongs in a count.
    """

    reason: str
    detail: str = ""
    wrong_field: bool = False


class _RejectedError(Exception):
    def __init__(self, reject: Reject) -> None:
        self.reject = reject


def normalise(row: Any, *, source: str, id: str) -> Dialogue | Reject:
    """The row as a dialogue whose turns alternate between user and assistant, after at most one system turn.

    Reads lists of turns (OpenAI `role`/`content`, ShareGPT `from`/`value`, text parts, an extra `chosen` answer),
    prompt and completion, Alpaca with input and history, question and answer, each with an optional `system`
    column. Roles are mapped to system, user and assistant, never passed on as they came. An empty system turn is
    no turn. Content is kept to the character. Raises nothing: what is not a dialogue is a Reject.
    """
    try:
        messages = [message for turn in _turns(row) if (message := _message(*turn)) is not None]
        _check_order([message.role for message in messages])
    except _RejectedError as error:
        return error.reject
    return Dialogue(id=id, source=source, messages=tuple(messages))


def _reject(reason: str, detail: str = "") -> NoReturn:
    raise _RejectedError(Reject(reason, detail))


def _wrong(reason: str) -> NoReturn:
    raise _RejectedError(Reject(reason, wrong_field=True))


def _turns(row: Any) -> Iterator[Turn]:
    if not isinstance(row, Mapping):
        _wrong(f"expected an object with fields, got {type(row).__name__}")
    if row.get("images") or row.get("image"):
        _reject("image")
    for column in ("system", "system_prompt"):
        if row.get(column):
            yield column, {"role": "system", "content": row[column]}
    column = next((c for c in CHAT_COLUMNS if row.get(c) is not None), None)
    if column is not None:
        yield from _listed(column, row[column])
        yield from _chosen(row.get("chosen"))
        return
    pair = next((p for p in PAIR_COLUMNS if p[0] in row and p[1] in row), None)
    if pair is not None:
        yield from _paired(row, *pair)
    elif isinstance(row.get("chosen"), list):
        yield from _listed("chosen", row["chosen"])
    elif any(c in row for c in CHAT_COLUMNS):
        _reject("no turn")
    else:
        found = ", ".join(sorted(map(str, row))[:10]) or "no field"
        _wrong(f"no chat field ({found}); expected one of {', '.join(CHAT_COLUMNS)}, or prompt and completion")


def _listed(column: str, turns: Any) -> Iterator[Turn]:
    if not isinstance(turns, list | tuple):
        _wrong(f"field {column!r} expected a list, got {type(turns).__name__}")
    for index, turn in enumerate(turns):
        yield f"{column}[{index}]", turn


def _chosen(chosen: Any) -> Iterator[Turn]:
    # a preference pair: the turns so far are shared, the preferred answer stands apart
    if isinstance(chosen, Mapping):
        yield "chosen", chosen
    elif isinstance(chosen, str):
        yield "chosen", {"role": "assistant", "content": chosen}


def _paired(row: Mapping[str, Any], question: str, answer: str) -> Iterator[Turn]:
    asked, answered = row[question], row[answer]
    if isinstance(asked, list):  # prompt and completion as lists of turns
        yield from _listed(question, asked)
        yield from _listed(answer, answered)
        return
    if isinstance(answered, list):  # UltraFeedback: `chosen` repeats the prompt
        yield from _listed(answer, answered)
        return
    history = row.get("history") or []
    if not isinstance(history, list):
        _wrong(f"field 'history' expected a list, got {type(history).__name__}")
    for index, exchange in enumerate(history):
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            _wrong(f"field 'history[{index}]' expected a question and an answer")
        yield f"history[{index}]", {"role": "user", "content": exchange[0]}
        yield f"history[{index}]", {"role": "assistant", "content": exchange[1]}
    given = row.get("input") if question == "instruction" else None
    if isinstance(asked, str) and isinstance(given, str) and given.strip():
        asked = f"{asked}\n\n{given}"
    yield question, {"role": "user", "content": asked}
    yield answer, {"role": "assistant", "content": answered}


def _message(where: str, turn: Any) -> Message | None:
    if not isinstance(turn, Mapping):
        _wrong(f"field {where!r} expected an object, got {type(turn).__name__}")
    role = _role(where, turn)
    if turn.get("tool_calls") or turn.get("function_call"):
        _reject("tool turn")
    key = next((k for k in ("content", "value", "text") if k in turn), None)
    if key is None:
        _wrong(f"field '{where}.content' is missing (found: {', '.join(map(str, turn))})")
    content = _text(f"{where}.{key}", turn[key])
    if not content.strip():
        if role == "system":
            return None
        _reject("empty content")
    try:
        content.encode()
    except UnicodeEncodeError:
        _reject("content is not valid Unicode")
    return Message(role, content)


def _role(where: str, turn: Mapping[str, Any]) -> str:
    key = next((k for k in ("role", "from") if k in turn), None)
    if key is None:
        _wrong(f"field '{where}.role' is missing (found: {', '.join(map(str, turn)) or 'nothing'})")
    name = turn[key]
    if name is None:
        _reject("no role")
    if not isinstance(name, str):
        _wrong(f"field '{where}.{key}' expected text, got {type(name).__name__}")
    plain = name.strip().lower()
    if plain in _TOOL_ROLES:
        _reject("tool turn")
    if plain not in _ROLES:
        _reject("unknown role", repr(name[:40]))
    return _ROLES[plain]


def _text(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _wrong(f"field {where!r} expected text, got {type(content).__name__}")
    return "\n".join(_part(f"{where}[{index}]", part) for index, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        _wrong(f"field {where!r} expected text or an object, got {type(part).__name__}")
    if part.get("type") != "text":
        _reject("content part that is not text", repr(part.get("type"))[:40])
    text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        _wrong(f"field '{where}.text' expected text, got {type(text).__name__}")
    return text


def _check_order(roles: list[str]) -> None:
    if not roles:
        _reject("no turn")
    if "system" in roles[1:]:
        _reject("system turn that is not the first")
    if any(a == b for a, b in pairwise(roles)):
        _reject("same role twice in a row")
    for role in ("user", "assistant"):
        if role not in roles:
            _reject(f"no {role} turn")
