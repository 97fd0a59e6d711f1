"""The HTTP side: routes, limits on what is under way, and answers in the shape of OpenAI's."""

import asyncio
import copy
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from chatsae.errors import UserError
from chatsae.serve.answer import Answer, Event
from chatsae.serve.engine import Engine, stopping
from chatsae.serve.errors import ApiError
from chatsae.serve.http import Bodies, Events, Gate, answer, reply, too_many, while_connected
from chatsae.serve.model import Served
from chatsae.serve.replies import Said
from chatsae.serve.requests import ChatRequest, FeaturesRequest, chat_request, features_request, parse
from chatsae.steering.spec import SteerSpec

T = TypeVar("T")

_SHORT = 1 << 14  # bytes of a body; its tokens are made in a few ten milliseconds
_PIECE = 1 << 14  # characters that are tokenised at a time to find out how many tokens a long text has
_EDGE = 16  # tokens that a piece may have more than its part of the whole text


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request, and all together, may take."""

    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    """To send a body."""
    read_seconds: float = 60.0
    """To take in a piece of a stream."""
    max_tokens: int = 1024
    """Of an answer."""
    requests: int = 128
    """Under way and waiting; one more is told to come back."""


class Lane:
    """A thread that renders and tokenises, with a tokenizer of its own: a tokenizer is not for two threads."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.thread = ThreadPoolExecutor(1, name)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """What the function gives. Functions run in the order in which they come."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)


class App:
    """The state behind the routes; `stopping` refuses what is new.

    Long requests have a lane of their own, so that no short one waits for them.
    """

    def __init__(self, served: Served, engine: Engine, limits: Limits) -> None:
        self.served, self.engine, self.limits = served, engine, limits
        self.stopping = False
        self._under_way = 0
        self._scale: asyncio.Task[None] | None = None
        self._short, self._long = (Lane(name, served.lm.tokenizer) for name in ("short", "long"))
        self._bodies = Bodies(limits.body_bytes, limits.body_seconds, limits.requests * limits.body_bytes)

    def asgi(self, key: str | None, hosts: Sequence[str]) -> Starlette:
        """The application; see `Gate`."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/features", self.features, methods=["GET", "POST"]),
        ]
        handlers: dict[Any, Any] = {
            ApiError: lambda request, error: answer(error),
            HTTPException: _plain_error,
            ClientDisconnect: lambda request, error: Response(status_code=400),
            Exception: lambda request, error: answer(ApiError(500, "an error of the server; its log says more")),
        }
        gate = Middleware(Gate, key=key, hosts=hosts)
        app = Starlette(routes=routes, middleware=[gate], exception_handlers=handlers)
        app.router.redirect_slashes = False  # it would send clients wherever the Host header says
        return app

    async def health(self, request: Request) -> Response:
        """Whether it answers, and how much it has to do."""
        return reply({"status": "stopping" if self.stopping else "ok"} | self.engine.counts())

    async def models(self, request: Request) -> Response:
        """The model, with its SAEs."""
        name = request.path_params.get("name")
        if name is None:
            return reply({"object": "list", "data": [self.served.listed()]})
        if name != self.served.name:
            message = f"model {name[:100]!r} does not exist; there is {self.served.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return reply(self.served.listed())

    async def chat(self, request: Request) -> Response:
        """An answer, whole or as a stream."""
        body = await self._bodies.read(request)
        with ExitStack() as ending:
            ending.enter_context(self._slot())
            with while_connected(request.receive):
                said = await self._answer(body)
                ending.callback(said.cancel)
                first = await said.first()
                if not said.streams:
                    return reply(await said.whole(first))
            return Events(said.stream(first), self.limits.read_seconds, ending.pop_all().close)

    async def features(self, request: Request) -> Response:
        """The strongest features on each token."""
        get = request.method == "GET"
        sent = request.scope["query_string"] if get else await self._bodies.read(request)
        with self._slot(), while_connected(request.receive):
            lane = self._lane(sent)
            data = await lane.run(_query if get else parse, sent)
            asked = await lane.run(features_request, data, self.served.name)
            self.served.check_saes(asked.saes)
            if lane is self._long:
                await self._check_length(lane, asked)
            tokens = await lane.run(self.served.tokens, asked, lane.tokenizer)
            return await self._computed(lambda: reply(self.served.features(asked, tokens)))

    async def _answer(self, body: bytes) -> Said:
        """An answer that has been handed to the engine."""
        lane = self._lane(body)
        asked = await lane.run(lambda: chat_request(parse(body), self.served.name))
        if lane is self._long:
            await self._check_length(lane, asked)
        row, most = await lane.run(self.served.prompt, asked, self.limits.max_tokens, lane.tokenizer)
        specs: tuple[SteerSpec, ...] = ()
        if asked.steering:
            relative = await lane.run(self.served.specs, asked.steering)
            if self.served.needs_scale(relative):
                await self._read_scale()
            specs = await self._computed(lambda: self.served.absolute(relative))
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has been told to go at once
                loop.call_soon_threadsafe(events.put_nowait, event)

        options: dict[str, Any] = {"sampling": asked.sampling, "max_new_tokens": most, "stops": asked.stops}
        writing = Answer(row, self.served.lm.tokenizer, sink, specs=specs, **options)
        self.engine.submit(writing)
        return Said(asked, writing, events, self.served.name)

    def _lane(self, body: bytes) -> Lane:
        return self._short if len(body) <= _SHORT else self._long

    async def _check_length(self, lane: Lane, asked: ChatRequest | FeaturesRequest) -> None:
        """Count the tokens of a long text, piece by piece: others have their turn between two pieces.

        Raises:
            ApiError: there are more than the context takes; no more of the text is read than it takes to see that.
        """
        text = await lane.run(self.served.text, asked, lane.tokenizer)
        least = 0
        for start in range(0, len(text), _PIECE):
            least += await lane.run(self.served.count, text[start : start + _PIECE], lane.tokenizer) - _EDGE
            if least > self.served.context:
                raise self.served.too_long(asked, "more")

    async def _read_scale(self) -> None:
        """Read what relative strengths are measured on, once for all who need it, whoever of them goes away."""
        if self._scale is None:
            self._scale = asyncio.ensure_future(asyncio.to_thread(self.served.read_scale))
        reading = self._scale
        try:
            await _checked(asyncio.shield(reading))
        finally:
            if reading.done() and self._scale is reading:
                self._scale = None  # where it failed, the next request tries again

    async def _computed(self, function: Callable[[], T]) -> T:
        """What the engine's thread computes.

        Raises:
            ApiError: it cannot be, or the server is stopping.
        """
        return await _checked(asyncio.wrap_future(self.engine.call(function)))

    @contextmanager
    def _slot(self) -> Generator[None, None, None]:
        """A place among the requests under way.

        Raises:
            ApiError: there is none.
        """
        if self.stopping:
            raise stopping()
        if self._under_way >= self.limits.requests:
            raise too_many(f"{self.limits.requests} requests are under way")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def close(self) -> None:
        """End what is left, and the threads."""
        self.engine.drain(0.0)
        self.engine.join()
        for lane in (self._short, self._long):
            lane.thread.shutdown(cancel_futures=True)


async def _checked(done: Awaitable[T]) -> T:
    """What a function gives; a user's mistake that it finds is the client's."""
    try:
        return await done
    except UserError as error:
        raise ApiError(400, str(error)) from None


def _query(query: bytes) -> dict[str, Any]:
    """The query of a GET as the body of a POST."""
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError as error:  # bytes that are no UTF-8, or too many fields
        raise ApiError(400, f"the query cannot be read: {str(error)[:200]}") from None
    data: dict[str, Any] = dict(pairs)
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1 and name != "sae":
            raise ApiError(400, f"{name[:100]} is given {times} times", param=name[:100])
    if "sae" in data:
        data["sae"] = [value for name, value in pairs if name == "sae"]
    if str(data.get("k", "")).isdecimal() and len(data["k"]) < 10:
        data["k"] = int(data["k"])
    if "raw" in data:
        data["raw"] = {"true": True, "1": True, "false": False, "0": False}.get(data["raw"].lower(), data["raw"])
    return data


def _plain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = str(request.scope["path"])[:100]
    told = {404: f"there is no {path}", 405: f"{request.method} is not for {path}"}
    return answer(ApiError(error.status_code, told.get(error.status_code, error.detail), headers=error.headers))
