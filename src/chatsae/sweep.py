"""A sweep of sparsity coefficients: several methods, one language-model pass each, compared at equal L0."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.config import Architecture, Method, RunConfig, sae_specs
from chatsae.errors import UserError
from chatsae.evals.curves import Curve, curves
from chatsae.evals.matched import Matched, matched
from chatsae.evals.pareto import pareto_figure
from chatsae.evals.report import Comparison, Report, compare, load_reports
from chatsae.evals.schema import VERSION
from chatsae.evals.session import evaluate_run
from chatsae.files import shared_name, write_json
from chatsae.runs import Run
from chatsae.training.session import train_run

METHODS: tuple[Method, ...] = ("fast", "bt-f", "bt-p")
_COEFFICIENTS: tuple[tuple[Architecture, str], ...] = (
    ("standard", "l1_coefficients"),
    ("jumprelu", "l0_coefficients"),
)


@dataclass(frozen=True)
class Sweep:
    """A finished sweep; `figures` are the files that were drawn."""

    comparison: Comparison
    matched: Matched
    figures: list[Path]

    def text(self) -> str:
        """The tables."""
        return "\n\n".join([self.comparison.table(), self.matched.table()])

    def facts(self) -> dict[str, Any]:
        """What JSON holds."""
        drawn = {"figures": [str(path) for path in self.figures]}
        return self.comparison.facts_json() | {"matched": self.matched.facts()} | drawn


def geometric(middle: float, points: int, span: float) -> tuple[float, ...]:
    """Coefficients from middle / span to middle x span, each the same factor above the one before."""
    steps = [2 * i / (points - 1) - 1 for i in range(points)] if points > 1 else [0.0]
    return tuple(float(f"{middle * span**step:.4g}") for step in steps)


def sweep_config(config: RunConfig, *, points: int = 5, span: float = 4.0) -> RunConfig:
    """The recipe with a geometric grid around each coefficient; several coefficients in the recipe stay as they are.

    Raises:
        UserError: there are fewer than 2 points, the span is no factor above 1, or a coefficient is 0.
    """
    if points < 2:
        raise UserError(f"--points must be at least 2, not {points}")
    if not 1 < span < float("inf"):
        raise UserError(f"--span must be above 1, not {span:g}")
    grid: dict[str, Any] = {}
    for architecture, name in _COEFFICIENTS:
        values = getattr(config.sae, name)
        if architecture not in config.sae.architectures or len(values) != 1:
            continue
        if values[0] <= 0:
            raise UserError(f"sae.{name} is {values[0]:g}; a sweep needs a value above 0 to go around, or several")
        grid[name] = geometric(values[0], points, span)
    return replace(config, sae=replace(config.sae, **grid))


def sweep(
    config: RunConfig,
    out: Path,
    *,
    methods: Sequence[Method] = METHODS,
    points: int = 5,
    span: float = 4.0,
    l0s: Sequence[float] = (),
) -> Sweep:
    """Train and evaluate one run per method under `out`, and compare them at equal L0.

    What is trained or evaluated already is not done again. Writes compare.json, matched.json and, where matplotlib is
    installed, pareto.png and pareto.svg.

    Raises:
        UserError: see `sweep_config`, `train_run`, `evaluate_run` and `matched`.
        KeyboardInterrupt: the user stopped it; the same call goes on where it stopped.
    """
    if not methods:
        raise UserError("--methods is empty; at least one method is needed")
    config = sweep_config(config, points=points, span=span)
    console.say(_plan(config, methods))
    chosen = list(dict.fromkeys(methods))
    for method in chosen:
        complete(replace(config, data=replace(config.data, method=method)), out / method)
    runs = [Run.read(out / method) for method in chosen]
    comparison, found = compare(runs), curves(load_reports(runs))
    comparison.save(out / "compare.json")
    at = _at_equal_l0(found, l0s)
    write_json(out / "matched.json", at.facts())
    figures = []
    if find_spec("matplotlib") is not None:
        figures = pareto_figure(
            found, out / "pareto", title=f"{shared_name(config.model.name)}, {config.train.tokens:,} tokens"
        )
    return Sweep(comparison, at, figures)


def _at_equal_l0(found: Sequence[Curve], l0s: Sequence[float]) -> Matched:
    try:
        return matched(found, l0s)
    except UserError as error:  # an hour of training is not lost over it
        console.warn(str(error))
        return Matched([], [])


def complete(config: RunConfig, out: Path) -> Report:
    """Train and evaluate a run, whatever of that is still to be done.

    Raises:
        UserError: see `train_run` and `evaluate_run`.
        KeyboardInterrupt: the user stopped it; the same call goes on where it stopped.
    """
    if train_run(config, out).ending == "interrupted":
        raise KeyboardInterrupt
    return _evaluated(out) or evaluate_run(out)


def _evaluated(out: Path) -> Report | None:
    """The report of a run, if it is whole and of the present schema."""
    try:
        report = Report.load(out / "report.json")
    except UserError:
        return None
    whole = report.version == VERSION and report.dialogues is not None
    return report if whole and {p.name for p in Run.read(out).sae_directories()} <= report.rows.keys() else None


def _plan(config: RunConfig, methods: Sequence[Method]) -> str:
    n = len(sae_specs(config.sae, layers=config.model.layers, d_in=1))
    grids = [
        f"sae.{name} {', '.join(f'{value:g}' for value in getattr(config.sae, name))}"
        for architecture, name in _COEFFICIENTS
        if architecture in config.sae.architectures
    ]
    passes = "one pass" if len(methods) == 1 else f"{len(methods)} passes"
    return f"{passes} of {config.model.name} ({', '.join(methods)}), {n} SAEs each: {'; '.join(grids)}"
