"""The section "The whole run" of docs/performance.md, from what tools/end_to_end.py measured."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatsae.files import write_text

BEGIN, END = "<!-- measured: make end-to-end -->", "<!-- end -->"
_AT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Record = Mapping[str, Any]


def write_page(page: Path, result: Record) -> None:
    """Replace what stands between the markers, or add them at the end of the page."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    write_text(page, f"{before}{BEGIN}\n\n{section(result)}\n{END}{after}")


def section(result: Record) -> str:
    """Everything between the markers."""
    machine, trainings = result["machine"], result["trainings"]
    lens = next((t["sae_lens"] for t in trainings if t["who"] == "sae_lens"), "")
    return f"""## The whole run

`make end-to-end`: trainings of {result["tokens"]:,} tokens, batch 128, with the paper's schedule by shares, on
{result["rows"]:,} recorded activations of the bundled model (d_in 192, 8x), passed over in another order each time.
`chatsae` is its training loop with `train.step` auto, `sae_lens` its own `SAETrainer.fit` ({lens}). Both get the same
batches, initial weights, learning rates and coefficients, step by step, and the objective is the same (v6 form, b_dec
subtracted from the input). What differs: sae_lens draws a progress bar; chatsae loads its compiled loops, which is
counted (compiling them, once per machine, takes some ten seconds and is not), and its GSNR, which sae_lens does not
have, is off. {result["threads"]} thread, {machine["cpu_count"]} cores ({platform.machine()}), torch {machine["torch"]}.
mse and L0 are of 32,768 activations that were not trained on; mean ± standard deviation over seeds
{", ".join(map(str, _seeds(trainings)))}.

{_table(trainings)}

How sparse real runs are, and what that makes of the steps (one seed; the share of all features that are active on a
token after so many of the steps; *dense* is the share of steps that were taken dense):

{_trajectories(trainings)}
"""


def _seeds(trainings: Sequence[Record]) -> list[int]:
    return sorted({t["seed"] for t in trainings})


def _table(trainings: Sequence[Record]) -> str:
    lines = [
        "| objective | | CPU s | wall s | CPU ratio | wall ratio | mse | L0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(t["name"] for t in trainings if t["who"] == "sae_lens"):
        rows = {who: [t for t in trainings if (t["name"], t["who"]) == (name, who)] for who in ("chatsae", "sae_lens")}
        for who, own in rows.items():
            ratios = ["", ""]
            if who == "chatsae":
                pairs = list(zip(own, rows["sae_lens"], strict=True))
                ratios = [_spread([b[k] / a[k] for a, b in pairs]) for k in ("cpu", "wall")]
            times = [_spread([t[k] for t in own]) for k in ("cpu", "wall")]
            scores = [_spread([t[k] for t in own]) for k in ("mse", "l0")]
            lines.append(f"| {' | '.join([name, who, *times, *ratios, *scores])} |")
    return "\n".join(lines)


def _trajectories(trainings: Sequence[Record]) -> str:
    steps = " | ".join(f"{100 * at:g} %" for at in _AT)
    lines = [f"| objective | dense | {steps} | L0 at the end |", "|---" * (len(_AT) + 3) + "|"]
    first = _seeds(trainings)[0]
    for t in trainings:
        if t["who"] == "chatsae" and t["seed"] == first:
            shares = [f"{100 * _l0_at(t, at) / t['d_sae']:.1f} %" for at in _AT]
            dense = f"{100 * t['dense_steps'] / t['steps']:.1f} %"
            cells = [t["name"], dense, *shares, f"{t['l0']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _l0_at(training: Record, share: float) -> float:
    """L0 of the reading that ends nearest to this share of the steps."""
    readings = training["l0_readings"]
    i = round(share * training["steps"] / training["every"]) - 1
    return readings[min(max(i, 0), len(readings) - 1)]


def _spread(values: Sequence[float]) -> str:
    less = f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{less}"
