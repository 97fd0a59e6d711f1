"""`chatsae serve` with many clients, large requests, and clients that misbehave: none of them is felt by the others."""

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from chatsae.serve import app as app_module
from chatsae.serve.answer import Answer
from chatsae.serve.app import Limits
from chatsae.serve.model import Served
from chatsae.serve.rows import Rows
from serve_process import PATIENCE, Inside, small_run, wait_until

httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")

STANDARD, JUMPRELU = "L3-2x-standard", "L3-2x-jumprelu"
KEY = "a-key-for-tests"
ASK: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "What is a list?"}]}
SHORT = {**ASK, "max_tokens": 1}
# pushed hard enough, the model repeats itself and never ends
ENDLESS: dict[str, Any] = {**ASK, "temperature": 0, "steering": [{"sae": STANDARD, "feature": 3, "strength": 300}]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(small_run(tmp_path_factory.mktemp("serve") / "run"), 8192)


@pytest.fixture
def server(served: Served) -> Iterator[Inside]:
    with Inside(served, Limits(body_seconds=PATIENCE)) as server:
        yield server


def sent(body: dict[str, Any]) -> bytes:
    """A whole request."""
    data = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(data) + data


def connect(server: Inside, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    connection.sendall(data)
    return connection


def wait_for(connection: socket.socket, text: bytes) -> None:
    """Read until it has come."""
    got = b""
    while text not in got:
        part = connection.recv(4096)
        assert part, got
        got += part


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    with connection:
        got = b""
        try:
            while part := connection.recv(65536):
                got += part
        except ConnectionResetError:
            pass
        return got


def answered(server: Inside, body: dict[str, Any] = SHORT, key: str = "none") -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    got = httpx.post(f"{server.url}/chat/completions", json=body, headers=headers, timeout=PATIENCE)
    assert got.status_code == 200, got.text
    return got.json()


# --- many at once -----------------------------------------------------------------------------------------------------


def specs(i: int) -> list[dict[str, Any]]:
    """Different steering for each of many clients; every tenth has none."""
    ops = ("add", "set", "min_clamp", "ablate", "add")
    spec: dict[str, Any] = {"sae": (STANDARD, JUMPRELU)[i % 2], "feature": 5 * i, "op": ops[i % 5]}
    if spec["op"] != "ablate":
        spec["strength"] = 20 + 3 * i
    if i % 3 == 1:
        spec["where"] = {"phase": ("prompt", "generated")[i % 2], "exclude": [0]}
    if i % 7 == 2:
        spec |= {"schedule": "decay", "schedule_tokens": 4}
    return [] if i % 10 == 9 else [spec]


async def streamed(client: Any, body: dict[str, Any], extra: dict[str, Any]) -> str:
    stream = await client.chat.completions.create(**body, stream=True, extra_body=extra)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def together(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
        return await asyncio.gather(*(streamed(client, b, {"steering": specs(i)}) for i, b in enumerate(bodies)))


def test_fifty_streaming_clients_get_what_they_get_alone(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("What is a list?", "Hi", "Explain the module that reads files, please.", "Who are you?")
    bodies = []
    for i in range(50):
        messages = [{"role": "user", "content": f"{words[i % 4]} {i % 6}"}]
        how = {"temperature": 0} if i % 2 else {"temperature": 0.9, "top_p": 0.9, "seed": i}
        bodies.append({"model": "demo", "messages": messages, "max_tokens": 4 + i % 5, **how})
    alone = [
        answered(server, {**body, "steering": specs(i)})["choices"][0]["message"]["content"]
        for i, body in enumerate(bodies)
    ]
    most, fit = 0, Rows.fit

    def fit_all(rows: Rows, waiting: list[Answer], room: int) -> int:  # none begins before all are there
        nonlocal most
        most = max(most, len(waiting))
        time.sleep(0 if most == len(bodies) else 0.01)
        return fit(rows, waiting, room) if most == len(bodies) else 0

    monkeypatch.setattr(Rows, "fit", fit_all)
    assert asyncio.run(together(server.url, bodies)) == alone
    assert len(set(alone)) > 25


# --- large requests ---------------------------------------------------------------------------------------------------


class Tokenizing:
    """What tokenizers are given; texts of more than 5,000 characters wait until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.long: list[int] = []
        self.go = threading.Event()
        tokenize = PreTrainedTokenizerBase.__call__

        def watched(tokenizer: Any, text: Any, **options: Any) -> Any:
            characters = sum(map(len, [text] if isinstance(text, str) else text))
            if characters > 5000:
                self.long.append(characters)
                assert self.go.wait(PATIENCE)
            return tokenize(tokenizer, text, **options)

        monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", watched)


LARGE = [  # tokens of one character, of sixteen, and of words; and more messages than fit
    {**SHORT, "messages": [{"role": "user", "content": text}]}
    for text in ("x" * 1_000_000, " " * 1_000_000, "word " * 200_000)
] + [{**SHORT, "messages": [{"role": "user", "content": ""}] * 25_000}]


def test_short_requests_do_not_wait_for_large_ones(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Tokenizing(monkeypatch)
    try:
        large = [connect(server, sent(body)) for body in LARGE * 2]
        wait_until(lambda: seen.long)
        answered(server)
        assert httpx.get(f"{server.url}/features", params={"text": "Hi"}, timeout=PATIENCE).status_code == 200
    finally:
        seen.go.set()
    for connection in large:
        with connection:
            wait_for(connection, b"this model's context is 2048 tokens")
    assert max(seen.long) <= app_module._PIECE
    assert sum(seen.long) < 8 * 130_000  # 2,048 tokens of the longest one are 127,000 characters


def test_long_requests_that_fit_get_the_same(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a request is taken for a long one changes nothing."""
    asked = {**ASK, "messages": [{"role": "user", "content": "word " * 2000}], "temperature": 0}
    texts = {"text": "word " * 1990, "raw": True, "k": 2}
    found = []
    for short in (1 << 20, 0):
        monkeypatch.setattr(app_module, "_SHORT", short)
        reply = answered(server, asked)
        features = httpx.post(f"{server.url}/features", json=texts, timeout=PATIENCE).json()
        found.append((reply["choices"], reply["usage"], features))
    assert found[0] == found[1]
    for body in (
        {"text": "word " * 3000},
        {"text": "word " * 3000, "raw": True},
        {"messages": [ASK["messages"][0]] * 2049},
    ):
        got = httpx.post(f"{server.url}/features", json=body, timeout=PATIENCE)
        assert got.json()["error"]["code"] == "context_length_exceeded"


def test_requests_whose_clients_have_gone_are_dropped(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Tokenizing(monkeypatch)
    try:
        large = [connect(server, sent(LARGE[0])) for _ in range(8)]
        wait_until(lambda: seen.long and server.app._under_way == 8)
        for connection in large:
            connection.close()
        wait_until(lambda: server.app._under_way == 0)
    finally:
        seen.go.set()
    server.app._long.thread.submit(lambda: None).result(PATIENCE)
    assert seen.long == [app_module._PIECE]


def test_a_client_that_hangs_up_leaves_nothing_behind(server: Inside) -> None:
    for stream in (True, False):
        with connect(server, sent({**ENDLESS, "stream": stream, "max_tokens": 1000})):
            wait_until(lambda: server.engine.rows.answers and server.engine.rows.answers[0].new)
            held = ExitStack()
            held.enter_context(server.held())
        with held:
            answers = list(server.engine.rows.answers)
            wait_until(lambda answers=answers: answers[0].cancelled)
        wait_until(lambda: server.engine.counts() == {"running": 0, "waiting": 0})
        assert len(answers[0].new) < 1000
        assert server.app._under_way == 0
    answered(server)


# --- connections ------------------------------------------------------------------------------------------------------


def test_idle_connections_are_not_felt(served: Served) -> None:
    """600 of them, at twice as many descriptors in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip(f"a process may have {hard} file descriptors here; 2,000 are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        with Inside(served, Limits(body_seconds=PATIENCE), key=KEY) as server, ExitStack() as idle:
            for data in (b"", b"POST /v1/chat/comple", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n") * 200:
                idle.enter_context(connect(server, data))
            wait_until(lambda: len(server.server.server_state.connections) == 600)
            for _ in range(3):
                answered(server, key=KEY)
            assert len(server.server.server_state.connections) >= 600  # theirs, and perhaps the last answer's
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_oldest_idle_connections_go_where_descriptors_run_short(server: Inside) -> None:
    server.server._most = 60
    with ExitStack() as opened:
        working = opened.enter_context(connect(server, sent({**ENDLESS, "stream": True, "max_tokens": 1000})))
        wait_for(working, b"data: ")
        with server.held():
            old = [opened.enter_context(connect(server)) for _ in range(40)]
            wait_until(lambda: len(server.server._quiet) == 40)
            new = [opened.enter_context(connect(server, b"GET ")) for _ in range(40)]
            wait_until(lambda: len(server.server.server_state.connections) == 60)
            closed = [connection for connection in old if closed_by_now(connection)]
            assert len(closed) == 21  # with the one that works there were 81
            assert not any(map(closed_by_now, [*new, working]))
    answered(server)


def closed_by_now(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b"" or connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 408"
    except BlockingIOError:
        return False


def test_slow_requests_are_ended(served: Served) -> None:
    head = sent(SHORT).partition(b"\r\n\r\n")[0]
    with Inside(served, Limits(body_seconds=0.3)) as server:
        half = connect(server, sent(SHORT)[:-9])  # of a body
        slow = [half, connect(server, head), connect(server)]
        assert [rest(connection)[:12] for connection in slow] == [b"HTTP/1.1 408"] * 3
        again = connect(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(again, b'"ok"')
        again.sendall(b"GET /health")  # the next one never comes
        assert rest(again).startswith(b"HTTP/1.1 408")


def test_bodies_that_are_being_read_have_a_limit_together(served: Served) -> None:
    with Inside(served, Limits(body_seconds=PATIENCE, body_bytes=20_000, requests=2)) as server, ExitStack() as slow:
        part = sent({**SHORT, "user": "x" * 19_000})[:-9]
        for i in (1, 2):
            slow.enter_context(connect(server, part))
            wait_until(lambda i=i: server.app._bodies._left < 40_000 - 19_000 * i)
        answered(server)  # what is left is enough for this
        got = httpx.post(f"{server.url}/chat/completions", json={**SHORT, "user": "x" * 15_000}, timeout=PATIENCE)
        assert (got.status_code, got.headers["retry-after"]) == (429, "1")
        slow.close()
        wait_until(lambda: server.app._bodies._left == 40_000)


def test_a_client_that_never_reads_is_let_go(served: Served) -> None:
    with Inside(served, Limits(body_seconds=0.3, read_seconds=0.3)) as server:
        server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with ExitStack() as deaf:
            for data in (
                sent({**ENDLESS, "stream": True, "max_tokens": 1000}),
                b"GET /v1/features?sae="
                + STANDARD.encode()
                + b"&text="
                + b"word+" * 1900
                + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            ):
                connection = deaf.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect(("127.0.0.1", server.port))
                connection.sendall(data)
                assert connection.recv(1, socket.MSG_PEEK) == b"H"
                wait_until(lambda: not server.server.server_state.connections)
        wait_until(lambda: server.engine.counts() == {"running": 0, "waiting": 0})
        assert server.app._under_way == 0
        answered(server)
