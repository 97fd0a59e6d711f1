"""Methods at equal L0: each method's curve, read off between its SAEs, never beyond them.

An error means little without the L0 it was reached at. Between two neighbouring SAEs of a curve a figure is linear in
log L0; outside the curve it is null. Intervals are bootstrapped over dialogues: both SAEs' L0 and figure are drawn
anew together, and all curves from the same draws, so differences are paired.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from chatsae import console
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.evals.curves import FIGURES, Curve, Point
from chatsae.statistics import interval, resample

Draws = Mapping[tuple[int, int], Mapping[str, Float[np.ndarray, " R"]]]
"""L0 and figures of each point, by curve and place on it, in every resample."""


@dataclass(frozen=True, slots=True)
class Between:
    """Where an L0 lies on a curve: its neighbours, and the weight of the upper one."""

    lower: int
    upper: int
    weight: float


@dataclass(frozen=True)
class Matched:
    """Rows: one per L0 and curve. Differences: one per L0, pair of curves and figure, first minus second."""

    rows: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    title: str = "At equal L0 (* best of its SAE and L0)"

    def table(self) -> str:
        """The rows grouped by SAE and L0, the best of each group marked with a star."""
        rows = [row | {"group": f"{row['SAE']} {row['l0']:g}"} for row in self.rows]
        return console.table(self.title, COLUMNS, rows, group="group", caption=_caption(self.rows))

    def facts(self) -> dict[str, Any]:
        """What JSON holds."""
        return {"rows": self.rows, "differences": self.differences}


@dataclass(frozen=True, slots=True)
class _Figure(Column):
    """A figure with half of its 95 % interval."""

    def cell(self, row: Mapping[str, Any]) -> str:
        found = row["intervals"].get(self.key)
        half = "" if found is None else f" ±{(found[1] - found[0]) / 2:.1g}"
        return Column(self.key).cell(row) + half


COLUMNS = (
    Column("SAE"),
    Column("l0"),
    Column("method"),
    _Figure("mse", best="min"),
    _Figure("mse_st", best="min"),
    _Figure("mse_st_no_prefix", "mse_st without\nprefix", best="min"),
    _Figure("explained_variance", "explained\nvariance", best="max"),
    _Figure("delta_loss", best="min"),
)


def place(l0s: Sequence[float], l0: float) -> Between | None:
    """Where `l0` lies among rising L0s, by its logarithm; None outside of them."""
    if not l0s or not l0s[0] <= l0 <= l0s[-1]:
        return None
    lower = bisect_right(l0s, l0) - 1
    if l0s[lower] == l0:
        return Between(lower, lower, 0.0)
    lo, hi = math.log(l0s[lower]), math.log(l0s[lower + 1])
    return Between(lower, lower + 1, (math.log(l0) - lo) / (hi - lo))


def shared_l0s(curves: Sequence[Curve], n: int = 5) -> list[float]:
    """Up to `n` round L0 values, evenly apart in log L0, where most curves have SAEs on both sides.

    Empty where no two of several curves do.
    """
    edges = sorted({edge for curve in curves for edge in curve.covers})
    stretches = [
        (sum(c.covers[0] <= low and high <= c.covers[1] for c in curves), low, high) for low, high in pairwise(edges)
    ]
    most = max((count for count, _, _ in stretches), default=0)
    if most < min(2, len(curves)):
        return []
    _, low, high = max((s for s in stretches if s[0] == most), key=lambda s: s[2] / s[1])
    wanted = [low * (high / low) ** ((i + 0.5) / n) for i in range(n)]
    return sorted({_round(value, low, high) for value in wanted})


def matched(curves: Sequence[Curve], l0s: Sequence[float] = (), *, resamples: int = 1000, seed: int = 0) -> Matched:
    """Every curve at common L0 values: those given, or per layer and width those of `shared_l0s`.

    Raises:
        UserError: an L0 is not positive, or none was given and no two curves of a layer and width overlap.
    """
    wrong = [l0 for l0 in l0s if not (math.isfinite(l0) and l0 > 0)]
    if wrong:
        raise UserError(f"--matched-l0 must hold positive numbers, not {wrong[0]:g}")
    draws = _draws(curves, resamples, seed)
    rows: list[dict[str, Any]] = []
    values: dict[tuple[int, float], dict[str, Float[np.ndarray, " R"]]] = {}
    for layer, factor in dict.fromkeys((c.layer, c.expansion_factor) for c in curves):
        own = {i: c for i, c in enumerate(curves) if (c.layer, c.expansion_factor) == (layer, factor)}
        for l0 in sorted(set(map(float, l0s))) or shared_l0s(list(own.values())):
            for i, curve in own.items():
                row, drawn = _read(curve, i, l0, draws)
                rows.append(row)
                values[i, l0] = drawn
    if not rows:
        covered = "; ".join(f"{c.group} {c.label} {c.covers[0]:.3g} to {c.covers[1]:.3g}" for c in curves)
        raise UserError(
            f"no two methods have SAEs on both sides of one L0 ({covered or 'there is no SAE'}); "
            "`chatsae sweep` trains several coefficients per method"
        )
    order = {group: i for i, group in enumerate(dict.fromkeys(row["SAE"] for row in rows))}
    rows.sort(key=lambda row: (order[row["SAE"]], row["l0"]))
    return Matched(rows, _differences(curves, rows, values))


def _read(curve: Curve, i: int, l0: float, draws: Draws) -> tuple[dict[str, Any], dict[str, Float[np.ndarray, " R"]]]:
    """A row, and the resampled figures behind its intervals."""
    where = place([p.l0 for p in curve.points], l0)
    row: dict[str, Any] = {"SAE": curve.group, "layer": curve.layer, "expansion_factor": curve.expansion_factor}
    row |= {"architecture": curve.architecture, "method": curve.label, "l0": l0}
    if where is None:
        low, high = curve.covers
        reason = f"its SAEs cover L0 {low:.3g} to {high:.3g}, and nothing is extrapolated"
        return row | {"between": [], "weight": None} | dict.fromkeys(FIGURES) | {
            "intervals": dict.fromkeys(FIGURES),
            "reasons": dict.fromkeys(FIGURES, reason),
        }, {}
    lower, upper = curve.points[where.lower], curve.points[where.upper]
    row |= {"between": [lower.sae, upper.sae], "weight": where.weight}
    drawn = _drawn(i, where, l0, draws, (lower, upper))
    intervals, reasons = dict.fromkeys(FIGURES), {}
    for name in FIGURES:
        a, b = lower.figures[name], upper.figures[name]
        row[name] = None if a is None or b is None else (1 - where.weight) * a + where.weight * b
        if row[name] is None:
            reasons[name] = f"{(lower if a is None else upper).sae} has no {name}"
        elif name not in drawn:
            reasons[f"intervals/{name}"] = "the report has no sums by dialogue (report.parquet)"
        else:
            found = interval(drawn[name])
            intervals[name] = None if found is None else list(found)
            if found is None:
                reasons[f"intervals/{name}"] = "fewer than two dialogues have it"
    return row | {"intervals": intervals, "reasons": reasons}, drawn


def _drawn(
    i: int, where: Between, l0: float, draws: Draws, points: tuple[Point, Point]
) -> dict[str, Float[np.ndarray, " R"]]:
    """The figures of a curve at an L0 in every resample: the two SAEs stay, their L0 and figures are drawn anew.

    A draw that moves the L0 out of the stretch takes its end: there too nothing is extrapolated.
    """
    lower, upper = draws.get((i, where.lower), {}), draws.get((i, where.upper), {})
    if not lower or not upper:
        return {}
    weight = np.zeros(len(lower["l0"]))
    if where.lower != where.upper:
        lo, hi = np.log(lower["l0"]), np.log(upper["l0"])
        weight = np.clip((math.log(l0) - lo) / np.where(hi > lo, hi - lo, np.nan), 0.0, 1.0)
        weight = np.where(np.isnan(weight), where.weight, weight)
    return {name: (1 - weight) * lower[name] + weight * upper[name] for name in FIGURES if name in lower}


def _draws(curves: Sequence[Curve], resamples: int, seed: int) -> Draws:
    parts = {
        f"{i} {k} {name}": pair
        for i, curve in enumerate(curves)
        for k, point in enumerate(curve.points)
        for name, pair in point.parts.items()
    }
    found: dict[tuple[int, int], dict[str, Float[np.ndarray, " R"]]] = {}
    for key, values in resample(parts, resamples=resamples, seed=seed).items():
        i, k, name = key.split()
        found.setdefault((int(i), int(k)), {})[name] = values
    return found


def _differences(
    curves: Sequence[Curve],
    rows: Sequence[Mapping[str, Any]],
    values: Mapping[tuple[int, float], Mapping[str, Float[np.ndarray, " R"]]],
) -> list[dict[str, Any]]:
    """Methods of one architecture and architectures of one method, at every L0 that both cover."""
    at = {(row["SAE"], row["method"], row["l0"]): row for row in rows}
    found = []
    for (i, a), (k, b) in combinations(enumerate(curves), 2):
        same_place = (a.layer, a.expansion_factor) == (b.layer, b.expansion_factor)
        if not same_place or (a.architecture != b.architecture and a.label != b.label):
            continue
        for l0 in sorted({l0 for curve, l0 in values if curve == i}):
            first, second = at[a.group, a.label, l0], at[b.group, b.label, l0]
            for name in FIGURES:
                if first[name] is None or second[name] is None:
                    continue
                x, y = values[i, l0].get(name), values[k, l0].get(name)
                between = None if x is None or y is None else interval(x - y)
                found.append(
                    {"l0": l0, "figure": name, "first": [a.group, a.label], "second": [b.group, b.label]}
                    | {"difference": first[name] - second[name], "interval": between and list(between)}
                )
    return found


def _round(value: float, low: float, high: float) -> float:
    """The value with as few digits as leave it within the range."""
    for digits in range(2, 17):
        short = float(f"{value:.{digits}g}")
        if low <= short <= high:
            return short
    return value


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """Read off by interpolation; which curves end before an L0, and where."""
    missing = Counter((row["SAE"], row["method"], row["reasons"]["mse"]) for row in rows if not row["between"])
    lines = ["linear in log L0 between neighbouring SAEs; behind ± half of the 95 % interval over dialogues"]
    lines += [f"- for {sae} {method}: {reason}" for sae, method, reason in missing]
    return "\n".join(lines)
