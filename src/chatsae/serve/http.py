"""What stands between the network and a request: who may ask, how long and how large it may be, and streams."""

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatsae.serve.errors import ApiError, as_json

_DRAINED = 16  # times the allowed size that is read and thrown away, so that the client gets to read the answer


def answer(error: ApiError) -> Response:
    """An error as a response."""
    return Response(as_json(error.facts()), error.status, headers=error.headers, media_type="application/json")


def reply(value: Any) -> Response:
    """JSON as a response."""
    return Response(as_json(value), media_type="application/json")


class Gate:
    """Lets pass who gives the key; without a key, who comes by a name of this machine (no page can rebind a name).

    /health needs no key.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, frozenset(hosts)
        self._key = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._refusal(Request(scope))
        await (self._app if error is None else answer(error))(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        if self._key is None:
            if _hostname(request.headers.get("host", "")) not in self._hosts:
                return ApiError(403, "the Host header does not name this machine")
            return None
        if request.scope["path"] == "/health":
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip()
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.encode("latin-1")), self._key):
            told = "a key is needed: Authorization: Bearer KEY" if not given else "this key is not the server's"
            return ApiError(401, told, headers={"WWW-Authenticate": "Bearer", "Connection": "close"})
        return None


class Bodies:
    """Reads the bodies of requests: each has at most `most` bytes, all that are being read at most `together`."""

    def __init__(self, most: int, seconds: float, together: int) -> None:
        self._most, self._seconds, self._left = most, seconds, together

    async def read(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            ApiError: 415, it is not declared as JSON; 413, it is too large; 408, it takes too long; 429, too many
                bytes of other bodies are being read.
        """
        declared = request.headers.get("content-length", "")
        too_large = declared.isdigit() and int(declared) > self._most
        read, size = bytearray(), 0
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    too_large = too_large or size > self._most
                    if not too_large:
                        self._left -= len(chunk)
                        read += chunk
                        if self._left < 0:
                            raise too_many("too many bytes are being sent")
                    elif size > _DRAINED * self._most:
                        break
        except TimeoutError:
            if not too_large:
                message = f"the body did not come within {self._seconds:g} seconds"
                raise ApiError(408, message, headers={"Connection": "close"}) from None
        finally:
            self._left += len(read)
        if too_large:
            raise ApiError(413, f"the body may have {self._most} bytes", headers={"Connection": "close"})
        _check_kind(request)
        return bytes(read)


def too_many(what: str) -> ApiError:
    """What a client is told that should come back when there is less to do."""
    return ApiError(429, f"{what}; ask again in a second", headers={"Retry-After": "1"})


def _check_kind(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, not {kind[:100] or 'absent'}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, f"Content-Encoding must be identity, not {encoding[:100] or 'empty'}")


@contextmanager
def while_connected(receive: Receive) -> Generator[None, None, None]:
    """Cancels what is being done for a client that goes away; the request's body must have been read.

    Raises:
        ClientDisconnect: it has gone.
    """
    task, watch = asyncio.current_task(), asyncio.create_task(_gone(receive))
    assert task is not None
    inside = True

    def leave(watch: asyncio.Task[None]) -> None:
        if inside and not watch.cancelled():
            task.cancel()

    watch.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if not watch.done():
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        inside = False
        watch.cancel()


class Events(Response):
    """Server-sent events; a client that does not read for `seconds` loses them. `finish` is called at the end."""

    def __init__(self, events: AsyncIterator[bytes], seconds: float, finish: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._seconds, self._finish = events, seconds, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(TimeoutError, ClientDisconnect), while_connected(receive):  # the server closes the connection
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for event in self._events:
                    await self._send(send, {"type": "http.response.body", "body": event, "more_body": True})
                await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._finish()

    async def _send(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self._seconds):
            await send(message)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _hostname(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, so that comparing says nothing about it
