"""What a run is: the facts of its identity card, its training curves, and the commands that make it again."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatsae.config import sae_specs
from chatsae.data.store.manifest import manifest_digest
from chatsae.errors import UserError
from chatsae.files import read_object
from chatsae.page.pack import short
from chatsae.runs import Run

CURVE_POINTS = 200

_ORDER = ("mse", "loss", "l0", "sparsity", "dead_fraction", "gsnr")


def identity(run: Run) -> list[list[str]]:
    """[label, value] of what is true of every SAE of a run."""
    config, environment, summary = run.config, _json(run.path / "environment.json"), _json(run.path / "summary.json")
    data, train = config.data, config.train
    sources = data.text_sources if data.method == "bt-p" else data.sources
    found: list[tuple[str, Any]] = [
        ("Method", data.method),
        ("Model", config.model.name),
        ("Hook", f"residual stream after block {', '.join(map(str, config.model.layers))}"),
        ("Trained on", data.prepared or ", ".join(sources)),
        ("Data digest", _digest(run)),
        ("Longest dialogue", f"{data.max_length:,} tokens"),
        ("Tokens", _count(summary.get("tokens"), train.tokens)),
        ("Steps", _count(summary.get("steps"), None)),
        ("Batch", f"{train.batch_size:,} tokens"),
        ("Seed", train.seed),
        ("Ended", summary.get("ending", "not finished")),
        ("Training time", _seconds(summary.get("seconds"))),
        ("Speed", _speed(summary.get("tokens_per_second"))),
        ("Platform", environment.get("platform")),
        ("Processors", environment.get("gpu") or environment.get("cpu_count")),
        ("Versions", ", ".join(f"{n} {environment[n]}" for n in _PACKAGES if n in environment) or None),
        ("Commit", environment.get("commit")),
    ]
    return [[label, str(value)] for label, value in found if value not in (None, "")]


_PACKAGES = ("chatsae", "torch", "transformers", "tokenizers", "python")


def sae_identity(run: Run, name: str) -> list[list[str]]:
    """[label, value] of one SAE, from its recipe."""
    for spec in sae_specs(run.config.sae, layers=tuple(sorted(run.config.model.layers)), d_in=1):
        if spec.name == name:
            sparsity = "l1_coefficient" if spec.architecture == "standard" else "l0_coefficient"
            return [
                ["Architecture", spec.architecture],
                ["Layer", str(spec.layer)],
                [sparsity, f"{spec.coefficient:g}"],
            ]
    return []


def curves(run: Run) -> dict[str, dict[str, list[list[float]]]]:
    """Of every SAE and figure of metrics.jsonl: [tokens, value] of at most `CURVE_POINTS` steps, with the last."""
    records = run.metrics()
    stride = max(1, math.ceil(len(records) / CURVE_POINTS))
    kept = [record for i, record in enumerate(records) if (len(records) - 1 - i) % stride == 0]
    found: dict[str, dict[str, list[list[float]]]] = {}
    for record in kept:
        for name, values in record.get("saes", {}).items():
            for figure, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                    found.setdefault(name, {}).setdefault(figure, []).append([record["tokens"], short(value)])
    return {name: dict(sorted(own.items(), key=_rank)) for name, own in found.items()}


def commands(run: Run, *, dialogues: int | None, evaluated: int | None) -> list[list[str]]:
    """[what it does, command] that make a run and what the page shows of it again."""
    path = run.path
    chosen = "" if dialogues is None else f" --dialogues {dialogues}"
    measured = "" if evaluated is None else f" --dialogues {evaluated}"
    return [
        ["Train again from the same recipe", f"chatsae train {path}/config.yaml --out {path}-again"],
        ["Evaluate on held-out dialogues", f"chatsae eval {path}{measured}"],
        ["Find out what its features respond to", f"chatsae features {path}{chosen}"],
        ["Score its features", f"chatsae judge {path}"],
        ["Find the features of the template's tokens", f"chatsae tokens {path}{chosen}"],
    ]


def _rank(item: tuple[str, Any]) -> tuple[int, str]:
    return (_ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER), item[0])


def _json(path: Path) -> Mapping[str, Any]:
    """A file of facts, empty where it is missing or damaged: they are for reading only."""
    try:
        return read_object(path)
    except UserError:
        return {}


def _digest(run: Run) -> str | None:
    """What stands for the data that a run was trained on, where the run says it."""
    facts = _json(run.path / "data.json")
    return f"{manifest_digest(dict(facts))[:16]}…" if facts else None


def _count(value: Any, planned: int | None) -> str | None:
    if value is None:
        return None if planned is None else f"{planned:,} planned"
    return f"{value:,}"


def _seconds(value: Any) -> str | None:
    if value is None:
        return None
    hours, rest = divmod(round(value), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _speed(value: Any) -> str | None:
    return None if value is None else f"{value:,.0f} tokens/s"
