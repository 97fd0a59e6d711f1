"""Write docs/results.md: FAST and its baselines on the bundled model, three seeds, and a sweep of coefficients.

What is trained or evaluated already in --out is not done again, so an interrupted call goes on where it stopped.
"""

import argparse
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatsae.config import RunConfig
from chatsae.demo.walkthrough import for_method
from chatsae.evals.curves import curves
from chatsae.evals.matched import Matched, matched
from chatsae.evals.pareto import pareto_figure
from chatsae.evals.report import load_reports
from chatsae.recipe import load_recipe
from chatsae.runs import Run, environment
from chatsae.sweep import complete, sweep, sweep_config
from results_scores import DIALOGUES, Scores, score, score_sentence, score_table
from results_tables import (
    METHODS,
    Found,
    architecture_sentence,
    folded,
    gain_paragraph,
    gain_table,
    group_table,
    gsnr_table,
    gsnr_unit,
    main_table,
    matched_table,
    method_table,
    missing_sentence,
    ratio_table,
)
from steering_page import kept_section

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
FIGURE = ROOT / "docs" / "img" / "pareto"
SWEEP_TOKENS = 409_600
L0S = (25.0, 35.0, 55.0, 70.0, 90.0)
"""What FAST and BT(F) cover with both architectures; BT(P) needs more active features for most of it."""

SYNTHETIC = """## When FAST wins, where the truth is known

![Error of BT(F) and BT(P) over that of FAST, as leakage, the sink's norm and the prefix change](img/synthetic.svg)

On activations made of known features (roles, template tokens, a sink at position 0, a constant prefix, topics, leakage
between dialogues) one cause can be changed at a time: [synthetic.md](synthetic.md), `make synthetic`.
"""


def measure(config: RunConfig, out: Path, seeds: Sequence[int]) -> Found:
    """Rows of reports by (SAE, method), one per seed."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in seeds:
        for method in METHODS:
            own = for_method(replace(config, train=replace(config.train, seed=seed)), method)
            for name, row in complete(own, out / f"seed-{seed}" / method).rows.items():
                if "control" not in row:
                    found.setdefault((name, method), []).append(row)
    return found


def swept(config: RunConfig) -> RunConfig:
    """The recipe of the sweep: fewer tokens, five coefficients per architecture, the fast step where it pays."""
    return sweep_config(replace(config, train=replace(config.train, tokens=SWEEP_TOKENS, step="auto")))


def at_equal_l0(config: RunConfig, out: Path) -> Matched:
    """Train what is missing of the sweep, draw the figure, and read the methods off at equal L0."""
    sweep(swept(config), out / "sweep", methods=METHODS)
    found = curves(load_reports([Run.read(out / "sweep" / method) for method in METHODS]))
    pareto_figure(
        found, FIGURE, title=f"{config.model.name}, {SWEEP_TOKENS:,} tokens, {config.eval.dialogues} dialogues"
    )
    return matched(found, L0S)


def page(recipe: Path, seeds: Sequence[int], found: Found, at: Matched, scores: Scores) -> str:
    """The whole page."""
    config, versions = load_recipe(recipe), environment()
    l1, l0 = (", ".join(f"{v:g}" for v in values) for values in _coefficients(config))
    return f"""# Results on the bundled chat model

Written by `make results` from `{recipe.relative_to(ROOT)}`: {len(METHODS)} methods × {len(seeds)} seeds
({", ".join(map(str, seeds))}), {config.train.tokens:,} training tokens each, {config.sae.form} form, evaluated on
{config.eval.dialogues} held-out dialogues, each fed whole. Mean ± standard deviation over the seeds.

Conditions: {versions["cpu_count"]} cores ({platform.machine()}), Python {versions["python"]}, torch
{versions["torch"]}, transformers {versions["transformers"]}. The bundled model is small and knows one subject: this
page shows that the pipeline works and in which direction the methods differ here, not what they do on a large model.

{main_table(found)}

`mse` is eq. 7 of the paper; `mse_st` the same over special tokens matched by id, as the paper does; in brackets log2,
as the paper prints both. Lower is better except for explained variance; an `mse` is only comparable at a like `l0`.
Delta Loss is in nats per token of the language model, on all tokens. `bt-f-isolated` reads the blocks of `bt-f` with
attention kept within each dialogue: between it and `bt-f` lies what other dialogues in a block do, between it and
`fast` what cutting dialogues at block edges does.

{folded("Ratios, seed by seed (above 1: FAST is better)", ratio_table(found))}

## How much of the gain is position 0 and the constant prefix

{gain_paragraph(found)}

{gain_table(found)}

A bit is a factor of 2 in the error. In brackets the share of the gain by template position. The constant prefix is
what the template puts before every dialogue: the same vectors each time, which an SAE can memorise. `L0` is not equal
between methods here; the next section makes it so.

## At equal L0

![MSE and Delta Loss over L0, a line per method and architecture](img/pareto.svg)

One seed ({config.train.seed}), {SWEEP_TOKENS:,} tokens (fewer than above, as there are five times the SAEs),
five coefficients per architecture (`sae.l1_coefficients` {l1};
`sae.l0_coefficients` {l0}), all of a method from one pass of the language model, as
`chatsae sweep` trains them. Error bars: 95 % over dialogues.
`chatsae compare runs/results/sweep/*/ --matched-l0 --figure pareto` prints the table and draws the figure.

{architecture_sentence(at)}

**Is FAST better at equal L0?** Geometric mean of the ratio, and in how many pairs FAST is lower, over both
architectures and all L0 values that both methods cover. *Surely*, here and above: the 95 % interval of the paired
difference over dialogues leaves out 0; it does not know what another seed would give.

{method_table(at)}

{folded("The table: every method read off at equal L0 (best of its SAE and L0 in bold)", matched_table(at))}

Figures are linear in log L0 between neighbouring SAEs. {missing_sentence(at)}

{SYNTHETIC}
## By group

{folded("Mean squared error by part, role, kind and position of a token", group_table(found))}

Of FAST in full, of the others as multiples of it; mean over the seeds. `part: constant prefix` is without position 0;
`kind: first assistant` is the first content token of each answer.

## How many features have a pattern

Share of scores 4 and 5 of 512 features per SAE and seed, by the pattern judge ([judge.md](judge.md)) on their strongest
contexts of {DIALOGUES} dialogues, with 95 % Wilson intervals; the paper's 21.1 %, 10.2 % and 7.0 % are of 128 features,
five contexts and GPT-4o, so levels do not compare:

{score_table(scores)}

{textwrap.fill(score_sentence(scores), 120)}

L0 differs between the methods, and a pattern is not a meaning: the judge knows tokens, their neighbours and places in
the template. `chatsae judge RUN --dialogues {DIALOGUES}` prints a row of the table.

## GSNR

Every SAE at its own weights, on random tokens of the held-out dialogues ({gsnr_unit(found)}):

{gsnr_table(found)}

A GSNR at the weights an SAE was trained to says how far it is from its optimum on these tokens as much as how clean its
gradient is. [gsnr.md](gsnr.md) has the experiment that can be compared, all methods from the same weights on the same
dialogues, and the attention leakage that the paper names as the cause.

{kept_section()}
"""


def _coefficients(config: RunConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    sae = swept(config).sae
    return sae.l1_coefficients, sae.l0_coefficients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    args = parser.parse_args()
    config = load_recipe(args.recipe)
    found = measure(config, args.out, args.seeds)
    at = at_equal_l0(config, args.out)
    scores = score(args.out, args.seeds)
    PAGE.write_text(page(args.recipe, args.seeds, found, at, scores), encoding="utf-8")


if __name__ == "__main__":
    main()
