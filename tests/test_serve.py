"""`chatsae serve` as a process, asked by the official client and by clients that misbehave."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatsae.cli import main
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.steering.generate import generate
from chatsae.steering.spec import SteerSpec
from serve_process import LAYER, Process, small_run

httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

STANDARD, JUMPRELU = "L3-2x-standard", "L3-2x-jumprelu"
KEY = "a-key-für-tests-123"
LIMITS = ("--requests", "3", "--body-seconds", "0.6", "--body-bytes", "5000", "--max-tokens", "2000", "--grace", "1.5")
ASK: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "What is a list?"}]}
# pushed hard enough, the model repeats itself and never ends
ENDLESS: dict[str, Any] = {**ASK, "temperature": 0, "steering": [{"sae": STANDARD, "feature": 3, "strength": 300}]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Process]:
    process = Process(run, "--port", "0")
    yield process
    process.send(signal.SIGKILL)
    process.end()


@pytest.fixture
def client(server: Process) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def post(url: str, body: Any, **options: Any) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return httpx.post(f"{url}/chat/completions", content=data, headers=headers, timeout=30, **options)


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


# --- what the official client gets ------------------------------------------------------------------------------------


def test_plain_and_streamed_answers_are_those_of_the_model(client: Any, run: Path) -> None:
    lm = LanguageModel("demo", [LAYER], head=True)
    (expected,) = generate(lm, ["What is a list?"], max_new_tokens=12).completions
    told = client.chat.completions.create(**ASK, temperature=0, max_tokens=12)
    assert told.choices[0].message.content == expected.text
    assert told.choices[0].finish_reason == expected.finish_reason == "length"
    assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (expected.n_prompt, 12)
    usage = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(**ASK, temperature=0, max_tokens=12, stream=True, stream_options=usage)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert len(chunks) > 10
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == expected.n_prompt + 12
    spec = SteerSpec(sae=SAE.load(run / "saes" / JUMPRELU), feature=7, strength=60.0)
    (expected,) = generate(lm, ["What is a list?"], [[spec]], max_new_tokens=12).completions
    body = {"steering": [{"sae": JUMPRELU, "feature": 7, "strength": 60}]}
    steered = client.chat.completions.create(**ASK, temperature=0, max_tokens=12, extra_body=body)
    assert steered.choices[0].message.content == expected.text != told.choices[0].message.content
    read = expected.n_prompt + len(expected.token_ids) - 1  # the last token is never read
    assert steered.steering == [{"spec": "add 60 feature 7", "layer": LAYER, "tokens": read}]


def test_seed_stop_and_length_are_kept(client: Any) -> None:
    def said(**options: Any) -> Any:
        return client.chat.completions.create(**ASK, **({"max_tokens": 16} | options)).choices[0]

    first, second = (said(temperature=1.2, top_p=0.95, seed=5).message.content for _ in range(2))
    assert first == second
    assert len({said(temperature=1.5, seed=i, max_tokens=6).message.content for i in range(4)}) > 1
    whole = said(temperature=0, max_tokens=40).message.content
    stop = whole[10:13]
    cut = said(temperature=0, max_tokens=40, stop=["never this", stop])
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert said(temperature=0, max_tokens=200).finish_reason == "stop"


def test_a_spec_that_meets_no_token_says_so(client: Any) -> None:
    spec = {"sae": STANDARD, "feature": 1, "strength": 9, "where": {"positions": [1999]}}
    told = client.chat.completions.create(**ASK, temperature=0, max_tokens=2, extra_body={"steering": [spec]})
    assert told.steering[0]["tokens"] == 0


def test_strengths_in_units_of_the_layer(client: Any) -> None:
    body = {"steering": {"sae": STANDARD, "feature": 1, "strength": 0.5, "unit": "rel_norm"}}
    told = client.chat.completions.create(**ASK, temperature=0, max_tokens=1, extra_body=body)
    alpha = float(told.steering[0]["spec"].split()[1])
    assert 5 < alpha < 100


def test_models_and_features(client: Any, server: Process) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert [sae["name"] for sae in model.saes] == [STANDARD, JUMPRELU]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    got = httpx.get(f"{server.url}/features", params={"text": "Hi", "k": 3, "sae": STANDARD}).json()
    posted = httpx.post(f"{server.url}/features", json={"text": "Hi", "k": 3, "sae": [STANDARD]}).json()
    assert got == posted
    (found,) = got["data"]
    assert (found["sae"], found["layer"]) == (STANDARD, LAYER)
    tokens = {row["token"] for row in found["tokens"] if (row["role"], row["kind"]) == ("user", "content")}
    assert "".join(tokens) == "Hi"
    assert {len(row["features"]) for row in found["tokens"]} == {3}
    values = [feature["value"] for feature in found["tokens"][-1]["features"]]
    assert values == sorted(values, reverse=True)
    turns = [*ASK["messages"], {"role": "assistant", "content": "A sequence."}]
    both = httpx.post(f"{server.url}/features", json={"messages": turns}).json()["data"]
    assert [each["sae"] for each in both] == [STANDARD, JUMPRELU]
    assert httpx.get(f"{server.url}/features", params={"text": "Hi", "sae": "other"}).status_code == 404


async def streamed(client: Any, body: dict[str, Any], extra: dict[str, Any]) -> str:
    stream = await client.chat.completions.create(**body, stream=True, extra_body=extra)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def together(url: str, bodies: list[dict[str, Any]]) -> tuple[list[str], int]:
    """All at once; and the most that were under way at one time."""
    most = 0

    async def look() -> None:
        nonlocal most
        async with httpx.AsyncClient() as other:
            while True:
                most = max(most, (await other.get(url.replace("/v1", "/health"))).json()["running"])
                await asyncio.sleep(0.02)

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        looking = asyncio.create_task(look())
        texts = await asyncio.gather(*(streamed(client, b, {"steering": specs(i)}) for i, b in enumerate(bodies)))
        looking.cancel()
    return texts, most


def test_fifty_streaming_clients_get_what_they_get_alone(client: Any, server: Process) -> None:
    words = ("What is a list?", "Hi", "Explain the module that reads files, please.", "Who are you?")
    bodies = []
    for i in range(50):
        messages = [{"role": "user", "content": f"{words[i % 4]} {i % 6}"}]
        how = {"temperature": 0} if i % 2 else {"temperature": 0.9, "top_p": 0.9, "seed": i}
        bodies.append({"model": "demo", "messages": messages, "max_tokens": 4 + i % 5, **how})
    alone = [
        client.chat.completions.create(**body, extra_body={"steering": specs(i)}).choices[0].message.content
        for i, body in enumerate(bodies)
    ]
    texts, most = asyncio.run(together(server.url, bodies))
    assert texts == alone
    assert most > 10
    assert len(set(alone)) > 25


# --- requests that cannot be answered ---------------------------------------------------------------------------------

BAD: list[tuple[Any, int, str]] = [
    (b"{", 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b"[" * 4000, 400, "nested"),
    (b'{"n": 1' + b"0" * 4500 + b"}", 400, "not JSON"),
    (b"[]", 400, "JSON object"),
    ({"messages": ASK["messages"]}, 400, "model is missing"),
    ({**ASK, "model": "gpt-4"}, 404, "there is 'demo'"),
    ({**ASK, "model": "\ud800"}, 404, "there is 'demo'"),
    ({**ASK, "messages": []}, 400, "at least one"),
    ({**ASK, "messages": [{"role": "user"}]}, 400, r"messages\[0\].content is missing"),
    ({**ASK, "messages": [{"role": "robot", "content": "x"}]}, 400, "role must be one of"),
    ({**ASK, "messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "special token"),
    ({**ASK, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "Unicode"),
    ({**ASK, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
    ({**ASK, "messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context is 2048 tokens"),
    ({**ASK, "max_tokens": 1025}, 400, "allows answers of 1024 tokens"),
    ({**ASK, "max_tokens": 0}, 400, "whole number from 1"),
    ({**ASK, "temperature": 3}, 400, "from 0 to 2"),
    ({**ASK, "temperature": True}, 400, "must be a number"),
    ({**ASK, "seed": 10**30}, 400, "whole number"),
    ({**ASK, "stop": [""]}, 400, "1 to 256 characters"),
    ({**ASK, "tempreature": 1}, 400, "perhaps temperature"),
    ({**ASK, "n": 2}, 400, "n is not supported"),
    ({**ASK, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
    ({**ASK, "steering": ["x"]}, 400, r"steering\[0\] must be an object"),
    ({**ASK, "steering": [{"feature": 1}]}, 400, r"steering\[0\].*which sae"),
    ({**ASK, "steering": [{"sae": "../run", "feature": 1}]}, 400, "has no SAE"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": 10**6}]}, 400, "does not exist"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": 1, "strenght": 1}]}, 400, "perhaps strength"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": 1, "strength": 10**400}]}, 400, "whole number of at most"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": 1, "where": {"positions": [0] * 300}}]}, 400, "at most 256"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": 1, "unit": "auto"}]}, 400, "chosen beforehand"),
    ({**ASK, "steering": [{"vector": [1, 2], "layer": 3}]}, 400, "2 numbers, the stream of demo 192"),
    ({**ASK, "steering": [{"vector": [1] * 192, "layer": 99}]}, 400, "layer 99 does not exist"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": 1, "strength": 1e300}]}, 400, "too large"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": 1}] * 17}, 400, "at most 16 specs"),
]


def test_what_cannot_be_answered_is_refused_with_its_reason(server: Process) -> None:
    with httpx.Client(timeout=30) as client:
        for body, status, message in BAD:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            got = client.post(f"{server.url}/chat/completions", content=data, headers=headers)
            error = got.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert got.status_code == status, (error, data[:100])
            assert re.search(message, error["message"]), error
        assert client.get(f"{server.url}/nothing").status_code == 404
        assert client.get(f"{server.url}/chat/completions").status_code == 405
        plain = client.post(f"{server.url}/chat/completions", content=json.dumps(ASK), headers={"Content-Type": "x/y"})
        assert plain.status_code == 415
        for host in ("rebound.example", "[", "", "localhost.example:80"):
            assert client.get(f"{server.url}/models", headers={"Host": host}).status_code == 403
        assert client.get(f"{server.url}/models", headers={"Host": "LOCALHOST:1"}).status_code == 200
        assert client.get(f"{server.url}/models/").status_code == 404
    assert post(server.url, {**ASK, "max_tokens": 1}).status_code == 200


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds
        time.sleep(0.02)


def raw(port: int, data: bytes) -> bytes:
    """What comes back on a connection for these bytes, until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(data)
        got = b""
        try:
            while part := connection.recv(65536):
                got += part
        except ConnectionResetError:
            pass
        return got


def test_a_client_that_hangs_up_leaves_nothing_behind(server: Process) -> None:
    def running() -> int:
        found = httpx.get(server.url.replace("/v1", "/health")).json()
        assert (found["status"], found["waiting"]) == ("ok", 0)
        return found["running"]

    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for stream in (True, False):
        body = json.dumps({**ENDLESS, "stream": stream, "max_tokens": 1000}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: running() == 1)
        wait_until(lambda: running() == 0, 4.0)  # 1000 tokens take longer
    assert b" 400 " in raw(server.port, b"NONSENSE\r\n\r\n")


# --- killed, and started again on the same port, behind a key and narrow limits -------------------------------------


@pytest.fixture(scope="module")
def strict(server: Process, run: Path) -> Iterator[Process]:
    with httpx.stream(
        "POST", f"{server.url}/chat/completions", json={**ENDLESS, "stream": True}, timeout=30
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.send(signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            list(lines)
    assert server.end() == -signal.SIGKILL
    flags = ("--port", str(server.port), "--api-key-env", "CHATSAE_TEST_KEY", *LIMITS)
    process = Process(run, *flags, env={"CHATSAE_TEST_KEY": KEY})
    yield process
    process.send(signal.SIGKILL)
    process.end()


def keyed(key: str) -> dict[str, bytes]:
    return {"Authorization": f"Bearer {key}".encode()}


def test_after_a_kill_it_answers_again_but_only_with_the_key(strict: Process) -> None:
    body = {**ASK, "max_tokens": 1}
    assert post(strict.url, body, headers=keyed(KEY)).status_code == 200
    for headers in ({}, keyed(KEY[:-1]), {"Authorization": KEY.encode()}):
        got = post(strict.url, body, headers=headers)
        assert got.status_code == 401
        assert got.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{strict.url}/models").status_code == 401
    assert httpx.get(f"{strict.url}/models", headers={"Host": "["} | keyed(KEY)).status_code == 200
    assert httpx.get(strict.url.replace("/v1", "/health")).json()["status"] == "ok"
    assert KEY not in strict.logged()
    assert "$CHATSAE_TEST_KEY" in strict.logged()


def test_large_and_slow_requests_are_refused(strict: Process) -> None:
    large = {**ASK, "messages": [{"role": "user", "content": "x" * 20_000}]}
    assert post(strict.url, large, headers=keyed(KEY)).status_code == 413
    chunks = (b"x" * 4000 for _ in range(4))
    headers = {"Content-Type": "application/json"} | keyed(KEY)
    assert httpx.post(f"{strict.url}/chat/completions", content=chunks, headers=headers).status_code == 413
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Authorization: Bearer " + KEY.encode() + b"\r\nContent-Length: 100\r\n"
    got: list[bytes] = []
    slow = [head + b"\r\n{", head, b""]  # half a body, half the headers, nothing
    threads = [threading.Thread(target=lambda part=part: got.append(raw(strict.port, part))) for part in slow]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer[:12] for answer in got] == [b"HTTP/1.1 408"] * 3


def test_one_request_too_many_is_told_to_come_back(strict: Process) -> None:
    body = {**ENDLESS, "stream": True, "max_tokens": 400}
    with httpx.Client(headers=keyed(KEY), timeout=30) as client:
        streams = [client.stream("POST", f"{strict.url}/chat/completions", json=body) for _ in range(3)]
        opened = [stream.__enter__() for stream in streams]
        assert [response.status_code for response in opened] == [200] * 3
        full = client.post(f"{strict.url}/chat/completions", json=ASK)
        assert full.status_code == 429
        assert full.headers["retry-after"] == "1"
        for stream in streams:
            stream.__exit__(None, None, None)
        one = {**ASK, "max_tokens": 1}
        wait_until(lambda: client.post(f"{strict.url}/chat/completions", json=one).status_code == 200)


def test_sigterm_lets_short_answers_end_and_ends_the_others(strict: Process) -> None:
    lines: dict[str, list[str]] = {"short": [], "long": []}

    def listen(name: str, tokens: int) -> None:
        body = {**ENDLESS, "stream": True, "max_tokens": tokens}
        with httpx.stream(
            "POST", f"{strict.url}/chat/completions", json=body, headers=keyed(KEY), timeout=30
        ) as response:
            lines[name] += [line for line in response.iter_lines() if line]

    threads = [threading.Thread(target=listen, args=each) for each in (("short", 30), ("long", 2000))]
    for thread in threads:
        thread.start()
    wait_until(lambda: httpx.get(strict.url.replace("/v1", "/health")).json()["running"] == 2)
    strict.send(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert strict.process.wait(20) == 0
    assert lines["short"][-1] == "data: [DONE]"
    assert json.loads(lines["long"][-1].removeprefix("data: "))["error"]["code"] == "server_shutdown"
    assert "Traceback" not in strict.logged()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{strict.url}/models")


# --- what it refuses to start with ------------------------------------------------------------------------------------


def test_it_refuses_to_start_with_one_clear_message(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_KEY_HERE", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for argv, message in (
            ([str(run), "--port", port], f"127.0.0.1, port {port}: Address already in use"),
            ([str(tmp_path / "none"), "--port", "0"], "none does not exist"),
            ([str(tmp_path), "--port", "0"], "holds no run"),
            ([str(run), "--port", "0", "--host", "0.0.0.0"], "--api-key-env VAR is needed"),
            ([str(run), "--port", "0", "--api-key-env", "NO_KEY_HERE"], "not set, or empty"),
            ([str(run), "--port", "0", "--host", "no.such.host.invalid"], "--host no.such.host.invalid: "),
            ([str(run), "--port", "70000"], "--port must be"),
            ([str(run), "--batch", "0"], "--batch must be at least 1"),
        ):
            assert main(["serve", *argv]) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1


def test_without_its_extra_it_says_what_to_install(run: Path) -> None:
    code = "import sys; sys.modules['uvicorn'] = None\nfrom chatsae.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "serve", str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'chatsae[serve]'" in done.stderr
