"""The figure of a sweep: what a feature and its controls do to answers, over alpha in median norms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatsae.evals.pareto import METADATA, SETTINGS, figure_paths, need_matplotlib
from chatsae.files import whole
from chatsae.steering.sweep import ARMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Facts = Mapping[str, Any]

PANELS = (
    ("kl_mean", "How far predictions move:\nKL(steered || unsteered), nats per token"),
    ("log_perplexity_ratio", "Perplexity under the unsteered model:\nlog ratio to the unsteered answer, nats"),
    ("repetition", "Repetition:\nshare of 3-grams that stood before"),
    ("reread_mean", "Is the feature in the text?\nactivation when it is read again"),
    ("holds", "Quality:\nshare of the answers that hold"),
)
"""Measure (or holds), and title with unit."""

_COLOURS = {"feature": "#0072B2", "random": "#000000", "other": "#D55E00"}  # told apart with any colour vision
_MARKERS = {"feature": "o", "random": "^", "other": "s"}
_NAMES = {
    "feature": "the feature",
    "random": "a random unit direction, per question",
    "other": "another feature that fires, per question",
}


def sweep_figure(sweeps: Sequence[Facts], path: Path, *, titles: Sequence[str] = (), title: str = "") -> list[Path]:
    """Draw sweeps, a row of panels each, with 95 % intervals over questions; returns the files written.

    Strengths are in median norms; the grey field is the feature's window, the dotted line the automatic strength.

    Raises:
        UserError: matplotlib is missing, or a file cannot be written.
    """
    need_matplotlib()
    paths = figure_paths(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(3.3 * len(PANELS), 0.8 + 2.9 * len(sweeps)), layout="constrained")
        grid = figure.subplots(len(sweeps), len(PANELS), squeeze=False, sharex=True)
        for row, (axes, sweep) in enumerate(zip(grid, sweeps, strict=True)):
            for axis, (name, heading) in zip(axes, PANELS, strict=True):
                _panel(axis, sweep, name)
                if row == 0:
                    axis.set_title(heading, loc="left")
                if row == len(sweeps) - 1:
                    axis.set_xlabel("alpha / median norm (dashed: unsteered)")
            what = titles[row] if titles else f"{sweep['sae']}, feature {sweep['feature']}"
            axes[0].set_ylabel(what)
        looks = [Line2D([], [], color=_COLOURS[a], marker=_MARKERS[a], markersize=4, label=_NAMES[a]) for a in ARMS]
        figure.legend(handles=looks, loc="outside lower center", ncols=len(ARMS), frameon=False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        for file in paths:
            with whole(file) as new:
                figure.savefig(new, dpi=110, metadata=METADATA[file.suffix.lower()])
    return paths


def _panel(axes: "Axes", sweep: Facts, name: str) -> None:
    steps, means = sweep["strengths"], []
    for arm in ARMS:
        points = []
        for row in sweep["summary"]:
            found = row["holds"] if name == "holds" else row["measures"][name]
            x = steps[row["strength"]]["rel_norm"]
            if row["arm"] == arm and x > 0 and found["mean"] is not None:
                points.append((x, found["mean"], *(found["interval"] or (found["mean"], found["mean"]))))
        if not points:
            continue
        x, y, low, high = zip(*points, strict=True)
        means += y
        look: dict[str, Any] = {"color": _COLOURS[arm], "zorder": 3 if arm == "feature" else 2}
        axes.plot(x, y, marker=_MARKERS[arm], markersize=3.5, linewidth=1.2, **look)
        axes.fill_between(x, low, high, color=_COLOURS[arm], alpha=0.12, linewidth=0)
    unsteered = next(row for row in sweep["summary"] if row["strength"] == 0)
    base = (unsteered["holds"] if name == "holds" else unsteered["measures"][name])["mean"]
    if base is not None and name != "kl_mean":
        axes.axhline(base, color="#888888", linewidth=0.8, linestyle="--", zorder=1)
    _window(axes, sweep)
    axes.set_xscale("log")
    if name == "kl_mean" and (above := [mean for mean in means if mean > 0]):
        axes.set_yscale("log")
        axes.set_ylim(min(above) / 2, 2 * max(above))
    _plain(axes)


def _window(axes: "Axes", sweep: Facts) -> None:
    found, auto = sweep["windows"][ARMS[0]], sweep["auto"]
    if found["open"]:
        axes.axvspan(found["rel_from"], found["rel_to"], color="#888888", alpha=0.15, linewidth=0, zorder=0)
    if auto["alpha"] is not None:
        axes.axvline(auto["rel_norm"], color="#009E73", linewidth=1, linestyle=":", zorder=1)


def _plain(axes: "Axes") -> None:
    """Strengths as they are said, 0.2 and not 2 x 10^-1; no ticks between."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.minorticks_off()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
