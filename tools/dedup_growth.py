"""How the deduplication grows: four sizes measured, a projection to the paper's 11.4 M samples, a figure.

    python tools/dedup_growth.py SOURCE... [--repeats 3] [--out docs/data-dedup.svg]

Prints JSON. Every size is measured in processes of its own; the least CPU time of the repeats counts. The projection is
a straight line through the logarithms of the four values (least squares); for memory, the most bytes per kept n-gram of
the four, times the projected n-grams. matplotlib is in bench/requirements.txt.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from chatsae.bench.dedup import base_dialogues, measure
from chatsae.bench.samples import Samples, write_base

SIZES = (62_500, 125_000, 250_000, 500_000)
PAPER = 11_400_000  # samples
ENGINES = ("numba", "bit maps")
_QUANTITIES = {"cpu_s": "CPU seconds", "own_mb": "peak MB above the start", "kept_ngrams": "kept n-grams"}


def grown(sources: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """A row per engine and size."""
    rows = []
    base = base_dialogues(sources, max(SIZES))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "base.jsonl"
        write_base(base, path)
        for size in SIZES:
            ngrams = Samples(base, size).windows()
            table = _least(path, "numba", size, repeats)
            maps = _least(path, "bit maps", size, repeats, memory_gb=table["table_bytes"] / 2e9)
            if maps["digest"] != table["digest"]:
                raise SystemExit(f"{size:,} samples: the kept sets differ")
            rows += [row | {"ngrams": ngrams, "kept_ngrams": table["kept_ngrams"]} for row in (table, maps)]
    return rows


def _least(path: Path, engine: str, size: int, repeats: int, memory_gb: float | None = None) -> dict[str, Any]:
    """The row with the least CPU time; the most memory of all."""
    rows = [measure(engine, path, size, memory_gb)[0] for _ in range(repeats)]
    own = max(round(row["peak_mb"] - row["start_mb"], 1) for row in rows)
    return min(rows, key=lambda row: row["cpu_s"]) | {"own_mb": own}


def projected(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the rows of one engine lead to at the paper's number of samples, and the exponents of the lines."""
    sizes = np.log([row["samples"] for row in rows])
    lines = {name: np.polyfit(sizes, np.log([row[name] for row in rows]), 1) for name in ("cpu_s", "kept_ngrams")}
    found = {name: float(np.exp(np.polyval(line, np.log(PAPER)))) for name, line in lines.items()}
    own = found["kept_ngrams"] * max(row["own_mb"] / row["kept_ngrams"] for row in rows)
    exponents = {f"{name}_exponent": float(line[0]) for name, line in lines.items()}
    last = rows[-1]
    each = {
        "us_per_ngram": 1e6 * last["cpu_s"] / last["ngrams"],
        "bytes_per_kept_ngram": max(1e6 * row["own_mb"] / row["kept_ngrams"] for row in rows),
        "ngrams_per_sample": last["ngrams"] / last["samples"],
    }
    return found | {"own_mb": own} | exponents | each


def draw(rows: Sequence[Mapping[str, Any]], ends: Mapping[str, Mapping[str, float]], out: Path) -> None:
    """Three panels, double logarithmic: measured values filled, the projection hollow at the end of a dashed line."""
    plot = import_module("matplotlib.pyplot")
    plot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "chatsae", "font.size": 10})
    figure, panels = plot.subplots(1, 3, figsize=(11, 3.8), facecolor="white")
    for panel, (name, title) in zip(panels, _QUANTITIES.items(), strict=True):
        for engine, colour, marker in zip(ENGINES, ("#1f5fa8", "#c2571a"), "os", strict=True):
            mine = [row for row in rows if row["engine"] == engine]
            if name == "kept_ngrams" and engine != ENGINES[0]:
                continue  # the same for both
            sizes, values = [row["samples"] for row in mine], [row[name] for row in mine]
            label = "both" if name == "kept_ngrams" else engine
            panel.plot(sizes, values, marker + "-", color=colour, label=f"{label}, measured")
            line = [sizes[-1], PAPER], [values[-1], ends[engine][name]]
            panel.plot(*line, marker + "--", color=colour, markerfacecolor="white", markevery=[1], label="projected")
            panel.annotate(
                f"{ends[engine][name]:,.0f}" if name != "kept_ngrams" else f"{ends[engine][name]:.2g}",
                (PAPER, ends[engine][name]),
                xytext=(-6, 7 if engine == ENGINES[0] else -14) if name != "cpu_s" else _aside(engine),
                textcoords="offset points",
                ha="right",
                color=colour,
            )
        panel.set(xscale="log", yscale="log", xlabel="samples", title=title)
        panel.grid(True, which="major", color="#dddddd")
        panel.legend(fontsize=8, frameon=False, loc="upper left")
        bottom, top = panel.get_ylim()
        panel.set_ylim(bottom, top * 6)  # room for the legend
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def _aside(engine: str) -> tuple[int, int]:
    """CPU seconds: the bit maps lie above."""
    return (-6, -14) if engine == ENGINES[0] else (-6, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description="How the deduplication grows with the number of samples.")
    parser.add_argument("sources", nargs="+", help="as in data.sources of a recipe")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each size")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "data-dedup.svg")
    arguments = parser.parse_args()
    rows = grown(arguments.sources, arguments.repeats)
    ends = {engine: projected([row for row in rows if row["engine"] == engine]) for engine in ENGINES}
    print(json.dumps({"rows": rows, "projection": {"samples": PAPER} | ends}, indent=2))
    draw(rows, ends, arguments.out)


if __name__ == "__main__":
    main()
