"""The engine for corpora beyond one machine, in Spark's local mode: the same bytes as without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chatsae.cli import main

pytest.importorskip("pyspark", reason="Spark is not installed (pip install 'chatsae[spark]')")
if shutil.which("java") is None:
    pytest.skip("Spark needs Java, which is not installed", allow_module_level=True)

WORDS = [f"w{i}" for i in range(300)]


def row(i: int) -> dict:
    start = (i * 37) % 200 if i % 3 else ((i // 2) * 37) % 200
    answer = " ".join(WORDS[start : start + 12]) if i % 3 == 0 else " ".join(f"{w}-{i}" for w in WORDS[:9])
    return {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": answer}]}


def prepare_with_spark(recipe: Path, out: Path) -> subprocess.CompletedProcess:
    """In a process of its own, since its session goes on as long as that does."""
    command = [sys.executable, "-m", "chatsae.cli", "prepare", str(recipe), "--out", str(out), "--engine", "spark"]
    settings = "--conf spark.sql.shuffle.partitions=4 --conf spark.ui.enabled=false"
    spark = {"PYSPARK_SUBMIT_ARGS": f"--master local[2] {settings} pyspark-shell"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | spark)


def test_spark_keeps_the_same_dialogues_to_the_byte(tmp_path):
    rows = [row(i) for i in range(600)]
    special = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "Yes."}]}
    for name, part in (("a", [*rows[:200], special]), ("b", rows[200:]), ("c", rows[:100])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in part))
    recipe = tmp_path / "recipe.yaml"
    sources = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    data = {"sources": sources, "text_sources": [], "ngram": 7, "max_tokens": 0, "workers": 1}
    recipe.write_text(json.dumps({"data": data}))
    assert main(["prepare", str(recipe), "--out", str(tmp_path / "local")]) == 0
    spark = prepare_with_spark(recipe, tmp_path / "spark")
    assert spark.returncode == 0, spark.stderr[-2000:]
    files = sorted(path.name for path in (tmp_path / "local").iterdir())
    assert len(files) > 4
    for name in files:
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "spark" / name).read_bytes(), name
    counts = json.loads((tmp_path / "spark" / "manifest.json").read_text())["counts"]["dialogues"]
    assert counts[2]["dropped"] > 50


def test_what_spark_cannot_read_is_one_line(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"data": {"sources": ["pydocs"], "max_tokens": 1000, "text_sources": []}}))
    assert main(["prepare", str(recipe), "--out", str(tmp_path / "out"), "--engine", "spark"]) == 2
    said = capsys.readouterr().err
    assert "never ends when data.max_tokens is set" in said
    assert "Traceback" not in said
