"""A run to serve, and the process that serves it on loopback."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from chatsae.config import DataConfig, ModelConfig, RunConfig, SAEConfig, sae_specs
from chatsae.runs import Run
from chatsae.sae.init import init_sae

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

    def end(self, seconds: float = 20.0) -> int:
        """Wait for its end; its exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.log.close()
