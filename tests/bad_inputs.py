"""What users get wrong: one row each, for test_bad_input.py. A row is added for every fault of the kind.

A row has a name, `make`, and words of which the message must hold every one. `make(at)` gets a `Place` and returns the
arguments of a command, or a function that is called (the Python API). A command must end with exit code 2 and one
message, a function with UserError; neither may show a traceback or begin the work.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatsae.config import DataConfig, RunConfig, SAEConfig, TrainConfig
from serve_process import small_run

Made = Sequence[str | Path] | Callable[[], Any]


class Place:
    """An empty directory for one row, and a run that all rows share and none may change."""

    def __init__(self, path: Path, shared: Path) -> None:
        self.path, self._shared = path, shared

    @property
    def run(self) -> Path:
        """A run of two SAEs, L3-2x-standard and L3-2x-jumprelu; only to be read."""
        if not self._shared.exists():
            small_run(self._shared)
        return self._shared

    def own_run(self) -> Path:
        """A copy of it."""
        return Path(shutil.copytree(self.run, self.path / "run"))

    def file(self, name: str, content: str | bytes = "") -> Path:
        """A file with this content."""
        path = self.path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def rows(self, *rows: Any, name: str = "chat.jsonl") -> Path:
        """A file of JSON lines."""
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def recipe(self, text: str = "") -> Path:
        """A recipe with this text; without one, that of the bundled model's defaults."""
        return self.file("recipe.yaml", text)

    def pipe(self, name: str) -> Path:
        """A named pipe that nobody writes to."""
        os.mkfifo(self.path / name)
        return self.path / name


@dataclass(frozen=True)
class Row:
    """One bad input; `words` are all in the message."""

    name: str
    make: Callable[[Place], Made]
    words: tuple[str, ...]


def row(name: str, make: Callable[[Place], Made], *words: str) -> Row:
    return Row(name, make, words)


def value(text: str, *words: str) -> Row:
    """A recipe that `train` must refuse, and say where."""
    return Row(f"recipe {text[:60]!r}", lambda at: ["train", at.recipe(text)], ("recipe.yaml", *words))


def values(text: str, *words: str) -> Row:
    """A recipe whose values do not go together, or not with the model or the machine."""
    return Row(f"recipe {text[:60]!r}", lambda at: ["train", at.recipe(text), "--out", at.path / "run"], words)


def flags(verb: str, *given: str, words: Sequence[str] = ()) -> Row:
    """Flags of a verb on the shared run; by default the message names the first of them."""
    name = f"{verb} {' '.join(given)}"[:80]
    return Row(name, lambda at: [verb, at.run, *given], tuple(words) or (given[0],))


def python(name: str, call: Callable[[Place], Any], *words: str) -> Row:
    """A call of the Python API."""
    return Row(f"python {name}", lambda at: lambda: call(at), words)


VALUES = (
    value("sae: {lrs: [.nan]}", "sae.lrs must be above 0, not nan"),
    value("sae: {lrs: [.inf]}", "sae.lrs must be a finite number"),
    value(f"sae: {{lrs: [1{'0' * 400}]}}", "sae.lrs must be a number"),
    value("sae: {lrs: [0]}", "sae.lrs must be above 0"),
    value("sae: {target_l0: [0]}", "sae.target_l0 must be above 0"),
    value("sae: {target_l0: [50, 50]}", "sae.target_l0 holds a value twice"),
    values("sae: {target_l0: [50], l1_coefficients: [1, 2]}", "sae.target_l0 is set"),
    value("sae: {normalize: layer}", "sae.normalize"),
    value("train: {sinks: drop}", "train.sinks"),
    value("sae: {lrs: []}", "sae.lrs is empty"),
    value("sae: {lrs: [0.1, 1.0e-1]}", "sae.lrs holds a value twice"),
    value("sae: {l1_coefficients: [.nan]}", "sae.l1_coefficients"),
    value("sae: {l1_coefficients: [-1]}", "sae.l1_coefficients must be at least 0"),
    value("sae: {l0_coefficients: [1.0e+30]}", "sae.l0_coefficients must be at most"),
    value("sae: {expansion_factors: [0]}", "sae.expansion_factors must be at least 1"),
    values("sae: {expansion_factors: [1000000000]}", "sae.expansion_factors", "GiB"),
    value("sae: {expansion_factors: [2.5]}", "sae.expansion_factors must be a whole number, not 2.5"),
    value("sae: {bandwidth: 0}", "sae.bandwidth must be above 0"),
    value("sae: {architectures: [topk]}", "sae.architectures must be one of standard, jumprelu"),
    value("train: {adam_betas: [1, 1]}", "train.adam_betas[0] must be below 1"),
    value("train: {adam_betas: [0.9, .nan]}", "train.adam_betas[1] must be at least 0, not nan"),
    value("train: {seed: 18446744073709551616}", "train.seed must be at most 2^64 - 1"),
    value(f"train: {{seed: {'9' * 6000}}}", "cannot be"),
    value("train: {tokens: 2026-99-99}", "cannot be"),
    value("train: {tokens: 2026-09-09}", "train.tokens must be a whole number"),
    value("train: {tokens: 10000000000000000000}", "train.tokens must be at most 2^53"),
    values("train: {tokens: 10}", "train.tokens is 10, less than one batch"),
    value("train: {clip_grad_norm: -1}", "train.clip_grad_norm must be above 0"),
    value("train: {clip_grad_norm: 0}", "train.clip_grad_norm must be above 0"),
    value("train: {clip_grad_norm: .nan}", "train.clip_grad_norm"),
    value("train: {dead_feature_window: -1}", "train.dead_feature_window must be at least 0"),
    value("train: {lr_warmup_share: -1}", "train.lr_warmup_share must be between 0 and 1"),
    value("train: {lr_warmup_share: 0.9, lr_decay_share: 0.9}", "add up to more than 1"),
    value("train: {sparsity_warmup_share: .nan}", "train.sparsity_warmup_share"),
    value("train: {log_every: 0}", "train.log_every must be at least 1"),
    value("train: {gsnr: 1}", "train.gsnr must be true or false"),
    values("buffer: {capacity: 10000000000000}", "buffer.capacity", "GiB"),
    values("buffer: {capacity: 100}", "buffer.capacity", "two batches"),
    value("eval: {dialogues: -3}", "eval.dialogues must be at least 1"),
    value("data: {ngram_roles: [nobody]}", "data.ngram_roles must be one of system, user, assistant, tool"),
    value("data: {memory_gb: .nan}", "data.memory_gb must be at least 0, not nan"),
    value("data: {workers: 1000000}", "data.workers must be at most 4096"),
    value("data: {held_out: [1, 2]}", "data.held_out must hold 3 values"),
    value("data: {held_out: [1, -2, 3]}", "data.held_out[1] must be at least 0"),
    value("data: {epochs: -1}", "data.epochs must be at least 0"),
    values("data: {sources: []}", "data.sources is empty"),
    value("data: {sources: ['']}", "data.sources is empty"),
    value('data: {sources: ["a\\0.jsonl"]}', "data.sources holds a zero character"),
    value("harvest: {pool: 0}", "harvest.pool must be at least 1"),
    values("model: {layers: []}", "model.layers is empty"),
    values("model: {layers: [3, 3]}", "model.layers"),
    value("model: {layers: [-1]}", "model.layers must be at least 0"),
    values("model: {layers: [99]}", "layer 99"),
    value("model: {name: ''}", "model.name is empty"),
    values("model: {device: quantum}", "device"),
    value("train: {tokens: 5000}\ntrain: {seed: 1}", "'train' is there twice"),
    value("train: {seed: 1, seed: 2}", "'seed' is there twice"),
    value("? [a, b]\n: 1", "unhashable key"),
    value("train: {\x1b[31m: 1}", "not valid YAML"),
    value('train: {"\\e[31mred": 1}', r"\x1b[31mred"),
    value("[" * 3000, "nested too deeply"),
    value(
        "a: &a [x, x]\n"
        + "".join(f"{k}: &{k} [{', '.join([f'*{j}'] * 9)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True)),
        "unknown key a",
    ),
    value("train: {seed: " + "&a " + "[" * 50 + "1" + "]" * 50 + "}", "train.seed must be a whole number"),
    value(
        "x: &a {k1: 1, k2: 2}\n"
        + "".join(
            f"x{i}: &{k} {{<<: [{', '.join([f'*{j}'] * 9)}]}}\n"
            for i, (j, k) in enumerate(zip("abcdefgh", "bcdefghi", strict=True))
        ),
        "too many keys",
    ),
    value("!!python/object/apply:os.system [ls]", "not valid YAML"),
    value("- 1", "the file must be a mapping"),
    value("train: 3", "train must be a mapping"),
)

FILES = (
    row("a recipe that is no UTF-8", lambda at: ["train", at.file("r.yaml", b"train: \xff")], "r.yaml", "not UTF-8"),
    row("a recipe that is a directory", lambda at: ["train", at.path], "is a directory"),
    row("a recipe that is a pipe", lambda at: ["train", at.pipe("r.yaml")], "r.yaml is not a regular file"),
    row("a recipe that is a device", lambda at: ["plan", "/dev/zero"], "/dev/zero is not a regular file"),
    row("a recipe that is missing", lambda at: ["sweep", at.path / "no.yaml"], "no.yaml does not exist"),
    row(
        "a recipe behind flags",
        lambda at: ["train", "--train.tokens", "9", at.recipe("train: {batch_size: 10}")],
        "one batch of 10",
    ),
    row("an escape in a path", lambda at: ["show", at.path / "\x1b[2J"], r"\x1b[2J"),
    row("a path that is no UTF-8", lambda at: ["show", os.fsdecode(b"/no/\xff")], r"/no/\udcff"),
)

VERBS = (
    row(
        "train: an output that is a file",
        lambda at: ["train", at.recipe(), "--out", at.file("out")],
        "--out",
        "is a file",
    ),
    row(
        "train: an output below a file",
        lambda at: ["train", at.recipe(), "--out", at.file("out") / "run"],
        "not a directory",
    ),
    row("plan: seconds", lambda at: ["plan", at.recipe(), "--seconds", "nan"], "--seconds must be at least 0, not nan"),
    row(
        "plan: a flag", lambda at: ["plan", at.recipe(), "--seconds", "0", "--train.tokens", "3"], "less than one batch"
    ),
    row("plan: nothing", lambda at: ["plan"], "at least one recipe"),
    row("sweep: points", lambda at: ["sweep", at.recipe(), "--points", "1"], "--points must be at least 2"),
    row("sweep: span", lambda at: ["sweep", at.recipe(), "--span", "1"], "--span must be above 1"),
    row("sweep: span inf", lambda at: ["sweep", at.recipe(), "--span", "inf"], "--span must be a finite number"),
    row("sweep: no methods", lambda at: ["sweep", at.recipe(), "--methods"], "--methods is empty"),
    row(
        "sweep: a method twice",
        lambda at: ["sweep", at.recipe(), "--methods", "fast", "fast"],
        "--methods holds a value twice",
    ),
    row("sweep: data.method", lambda at: ["sweep", at.recipe(), "--data.method", "bt-p"], "--data.method", "--methods"),
    row("sweep: L0", lambda at: ["sweep", at.recipe(), "--matched-l0", "-3"], "--matched-l0 must be above 0"),
    flags("eval", "--dialogues", "0"),
    flags("compare", "--matched-l0", "nan"),
    flags("compare", "--out", "/", words=("--out / is a directory",)),
    flags("features", "--rows", "0"),
    flags("features", "--dialogues", "-1"),
    flags("features", "--seed", "-1"),
    flags("features", "--only", "-2"),
    flags("judge", "--params", "[1"),
    flags("judge", "--params", "[1]"),
    flags("judge", "--judge", "oracle"),
    flags("judge", "--judge", "openai", words=("--model",)),
    flags("judge", "--concurrency", "1000000"),
    flags("judge", "--budget", "nan"),
    flags("judge", "--timeout", "0"),
    flags("judge", "--dialogues", "0"),
    flags("report", "--out", "/", words=("--out / is a directory",)),
    flags("report", "--features", "0"),
    flags("report", "--dialogues", "-5"),
    flags("audit", "--pairs", "10"),
    flags("audit", "--draws", "1000000000000"),
    flags("audit", "--max-perplexity-ratio", "0.5"),
    flags("steer", "--feature", "0", "--max-new-tokens", "0", words=("--max-new-tokens",)),
    flags("steer", "--feature", "-1"),
    flags("steer", "--feature", "0", "--bound", "nan", words=("--bound",)),
    flags("steer", "--feature", "0", "--alpha", "lots", words=("--alpha takes numbers or auto",)),
    flags("steer", "--feature", "0", "--sweep", "--share", "2", words=("--share",)),
    flags("tokens", "--top", "0"),
    flags("tokens", "--dialogues", "0"),
    flags("export", "--format", "gguf", "--feature", "-3", "--alpha", "1", words=("--feature must be at least 0",)),
    flags(
        "export", "--format", "gguf", "--feature", "3", "--alpha", "nan", words=("--alpha must be a number, not nan",)
    ),
    flags("serve", "--port", "70000"),
    flags("serve", "--body-seconds", "0"),
)

PYTHON = (
    python("TrainConfig", lambda at: TrainConfig(lr_warmup_share=-1), "train.lr_warmup_share"),
    python("TrainConfig of a wrong type", lambda at: TrainConfig(tokens="many"), "train.tokens must be a whole number"),
    python("SAEConfig", lambda at: SAEConfig(lrs=[float("nan")]), "sae.lrs"),
    python("DataConfig", lambda at: DataConfig(ngram_roles=["nobody"]), "data.ngram_roles"),
    python("RunConfig", lambda at: RunConfig(train={"tokens": 3}), "train must be a TrainConfig"),
)

ROWS = (*VALUES, *FILES, *VERBS, *PYTHON)
