"""Preparations that stop when there is enough: interrupted in the last chunk, and with less held out than asked for."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from chatsae.config import DataConfig
from chatsae.data.store import prepare as preparing
from chatsae.data.store import selection
from chatsae.data.store.prepare import prepare
from chatsae.data.store.summary import warnings
from chatsae.data.store.writing import Writing
from chatsae.lm.checkpoint import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    def row(i: int) -> dict[str, object]:
        turns = [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}. " * 5}]
        return {"messages": turns}

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(300)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"Text {i}. " * 30}) + "\n" for i in range(60)))
    sources = {"sources": (str(tmp_path / "a.jsonl"),), "text_sources": (str(tmp_path / "b.jsonl"),)}
    return DataConfig(**sources, held_out=(20, 5, 5), workers=1, block_size=64)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_interrupt_in_the_chunk_with_which_there_is_enough_changes_nothing(config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 16)
    monkeypatch.setattr(preparing, "_CHECKPOINT_SECONDS", 0.0)
    whole = prepare(config, tokenizer, tmp_path / "whole", seed=0, max_tokens=2000)
    add, interrupts = Writing.add, []

    def interrupted(self, *args):
        add(self, *args)
        if self.enough and self._kind not in interrupts:
            interrupts.append(self._kind)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Writing, "add", interrupted)
    for _ in ("dialogues", "documents"):
        with pytest.raises(KeyboardInterrupt):
            prepare(config, tokenizer, tmp_path / "cut", seed=0, max_tokens=2000)
    cut = prepare(config, tokenizer, tmp_path / "cut", seed=0, max_tokens=2000)
    assert interrupts == ["dialogues", "documents"]
    assert cut.sha256 == whole.sha256
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_to_do_is_said_where_less_is_held_out_than_asked_for(config, tokenizer, tmp_path):
    early = warnings(prepare(config, tokenizer, tmp_path / "early", seed=0, max_tokens=2000))
    (line,) = [line for line in early if line.startswith("eval has")]
    assert "of 20 dialogues: reading ended with the training tokens that data.max_tokens asks for" in line
    assert "set it to 0" in line
    many = replace(config, held_out=(2000, 5, 5))
    whole = warnings(prepare(many, tokenizer, tmp_path / "whole", seed=0, max_tokens=0))
    (line,) = [line for line in whole if line.startswith("eval has")]
    assert line.endswith("of 2,000 dialogues: the sources have no more")
