"""What clients may ask, read from JSON: every field is checked, none is passed over in silence."""

import difflib
import json
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatsae.serve.errors import ApiError
from chatsae.serve.sampling import Sampling

# Fields of OpenAI's protocol that change nothing in an answer here.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity")
# Fields that are understood at the one value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
_STOPS, _STOP_CHARACTERS = 4, 256
_LARGEST = 2**31  # of a whole number in a spec
_MOST_LISTED = 256  # positions, roles or kinds of a spec
_DEEPEST = 4
_COLDEST = 1e-4  # a temperature below is 0


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for an answer; the steering is checked later, beside the model."""

    messages: tuple[dict[str, str], ...]
    sampling: Sampling
    max_tokens: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    steering: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class FeaturesRequest:
    """A request for the strongest features of a text, or of messages."""

    text: str | None
    messages: tuple[dict[str, str], ...]
    raw: bool
    saes: tuple[str, ...]
    k: int


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Fields that are null, at any depth, are absent.

    Raises:
        ApiError: it is not an object, or a field of one is given twice.
    """
    try:
        data = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, a number of too many digits
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_kind(data)}", code="invalid_json")
    return data


def chat_request(data: dict[str, Any], model: str) -> ChatRequest:
    """A request to /v1/chat/completions.

    Raises:
        ApiError: 404, another model; 400, another field that cannot be.
    """
    fields = _Fields(data)
    _check_model(fields, model, required=True)
    messages = _messages(fields.take("messages", list, "a list of messages"))
    limits = [fields.whole(name, 1, 2**31) for name in ("max_tokens", "max_completion_tokens")]
    if None not in limits:
        raise ApiError(400, "max_tokens and max_completion_tokens mean the same; give one", param="max_tokens")
    stream = fields.take("stream", bool, "true or false", default=False)
    options = _Fields(fields.take("stream_options", dict, "an object", default={}), "stream_options.")
    if "stream_options" in data and not stream:
        raise ApiError(400, "stream_options is for requests with stream: true", param="stream_options")
    include_usage = options.take("include_usage", bool, "true or false", default=False)
    options.take("include_obfuscation", bool, "true or false", default=False)
    options.done()
    seed = fields.whole("seed", -(2**63), 2**63 - 1)
    sampling = Sampling(
        temperature=warmth if (warmth := fields.number("temperature", 0.0, 2.0, 1.0)) >= _COLDEST else 0.0,
        top_p=fields.number("top_p", 0.0, 1.0, 1.0),
        seed=secrets.randbits(63) if seed is None else seed,
    )
    stops = _stops(fields.take("stop", (str, list), "a text or a list of texts", default=[]))
    steering = _steering(fields.take("steering", (list, dict), "a list of specs", default=[]))
    fields.done(_IGNORED, _NEUTRAL)
    limit = next((n for n in limits if n is not None), None)
    return ChatRequest(messages, sampling, limit, stops, stream, include_usage, steering)


def features_request(data: dict[str, Any], model: str) -> FeaturesRequest:
    """A request to /v1/features.

    Raises:
        ApiError: 404, another model; 400, another field that cannot be.
    """
    fields = _Fields(data)
    _check_model(fields, model, required=False)
    text = fields.take("text", str, "a text", default=None)
    messages = _messages(given) if (given := fields.take("messages", list, "a list", default=None)) is not None else ()
    if (text is None) == (given is None):
        raise ApiError(400, "give either text or messages", param="text")
    raw = fields.take("raw", bool, "true or false", default=False)
    if raw and text is None:
        raise ApiError(400, "raw is for text: messages are always rendered with the chat template", param="raw")
    named = fields.take("sae", (str, list), "a name or a list of names", default=[])
    saes = (named,) if isinstance(named, str) else tuple(named)
    if not all(isinstance(name, str) for name in saes):
        raise ApiError(400, "sae must be a name or a list of names", param="sae")
    k = fields.whole("k", 1, 1000)
    fields.done(_IGNORED)
    return FeaturesRequest(text, messages, raw, saes, 5 if k is None else k)


class _Fields:
    """The fields of an object, each taken once; what is left over at the end is refused."""

    def __init__(self, data: dict[str, Any], prefix: str = "") -> None:
        self._left, self._prefix, self._known = dict(data), prefix, []

    def take(self, name: str, kinds: Any, wanted: str, *, default: Any = ...) -> Any:
        """The value of a field; without a default it must be there."""
        self._known.append(name)
        if name not in self._left:
            if default is ...:
                raise ApiError(400, f"{self._prefix}{name} is missing", param=f"{self._prefix}{name}")
            return default
        value = self._left.pop(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise self._wrong(name, wanted, value)
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number, None where it is not there."""
        value = self.take(name, (int, float), "a whole number", default=None)
        if value is None:
            return None
        if value != value or math.isinf(value) or value != int(value) or not low <= value <= high:
            raise self._wrong(name, f"a whole number from {low} to {high}", value)
        return int(value)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A number in a range."""
        value = self.take(name, (int, float), "a number", default=default)
        if not low <= value <= high:
            raise self._wrong(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def done(self, ignored: Sequence[str] = (), neutral: Mapping[str, Sequence[Any]] | None = None) -> None:
        """Refuse what nobody took."""
        neutral = neutral or {}
        for name, value in self._left.items():
            if name in neutral:
                if value not in neutral[name]:
                    only = " or ".join(json.dumps(v) for v in neutral[name])
                    message = f"{name} is not supported here, other than as {only}"
                    raise ApiError(400, message, param=name, code="unsupported_parameter")
            elif name not in ignored:
                near = difflib.get_close_matches(name[:100], [*self._known, *neutral, *ignored], n=1)
                hint = f"; perhaps {near[0]}" if near else ""
                param = f"{self._prefix}{name[:100]}"
                raise ApiError(400, f"unknown field {param}{hint}", param=param, code="unknown_parameter")

    def _wrong(self, name: str, wanted: str, value: Any) -> ApiError:
        param = f"{self._prefix}{name}"
        return ApiError(400, f"{param} must be {wanted}, not {_shown(value)}", param=param, code="invalid_value")


def _check_model(fields: _Fields, model: str, *, required: bool) -> None:
    asked = fields.take("model", str, "the name of a model", default=... if required else model)
    if asked != model:
        message = f"model {asked[:100]!r} does not exist; there is {model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _messages(value: list[Any]) -> tuple[dict[str, str], ...]:
    if not value:
        raise ApiError(400, "messages must hold at least one message", param="messages")
    return tuple(_message(each, f"messages[{i}].") for i, each in enumerate(value))


def _message(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ApiError(400, f"{at[:-1]} must be an object, not {_kind(value)}", param=at[:-1])
    for name in ("tool_calls", "function_call", "tool_call_id"):
        if value.get(name, []) != []:
            message = f"{at}{name}: tool calls are not supported"
            raise ApiError(400, message, param=f"{at}{name}", code="unsupported_parameter")
    fields = _Fields(value, at)
    role = fields.take("role", str, "a text")
    content = fields.take("content", (str, list), "a text or a list of text parts")
    if isinstance(content, list):
        content = "".join(_part(part, f"{at}content[{i}]") for i, part in enumerate(content))
    fields.done(("name", "refusal", "annotations"), {"tool_calls": ([],)})
    known = ("system", "developer", "user", "assistant", "tool")
    if role not in known:
        raise ApiError(400, f"{at}role must be one of {', '.join(known)}, not {_shown(role)}", param=f"{at}role")
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(value: Any, at: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "text" or not isinstance(value.get("text"), str):
        raise ApiError(400, f'{at} must be {{"type": "text", "text": ...}}; only text is read', param=at)
    fields = _Fields(value, f"{at}.")
    fields.take("type", str, "text")
    text = fields.take("text", str, "a text")
    fields.done(("annotations", "cache_control"))
    return str(text)


def _stops(value: str | list[Any]) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value)
    fine = all(isinstance(stop, str) and 0 < len(stop) <= _STOP_CHARACTERS for stop in stops)
    if len(stops) > _STOPS or not fine:
        wanted = f"at most {_STOPS} texts of 1 to {_STOP_CHARACTERS} characters"
        raise ApiError(400, f"stop must be {wanted}", param="stop", code="invalid_value")
    return stops


def _steering(value: Any) -> tuple[Mapping[str, Any], ...]:
    entries = [value] if isinstance(value, dict) else value
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ApiError(400, f"steering[{i}] must be an object, not {_kind(entry)}", param=f"steering[{i}]")
        _check_sizes(entry, f"steering[{i}]")
    return tuple(entries)


def _check_sizes(value: Any, at: str, depth: int = 0) -> None:
    """Refuse numbers and lists that no spec needs, before anything computes with them."""
    if depth > _DEEPEST:
        raise ApiError(400, f"{at[:100]} is nested too deeply", param="steering")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_sizes(inner, f"{at}.{key[:100]}", depth + 1)
    elif isinstance(value, list):
        if len(value) > _MOST_LISTED and not at.endswith(".vector"):
            raise ApiError(400, f"{at}: at most {_MOST_LISTED} entries, not {len(value)}", param=at)
        for inner in value:
            _check_sizes(inner, at, depth + 1)
    elif isinstance(value, int) and abs(value) >= _LARGEST:
        raise ApiError(400, f"{at}: a whole number of at most {_LARGEST - 1} is needed", param=at)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ApiError(400, f"the field {name[:100]!r} is given twice", code="invalid_json")
    return {name: value for name, value in found.items() if value is not None}


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    return json.dumps(value)[:60] if isinstance(value, (str, int, float)) else _kind(value)
