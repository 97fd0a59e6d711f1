"""`chatsae serve` as a process, asked by the official client, and what it refuses."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chatsae.cli import main
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.steering.generate import generate
from chatsae.steering.spec import SteerSpec
from serve_process import LAYER, PATIENCE, Process, small_run, wait_until

httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

STANDARD, JUMPRELU = "L3-2x-standard", "L3-2x-jumprelu"
KEY = "a-key-für-tests-123"
LIMITS = ("--requests", "3", "--body-bytes", "5000", "--max-tokens", "2000")
LIMITS += ("--body-seconds", f"{PATIENCE}", "--grace", f"{PATIENCE}")  # no test waits until they are over
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
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def post(url: str, body: Any, **options: Any) -> Any:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return httpx.post(f"{url}/chat/completions", content=data, headers=headers, timeout=PATIENCE, **options)


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


def test_answers_come_back_as_the_client_gives_them(client: Any) -> None:
    """What the client has parsed is whole by its own types, and can be sent again as it is."""
    how: dict[str, Any] = {"temperature": 0, "max_tokens": 200, "extra_body": {"steering": None, "tools": None}}
    told = client.chat.completions.create(**ASK, **how)
    assert type(told).model_validate(told.model_dump(), strict=True) == told
    chunks = list(client.chat.completions.create(**ASK, **how, stream=True))
    for chunk in chunks:
        assert type(chunk).model_validate(chunk.model_dump(), strict=True) == chunk
    with client.chat.completions.stream(**ASK, temperature=0, max_tokens=200) as stream:
        gathered = stream.get_final_completion().choices[0].message
    how["max_tokens"] = 6
    follow_up = {"role": "user", "content": "And?"}
    answers = []
    for message in (told.choices[0].message, told.choices[0].message.model_dump(), gathered, gathered.model_dump()):
        turns = [*ASK["messages"], message, follow_up]
        answers.append(client.chat.completions.create(**ASK | {"messages": turns}, **how).choices[0].message.content)
    plain = [*ASK["messages"], {"role": "assistant", "content": told.choices[0].message.content}, follow_up]
    answers.append(client.chat.completions.create(**ASK | {"messages": plain}, **how).choices[0].message.content)
    assert len(set(answers)) == 1
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [*ASK["messages"], {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="tool calls are not supported") as error:
        client.chat.completions.create(model="demo", messages=turns)
    assert (error.value.param, error.value.code) == ("messages[1].tool_calls", "unsupported_parameter")


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
    url = f"{server.url}/features"
    got = httpx.get(url, params={"text": "Hi", "k": 3, "sae": STANDARD}, timeout=PATIENCE).json()
    posted = httpx.post(url, json={"text": "Hi", "k": 3, "sae": [STANDARD]}, timeout=PATIENCE).json()
    assert got == posted
    (found,) = got["data"]
    assert (found["sae"], found["layer"]) == (STANDARD, LAYER)
    tokens = {row["token"] for row in found["tokens"] if (row["role"], row["kind"]) == ("user", "content")}
    assert "".join(tokens) == "Hi"
    assert {len(row["features"]) for row in found["tokens"]} == {3}
    values = [feature["value"] for feature in found["tokens"][-1]["features"]]
    assert values == sorted(values, reverse=True)
    turns = [*ASK["messages"], {"role": "assistant", "content": "A sequence."}]
    both = httpx.post(url, json={"messages": turns}, timeout=PATIENCE).json()["data"]
    assert [each["sae"] for each in both] == [STANDARD, JUMPRELU]
    assert (
        httpx.get(f"{server.url}/features", params={"text": "Hi", "sae": "other"}, timeout=PATIENCE).status_code == 404
    )


# --- requests that cannot be answered ---------------------------------------------------------------------------------

FIRST = {"sae": STANDARD, "feature": 1}
BAD: list[tuple[Any, int, str]] = [
    (b"{", 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b"[" * 4000, 400, "nested"),
    (b'{"n": 1' + b"0" * 4500 + b"}", 400, "not JSON"),
    (b"[]", 400, "JSON object"),
    ({"messages": ASK["messages"]}, 400, "model is missing"),
    ({**ASK, "model": "gpt-4"}, 404, "there is 'demo'"),
    ({**ASK, "model": "\ud800"}, 404, "there is 'demo'"),
    (b'{"model": "demo", "model": "demo"}', 400, "'model' is given twice"),
    (b'{"temperature": NaN}', 400, "NaN is no JSON number"),
    (b'{"a":' * 4000 + b"1" + b"}" * 4000, 400, "nested"),
    (json.dumps({**ASK, "user": "\u00e9"}, ensure_ascii=False).encode("latin-1"), 400, "not JSON"),
    ({**ASK, "messages": []}, 400, "at least one"),
    ({**ASK, "messages": None}, 400, "messages is missing"),
    ({**ASK, "messages": [None]}, 400, r"messages\[0\] must be an object, not null"),
    ({**ASK, "messages": [{"role": "user", "content": None}]}, 400, r"messages\[0\].content is missing"),
    (
        {**ASK, "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "txt": 1}]}]},
        400,
        "perhaps text",
    ),
    ({**ASK, "messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]}, 400, "tool calls are not supported"),
    ({**ASK, "messages": [{"role": "assistant", "function_call": {}}]}, 400, "tool calls are not supported"),
    ({**ASK, "messages": [{"role": "user"}]}, 400, r"messages\[0\].content is missing"),
    ({**ASK, "messages": [{"role": "robot", "content": "x"}]}, 400, "role must be one of"),
    ({**ASK, "messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "special token"),
    ({**ASK, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "Unicode"),
    ({**ASK, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
    ({**ASK, "messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context is 2048 tokens"),
    ({**ASK, "max_tokens": 1025}, 400, "allows answers of 1024 tokens"),
    ({**ASK, "max_tokens": 0}, 400, "whole number from 1"),
    ({**ASK, "max_tokens": -1}, 400, "whole number from 1"),
    (json.dumps({**ASK, "max_tokens": 7}).replace("7", "1e999").encode(), 400, "whole number from 1"),
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
    ({**ASK, "steering": [{"vector": [None] * 192, "layer": 3}]}, 400, "must be a number"),
    ({**ASK, "steering": [{"vector": [1e300] * 192, "layer": 3}]}, 400, "no direction"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": -1}]}, 400, "does not exist"),
    (b'{"steering": [{"feature": 1, "strength": -Infinity}]}', 400, "no JSON number"),
    (json.dumps({**ASK, "steering": [{**FIRST, "strength": 7}]}).replace("7", "1e999").encode(), 400, "finite number"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": 1, "strength": 1e300}]}, 400, "too large"),
    ({**ASK, "steering": [{"sae": STANDARD, "feature": 1}] * 17}, 400, "at most 16 specs"),
]


def test_what_cannot_be_answered_is_refused_with_its_reason(server: Process) -> None:
    with httpx.Client(timeout=PATIENCE) as client:
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
        zipped = client.post(f"{server.url}/chat/completions", json=ASK, headers={"Content-Encoding": "gzip"})
        assert zipped.status_code == 415
        for body, message in (
            ({"text": "word " * 1500, "k": 1000}, "an answer has at most"),
            ({"text": "word " * 3000}, "context is 2048 tokens"),
            ({"text": "\ud800", "raw": True}, "not valid Unicode"),
            ({"text": "", "raw": True}, "the text is empty"),
            ({"text": None, "messages": None}, "give either text or messages"),
        ):
            got = client.post(f"{server.url}/features", content=json.dumps(body), headers=headers)
            assert got.status_code == 400, got.text
            assert message in got.json()["error"]["message"]
        for query, message in (("text=a&text=b", "text is given 2 times"), ("text=%ff", "cannot be read")):
            got = client.get(f"{server.url}/features?{query}")
            assert got.status_code == 400
            assert message in got.json()["error"]["message"]
        for host in ("rebound.example", "[", "", "localhost.example:80"):
            assert client.get(f"{server.url}/models", headers={"Host": host}).status_code == 403
        assert client.get(f"{server.url}/models", headers={"Host": "LOCALHOST:1"}).status_code == 200
        assert client.get(f"{server.url}/models/").status_code == 404
    assert post(server.url, {**ASK, "max_tokens": 1}).status_code == 200


# --- killed, and started again on the same port, behind a key and narrow limits -------------------------------------


@pytest.fixture(scope="module")
def strict(server: Process, run: Path) -> Iterator[Process]:
    with httpx.stream(
        "POST", f"{server.url}/chat/completions", json={**ENDLESS, "stream": True}, timeout=PATIENCE
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
    assert httpx.get(f"{strict.url}/models", timeout=PATIENCE).status_code == 401
    assert httpx.get(f"{strict.url}/models", headers={"Host": "["} | keyed(KEY), timeout=PATIENCE).status_code == 200
    assert httpx.get(strict.url.replace("/v1", "/health"), timeout=PATIENCE).json()["status"] == "ok"
    assert KEY not in strict.logged()
    assert "$CHATSAE_TEST_KEY" in strict.logged()


def test_large_requests_are_refused(strict: Process) -> None:
    large = {**ASK, "messages": [{"role": "user", "content": "x" * 20_000}]}
    assert post(strict.url, large, headers=keyed(KEY)).status_code == 413
    chunks = (b"x" * 4000 for _ in range(4))
    assert post(strict.url, chunks, headers=keyed(KEY)).status_code == 413


def test_one_request_too_many_is_told_to_come_back(strict: Process) -> None:
    body = {**ENDLESS, "stream": True, "max_tokens": 400}
    with httpx.Client(headers=keyed(KEY), timeout=PATIENCE) as client:
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


def test_the_first_signal_lets_answers_end_and_the_second_does_not_wait(strict: Process) -> None:
    lines: dict[str, list[str]] = {"short": [], "long": []}
    ended = threading.Event()

    def listen(name: str, tokens: int) -> None:
        body = {**ENDLESS, "stream": True, "max_tokens": tokens}
        with httpx.stream(
            "POST", f"{strict.url}/chat/completions", json=body, headers=keyed(KEY), timeout=PATIENCE
        ) as response:
            lines[name] += [line for line in response.iter_lines() if line]
        if name == "short":
            ended.set()

    threads = [threading.Thread(target=listen, args=each) for each in (("short", 30), ("long", 1900))]
    half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    slow = [half, half + b"Authorization: Bearer " + KEY.encode() + b"\r\n\r\n{", b""]
    with ExitStack() as opened:
        for data in slow:  # what never comes does not hold it up
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", strict.port), timeout=PATIENCE))
            connection.sendall(data)
        for thread in threads:
            thread.start()
        wait_until(lambda: httpx.get(strict.url.replace("/v1", "/health"), timeout=PATIENCE).json()["running"] == 2)
        strict.send(signal.SIGTERM)
        assert ended.wait(PATIENCE)
        assert lines["short"][-1] == "data: [DONE]"
        strict.send(signal.SIGINT)  # 1,900 tokens take longer than 30
        for thread in threads:
            thread.join()
        assert strict.process.wait(PATIENCE / 2) == 0
    assert json.loads(lines["long"][-1].removeprefix("data: "))["error"]["code"] == "server_shutdown"
    assert "Traceback" not in strict.logged()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{strict.url}/models", timeout=PATIENCE)


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
