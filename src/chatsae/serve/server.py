"""`chatsae serve`: the process around the application: socket, key, signals."""

import asyncio
import errno
import ipaddress
import os
import resource
import shlex
import signal
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvicorn

from chatsae import console
from chatsae.errors import UserError
from chatsae.serve.app import App, Limits
from chatsae.serve.engine import Engine
from chatsae.serve.errors import ApiError, as_json
from chatsae.serve.model import Served
from chatsae.serve.probe import measure_margin

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_SECONDS = 5.0  # to send what ends a stream
_BACKLOG = 2048  # connections that the system keeps until they are accepted
_ACCEPTED = 32  # connections that are accepted before anything else is done: their descriptors must be there
_DESCRIPTORS = 100  # file descriptors for all else than connections


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `serve_run` is asked; the fields of the verb."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None
    max_tokens: int = 1024
    context: int = 8192
    batch: int = 64
    requests: int = 128
    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    margin: float | None = None
    grace: float = 10.0
    json: bool = False


def serve_run(path: Path, options: Options) -> None:
    """Serve a run until a signal ends it.

    Raises:
        UserError: there is no such run, the address cannot be had, or a key is needed and not there.
    """
    _check(options)
    key = _key(options.api_key_env)
    listening = _listen(options.host, options.port)
    try:
        if key is None and not _is_loopback(listening):
            raise UserError(f"--host {options.host} can be reached from other machines: --api-key-env VAR is needed")
        served = Served(path, options.context)
        margin, why = measure_margin(served.lm) if options.margin is None else (options.margin, "--margin")
        engine = Engine(served.lm, margin, most=options.batch)
        names = ("body_bytes", "body_seconds", "max_tokens", "requests")
        app = App(served, engine, Limits(**{name: getattr(options, name) for name in names}))
        _announce(served, listening, options, margin, why)
        asyncio.run(_serve(app, listening, key, options))
    finally:
        listening.close()


def server_of(app: App, listening: socket.socket, key: str | None, options: Options) -> "Server":
    """The server of the application, which leaves signals alone."""
    config = uvicorn.Config(
        app.asgi(key, ("localhost", options.host.strip("[]").lower(), listening.getsockname()[0])),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_ACCEPTED,
    )
    return Server(config, options.body_seconds, app.limits.read_seconds)


async def _serve(app: App, listening: socket.socket, key: str | None, options: Options) -> None:
    server = server_of(app, listening, key, options)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        again, app.stopping = app.stopping, True
        seconds = 0.0 if again else options.grace
        app.engine.drain(seconds)
        server.should_exit = True
        loop.call_later(seconds + _LAST_SECONDS, server.abort)
        under_way = sum(app.engine.counts().values())
        if under_way and not again:
            console.say(f"stopping: {under_way} answers have {options.grace:g} seconds to end")

    loop.set_exception_handler(server.log)
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    app.engine.start()
    try:
        await server.serve(sockets=[listening])
    finally:
        app.close()


class Server(uvicorn.Server):
    """uvicorn's server; it closes connections that wait for nothing, and leaves signals to whoever runs it.

    A connection is quiet while no request on it is complete, or its client reads nothing of what is left to send.
    Quiet ones are closed after a while, and before that, the oldest first, where file descriptors run short.
    """

    def __init__(self, config: uvicorn.Config, seconds: float, read_seconds: float) -> None:
        """`seconds`: for a request to come; `read_seconds`: for a client to read."""
        super().__init__(config)
        self._seconds, self._read_seconds = seconds, read_seconds
        self._silent_until = 0.0
        self._quiet: dict[Any, tuple[Any, float]] = {}  # what a connection was last seen at, and since when
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = sys.maxsize if soft == resource.RLIM_INFINITY else soft - min(_DESCRIPTORS, soft // 2)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)  # asyncio has set it to the number that it accepts at a time

    def log(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A line now and then where there is no descriptor for a connection; a traceback of all else."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() > self._silent_until:
            self._silent_until = loop.time() + 60
            console.warn("no file descriptor is left for a new connection; idle ones are being closed")

    def abort(self) -> None:
        """Close all connections, whatever is under way on them."""
        for connection in list(self.server_state.connections):
            cast(Any, connection).transport.abort()

    async def on_tick(self, counter: int) -> bool:
        self._close_quiet(time.monotonic())
        return await super().on_tick(counter)

    def _close_quiet(self, now: float) -> None:
        connections: Any = self.server_state.connections
        before, self._quiet = self._quiet, {}
        for connection in connections:
            if (state := _state(connection)) is not None:
                seen, since = before.get(connection, (None, now))
                self._quiet[connection] = (state, since if seen == state else now)
        spare = len(connections) - self._most
        for connection, ((_, unsent), since) in sorted(self._quiet.items(), key=lambda item: item[1][1]):
            kept_alive = connection.timeout_keep_alive_task is not None and not unsent  # uvicorn ends those
            late = now - since > (self._read_seconds if unsent else self._seconds)
            if spare > 0 or (late and not kept_alive):
                _close(connection, self._seconds)
                spare -= 1


def _state(connection: Any) -> tuple[Any, int] | None:
    """What changes as long as something happens on a connection; None while a request is being answered."""
    unsent = connection.transport.get_write_buffer_size()
    cycle = connection.cycle
    busy = cycle is not None and not cycle.response_complete and not connection.transport.is_closing()
    return None if busy else (cycle, unsent)


def _close(connection: Any, seconds: float) -> None:
    transport = connection.transport
    if transport.is_closing() or transport.get_write_buffer_size():
        transport.abort()
        return
    body = as_json(ApiError(408, f"the request did not come within {seconds:g} seconds").facts())
    head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    transport.write(b"HTTP/1.1 408 Request Timeout\r\n" + head.encode() + body)
    transport.close()


def _check(options: Options) -> None:
    for name in ("max_tokens", "context", "batch", "requests", "body_bytes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    for name in ("body_seconds", "grace", "margin"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be a number of at least 0, not {value}")
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port must be 0 (any free one) to 65535, not {options.port}")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"--api-key-env {variable}: this environment variable is not set, or empty")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, proto)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise UserError(f"{host}, port {port}: {error.strerror or error}; choose another --port") from None
    return listening


def _is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def _announce(served: Served, listening: socket.socket, options: Options, margin: float | None, why: str) -> None:
    name, port = listening.getsockname()[:2]
    url = f"http://{f'[{name}]' if ':' in name else name}:{port}/v1"
    together = (
        "each token read alone" if margin is None else f"up to {options.batch} answers at once, margin {margin:.2g}"
    )
    console.say(f"{served.name} with {', '.join(served.saes)} at {url} ({together}: {why})")
    sae = next(iter(served.saes))
    spec = {"sae": sae, "feature": 0, "strength": 0.5, "unit": "rel_norm"}
    body = {"model": served.name, "messages": [{"role": "user", "content": "Who are you?"}], "steering": [spec]}
    auth = "" if options.api_key_env is None else f'-H "Authorization: Bearer ${options.api_key_env}" '
    data = shlex.quote(as_json(body).decode())
    console.say(f"  curl {url}/chat/completions -H 'Content-Type: application/json' {auth}-d {data}")
    if options.json:
        console.result({"url": url, "pid": os.getpid(), **served.listed()})
