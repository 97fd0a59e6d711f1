"""Everything `chatsae compare` shows of several runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.evals.curves import curves
from chatsae.evals.matched import matched
from chatsae.evals.pareto import figure_paths, need_matplotlib, pareto_figure
from chatsae.evals.report import compare, load_reports
from chatsae.files import shared_name, write_json
from chatsae.runs import Run


def compare_runs(
    paths: Sequence[Path],
    *,
    paper: str | None = None,
    l0s: Sequence[float] | None = None,
    figure: Path | None = None,
    out: Path | None = None,
) -> tuple[dict[str, Any], str]:
    """Set evaluated runs side by side; returns the JSON and the tables.

    Args:
        paths: run directories.
        paper: see `compare`.
        l0s: L0 values to read every method off at; empty: chosen; None: at none.
        figure: file of the Pareto figure; without a suffix, a PNG and an SVG.
        out: file for the JSON.

    Raises:
        UserError: see `compare`, `matched` and `pareto_figure`.
    """
    if figure is not None:
        need_matplotlib()
        figure_paths(figure)
    runs = [Run.read(path) for path in paths]
    comparison = compare(runs, paper=paper)
    facts, tables = comparison.facts_json(), [comparison.text()]
    if l0s is not None or figure is not None:
        found = curves(load_reports(runs))
        if l0s is not None:
            at = matched(found, l0s)
            facts["matched"] = at.facts()
            tables.append(at.table())
        if figure is not None:
            models = ", ".join(dict.fromkeys(shared_name(run.config.model.name) for run in runs))
            for file in pareto_figure(found, figure, title=models):
                console.say(f"figure: {file}")
    if out is not None:
        write_json(out, facts)
    return facts, "\n\n".join(tables)
