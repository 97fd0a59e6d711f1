"""The demo: the whole method on the bundled chat model, FAST against BT(F) and BT(P)."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.config import Method, RunConfig
from chatsae.evals.report import Comparison, compare
from chatsae.evals.session import evaluate_run
from chatsae.recipe import load_recipe
from chatsae.runs import Run
from chatsae.training.session import train_run

RECIPE = Path(__file__).with_name("recipe.yaml")
METHODS: tuple[Method, ...] = ("bt-p", "bt-f", "fast")


def demo(out: Path, recipe: Path | None = None) -> Comparison:
    """Train and evaluate one run per method under `out`; prints the table and writes compare.json.

    Raises:
        UserError: see `train_run` and `evaluate_run`.
        KeyboardInterrupt: the user stopped it; the same call goes on where it stopped.
    """
    start = time.monotonic()
    config = load_recipe(recipe or RECIPE)
    console.say(_plan(config))
    for method in METHODS:
        summary = train_run(for_method(config, method), out / method)
        if summary.ending == "interrupted":
            raise KeyboardInterrupt
        if not (out / method / "report.json").exists():
            evaluate_run(out / method)
    comparison = compare([Run.read(out / method) for method in METHODS])
    comparison.save(out / "compare.json")
    console.result(comparison.table())
    console.result(verdict(comparison.rows))
    console.say(_next_steps(out, time.monotonic() - start))
    return comparison


def for_method(config: RunConfig, method: Method) -> RunConfig:
    """The same recipe with another method."""
    return replace(config, data=replace(config.data, method=method))


def verdict(rows: list[dict[str, Any]]) -> str:
    """Two sentences on what the table shows, computed from it, whichever way it falls."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["SAE"], {})[row["method"]] = row
    first = [f"{name}: {_ranking(group, 'mse_st')}" for name, group in groups.items()]
    second = [
        f"{name}: {_ranking(group, 'mse')}, with l0 "
        + ", ".join(f"{group[m]['l0']:.0f} ({m})" for m in _ordered(group, "mse"))
        for name, group in groups.items()
    ]
    return (
        f"On special tokens (mse_st, lowest first) {'; '.join(first)}.\n"
        f"On all tokens (mse, lowest first) {'; '.join(second)}: an mse means little without its l0."
    )


def _ordered(group: dict[str, dict[str, Any]], metric: str) -> list[str]:
    return sorted(group, key=lambda m: group[m][metric])


def _ranking(group: dict[str, dict[str, Any]], metric: str) -> str:
    order = _ordered(group, metric)
    best = group[order[0]][metric]
    return " < ".join(m if m == order[0] or best <= 0 else f"{m} ({group[m][metric] / best:.2f}x)" for m in order)


def _plan(config: RunConfig) -> str:
    return (
        f"Training {', '.join(config.sae.architectures)} SAEs on layer {', '.join(map(str, config.model.layers))} of "
        f"{config.model.name}, {config.train.tokens:,} tokens for each of bt-p (pretraining text in blocks), "
        f"bt-f (dialogues in blocks) and fast (each dialogue alone)."
    )


def _next_steps(out: Path, seconds: float) -> str:
    return f"""
Done in {seconds / 60:.1f} minutes. Everything is in {out}: compare.json, and per method config.yaml, metrics.jsonl,
report.json and saes/ (each SAE loads in sae_lens too).

Next:
  chatsae show {out}
  chatsae plan recipes/qwen2.5-0.5b.yaml
  chatsae train recipes/qwen2.5-0.5b.yaml --data.method fast     # downloads Qwen2.5-0.5B-Instruct and the chat data
"""
