"""The demo: the whole method on the bundled test model or on a real one, FAST against BT(F) and BT(P)."""

import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.config import Method, RunConfig
from chatsae.evals.report import Comparison, compare
from chatsae.evals.tables import has_sinks
from chatsae.features.judging import read_judgements
from chatsae.features.store import FeatureStore
from chatsae.lm.gguf import fetch
from chatsae.page.data import Wanted
from chatsae.page.write import report, summary
from chatsae.recipe import load_recipe
from chatsae.runs import Run
from chatsae.steering.command import Ask, steer_run
from chatsae.sweep import complete

RECIPE = Path(__file__).with_name("recipe.yaml")
REAL = Path(__file__).with_name("smollm2.yaml")
REAL_WANTED = Wanted(features=128, dialogues=40)
PROMPTS = ("Tell me about the weather today.",)
_GOOD = 4
METHODS: tuple[Method, ...] = ("bt-p", "bt-f", "fast")


def demo(out: Path, recipe: Path | None = None, wanted: Wanted | None = None) -> Comparison:
    """Train and evaluate one run per method under `out`; prints the table, writes compare.json and a page, report.html.

    `wanted` is what the page shows of the features.

    Raises:
        UserError: see `chatsae.sweep.complete`.
        KeyboardInterrupt: the user stopped it; the same call goes on where it stopped.
    """
    start = time.monotonic()
    config = load_recipe(recipe or RECIPE)
    console.say(_plan(config))
    for method in METHODS:
        complete(for_method(config, method), out / method)
    comparison = compare([Run.read(out / method) for method in METHODS])
    comparison.save(out / "compare.json")
    console.result(comparison.text())
    console.result(verdict(comparison.rows))
    console.say("What the features respond to, and their scores:")
    page = report([out / method for method in METHODS], out / "report.html", wanted)
    console.say(summary(page))
    console.say(_next_steps(out, time.monotonic() - start))
    return comparison


def real_demo(out: Path, wanted: Wanted = REAL_WANTED, recipe: Path = REAL) -> Comparison:
    """`demo` on SmolLM2-135M-Instruct, fetched where it is missing; then an answer steered with a feature.

    Raises:
        UserError: see `demo` and `chatsae.lm.gguf.fetch`.
        KeyboardInterrupt: the user stopped it; the same call goes on where it stopped.
    """
    fetch("smollm2")
    comparison = demo(out, recipe, wanted)
    found = best_feature(out / "fast")
    if found is None:
        console.say("No feature has a score of 4 or more, so none is steered.")
        return comparison
    name, feature, explanation = found
    ask = Ask(feature=feature, alphas=("auto",), sae=name, prompts=PROMPTS, max_new_tokens=40, dialogues=24)
    console.say(f"Steering with feature {feature} of fast/{name}: {explanation}")
    console.result(steer_run(out / "fast", ask)[1])
    return comparison


def best_feature(path: Path) -> tuple[str, int, str] | None:
    """The SAE, index and explanation of the feature with the highest score of at least 4 in a run's judgements.

    Of those that fire on a tenth of the tokens at most; among equals the one that fires most.
    """
    found = []
    for sae in Run.read(path).sae_directories():
        for judgement in read_judgements(path, sae.name):
            store = FeatureStore.load(path / "features" / sae.name)
            active, most = store.columns["n_active"], store.facts["n_tokens"] / 10
            for verdict in judgement["verdicts"]:
                score, feature = verdict["score"], verdict["feature"]
                if score is not None and score >= _GOOD and active[feature] <= most:
                    found.append((score, int(active[feature]), sae.name, feature, verdict["explanation"]))
    return max(found)[2:] if found else None


def for_method(config: RunConfig, method: Method) -> RunConfig:
    """The same recipe with another method."""
    return replace(config, data=replace(config.data, method=method))


def verdict(rows: list[dict[str, Any]]) -> str:
    """Two sentences on what the table shows, computed from it, whichever way it falls; without sinks, if there are."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["SAE"], {})[row["method"]] = row
    special, overall, active = ("mse_st", "mse", "l0")
    tokens = "special tokens", "all tokens"
    if has_sinks(rows):
        special, overall, active = ("mse_st_no_first", "mse_no_sinks", "l0_no_sinks")
        tokens = "special tokens beyond position 0", "all tokens but sinks"
    rankings = ["; ".join(_ranking(name, one, figure) for name, one in groups.items()) for figure in (special, overall)]
    l0 = "; ".join(f"{name} {_l0(group, active)}" for name, group in groups.items())
    return (
        f"Error on {tokens[0]} ({special}): {rankings[0]}.\n"
        f"Error on {tokens[1]} ({overall}): {rankings[1]}; more active features leave less error, so read it beside l0 "
        f"({l0})."
    )


def _ranking(name: str, group: dict[str, dict[str, Any]], metric: str) -> str:
    best, *others = sorted(group, key=lambda method: group[method][metric])
    least = group[best][metric]
    ratios = [f"{m} {group[m][metric] / least:.2f} times that" if least > 0 else m for m in others]
    return f"{best} is best for {name} ({', '.join(ratios)})"


def _l0(group: dict[str, dict[str, Any]], figure: str) -> str:
    return ", ".join(f"{method} {row[figure]:.0f}" for method, row in group.items())


def _plan(config: RunConfig) -> str:
    return (
        f"Training {', '.join(config.sae.architectures)} SAEs on layer {', '.join(map(str, config.model.layers))} of "
        f"{config.model.name}, {config.train.tokens:,} tokens for each of bt-p (pretraining text in blocks), "
        f"bt-f (dialogues in blocks) and fast (each dialogue alone)."
    )


def _next_steps(out: Path, seconds: float) -> str:
    command = "chatsae" if shutil.which("chatsae") else os.path.relpath(Path(sys.executable).parent / "chatsae")
    return f"""
Done in {seconds / 60:.1f} minutes. Everything is in {out}: report.html to look at, compare.json, and per method
config.yaml, metrics.jsonl, report.json and saes/ (each SAE loads in sae_lens too).

Next:
  open {out / "report.html"} in a browser
  {command} show {out}
  {command} plan recipes/qwen2.5-0.5b.yaml
  {command} train recipes/qwen2.5-0.5b.yaml --data.method fast     # downloads Qwen2.5-0.5B-Instruct and the chat data
"""
