"""Curves over L0: the SAEs of one method that differ in their sparsity coefficient only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatsae.config import Architecture, Method, RunConfig, SAESpec, sae_specs
from chatsae.evals.figures import Table, ratios
from chatsae.evals.report import Report
from chatsae.files import shared_name
from chatsae.recipe import differences
from chatsae.runs import Run
from chatsae.statistics import Ratio

FIGURES = (
    *("mse", "mse_st", "mse_st_template", "mse_st_no_first", "mse_st_no_prefix"),
    *("fvu", "explained_variance", "delta_loss", "delta_loss_percent", "kl"),
)
"""The figures of a report that are read off at a given L0."""


@dataclass(frozen=True, slots=True)
class Point:
    """An SAE: its L0 and figures; `parts` are L0 and figures by dialogue, empty where the report has no sums."""

    sae: str
    run: str
    coefficient: float
    l0: float
    figures: Mapping[str, float | None]
    intervals: Mapping[str, Sequence[float] | None]
    parts: Mapping[str, Ratio]


@dataclass(frozen=True, slots=True)
class Curve:
    """SAEs of one method by rising L0; `label` is the method, with what else sets it apart from other curves."""

    layer: int
    expansion_factor: int
    architecture: Architecture
    method: Method
    label: str
    points: tuple[Point, ...]

    @property
    def group(self) -> str:
        """What its SAEs are called without their coefficient."""
        return f"L{self.layer}-{self.expansion_factor}x-{self.architecture}"

    @property
    def covers(self) -> tuple[float, float]:
        """Least and largest L0."""
        return self.points[0].l0, self.points[-1].l0


def curves(reports: Sequence[tuple[Run, Report]]) -> list[Curve]:
    """The curves in the reports of several runs, in the order of their SAEs.

    Runs of one method make one curve where they differ in the coefficients alone; other settings part them, and join
    the label. An SAE none of whose features fires has no place on a logarithmic axis and is left out.
    """
    found: dict[tuple[int, int, Architecture, Method, str], list[Point]] = {}
    labels = _labels([run.config for run, _ in reports])
    for (run, report), label in zip(reports, labels, strict=True):
        config = run.config
        for spec in sae_specs(config.sae, layers=tuple(sorted(config.model.layers)), d_in=1):
            row = report.rows.get(spec.name)
            if row is not None and row["l0"]:
                table = None if report.dialogues is None else report.dialogues.tables.get(spec.name)
                name = label if len(config.sae.lrs) == 1 else f"{label}, lr {spec.lr:g}"
                key = (spec.layer, spec.expansion_factor, spec.architecture, config.data.method, name)
                found.setdefault(key, []).append(_point(spec, run, row, table))
    return [Curve(*key, points=tuple(sorted(points, key=lambda p: p.l0))) for key, points in found.items()]


def _point(spec: SAESpec, run: Run, row: Mapping[str, Any], table: Table | None) -> Point:
    parts: dict[str, Ratio] = {}
    if table is not None:
        parts = {name: pair for name, pair in ratios(table).items() if name in ("l0", *FIGURES)}
        parts["explained_variance"] = (table["variance"] - table["squared_error"], table["variance"])
    return Point(
        sae=spec.name,
        run=shared_name(str(run.path)),
        coefficient=spec.coefficient,
        l0=row["l0"],
        figures={name: row.get(name) for name in FIGURES},
        intervals=row.get("intervals", {}),
        parts=parts,
    )


def _labels(configs: Sequence[RunConfig]) -> list[str]:
    """The method of each run; with the settings in which it differs from the first run of its method."""
    first: dict[Method, RunConfig] = {}
    labels = []
    for config in map(_bare, configs):
        method = config.data.method
        changed = differences(first.setdefault(method, config), config)
        labels.append(", ".join([method, *(_short(line) for line in changed)]))
    return labels


def _short(line: str) -> str:
    """`train.seed: 42 -> 43` as `seed 43`."""
    name, _, values = line.partition(": ")
    return f"{name.partition('.')[2]} {values.partition(' -> ')[2]}"


def _bare(config: RunConfig) -> RunConfig:
    """The configuration without what a curve varies, and without what does not reach an SAE."""
    plain = RunConfig()
    sae = replace(
        config.sae,
        architectures=plain.sae.architectures,
        expansion_factors=plain.sae.expansion_factors,
        l1_coefficients=plain.sae.l1_coefficients,
        l0_coefficients=plain.sae.l0_coefficients,
        lrs=plain.sae.lrs if len(config.sae.lrs) > 1 else config.sae.lrs,
    )
    train = replace(
        config.train, log_every=plain.train.log_every, checkpoint_every=plain.train.checkpoint_every, step="auto"
    )
    model = replace(config.model, layers=plain.model.layers)
    return replace(config, model=model, sae=sae, train=train, eval=plain.eval)
