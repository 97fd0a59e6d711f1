"""`chatsae serve`: the process around the application: socket, key, signals."""

import asyncio
import ipaddress
import os
import shlex
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from chatsae import console
from chatsae.errors import UserError
from chatsae.serve.app import App, Limits
from chatsae.serve.engine import Engine
from chatsae.serve.errors import ApiError, as_json
from chatsae.serve.model import Served
from chatsae.serve.probe import measure_margin

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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


async def _serve(app: App, listening: socket.socket, key: str | None, options: Options) -> None:
    config = uvicorn.Config(
        app.asgi(key, ("localhost", options.host.strip("[]").lower(), listening.getsockname()[0])),
        http=type("_Timed", (_Protocol,), {"seconds": options.body_seconds}),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=2 * options.requests + 256,
        timeout_graceful_shutdown=int(options.grace) + 5,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        again, app.stopping = app.stopping, True
        app.engine.drain(0.0 if again else options.grace)
        server.should_exit = True
        counts = app.engine.counts()
        if not again and sum(counts.values()):
            console.say(f"stopping: {sum(counts.values())} answers have {options.grace:g} seconds to end")

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    app.engine.start()
    await server.serve(sockets=[listening])


class _Server(uvicorn.Server):
    """Leaves the signals to `_serve`, which ends answers first and the process with exit code 0."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Protocol(H11Protocol):
    """Ends connections whose request line and headers do not come within `seconds`."""

    seconds = 10.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(self.seconds, self._end, None)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # a request is here
            if self._late is not None:
                self._late.cancel()
            self._late = None
        elif self._late is None and not self.transport.is_closing():  # the beginning of another one
            self._late = self.loop.call_later(self.seconds, self._end, self.cycle)

    def _end(self, cycle: object) -> None:
        if self.cycle is cycle and not self.transport.is_closing():
            body = as_json(ApiError(408, f"the request did not come within {self.seconds:g} seconds").facts())
            head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\n" + head.encode() + body)
            self.transport.close()


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
        listening.listen(2048)
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
