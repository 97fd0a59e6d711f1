"""A server on loopback that speaks the chat completions protocol and does what it is told, and features to judge."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from chatsae.features.records import Context, Feature

Script = Callable[[dict[str, Any], int], "Reply"]


@dataclass
class Reply:
    """What the server sends; `seconds` before it does."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Served:
    """The server's address, and what it was asked."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    under_way: int = 0
    highest: int = 0
    clients: list[Any] = field(default_factory=list)
    """Closed before the server is."""


def said(text: str | None, **message: Any) -> Reply:
    """An answer of 10 tokens to a prompt of 100."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    return Reply({"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})


def rated(score: int, deviating: tuple[int, ...] = (), explanation: str = "digits") -> Reply:
    """An answer to the rubric."""
    return said(json.dumps({"explanation": explanation, "deviating": list(deviating), "score": score}))


@contextmanager
def serve(script: Script) -> Iterator[Served]:
    """Serve replies of a script, which gets the request's body and its number."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.bodies)
                served.bodies.append(body)
                served.headers.append(dict(self.headers))
                served.times.append(time.monotonic())
                served.under_way += 1
                served.highest = max(served.highest, served.under_way)
            assert self.path == "/v1/chat/completions"
            reply = script(body, number)
            time.sleep(reply.seconds)
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            with lock:
                served.under_way -= 1
            try:
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # whoever asked did not wait

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        for each in served.clients:
            each.close()
        server.shutdown()
        thread.join()
        server.server_close()


def context(text: str, peak: int, *, role: int = 3, value: float = 5.0, dialogue: str = "d") -> Context:
    """A window of words, a token each, with the space before it."""
    words = text.split(" ")
    tokens = tuple(word if i == 0 else f" {word}" for i, word in enumerate(words))
    n = len(tokens)
    return Context(
        feature=0,
        dialogue=dialogue,
        value=value,
        quantile=None,
        start=0,
        peak=peak,
        input_ids=tuple(range(n)),
        tokens=tokens,
        acts=tuple(value if i == peak else 0.0 for i in range(n)),
        role=(role,) * n,
        kind=(0,) * n,
        turn=(0,) * n,
        prefix=(False,) * n,
    )


def feature(index: int, n: int = 5) -> Feature:
    """A feature with `n` contexts, strongest first, each of which names the feature and its rank."""
    contexts = tuple(context(f"feature{index} rank{i} word", 1, value=10.0 - i, dialogue=f"d{i}") for i in range(n))
    return Feature(index, 0.01, 10.0, contexts, (), (), ())
