"""How the deduplication grows: four sizes measured, a projection to the paper's 11.4 M samples, a figure.

    python tools/dedup_growth.py SOURCE... [--repeats 3] [--check] [--out docs/data-dedup.svg] > growth.json
    python tools/dedup_growth.py --rows growth.json   (draws it again)

Every size is measured in processes of its own; the least CPU time of the repeats counts, and the most memory. Projected
from the four: the kept n-grams on a straight line (every copy of the dialogues adds alike), the CPU seconds on a
straight line through the logarithms (a look-up costs more in a larger table), the memory as the most bytes per kept
n-gram of the four. --check measures numba on 11.4 M samples as well: six minutes, most of them for making the samples,
and 4 GB. matplotlib is in bench/requirements.txt.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from chatsae.bench.dedup import base_dialogues, measure, measure_bit_maps
from chatsae.bench.samples import Samples, write_base
from chatsae.runs import environment

SIZES = (62_500, 125_000, 250_000, 500_000)
PAPER = 11_400_000  # samples
ENGINES = ("numba", "bit maps")
_STYLE = {"numba": ("#1f5fa8", "o"), "bit maps": ("#c2571a", "s")}
_QUANTITIES = {"cpu_s": "CPU seconds", "own_mb": "peak MB above the start", "kept_ngrams": "kept n-grams"}


def measured(sources: Sequence[str], repeats: int, check: bool) -> dict[str, Any]:
    """A row per engine and size; with `check`, one at the projected size."""
    base = base_dialogues(sources, max(SIZES))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "base.jsonl"
        write_base(base, path)
        rows = [row for size in SIZES for row in _both(path, size, repeats, Samples(base, size).windows())]
        checks = [_least([measure("numba", path, PAPER)[0]])] if check else []
    return {"machine": environment(), "rows": rows, "check": checks}


def _both(path: Path, size: int, repeats: int, ngrams: int) -> list[dict[str, Any]]:
    table = _least([measure("numba", path, size)[0] for _ in range(repeats)])
    kept = table["kept_ngrams"]
    maps = _least([measure_bit_maps(path, size, kept)[0] for _ in range(repeats)])
    if maps["digest"] != table["digest"]:
        raise SystemExit(f"{size:,} samples: the kept sets differ")
    return [row | {"ngrams": ngrams, "kept_ngrams": kept} for row in (table, maps)]


def _least(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the least CPU time; the most memory of all."""
    own = max(round(row["peak_mb"] - row["start_mb"], 1) for row in rows)
    return min(rows, key=lambda row: row["cpu_s"]) | {"own_mb": own}


def projected(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the rows of one engine lead to at the paper's number of samples."""
    sizes = np.array([row["samples"] for row in rows])
    kept = np.array([row["kept_ngrams"] for row in rows])
    line = np.polyfit(np.log(sizes), np.log([row["cpu_s"] for row in rows]), 1)
    bytes_each = max(1e6 * row["own_mb"] / row["kept_ngrams"] for row in rows)
    kept_ngrams = float(np.polyval(np.polyfit(sizes, kept, 1), PAPER))
    return {
        "samples": PAPER,
        "cpu_s": float(np.exp(np.polyval(line, np.log(PAPER)))),
        "cpu_s_exponent": float(line[0]),
        "kept_ngrams": kept_ngrams,
        "bytes_per_kept_ngram": bytes_each,
        "own_mb": kept_ngrams * bytes_each / 1e6,
    }


def draw(facts: Mapping[str, Any], out: Path) -> None:
    """Three panels, double logarithmic: measured values filled, the projection hollow at the end of a dashed line."""
    plot = import_module("matplotlib.pyplot")
    plot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "chatsae", "font.size": 10})
    figure, panels = plot.subplots(1, 3, figsize=(12, 4), facecolor="white")
    for panel, (name, title) in zip(panels, _QUANTITIES.items(), strict=True):
        engines = ENGINES[:1] if name == "kept_ngrams" else ENGINES  # it is the same for both
        for engine in engines:
            _curve(panel, facts, engine, name, label="both" if len(engines) == 1 else engine)
        panel.set(xscale="log", yscale="log", xlabel="samples", title=title)
        panel.grid(True, which="major", color="#dddddd")
        panel.legend(fontsize=8, frameon=False, loc="upper left")
        bottom, top = panel.get_ylim()
        panel.set_ylim(bottom, top * 10)  # room for the legend
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def _curve(panel: Any, facts: Mapping[str, Any], engine: str, name: str, label: str) -> None:
    colour, marker = _STYLE[engine]
    rows = [row for row in facts["rows"] if row["engine"] == engine]
    panel.plot(
        [row["samples"] for row in rows],
        [row[name] for row in rows],
        f"{marker}-",
        color=colour,
        label=f"{label}, measured",
    )
    end = facts["projection"][engine]
    ends = [rows[-1]["samples"], end["samples"]], [rows[-1][name], end[name]]
    style = {"color": colour, "markerfacecolor": "white", "markevery": [1], "markersize": 9}
    panel.plot(*ends, f"{marker}--", label=f"{label}, projected to 11.4 M", **style)
    checks = [row for row in facts["check"] if row["engine"] == engine]
    if checks:
        panel.plot(
            [row["samples"] for row in checks],
            [row[name] for row in checks],
            "x",
            color=colour,
            markersize=7,
            label=f"{engine}, measured as a check",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="How the deduplication grows with the number of samples.")
    parser.add_argument("sources", nargs="*", help="as in data.sources of a recipe")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each size")
    parser.add_argument("--check", action="store_true", help="measure numba at the projected size, too")
    parser.add_argument("--rows", type=Path, help="draw what was printed before")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "data-dedup.svg")
    arguments = parser.parse_args()
    if arguments.rows:
        facts: dict[str, Any] = json.loads(arguments.rows.read_text(encoding="utf-8"))
    else:
        facts = measured(arguments.sources, arguments.repeats, arguments.check)
    of = {engine: [row for row in facts["rows"] if row["engine"] == engine] for engine in ENGINES}
    facts["projection"] = {engine: projected(of[engine]) for engine in ENGINES}
    print(json.dumps(facts, indent=2))
    draw(facts, arguments.out)


if __name__ == "__main__":
    main()
