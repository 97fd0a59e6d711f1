"""The HTTP side: routes, limits on what is under way, and answers in the shape of OpenAI's."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from chatsae.errors import UserError
from chatsae.serve.answer import Answer, Event, Failed
from chatsae.serve.engine import Engine, stopping
from chatsae.serve.errors import ApiError
from chatsae.serve.http import Events, Gate, answer, body_of, gone, reply
from chatsae.serve.model import Served
from chatsae.serve.replies import Said
from chatsae.serve.requests import ChatRequest, chat_request, features_request, parse
from chatsae.steering.spec import SteerSpec

T = TypeVar("T")


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


class App:
    """The state behind the routes; `stopping` refuses what is new."""

    def __init__(self, served: Served, engine: Engine, limits: Limits) -> None:
        self.served, self.engine, self.limits = served, engine, limits
        self.stopping = False
        self._under_way = 0
        self._reading = asyncio.Lock()
        self._renderer = ThreadPoolExecutor(1, "render")  # a tokenizer is not for two threads

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
        app = Starlette(routes=routes, middleware=[gate], exception_handlers=handlers, lifespan=self._lifespan)
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
        body = await body_of(request, self.limits.body_bytes, self.limits.body_seconds)
        asked = chat_request(parse(body), self.served.name)
        release = self._slot()
        try:
            events: asyncio.Queue[Event] = asyncio.Queue()
            writing = await self._answer(asked, events)
            watch = asyncio.create_task(_watch(request, writing, events))

            def finish() -> None:
                watch.cancel()
                writing.cancelled = True
                release()

        except BaseException:
            release()
            raise
        try:
            said = Said(asked, writing, events, self.served.name)
            first = await said.first()
            if not asked.stream:
                whole = reply(await said.whole(first))
                finish()
                return whole
            return Events(said.stream(first), self.limits.read_seconds, finish)
        except BaseException:
            finish()
            raise

    async def features(self, request: Request) -> Response:
        """The strongest features on each token."""
        if request.method == "GET":
            data: dict[str, Any] = _query(request)
        else:
            data = parse(await body_of(request, self.limits.body_bytes, self.limits.body_seconds))
        asked = features_request(data, self.served.name)
        self.served.check_saes(asked.saes)
        release = self._slot()
        try:
            tokens = await self._rendered(lambda: self.served.tokens(asked))
            return reply(await self._computed(lambda: self.served.features(asked, tokens)))
        finally:
            release()

    async def _answer(self, asked: ChatRequest, events: "asyncio.Queue[Event]") -> Answer:
        """An answer that has been handed to the engine."""
        row, most = await self._rendered(lambda: self.served.prompt(asked, self.limits.max_tokens))
        specs: tuple[SteerSpec, ...] = ()
        if asked.steering:
            relative = await self._rendered(lambda: self.served.specs(asked.steering))
            async with self._reading:
                if self.served.needs_scale(relative):
                    await _checked(asyncio.to_thread(self.served.read_scale))
            specs = await self._computed(lambda: self.served.absolute(relative))
        loop = asyncio.get_running_loop()

        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has been told to go at once
                loop.call_soon_threadsafe(events.put_nowait, event)

        tokenizer = self.served.lm.tokenizer
        options: dict[str, Any] = {"sampling": asked.sampling, "max_new_tokens": most, "stops": asked.stops}
        writing = Answer(row, tokenizer, sink, specs=specs, **options)
        self.engine.submit(writing)
        return writing

    async def _rendered(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._renderer, function)

    async def _computed(self, function: Callable[[], T]) -> T:
        """What the engine's thread computes.

        Raises:
            ApiError: it cannot be, or the server is stopping.
        """
        return await _checked(asyncio.wrap_future(self.engine.call(function)))

    def _slot(self) -> Callable[[], None]:
        """A place among the requests under way; gives what frees it.

        Raises:
            ApiError: there is none.
        """
        if self.stopping:
            raise stopping()
        if self._under_way >= self.limits.requests:
            message = f"{self.limits.requests} requests are under way; ask again in a second"
            raise ApiError(429, message, headers={"Retry-After": "1"})
        self._under_way += 1
        held = [1]

        def release() -> None:
            self._under_way -= held.pop() if held else 0

        return release

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None, None]:
        yield
        self.engine.drain(0.0)
        await asyncio.to_thread(self.engine.join)
        self._renderer.shutdown()


async def _checked(done: Awaitable[T]) -> T:
    """What a function gives; a user's mistake that it finds is the client's."""
    try:
        return await done
    except UserError as error:
        raise ApiError(400, str(error)) from None


async def _watch(request: Request, writing: Answer, events: "asyncio.Queue[Event]") -> None:
    """Free the row of a client that goes away."""
    await gone(request.receive)
    writing.cancelled = True
    events.put_nowait(Failed(ApiError(400, "the client has gone")))


def _query(request: Request) -> dict[str, Any]:
    """The query of a GET as the body of a POST."""
    data: dict[str, Any] = {key: request.query_params[key] for key in request.query_params}
    if "sae" in data:
        data["sae"] = request.query_params.getlist("sae")
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
