"""Any endpoint that speaks the chat completions protocol."""

import email.utils
import json
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx2

from chatsae.errors import UserError
from chatsae.features.judge.client import Answer, Request
from chatsae.features.judge.gate import Gate

_AGAIN = {408, 409, 429, *range(500, 600)}
_OVERLOADED = {408, 429, 500, 502, 503, 504}
_FILTERED = {"content_filter", "content_policy_violation"}


@dataclass(frozen=True, slots=True)
class Retry:
    """Exponential back-off in seconds, each time drawn between half and all of it (jitter).

    `patience`: the longest pause that a server may ask for.
    """

    attempts: int = 6
    first: float = 1.0
    longest: float = 60.0
    patience: float = 600.0

    def pause(self, attempt: int) -> float:
        """The pause after a failed attempt, counted from 0."""
        whole = min(self.longest, self.first * 2**attempt)
        return whole * (0.5 + random.random() / 2)


class OpenAICompat:
    """A model behind an OpenAI-compatible endpoint; the key comes from an environment variable and goes nowhere else.

    408, 409, 429, 5xx, broken answers and broken connections are asked again, after the pause that Retry-After names
    where there is one; any other status ends it with the server's text.

    Raises:
        UserError: the address is none, or the variable is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 120.0,
        retry: Retry | None = None,
        concurrency: int = 8,
    ) -> None:
        _check_address(base_url)
        self.model = model
        self.gate = Gate(concurrency)
        self._retry = retry or Retry()
        self._url = base_url.rstrip("/") + "/chat/completions"
        key = None if api_key_env is None else _key(api_key_env)
        given = dict(headers or {})
        self._secrets = sorted({s for s in (key, *given.values()) if s}, key=len, reverse=True)
        if key is not None:
            given["Authorization"] = f"Bearer {key}"
        self._client = httpx2.Client(headers=given, timeout=timeout)

    def complete(self, request: Request) -> Answer:
        """Ask until there is an answer.

        Raises:
            UserError: the server refuses, or fails again and again.
            ClosedError: the client was stopped.
        """
        problem = ""
        for attempt in range(self._retry.attempts):
            entered = self.gate.enter()
            overloaded, asked = False, None
            try:
                response = self._client.post(self._url, json=self._body(request))
                overloaded = response.status_code in _OVERLOADED
                if response.status_code not in _AGAIN:
                    return self._answer(response)
                problem = f"status {response.status_code}: {self._text(response)}"
                asked = self._asked_pause(response)
            except httpx2.TransportError as error:
                overloaded = isinstance(error, httpx2.TimeoutException)
                problem = self.redact(f"{type(error).__name__}: {error}")
            except _BrokenError as error:
                problem = self.redact(str(error))
            finally:
                self.gate.leave(entered, overloaded=overloaded, pause=asked or 0.0)
            if attempt + 1 < self._retry.attempts:
                self.gate.sleep(self._retry.pause(attempt) if asked is None else asked)
        raise UserError(f"{self._url} gave no answer in {self._retry.attempts} attempts; the last one: {problem}")

    def stop(self) -> None:
        """Send away who waits to ask, or to ask again."""
        self.gate.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def redact(self, text: str) -> str:
        """Text without the key, and without what headers hold."""
        for secret in self._secrets:
            text = text.replace(secret, "[redacted]")
        return text

    def _body(self, request: Request) -> dict[str, Any]:
        return {"model": self.model, "messages": [dict(m) for m in request.messages], **request.params}

    def _answer(self, response: httpx2.Response) -> Answer:
        if response.status_code != 200:
            if response.status_code == 400 and _code(response) in _FILTERED:
                return Answer("", refusal="the server's content filter", finish_reason="content_filter")
            raise UserError(f"{self._url} answered with status {response.status_code}: {self._text(response)}")
        try:
            facts = response.json()
            choice = facts["choices"][0]
            message, usage = choice["message"], facts.get("usage") or {}
            content, refusal = _said(message.get("content")), message.get("refusal")
            tokens = (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _BrokenError(f"no chat completion ({error}): {self.redact(response.text)[:200]}") from None
        finish = choice.get("finish_reason")
        finish = self.redact(str(finish)) if finish else None
        if not refusal and not content and finish == "content_filter":
            refusal = "the server's content filter"
        return Answer(self.redact(content), self.redact(str(refusal)) if refusal else None, finish, *tokens)

    def _text(self, response: httpx2.Response) -> str:
        """What the server says about an error; the key is taken out before the text is cut."""
        try:
            error = response.json()["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError, IndexError):
            text = response.text
        return " ".join(self.redact(text).split())[:500] or "(no text)"

    def _asked_pause(self, response: httpx2.Response) -> float | None:
        seconds = retry_after(response.headers.get("retry-after"), datetime.now(UTC))
        if seconds is not None and seconds > self._retry.patience:
            raise UserError(
                f"{self._url} asks to wait {seconds:,.0f} s ({self._text(response)}); "
                "the same command goes on from here later"
            )
        return seconds


class _BrokenError(Exception):
    """A status of success without an answer."""


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds to wait, from a Retry-After header with seconds or an HTTP date; None without a usable one."""
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if float(value) < float("inf") else None
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - now).total_seconds())


def _said(content: Any) -> str:
    """The text of a message: of a list of parts those that are text, not those that are thoughts."""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else _part(part) for part in content)
    if not isinstance(content, str | None):
        raise TypeError("content is no text")
    return content or ""


def _part(part: Mapping[str, Any]) -> str:
    return str(part.get("text") or "") if part.get("type", "text") in ("text", "output_text") else ""


def _count(tokens: Any) -> int | None:
    """Tokens that a server tells, if it is a number of them."""
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0 else None


def _code(response: httpx2.Response) -> str | None:
    try:
        return response.json()["error"]["code"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key and not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):  # it may be a key itself: it is not repeated
        raise UserError("--api-key-env takes the name of an environment variable that holds the key, like JUDGE_KEY")
    if not key:
        raise UserError(f"--api-key-env: the environment variable {variable} is not set")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"--api-key-env: {variable} holds characters that no key has (spaces, breaks or accents)")
    return key


def _check_address(base_url: str) -> None:
    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError):
        raise UserError("--base-url is no address; one like http://127.0.0.1:8000/v1 is needed") from None
    if url.userinfo or url.query:
        raise UserError("--base-url holds a password or a query; a key comes from a variable, --api-key-env NAME")
    if url.scheme not in ("http", "https") or not url.host or "%" in url.host:
        raise UserError(f"--base-url {base_url} is no address; one like http://127.0.0.1:8000/v1 is needed")
