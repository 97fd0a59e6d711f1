"""The client against a real server of another project: `transformers serve` with the bundled model."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatsae.features.judge.asking import Asker
from chatsae.features.judge.cache import Cache, Replay
from chatsae.features.judge.client import Request
from chatsae.features.judge.local import LocalHF
from chatsae.features.judge.openai import OpenAICompat
from chatsae.features.judge.rubric import RubricJudge
from chatsae.lm.load import demo_model_path
from judge_server import feature

NEEDED = ("fastapi", "uvicorn", "openai")


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("serve") / "log.txt").open("w+")
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(demo_model_path())]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()
        log.close()


def test_a_real_server_is_asked_once_and_answers_as_the_model_does(url, tmp_path):
    client = OpenAICompat(url, str(demo_model_path()), timeout=120.0, concurrency=2)
    cache = Cache(tmp_path / "cache.sqlite")
    messages = ({"role": "user", "content": "How do I sort a list?"},)
    request = Request(messages, {"temperature": 0.0, "max_tokens": 24, "seed": 0})
    try:
        answer = client.complete(request)
        judge = RubricJudge(Asker(client, cache, concurrency=2), "demo", {"max_tokens": 16})
        found = list(judge.verdicts([feature(i) for i in range(3)], n_contexts=5))
        usage = judge.asker.usage
        assert (usage.calls, usage.estimated, usage.cached) == (3 + usage.reasked, 0, 0)
        again = RubricJudge(Asker(client, cache, concurrency=2), "demo", {"max_tokens": 16})
        assert list(again.verdicts([feature(i) for i in range(3)], n_contexts=5)) == found
        assert (again.asker.usage.calls, again.asker.usage.cached) == (0, usage.calls)
    finally:
        client.close()
        cache.close()
    local = LocalHF(demo_model_path())
    assert answer.text == local.complete(request).text
    assert answer.prompt_tokens == local._lm.prompt_ids(list(messages)).shape[1]
    assert 0 < answer.completion_tokens <= 24
    assert all(v.score in (1, 2, 3, 4, 5) or v.reason.startswith("unreadable") for v in found)  # whatever it can say
    replay = Replay(tmp_path / "cache.sqlite")
    judge = RubricJudge(Asker(replay), "demo", {"max_tokens": 16})
    assert list(judge.verdicts([feature(i) for i in range(3)], n_contexts=5)) == found
    replay.close()
