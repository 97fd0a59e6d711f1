"""A run to serve, and what serves it on loopback: a process, or a thread of the tests' own."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from chatsae.config import DataConfig, ModelConfig, RunConfig, SAEConfig, sae_specs
from chatsae.runs import Run
from chatsae.sae.init import init_sae
from chatsae.serve.app import App, Limits
from chatsae.serve.engine import Engine
from chatsae.serve.model import Served
from chatsae.serve.server import Options, server_of

PATIENCE = 200.0
"""Seconds that anything may take. Nothing here takes more than a few on a machine that is free, and no test depends on
how long; a busy machine may take a hundred times that, and only a server that hangs takes longer."""

D_IN = 192
LAYER = 3


def small_run(folder: Path) -> Path:
    """A run of the bundled model with two SAEs of random weights."""
    source = folder.with_suffix(".jsonl")
    chats = [[("user", f"Number {i}, please."), ("assistant", f"Here is {i}.")] for i in range(400)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = RunConfig(
        model=ModelConfig(name="demo", layers=(LAYER,)),
        data=DataConfig(sources=(str(source),), ngram=0),
        sae=SAEConfig(architectures=("standard", "jumprelu"), expansion_factors=(2,)),
    )
    run = Run.open(folder, config)
    for i, spec in enumerate(sae_specs(config.sae, layers=(LAYER,), d_in=D_IN)):
        init_sae(spec, torch.Generator().manual_seed(i)).save(run.path / "saes" / spec.name)
    run.close()
    return folder


class Process:
    """`chatsae serve`, ready to answer."""

    def __init__(self, run: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        command = [sys.executable, "-m", "chatsae.cli", "serve", str(run), "--json", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, env={**os.environ, **(env or {})}
        )
        assert self.process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            line = self.process.stdout.readline()
            assert line, self.logged()
            lines.append(line)
        self.facts: dict[str, Any] = json.loads("".join(lines))
        self.url: str = self.facts["url"]
        self.port = int(self.url.rpartition(":")[2].partition("/")[0])

    def logged(self) -> str:
        """What it wrote for people."""
        self.log.seek(0)
        return self.log.read()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; its exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.log.close()


class Inside:
    """The server of `chatsae serve` in a thread of this process, so that a test can hold back what it does."""

    def __init__(self, served: Served, limits: Limits = Limits(), *, key: str | None = None) -> None:  # noqa: B008
        self.engine = Engine(served.lm, 1e-3)
        self.app = App(served, self.engine, limits)
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.server = server_of(self.app, self.listening, key, Options(body_seconds=limits.body_seconds))
        self.engine.start()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[self.listening])))
        self.thread.start()

    def __enter__(self) -> "Inside":
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.drain(0.0)
        self.server.should_exit = True
        self.thread.join()
        self.app.close()
        self.listening.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine waits meanwhile, between two steps."""
        go = threading.Event()
        holding = self.engine.call(go.wait)
        wait_until(holding.running)
        try:
            yield
        finally:
            go.set()


def wait_until(holds: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for something to be so."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.01)
