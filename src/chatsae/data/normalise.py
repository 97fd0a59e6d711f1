"""One row of a chat corpus, in any common shape -> a Dialogue, or the reason why it is none."""

import json
import re
from itertools import pairwise
from typing import Any

from chatsae.batch import Dialogue, Message
from chatsae.data.shapes import (
    CHAT_COLUMNS,
    CHOICES,
    EXTRA_COLUMNS,
    MISSING,
    NO_FIELD,
    NO_TURN,
    NOT_OBJECT,
    PAIR_COLUMNS,
    ROLES,
    WRONG_TYPE,
    Reject,
    RejectedError,
    Turn,
    missing,
    shown,
    turns_of,
    wrong_type,
)

__all__ = ["CHAT_COLUMNS", "EXTRA_COLUMNS", "IMAGE", "MAX_CHARS", "PAIR_COLUMNS", "REASONS", "Reject", "normalise"]

MAX_CHARS = 200_000
"""Characters of the longest turn that is kept."""

IMAGE = "<image>"
"""What stands for an image."""

_NO_ROLE = "no role"
_UNKNOWN_ROLE = "unknown role"
_EMPTY = "empty content"
_PART = "content part of unknown type"
_NOT_JSON = "tool call or result that JSON cannot hold"
_MISPLACED = "tool call or result in another's turn"
_SURROGATE = "content is not valid Unicode"
_SPECIAL = "special token in the content"  # the words of the render stage
_TOO_LONG = "turn over {:,} characters"
_NO_USER, _NO_ASSISTANT = "no user turn", "no assistant turn"
_LATE_SYSTEM = "system turn that is not the first"
_NOT_USER_FIRST = "first turn is not the user's"
_TWICE = "same role twice in a row"
_STRAY_TOOL = "tool turn that follows no assistant turn"

REASONS = frozenset(
    [
        *(NOT_OBJECT, NO_FIELD, WRONG_TYPE, MISSING, NO_TURN, _NO_ROLE, _UNKNOWN_ROLE, _EMPTY, _PART, _NOT_JSON),
        *(_SURROGATE, _SPECIAL, _TOO_LONG.format(MAX_CHARS), _NO_USER, _NO_ASSISTANT, _LATE_SYSTEM, _NOT_USER_FIRST),
        *(_TWICE, _STRAY_TOOL, _MISPLACED, CHOICES),
    ]
)
"""Every reason of a Reject (that of a long turn with the number of the default)."""

_CALL_ROLES = {"function_call", "tool_call", "tool_calls"}
_TEXTS = {"text", "input_text", "output_text"}
_IMAGES = {"image", "image_url", "input_image"}
_THOUGHTS = {"reasoning", "thinking", "redacted_thinking"}
_CALLS = {"tool_call", "tool_use", "function_call"}
_RESULTS = {"tool_response", "tool_result", "function_response"}
_KINDS = _TEXTS | _IMAGES | _THOUGHTS | _CALLS | _RESULTS


def normalise(
    row: Any, *, source: str, id: str, special: re.Pattern[str] | None = None, max_chars: int = MAX_CHARS
) -> Dialogue | Reject:
    """The row as a dialogue: at most one system turn, then turns of user, assistant and tool in sound order.

    Reads lists of turns (OpenAI, ShareGPT, content parts, nested, or as JSON in a string), preference pairs (the
    chosen answer), prompt and completion, question and answer, Alpaca with input and history, and "Human: Assistant:"
    texts, each with an optional `system` column. Content is kept to the character; the texts of parts are joined by
    newlines. An image part is "<image>"; a tool call is its JSON text, in the assistant's turn; reasoning is left out,
    as chat templates leave it out of a history; an empty system turn is no turn. Columns of other things (the tools on
    offer, labels, image files) are not looked at.

    A turn of more than `max_chars` characters, or with a match of `special`, rejects the row. Raises nothing: what is
    not a dialogue is a Reject.
    """
    try:
        messages: list[Message] = []
        for turn in turns_of(row):
            _add(messages, turn)
        _check_order(messages)
        for message in messages:
            _check_content(message.content, special, max_chars)
    except RejectedError as error:
        return error.reject
    return Dialogue(id=id, source=source, messages=tuple(messages))


def _add(messages: list[Message], turn: Turn) -> None:
    where, value = turn
    if not isinstance(value, dict):
        wrong_type(where, "an object", value)
    name, role = _role(where, value)
    content, results = _content(where, role, value)
    messages += [Message("tool", result) for result in results]
    if not content or content.isspace():
        if role == "system" or results:
            return
        raise RejectedError(_EMPTY, f"{where!r}")
    if name in _CALL_ROLES and messages and messages[-1].role == "assistant":
        content = f"{messages.pop().content}\n{content}"  # the call of a turn that has begun
    messages.append(Message(role, content))


def _role(where: str, turn: dict[Any, Any]) -> tuple[str, str]:
    """The name of the role in the row, and what it is called here."""
    key = "role" if turn.get("role") is not None else "from"
    name = turn.get(key)
    if not isinstance(name, str):
        if name is not None:
            wrong_type(f"{where}.{key}", "text", name)
        if "role" not in turn and "from" not in turn:
            missing(f"{where}.role", turn)
        raise RejectedError(_NO_ROLE, f"{where!r}")
    if name in ROLES:
        return name, ROLES[name]
    plain = name.strip().lower()
    if plain not in ROLES:
        raise RejectedError(_UNKNOWN_ROLE, repr(shown(name)))
    return plain, ROLES[plain]


def _content(where: str, role: str, turn: dict[Any, Any]) -> tuple[str, list[str]]:
    """The text of a turn, and the results of tools that stand in it (as some have them, in the user's turn)."""
    content = turn.get("content")
    if isinstance(content, str) and "tool_calls" not in turn and "function_call" not in turn:
        return content, []
    key = next((k for k in ("content", "value", "text") if turn.get(k) is not None), None)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if key is None and not calls and not any(k in turn for k in ("content", "value", "text")):
        missing(f"{where}.content", turn)
    text, results = ("", []) if key is None else _text(f"{where}.{key}", role, turn[key])
    if not calls:
        return text, results
    if role != "assistant":
        raise RejectedError(_MISPLACED, f"{where!r}")
    each = calls if isinstance(calls, list) else [calls]
    return "\n".join(filter(None, (text, *map(_call, each)))), results


def _text(where: str, role: str, content: Any) -> tuple[str, list[str]]:
    if isinstance(content, str):
        return content, []
    parts = [content] if isinstance(content, dict) and "type" in content else content
    if role == "tool" and not _are_parts(parts):
        return _spelled(content), []
    if not isinstance(parts, list | tuple):
        wrong_type(where, "text", content)
    texts: list[str] = []
    results: list[str] = []
    for index, part in enumerate(parts):
        _add_part(f"{where}[{index}]", role, part, texts, results)
    return "\n".join(filter(None, texts)), results


def _are_parts(content: Any) -> bool:
    """Whether the data of a tool is content parts, and not data that merely looks like them."""
    return isinstance(content, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and "type" in part and _kind(part) in _KINDS)
        for part in content
    )


def _add_part(where: str, role: str, part: Any, texts: list[str], results: list[str]) -> None:
    if isinstance(part, str):
        texts.append(part)
        return
    if not isinstance(part, dict):
        wrong_type(where, "text or an object", part)
    kind = _kind(part)
    if kind in _TEXTS:
        key = next((k for k in ("text", "value", "content") if part.get(k) is not None), "text")
        if not isinstance(part.get(key), str):
            wrong_type(f"{where}.{key}", "text", part.get(key))
        texts.append(part[key])
    elif kind in _IMAGES:
        texts.append(IMAGE)
    elif kind in _CALLS or kind in _RESULTS:
        if role != ("assistant" if kind in _CALLS else "user") and not (role == "tool" and kind in _RESULTS):
            raise RejectedError(_MISPLACED, f"{where!r}")
        if kind in _CALLS:
            texts.append(_call(part))
        else:
            (texts if role == "tool" else results).append(_result(part))
    elif kind not in _THOUGHTS:
        raise RejectedError(_PART, repr(kind))


def _kind(part: dict[Any, Any]) -> str:
    """The type of a part; where it does not tell, that of the field it has."""
    kind = part.get("type")
    if kind is None:
        kind = next((k for k in ("text", "image", "image_url") if part.get(k) is not None), None)
    return shown(kind)


def _result(part: dict[Any, Any]) -> str:
    value = next((part[k] for k in ("value", "content", "text", "output") if part.get(k) is not None), "")
    if _are_parts(value) and all(isinstance(p, str) or _kind(p) in _TEXTS for p in value):
        return _text("result", "tool", value)[0]
    return _spelled(value)


def _call(call: Any) -> str:
    """A tool call as JSON text, `{"name": ..., "arguments": ...}`; text that is there is kept as it is."""
    if isinstance(call, dict):
        if isinstance(call.get("value"), str):
            return call["value"]
        function = call.get("function")
        call = function if isinstance(function, dict) else call
        if call.get("name") is not None:
            call = {"name": call["name"], "arguments": _arguments(call)}
    return _spelled(call)


def _arguments(call: dict[Any, Any]) -> Any:
    arguments = next((call[k] for k in ("arguments", "input", "parameters") if call.get(k) is not None), {})
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return arguments


def _spelled(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise RejectedError(_NOT_JSON) from None


def _check_order(messages: list[Message]) -> None:
    if not messages:
        raise RejectedError(NO_TURN)
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        raise RejectedError(_LATE_SYSTEM)
    if roles[0] == "system":
        del roles[0]
    if "user" not in roles:
        raise RejectedError(_NO_USER)
    if "assistant" not in roles:
        raise RejectedError(_NO_ASSISTANT)
    if roles[0] != "user":
        raise RejectedError(_NOT_USER_FIRST, f"it is the {roles[0]}'s")
    for before, role in pairwise(roles):
        if role == before != "tool":
            raise RejectedError(_TWICE, role)
        if role == "tool" and before == "user":
            raise RejectedError(_STRAY_TOOL)


def _check_content(content: str, special: re.Pattern[str] | None, max_chars: int) -> None:
    if len(content) > max_chars:
        raise RejectedError(_TOO_LONG.format(max_chars), f"{len(content):,}")
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError:
            raise RejectedError(_SURROGATE) from None
    if special is not None and (found := special.search(content)):
        raise RejectedError(_SPECIAL, repr(shown(found[0])))
