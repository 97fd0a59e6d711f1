"""Answers in the shape of OpenAI's chat completions, whole or in pieces."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from chatsae.serve.answer import Answer, Done, Event, Failed, Piece
from chatsae.serve.errors import ApiError, as_json
from chatsae.serve.requests import ChatRequest


class Said:
    """What is written to one client. Attributes: streams (whether in pieces)."""

    def __init__(self, asked: ChatRequest, writing: Answer, events: "asyncio.Queue[Event]", model: str) -> None:
        self._asked, self._writing, self._events = asked, writing, events
        self.streams = asked.stream
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        self._head["model"] = model

    def cancel(self) -> None:
        """Nobody listens any more: no further token is computed."""
        self._writing.cancelled = True

    async def first(self) -> Piece | Done:
        """The first event.

        Raises:
            ApiError: the answer has failed before it began.
        """
        return _fine(await self._events.get())

    async def whole(self, event: Piece | Done) -> dict[str, Any]:
        """The whole answer.

        Raises:
            ApiError: it has failed.
        """
        text = []
        while isinstance(event, Piece):
            text.append(event.text)
            event = _fine(await self._events.get())
        message = {"role": "assistant", "content": "".join(text), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.reason}
        return {**self._head, "choices": [choice], "usage": _usage(event), **self._steering(event)}

    async def stream(self, event: Event) -> AsyncIterator[bytes]:
        """The answer in pieces, as server-sent events; an error ends it as an event of its own."""
        yield self._chunk({"role": "assistant", "content": ""})
        while isinstance(event, Piece):
            yield self._chunk({"content": event.text})
            event = await self._events.get()
        if isinstance(event, Failed):
            yield _event(event.error.facts())
            return
        yield self._chunk({}, event.reason, self._steering(event))
        if self._asked.include_usage:
            yield _event({**self._head, "choices": [], "usage": _usage(event)})
        yield b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, more: dict[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self._asked.include_usage else {}
        return _event({**self._head, "choices": [choice], **usage, **(more or {})})

    def _steering(self, done: Done) -> dict[str, Any]:
        """On how many tokens each spec acted: 0 means that it changed nothing."""
        if not self._writing.specs:
            return {}
        pairs = zip(self._writing.specs, done.acted, strict=True)
        return {"steering": [{"spec": spec.label(), "layer": spec.place, "tokens": n} for spec, n in pairs]}


def _fine(event: Event) -> Piece | Done:
    if isinstance(event, Failed):
        raise ApiError(event.error.status, event.error.message, **_more(event.error))
    return event


def _more(error: ApiError) -> dict[str, Any]:
    return {"param": error.param, "code": error.code, "headers": error.headers}


def _usage(done: Done) -> dict[str, int]:
    total = done.n_prompt + done.n_new
    return {"prompt_tokens": done.n_prompt, "completion_tokens": done.n_new, "total_tokens": total}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + as_json(value) + b"\n\n"
