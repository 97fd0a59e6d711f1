"""The Pareto figure: error and Delta Loss over L0, a line per method and architecture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatsae.config import Architecture, Method
from chatsae.errors import UserError
from chatsae.evals.curves import Curve
from chatsae.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("mse", "MSE per dimension (eq. 7)", "Reconstruction error"),
    ("delta_loss", "Delta Loss (nats per token)", "What the language model loses"),
)
"""Figure, label with unit, title."""

_COLOURS: Mapping[Method, str] = {  # Okabe and Ito: told apart with any colour vision
    "fast": "#0072B2",
    "bt-f": "#D55E00",
    "bt-f-isolated": "#009E73",
    "bt-p": "#000000",
}
_MARKERS: Mapping[Method, str] = {"fast": "o", "bt-f": "s", "bt-f-isolated": "D", "bt-p": "^"}
_LINES: Mapping[Architecture, str] = {"standard": "--", "jumprelu": "-"}
SETTINGS = {
    "svg.hashsalt": "chatsae",  # the same file for the same numbers
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}
METADATA: Mapping[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
_DECADE = 8.0  # a vertical axis is logarithmic where positive values span more than this factor


def figure_paths(path: Path) -> list[Path]:
    """The files that `--figure PATH` means: PATH itself, or without a suffix PATH.png and PATH.svg.

    Raises:
        UserError: the suffix is another.
    """
    if not path.suffix:
        return [path.with_suffix(suffix) for suffix in METADATA]
    if path.suffix.lower() not in METADATA:
        raise UserError(f"--figure {path}: only .png and .svg are written; without a suffix, both")
    return [path]


def need_matplotlib() -> None:
    """Say how to install matplotlib where it is missing.

    Raises:
        UserError: it is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("a figure needs matplotlib: pip install 'chatsae[figures]'") from None


def pareto_figure(curves: Sequence[Curve], path: Path, *, title: str = "") -> list[Path]:
    """Draw every curve, with 95 % intervals, one row of panels per layer and width; returns the files written.

    Raises:
        UserError: matplotlib is missing, there is no curve, or a file cannot be written.
    """
    need_matplotlib()
    paths = figure_paths(path)
    if not curves:
        raise UserError("there is nothing to draw: no SAE of the runs has an active feature")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((c.layer, c.expansion_factor) for c in curves))
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(4.1 * len(PANELS), 0.9 + 3.1 * len(places)), layout="constrained")
        grid = figure.subplots(len(places), len(PANELS), squeeze=False)
        for axes, here in zip(grid, places, strict=True):
            own = [c for c in curves if (c.layer, c.expansion_factor) == here]
            for panel, (name, label, heading) in zip(axes, PANELS, strict=True):
                _panel(panel, own, name, label)
                panel.set_title(f"{heading}, layer {here[0]}, {here[1]}x", loc="left")
        figure.legend(handles=_legend(curves), loc="outside lower center", ncols=4, frameon=False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        for file in paths:
            with whole(file) as new:
                figure.savefig(new, dpi=200, metadata=METADATA[file.suffix.lower()])
    return paths


def _panel(axes: "Axes", curves: Sequence[Curve], name: str, label: str) -> None:
    seen: list[float] = []
    for curve in curves:
        points = [
            (p.l0, y, p.intervals.get(name) or (y, y)) for p in curve.points if (y := p.figures[name]) is not None
        ]
        if not points:
            continue
        x, y, intervals = zip(*points, strict=True)
        seen += [edge for pair in intervals for edge in pair]
        errors = [
            [max(value - low, 0.0) for value, (low, _) in zip(y, intervals, strict=True)],
            [max(high - value, 0.0) for value, (_, high) in zip(y, intervals, strict=True)],
        ]
        look = _look(curve.method, curve.architecture)
        above = 3 if curve.method == "fast" else 2
        axes.errorbar(x, y, yerr=errors, **look, capsize=2, elinewidth=0.8, zorder=above)
    axes.set_xscale("log")
    axes.set_xlabel("L0 (active features per token)")
    axes.set_ylabel(label)
    if seen and min(seen) > 0 and max(seen) > _DECADE * min(seen):
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)


def _plain_ticks(axis: Any) -> None:
    """Numbers as they are said, 20 and not 2 x 10^1, at 1, 2 and 5 of each decade of a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _look(method: Method, architecture: Architecture) -> dict[str, Any]:
    colour = _COLOURS[method]
    face = colour if architecture == "jumprelu" else "white"
    return {
        "color": colour,
        "marker": _MARKERS[method],
        "markerfacecolor": face,
        "linestyle": _LINES[architecture],
        "markersize": 4.5,
        "linewidth": 1.2,
    }


def _legend(curves: Sequence[Curve]) -> list[Any]:
    """One entry per method and architecture, in the order of the methods' colours."""
    from matplotlib.lines import Line2D

    methods = list(_COLOURS)
    looks = sorted({(methods.index(c.method), c.architecture, c.label) for c in curves})
    return [
        Line2D([], [], label=f"{label}, {architecture}", **_look(methods[i], architecture))
        for i, architecture, label in looks
    ]
