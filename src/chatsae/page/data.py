"""What goes into the page, as one JSON object; docs/report.md has its shape."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from chatsae.errors import UserError
from chatsae.evals.report import Report
from chatsae.evals.schema import FIGURES
from chatsae.evals.tables import has_sinks, row_parts
from chatsae.features.calibration import EXPECTED
from chatsae.features.comparison import compare_scores
from chatsae.features.records import VALUE_EDGES
from chatsae.files import shared_name
from chatsae.page.explore import Wanted, dialogues_of, explored, unexplored
from chatsae.page.identity import commands, curves, identity, sae_identity
from chatsae.page.pack import Dialogues, short
from chatsae.runs import Run

SCHEMA_VERSION = 2

NO_SINKS = {
    "explained_variance_no_sinks": "max",
    "explained_variance": "max",
    "mse_no_sinks": "min",
    "mse": "min",
    "l0_no_sinks": "",
    "l0": "",
}
"""Figures that lead where there are norm sinks, each beside that of all tokens."""

HEADLINE = {
    "mse": "min",
    "mse_st": "min",
    "mse_st_template": "min",
    "mse_st_no_prefix": "min",
    "explained_variance": "max",
    "l0": "",
    "dead_fraction": "min",
    "dense_10pct": "",
    "duplicate_fraction": "min",
    "delta_loss": "min",
    "kl": "min",
    "top1_agreement": "max",
}
"""Figures of a report that the page sets side by side, and which end is better; beside L0, most are."""

METHODS = ("fast", "bt-f", "bt-p")


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories and in those below a directory of runs (a demo, say); FAST before its baselines.

    Raises:
        UserError: there is none.
    """
    if not paths:
        raise UserError("report needs at least one run directory")
    found: list[Run] = []
    for path in paths:
        below = [] if (path / "config.yaml").is_file() else sorted(p.parent for p in path.glob("*/config.yaml"))
        found += map(Run.read, below or [path])
    rank = {method: i for i, method in enumerate(METHODS)}
    return sorted(found, key=lambda run: rank.get(run.config.data.method, len(rank)))


def page_data(runs: Sequence[Run], wanted: Wanted | None = None) -> dict[str, Any]:
    """The object of the page: runs, SAEs with figures and features, the tokens that their contexts share.

    What is missing of features, scores and token samples is made first, unless `Wanted.build` is false.

    Raises:
        UserError: a run has no SAE, a file is damaged, or what is missing cannot be made.
    """
    wanted = wanted or Wanted()
    dialogues, names = Dialogues(), _run_names(runs)
    files = [run.path / "report.json" for run in runs]
    reports = [Report.load(file) if file.is_file() else None for file in files]
    headline = _headline(reports)
    views, saes = [], []
    for number, (run, report) in enumerate(zip(runs, reports, strict=True)):
        there = [path.name for path in run.sae_directories()]
        if lacking := [name for name in wanted.saes if name not in there]:
            raise UserError(f"run {run.path} has no SAE {lacking[0]!r}; it has {', '.join(there)}")
        chosen = wanted.saes or (there if len(runs) == 1 else there[:1])
        views.append(_run_view(run, names[number], report, wanted))
        shown = explored(run, chosen, wanted, dialogues)
        for name in there:
            view = {
                "run": number,
                "name": name,
                "identity": sae_identity(run, name),
                **_figures(report, name, headline),
            }
            saes.append(view | shown.get(name, unexplored(run, name)))
    found = {
        "schema_version": SCHEMA_VERSION,
        "chatsae": metadata.version("chatsae"),
        "command": _command(runs, wanted),
        "headline": [{"key": key, "best": best, "what": FIGURES[key]} for key, best in headline.items()],
        "value_edges": [short(edge) for edge in VALUE_EDGES],
        "rubric": {str(n): {str(k): v for k, v in scores.items()} for n, scores in EXPECTED.items()},
        "runs": views,
        "comparison": compare_scores(runs) if len(runs) > 1 else [],
        "saes": saes,
        "dialogues": dialogues.facts(),
    }
    return _renamed(found, _folders(runs, names)) | {"texts": list(dialogues.texts)}


def _folders(runs: Sequence[Run], names: Sequence[str]) -> dict[str, str]:
    """What runs call their data, model and directory by on this machine, the longest first, and the page in its place.

    The recipe holds paths as they were typed, and so do the stores and judgements of older versions.
    """
    found: dict[str, str] = {}
    for run, name in zip(runs, names, strict=True):
        data, here = run.config.data, run.path.resolve()
        typed = [run.config.model.name, data.prepared, *data.sources, *data.text_sources, *run.config.eval.sources]
        found |= {one: shared_name(one) for t in typed if t for one in (t, str(Path(t).expanduser()))}
        found |= {f"{here.parent}/": "", str(here): name}
        if shared_name(str(run.path)) != str(run.path):
            found[str(run.path)] = name
    return {one: found[one] for one in sorted(found, key=len, reverse=True) if one != found[one] and len(one) > 2}


def _renamed(value: Any, folders: Mapping[str, str]) -> Any:
    """The same with each path replaced wherever it stands in a text."""
    if isinstance(value, str):
        for path, name in folders.items():
            value = value.replace(path, name)
        return value
    if isinstance(value, dict):
        return {key: _renamed(one, folders) for key, one in value.items()}
    return [_renamed(one, folders) for one in value] if isinstance(value, list | tuple) else value


def _headline(reports: Sequence[Report | None]) -> dict[str, str]:
    """The figures that are shown, in their order, and which end of each is better."""
    rows = [row for report in reports if report is not None for row in report.rows.values()]
    return NO_SINKS | HEADLINE if has_sinks(rows) else HEADLINE


def _figures(report: Report | None, name: str, headline: Mapping[str, str]) -> dict[str, Any]:
    row = None if report is None else report.rows.get(name)
    if row is None:
        return {"figures": None, "mse_by_part": None, "gsnr": None}
    intervals, reasons = row.get("intervals", {}), row.get("reasons", {})
    figures = {}
    for key in headline:
        value, between = row.get(key), intervals.get(key)
        figures[key] = {
            "value": None if value is None else short(value),
            "interval": None if between is None else [short(edge) for edge in between],
            "reason": reasons.get(key),
        }
    gsnr, parts = row.get("gsnr"), {part: None if mse is None else short(mse) for part, mse in row_parts(row).items()}
    return {
        "figures": figures,
        "mse_by_part": parts if any(mse is not None for mse in parts.values()) else None,
        "gsnr": None if gsnr is None else gsnr.get("value"),
    }


def _run_view(run: Run, name: str, report: Report | None, wanted: Wanted) -> dict[str, Any]:
    config = (run.path / "config.yaml").read_text(encoding="utf-8")
    facts = None if report is None else report.facts
    dialogues = wanted.dialogues or dialogues_of(run)
    return {
        "name": name,
        "path": str(run.path),
        "method": run.config.data.method,
        "identity": identity(run),
        "evaluated": facts,
        "curves": curves(run),
        "commands": commands(run, dialogues=dialogues, evaluated=None if facts is None else facts["n_dialogues"]),
        "recipe": config,
    }


def _run_names(runs: Sequence[Run]) -> list[str]:
    """The last part of each path, with as many before it as tell them apart."""
    paths = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run is given twice")


def _command(runs: Sequence[Run], wanted: Wanted) -> str:
    words = ["chatsae report", *(str(run.path) for run in runs)]
    words += [f"--features {wanted.features}", f"--contexts {wanted.contexts}"]
    if wanted.saes:
        words.append(f"--sae {' '.join(wanted.saes)}")
    return " ".join(words)
