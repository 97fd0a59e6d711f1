"""Runs on disk whose SAEs have any L0 and figures one wants, with the sums by dialogue behind them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

import chatsae as cs
from chatsae.evals.figures import COLUMNS, Table, ratios
from chatsae.evals.report import DialogueSums, Report
from chatsae.recipe import to_yaml
from chatsae.runs import Run
from chatsae.statistics import ratio

S = 40
KEYS = [f"{i:04d}" for i in range(S)]


def table(l0: float, mse: float, *, delta_loss: float = 0.5, noise: float = 0.0, seed: int = 0) -> Table:
    """Sums of `S` dialogues of 10 tokens whose means are exactly these figures; `noise` sets dialogues apart."""
    rng = np.random.default_rng(seed)
    wave = 1 + noise * rng.uniform(-1, 1, S)
    wave /= wave.mean()
    found = dict.fromkeys(COLUMNS, np.zeros(S)) | {"n_tokens": np.full(S, 10.0), "variance": np.full(S, 100.0)}
    found |= dict.fromkeys(("mse", "mse_st", "mse_st_template", "mse_st_no_first"), mse * wave)
    found |= {"mse_st_no_prefix": np.full(S, np.nan), "squared_error": 10 * mse * wave, "l0": 10 * l0 * wave}
    found |= {"n_scored": np.full(S, 9.0), "loss": np.full(S, 18.0), "loss_sae": 18 + 9 * delta_loss * wave}
    return found


def row(sums: Table) -> dict[str, object]:
    """What a report says of them, as far as comparisons look at it."""
    figures: dict[str, object] = {name: ratio(parts) for name, parts in ratios(sums).items()}
    fvu = figures["fvu"]
    assert isinstance(fvu, float)
    return figures | {"explained_variance": 1 - fvu, "dead_fraction": 0.0, "intervals": {}, "reasons": {}, "groups": {}}


def run(path: Path, config: cs.RunConfig, tables: Mapping[str, Table], *, sums: bool = True) -> Run:
    """A run directory with a report on the SAEs of `tables`."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    facts = {"model": config.model.name, "n_dialogues": S, "max_length": 8192, "tokens_sha256": "0"}
    kept = DialogueSums(KEYS, dict(tables)) if sums else None
    Report({name: row(t) for name, t in tables.items()}, facts, kept).save(path / "report.json")
    return Run.read(path)


def config(method: str = "fast", *, l1: tuple[float, ...] = (1.0, 2.0, 4.0), **train: int) -> cs.RunConfig:
    """A grid of standard SAEs on layer 3 that differ in their coefficient."""
    base = cs.RunConfig()
    return replace(
        base,
        data=replace(base.data, method=method),
        sae=replace(base.sae, architectures=("standard",), l1_coefficients=l1),
        train=replace(base.train, **train),
    )


def names(l1: tuple[float, ...] = (1.0, 2.0, 4.0)) -> list[str]:
    return [f"L3-8x-standard-l1_{value:g}" for value in l1]
