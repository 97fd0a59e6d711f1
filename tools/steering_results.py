"""Write the section on steering of docs/results.md: features of special tokens, and what their strengths do.

    python tools/steering_results.py [--runs runs/results/seed-42]

Reads the runs fast, bt-f and bt-p of one seed of `make results` (or of `chatsae demo`), finds the features of the
special tokens in each, and sweeps strengths of some beside a random direction and another feature. Answers are kept in
RUN/steer/, so an interrupted call goes on where it stopped.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.errors import UserError
from chatsae.files import write_text
from chatsae.lm.load import load_model
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.steering.command import steer_split
from chatsae.steering.sweep_command import SweepAsk, sweep_run
from chatsae.steering.tokens import TokenRow, token_features
from chatsae.steersweep.figure import sweep_figure
from steering_page import FIGURE, Sweep, write_section

ROOT = Path(__file__).parents[1]
METHODS = ("fast", "bt-f", "bt-p")
DIALOGUES = 1000
"""Of the steering split, as the paper; the bundled corpus has fewer."""

MAIN = ("fast", "jumprelu")
"""The SAE whose features are steered, as the paper's: the first of each special token."""


@dataclass(frozen=True)
class Found:
    """Features of special tokens by (method, SAE), and how many dialogues they were found on."""

    rows: Mapping[tuple[str, str], list[TokenRow]]
    n_dialogues: int


def runs_of(folder: Path) -> dict[str, Run]:
    """The runs of a seed by method.

    Raises:
        UserError: one is missing; says how it is made.
    """
    missing = [method for method in METHODS if not (folder / method / "config.yaml").is_file()]
    if missing:
        raise UserError(
            f"{folder} has no run {' and no run '.join(missing)}; `make results` makes them in runs/results/seed-42 "
            "(hours), `make demo` small ones in runs/demo (minutes; then --runs runs/demo)"
        )
    return {method: Run.read(folder / method) for method in METHODS}


def special_tokens(runs: Mapping[str, Run]) -> Found:
    """One pass over the dialogues of the steering split for all SAEs of all methods."""
    saes = {(m, path.name): SAE.load(path) for m, run in runs.items() for path in run.sae_directories()}
    config = runs[METHODS[0]].config
    lm = load_model(config.model)
    tokens = steer_split(config, lm, DIALOGUES)
    by_text = {"\n".join(key): sae.to(lm.device) for key, sae in saes.items()}
    found = token_features(lm, by_text, [tokens])
    rows = {key: [row for row in found["\n".join(key)] if row.place in ("id", "template")] for key in saes}
    return Found(rows, len(tokens))


def wanted(found: Found) -> list[tuple[str, str, str, int]]:
    """Token, method, SAE and feature of each sweep.

    Of the main SAE the first feature of each token that no token before it has; of the other methods that of the
    token that begins a turn.
    """
    chosen: list[tuple[str, str, str, int]] = []
    for (method, sae), rows in found.rows.items():
        if not sae.endswith(MAIN[1]):
            continue
        by_id = [row for row in rows if row.place == "id"]
        for row in by_id if method == MAIN[0] else by_id[:1]:
            taken = {k for _, m, name, k in chosen if (m, name) == (method, sae)}
            free = [f.feature for f in row.features if f.feature not in taken]
            chosen += [(row.token, method, sae, free[0])] if free else []
    return chosen


def sweeps(runs: Mapping[str, Run], todo: Sequence[tuple[str, str, str, int]]) -> list[Sweep]:
    """Every sweep."""
    found = []
    for i, (token, method, sae, feature) in enumerate(todo, start=1):
        console.say(f"sweep {i} of {len(todo)}: {method} {sae}, feature {feature} ({token!r})")
        facts: dict[str, Any] = sweep_run(runs[method].path, SweepAsk(feature=feature, sae=sae))[0]
        found.append(Sweep(token, method, facts))
    return found


def shrink(path: Path) -> None:
    """Leave a tenth of a point to positions in an SVG, which halves it; numbers below 10 may be scales, and stay."""
    text = path.read_text(encoding="utf-8")
    write_text(path, re.sub(r"\b(\d{2,}\.\d)\d+", r"\1", text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results" / "seed-42")
    args = parser.parse_args()
    try:
        runs = runs_of(args.runs)
        found = special_tokens(runs)
        made = sweeps(runs, wanted(found))
        own = [sweep for sweep in made if sweep.method == MAIN[0]]
        sweep_figure(
            [sweep.facts for sweep in own],
            FIGURE,
            titles=[f"{sweep.token}, feature {sweep.facts['feature']}" for sweep in own],
        )
        shrink(FIGURE)
        write_section(found.rows, found.n_dialogues, made, runs[MAIN[0]].config.train.tokens)
    except UserError as error:
        console.fail(str(error))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
