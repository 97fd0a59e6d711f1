"""The tables and the figure of docs/synthetic.md, from what tools/synthetic.py measured."""

import math
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatsae.evals.matched import place
from chatsae.evals.synthetic import GROUPS, Reading, SyntheticConfig
from chatsae.files import write_text
from chatsae.runs import environment
from synthetic import BASE, FACTORS, READINGS, SWEEPS, TARGET, TRAIN, Job, grid

ROOT = Path(__file__).parents[1]
PAGE, FIGURE = ROOT / "docs" / "synthetic.md", ROOT / "docs" / "img" / "synthetic.svg"
BEGIN, END = "<!-- measured: make synthetic -->", "<!-- end -->"
ARCHITECTURES = ("standard", "jumprelu")
TOKENS = {
    "mse": "all tokens",
    "mse_no_prefix": "outside the prefix",
    "mse_st": "special tokens",
    "mse_st_no_prefix": "special, outside the prefix",
}
SWEPT_L0 = (4.0, 6.0, 8.0, 12.0)

Rows = Sequence[Mapping[str, Any]]
Found = Mapping[str, Rows]
Values = Mapping[str, float | None]


def flat(row: Mapping[str, Any]) -> dict[str, float | None]:
    """All figures of an SAE by one name: `mse`, `content/f1` ..."""
    scores = {f"{group}/{name}": value for group, own in row["groups"].items() for name, value in own.items()}
    return row["figures"] | scores


def at(rows: Rows, architecture: str, l0: float) -> Values:
    """Figures at an L0, linear in log L0 between neighbours; empty where no two SAEs enclose it."""
    found = sorted((flat(r) for r in rows if r["architecture"] == architecture), key=lambda r: r["l0"] or 0.0)
    where = place([r["l0"] for r in found if r["l0"]], l0)
    if where is None:
        return {}
    lower, upper = found[where.lower], found[where.upper]
    pairs = {name: (lower[name], upper[name]) for name in lower}
    return {
        name: None if a is None or b is None else (1 - where.weight) * a + where.weight * b
        for name, (a, b) in pairs.items()
    }


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; how many have a value where not all do, a dash where none does."""
    given = list(values)
    known = [v for v in given if v is not None]
    if not known:
        return "–"
    less = "" if len(known) < 2 else f" ± {statistics.stdev(known):.1g}"
    return f"{statistics.mean(known):.{digits}g}{less}" + (
        f" ({len(known)} of {len(given)})" if len(known) < len(given) else ""
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


class Results:
    """What was measured, by place and seed."""

    def __init__(self, found: Found, seeds: Sequence[int]) -> None:
        self.found, self.seeds = found, seeds

    def values(self, world: SyntheticConfig, reading: Reading, architecture: str, l0: float = TARGET) -> list[Values]:
        """Figures at equal L0, one record per seed."""
        jobs = [Job(replace(world, seed=seed), reading, grid(reading), "factors") for seed in self.seeds]
        return [at(self.found.get(job.key, ()), architecture, l0) for job in jobs]

    def sweep(self, name: str) -> list[Rows]:
        """SAEs of a sweep, by seed."""
        return [self.found[Job(replace(BASE, seed=s), "fast", SWEEPS[name], name).key] for s in self.seeds]

    def against_fast(
        self,
        world: SyntheticConfig,
        reading: Reading,
        architecture: str,
        figure: str,
        compare: Callable[[float, float], float],
    ) -> list[float | None]:
        """`compare(other, fast)` seed by seed."""
        pairs = zip(self.values(world, reading, architecture), self.values(world, "fast", architecture), strict=True)
        values = [(a.get(figure), b.get(figure)) for a, b in pairs]
        return [None if x is None or y is None else compare(x, y) for x, y in values]


def ratio(other: float, fast: float) -> float:
    return other / fast if fast else math.inf


def gain(other: float, fast: float) -> float:
    return fast - other


def places() -> list[tuple[str, SyntheticConfig]]:
    """The base point and every other one, with what sets it apart."""
    apart = [
        (f"{factor} {value:g}", replace(BASE, **{factor: value}))
        for factor, values in FACTORS.items()
        for value in values
        if value != getattr(BASE, factor)
    ]
    return [("base", BASE), *apart]


def base_table(results: Results) -> str:
    """Every figure at the base point."""
    names = {f: f for f in (*TOKENS, "mse_token_no_first", "mse_st_no_first", "mse/position_0")}
    names |= {"mse/constant_prefix": "mse/constant_prefix", "explained_variance": "explained variance"}
    names |= {"explained_variance_no_prefix": "the same outside the prefix", "dead_fraction": "dead"}
    names |= {f"{group}/mcc": f"MCC: {group}" for group in ("all", *GROUPS)}
    names |= {f"{group}/f1": f"F1: {group}" for group in ("all", *GROUPS)}
    columns = [(a, r) for a in ARCHITECTURES for r in READINGS]
    rows = [
        [label, *(spread(v.get(name) for v in results.values(BASE, r, a)) for a, r in columns)]
        for name, label in names.items()
    ]
    return table(["", *(f"{a}, {r}" for a, r in columns)], rows)


def ratio_table(results: Results, reading: Reading) -> str:
    rows = []
    for label, world in places():
        if reading == "bt-p" and world.prefix_length != BASE.prefix_length:
            continue
        cells = [
            spread(results.against_fast(world, reading, a, figure, ratio)) for a in ARCHITECTURES for figure in TOKENS
        ]
        rows.append([label, *cells])
    return table(["", *(f"{a}: {text}" for a in ARCHITECTURES for text in TOKENS.values())], rows)


def group_table(results: Results, reading: Reading, score: str) -> str:
    rows = []
    for label, world in places():
        if reading == "bt-p" and world.prefix_length != BASE.prefix_length:
            continue
        for a in ARCHITECTURES:
            names = (f"{group}/{score}" for group in ("all", *GROUPS))
            rows.append([label, a, *(spread(results.against_fast(world, reading, a, n, gain), 2) for n in names)])
    return table(["", "SAE", "all", *GROUPS], rows)


def sweep_table(results: Results) -> str:
    """L1 and L0 at equal numbers of active features."""
    names = {"mse": "mse", "explained_variance_no_prefix": "explained variance outside the prefix", "all/f1": "F1"}
    names |= {"all/best_f1": "best F1", "all/mcc": "MCC", "l2_ratio": "l2 ratio", "relative_bias": "relative bias"}
    names |= {"dead_fraction": "dead"}
    rows: list[list[str]] = []
    for l0 in SWEPT_L0:
        for name, architecture, label in (
            ("sweep", "standard", "L1 (Standard)"),
            ("sweep", "jumprelu", "L0 (JumpReLU)"),
            ("sweep-threshold", "jumprelu", "L0 from a threshold of 0.5"),
        ):
            found = [at(rows_of, architecture, l0) for rows_of in results.sweep(name)]
            rows.append([f"{l0:g}", label, *(spread(v.get(key) for v in found) for key in names)])
    return table(["L0", "penalty", *names.values()], rows)


def draw(results: Results, path: Path) -> None:
    """The figure, as SVG; the same file for the same numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = {"svg.hashsalt": "chatsae", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(settings | {"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6}):
        figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
        for column, factor in enumerate(FACTORS):
            _factor_panels(axes[:, column], results, factor)
        for axis, (name, label) in zip(axes[:, 3], (("mse", "mse"), ("all/f1", "F1, all features")), strict=True):
            _sweep_panel(axis, results, name, label)
        axes[0, 0].set_ylabel(f"mse of BT(F) / mse of FAST, at L0 {TARGET:g}")
        axes[1, 0].set_ylabel(f"F1 of FAST − F1 of BT(F), at L0 {TARGET:g}")
        for row in (0, 1):
            lows, highs = zip(*(axis.get_ylim() for axis in axes[row, :3]), strict=True)
            for axis in axes[row, :3]:
                axis.set_ylim(min(lows), max(highs))
        for axis, corner in ((axes[0, 0], "upper left"), (axes[1, 0], "lower left"), (axes[0, 3], "upper right")):
            axis.legend(fontsize=6.5, frameon=False, loc=corner)
        figure.suptitle("Solid: JumpReLU; dashed: Standard. Mean over seeds, bars: standard deviation.", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")  # told apart with any colour vision


def _factor_panels(axes: Any, results: Results, factor: str) -> None:
    values = FACTORS[factor]
    worlds = [replace(BASE, **{factor: value}) for value in values]
    upper, lower = (
        [(figure, text, ratio) for figure, text in TOKENS.items()],
        [(f"{group}/f1", group, gain) for group in GROUPS],
    )
    for axis, lines, neutral in ((axes[0], upper, 1.0), (axes[1], lower, 0.0)):
        for colour, (name, text, compare) in zip(_COLOURS, lines, strict=False):
            for a, style in zip(ARCHITECTURES, ("--", "-"), strict=True):
                seeds = [
                    [v for v in results.against_fast(w, "bt-f", a, name, compare) if v is not None] for w in worlds
                ]
                found = [(x, own) for x, own in enumerate(seeds) if own]
                points = [(x, statistics.mean(own), statistics.pstdev(own)) for x, own in found]
                label = text if style == "-" else None
                xs, ys, bars = zip(*points, strict=True) if points else ((), (), ())
                axis.errorbar(xs, ys, bars, color=colour, ls=style, lw=1.2, elinewidth=0.6, label=label)
        axis.axhline(neutral, color="#888888", lw=0.8)
        axis.set_xticks(range(len(values)), [f"{v:g}" for v in values])
        axis.set_xlabel(factor)


def _sweep_panel(axis: Any, results: Results, name: str, label: str) -> None:
    lines = (
        ("sweep", "standard", "L1 (Standard)", "--"),
        ("sweep", "jumprelu", "L0 (JumpReLU)", "-"),
        ("sweep-threshold", "jumprelu", "L0, initial threshold 0.5", ":"),
    )
    for colour, (sweep, architecture, text, style) in zip(_COLOURS, lines, strict=False):
        for number, rows in enumerate(results.sweep(sweep)):
            points = sorted((flat(r)["l0"], flat(r)[name]) for r in rows if r["architecture"] == architecture)
            xs, ys = zip(*points, strict=True)
            axis.plot(xs, ys, style, marker=".", color=colour, lw=1, label=None if number else text)
    axis.set_xscale("log")
    axis.set_xticks((2, 4, 8, 16), ("2", "4", "8", "16"))
    axis.minorticks_off()
    axis.axvline(true_l0(results), color="#888888", lw=0.8)
    axis.set_xlabel("L0 (line: true features per token)")
    axis.set_ylabel(label)
    if name == "mse":
        axis.set_yscale("log")


def true_l0(results: Results) -> float:
    """True features per token of the dialogues that SAEs are judged on, at the base point."""
    return statistics.mean(flat(rows[0])["true_l0"] or 0.0 for rows in results.sweep("sweep"))


def measured(results: Results, cpu_seconds: float) -> str:
    versions, seeds = environment(), results.seeds
    n = sum(len(rows) for rows in results.found.values())
    return f"""{n} SAEs of {8 * BASE.d_in} features in the `paper` form, {TRAIN.tokens:,} tokens each in batches of
{TRAIN.batch_size}; seeds {", ".join(map(str, seeds))}; {cpu_seconds / 60:.0f} minutes of CPU on one thread
({platform.machine()}, torch {versions["torch"]}). {true_l0(results):.2f} true features are active per token.
Mean ± standard deviation over the seeds; a dash, or fewer of the seeds, where no two SAEs
enclose the L0.

### At the base point, L0 {TARGET:g}

{base_table(results)}

### mse of BT(F) over mse of FAST, L0 {TARGET:g} (above 1: FAST is better)

{ratio_table(results, "bt-f")}

### mse of BT(P) over mse of FAST, L0 {TARGET:g}

{ratio_table(results, "bt-p")}

### F1 of FAST minus F1 of BT(F), L0 {TARGET:g} (above 0: FAST is better)

{group_table(results, "bt-f", "f1")}

### MCC of FAST minus MCC of BT(F), L0 {TARGET:g}

{group_table(results, "bt-f", "mcc")}

### F1 of FAST minus F1 of BT(P), L0 {TARGET:g}

{group_table(results, "bt-p", "f1")}

### L1 against L0 at the base point, FAST

{sweep_table(results)}
"""


def write_page(found: Found, seeds: Sequence[int], cpu_seconds: float) -> None:
    """Put the tables between the marks of the page, and draw the figure."""
    results = Results(found, seeds)
    draw(results, FIGURE)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(PAGE, f"{before}{BEGIN}\n\n{measured(results, cpu_seconds)}\n{END}{after}")
