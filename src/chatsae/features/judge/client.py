"""What a judge asks of a language model, and what it gets back."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from chatsae.errors import UserError

PROMPT_VERSION = 1
"""Part of every key of the cache: answers to prompts of other versions are not taken for answers to these."""

_CUT = {"length", "max_tokens", "max_output_tokens", "model_length", "content_filter", "abort", "error"}


@dataclass(frozen=True, slots=True)
class Request:
    """Messages (role and content) and sampling parameters, as the chat completions protocol has them.

    A `repeat` is another answer to the same.
    """

    messages: tuple[Mapping[str, str], ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 0

    def facts(self, model: str) -> dict[str, Any]:
        """What the answer depends on; nothing of the endpoint, and no key."""
        return {
            "model": model,
            "messages": [dict(message) for message in self.messages],
            "params": dict(self.params),
            "prompt_version": PROMPT_VERSION,
            "repeat": self.repeat,
        }

    def key(self, model: str) -> str:
        """The sha256 of those facts as canonical JSON."""
        return hashlib.sha256(canonical(self.facts(model)).encode()).hexdigest()

    def strictly(self, reminder: str) -> "Request":
        """The same with a reminder of the form that the answer must have."""
        *before, last = self.messages
        return Request(
            (*before, {**last, "content": f"{last['content']}\n\n{reminder}"}), dict(self.params), self.repeat
        )

    @property
    def prompt_tokens(self) -> int:
        """An estimate: a token per three bytes, and four per message, which is more than English text needs."""
        return sum(len(m["content"].encode()) // 3 + 4 for m in self.messages)

    @property
    def answer_tokens(self) -> int:
        """The most tokens that an answer may have, or is expected to have where no limit is sent."""
        return 1024 if self.limit is None else self.limit

    @property
    def limit(self) -> int | None:
        """The limit of an answer's tokens that is sent."""
        limits = (self.params.get(name) for name in ("max_completion_tokens", "max_tokens"))
        return next((int(n) for n in limits if n is not None), None)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said; `refusal` is the reason why it did not. Tokens are None where they are not known."""

    text: str
    refusal: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def cut(self) -> bool:
        """Whether it ended before the model was done."""
        return self.finish_reason is not None and self.finish_reason.lower() in _CUT


class NotRecordedError(UserError):
    """A record has no answer to a request."""


@runtime_checkable
class Client(Protocol):
    """Answers requests; called from several threads at once."""

    @property
    def model(self) -> str: ...

    def complete(self, request: Request) -> Answer:
        """The model's answer.

        Raises:
            UserError: there is none, and asking again would not help.
        """
        ...

    def stop(self) -> None:
        """Begin nothing more; what is under way comes to its end."""
        ...

    def close(self) -> None:
        """Let go of connections and files, when nothing is under way any more."""
        ...


def canonical(value: Any) -> str:
    """JSON in one form only: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
