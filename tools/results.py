"""Write docs/results.md: FAST and its baselines on the bundled model, three seeds, mean and spread.

Runs that are already in --out are not trained again, so an interrupted call goes on where it stopped.
"""

import argparse
import platform
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatsae.config import Method
from chatsae.demo.walkthrough import for_method
from chatsae.evals.report import Report
from chatsae.evals.session import evaluate_run
from chatsae.recipe import load_recipe
from chatsae.runs import environment
from chatsae.training.session import train_run

ROOT = Path(__file__).parents[1]
METHODS: tuple[Method, ...] = ("bt-p", "bt-f", "bt-f-isolated", "fast")
COLUMNS = {
    "mse": "mse",
    "log2_mse": "log2",
    "mse_st": "mse_st",
    "log2_mse_st": "log2",
    "mse_st_template": "mse_st_template",
    "l0": "l0",
    "explained_variance": "explained variance",
    "dead_fraction": "dead",
    "delta_loss": "Delta Loss",
    "delta_loss_percent": "%",
}


def measure(recipe: Path, out: Path, seeds: Sequence[int]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Reports by (SAE, method), one per seed."""
    config = load_recipe(recipe)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in seeds:
        for method in METHODS:
            run = out / f"seed-{seed}" / method
            summary = train_run(for_method(replace(config, train=replace(config.train, seed=seed)), method), run)
            if summary.ending == "interrupted":
                raise KeyboardInterrupt
            path = run / "report.json"
            report = Report.load(path) if path.exists() else evaluate_run(run)
            for name, row in report.rows.items():
                found.setdefault((name, method), []).append(row)
    return found


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4g} ± {spread:.2g}"


def table(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """A Markdown table, methods of one SAE together."""
    head = ["SAE", "method", *COLUMNS.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, method in sorted(found, key=lambda key: (key[0], METHODS.index(key[1]))):
        rows = found[name, method]
        lines.append(f"| {name} | {method} | " + " | ".join(cell([r[c] for r in rows]) for c in COLUMNS) + " |")
    return "\n".join(lines)


def ratios(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Per SAE and metric, each baseline over FAST, seed by seed."""
    lines = []
    for name in sorted({name for name, _ in found}):
        for metric in ("mse", "mse_st", "mse_st_template"):
            for method in ("bt-f", "bt-f-isolated", "bt-p"):
                pairs = zip(found[name, method], found[name, "fast"], strict=True)
                lines.append(
                    f"- {name}: {metric} of {method} over fast: {cell([b[metric] / f[metric] for b, f in pairs])}"
                )
    return "\n".join(lines)


def page(recipe: Path, seeds: Sequence[int], found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """The whole page."""
    config = load_recipe(recipe)
    versions = environment()
    return f"""# Results on the bundled chat model

Written by `make results` from `{recipe.relative_to(ROOT)}`: {len(METHODS)} methods × {len(seeds)} seeds
({", ".join(map(str, seeds))}), {config.train.tokens:,} training tokens each, {config.sae.form} form, evaluated on
{config.eval.dialogues} held-out dialogues, each fed whole. Mean ± standard deviation over the seeds.

Conditions: {versions["cpu_count"]} cores ({platform.machine()}), Python {versions["python"]}, torch
{versions["torch"]}, transformers {versions["transformers"]}. The bundled model is small and knows one subject: this
page shows that the pipeline works and in which direction the methods differ here, not what they do on a large model.

{table(found)}

`mse` is eq. 7 of the paper; `mse_st` the same over special tokens matched by id, as the paper does;
`mse_st_template` where the chat template wrote them. Lower is better except for explained variance; an `mse` is only
comparable at a like `l0`. Delta Loss is in nats per token of the language model, on all tokens. `bt-f-isolated` reads
the blocks of `bt-f` with attention kept within each dialogue: between it and `bt-f` lies what other dialogues in a
block do, between it and `fast` what cutting dialogues at block edges does.

Ratios, seed by seed (above 1: FAST is better):

{ratios(found)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    args = parser.parse_args()
    found = measure(args.recipe, args.out, args.seeds)
    (ROOT / "docs" / "results.md").write_text(page(args.recipe, args.seeds, found), encoding="utf-8")


if __name__ == "__main__":
    main()
