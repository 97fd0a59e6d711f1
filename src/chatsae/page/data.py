"""What goes into the page, as one JSON object; docs/report.md has its shape."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.errors import UserError
from chatsae.evals.report import Report
from chatsae.evals.schema import FIGURES
from chatsae.features.calibration import EXPECTED
from chatsae.features.firings import digest
from chatsae.features.judging import judge_features, read_judgements
from chatsae.features.patterns.judge import PatternJudge
from chatsae.features.records import VALUE_EDGES
from chatsae.features.session import Ask, RunFeatures
from chatsae.features.store import FeatureStore
from chatsae.page.identity import commands, curves, identity, sae_identity
from chatsae.page.pack import SAMPLED, Dialogues, firing_histograms, packed_feature, short
from chatsae.page.sample import stored_sample, token_samples
from chatsae.runs import Run

SCHEMA_VERSION = 1

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

JUDGED = 20
"""Contexts that the pattern judge looks at."""

METHODS = ("fast", "bt-f", "bt-p")
_DEMO_DIALOGUES = 300  # of the bundled model: a page in under two minutes


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the page is to show, and whether what is missing may be made."""

    features: int = 512
    """Of each SAE, at most."""
    contexts: int = 20
    saes: tuple[str, ...] = ()
    """SAEs with features; none: of one run all, of several the first of each."""
    dialogues: int | None = None
    build: bool = True

    def __post_init__(self) -> None:
        for name in ("features", "contexts"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")


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
    views, saes = [], []
    for number, run in enumerate(runs):
        report = Report.load(run.path / "report.json") if (run.path / "report.json").is_file() else None
        there = [path.name for path in run.sae_directories()]
        if lacking := [name for name in wanted.saes if name not in there]:
            raise UserError(f"run {run.path} has no SAE {lacking[0]!r}; it has {', '.join(there)}")
        chosen = wanted.saes or (there if len(runs) == 1 else there[:1])
        views.append(_run_view(run, names[number], report, wanted))
        shown = _explored(run, chosen, wanted, dialogues)
        for name in there:
            view = {"run": number, "name": name, "identity": sae_identity(run, name), **_figures(report, name)}
            saes.append(view | shown.get(name, _unexplored(run, name)))
    return {
        "schema_version": SCHEMA_VERSION,
        "chatsae": metadata.version("chatsae"),
        "command": _command(runs, wanted),
        "headline": [{"key": key, "best": best, "what": FIGURES[key]} for key, best in HEADLINE.items()],
        "value_edges": [short(edge) for edge in VALUE_EDGES],
        "rubric": {str(n): {str(k): v for k, v in scores.items()} for n, scores in EXPECTED.items()},
        "runs": views,
        "saes": saes,
        "dialogues": dialogues.facts(),
        "texts": list(dialogues.texts),
    }


def _explored(run: Run, names: Sequence[str], wanted: Wanted, dialogues: Dialogues) -> dict[str, dict[str, Any]]:
    """Features, scores and token samples of some SAEs of a run."""
    session = RunFeatures(run.path, names)
    if wanted.build:
        stores = _stores(session, wanted)
        limit = next(iter(stores.values())).facts["dialogues_asked"]
        samples: dict[str, Any] = dict(token_samples(session, limit))
    else:
        stores = {n: FeatureStore.load(p) for n in names if (p := session.folder / n).exists()}
        samples = {n: stored_sample(run.path / "page" / f"{n}.json", sae) for n, sae in session.saes.items()}
    found = {}
    for name in names:
        found[name] = _unexplored(run, name) | {"sample": samples.get(name)}
        if name in stores:
            sha256 = digest(session.saes[name])
            if stores[name].facts["sae_sha256"] != sha256:
                console.warn(f"{session.folder / name} is of other weights than {name} has now; it is left out")
                continue
            found[name] |= _features(run, stores[name], wanted, dialogues)
    return found


def _stores(session: RunFeatures, wanted: Wanted) -> dict[str, FeatureStore]:
    """The stores of a run; those that are missing, and the pattern judge's scores where there are none, are made."""
    run, names = session.run, list(session.saes)
    missing = [name for name in names if not (session.folder / name).exists()]
    if missing:
        limit = wanted.dialogues or _dialogues_of(run)
        ask = Ask(dialogues=limit, features=wanted.features, contexts=max(wanted.contexts, JUDGED))
        _part(session, missing).stores(ask)
    stores = session.stores()
    unjudged = [name for name in names if not _judgements(run, stores[name])]
    if unjudged:
        try:
            judge_features(_part(session, unjudged), PatternJudge, n_contexts=JUDGED)
        except UserError as error:
            console.warn(f"{run.path}: the features are not scored: {error}")
    return stores


def _part(session: RunFeatures, names: Sequence[str]) -> RunFeatures:
    """Some SAEs of a run, with the model that is loaded already if they are all of them."""
    return session if set(names) == set(session.saes) else RunFeatures(session.run.path, names)


def _dialogues_of(run: Run) -> int | None:
    return _DEMO_DIALOGUES if run.config.model.name == "demo" else None


def _judgements(run: Run, store: FeatureStore) -> list[dict[str, Any]]:
    """The results of the judges that looked at these very features."""
    same = ("sae_sha256", "tokens_sha256")
    found = read_judgements(run.path, store.name)
    return [j for j in found if all(j["store"].get(key) == store.facts[key] for key in same)]


def _features(run: Run, store: FeatureStore, wanted: Wanted, dialogues: Dialogues) -> dict[str, Any]:
    judged = _judgements(run, store)
    verdicts = [{v["feature"]: v for v in facts["verdicts"]} for facts in judged]
    indices = store.indices[: wanted.features].tolist()
    split = store.facts["tokens_sha256"]
    rows = []
    with console.progress(f"pack {run.path.name} {store.name}", len(indices)) as advance:
        for index in indices:
            feature = store.feature(index, contexts=wanted.contexts, sampled=SAMPLED)
            rows.append(packed_feature(feature, dialogues, split, [own.get(index) for own in verdicts]))
            advance(1)
    facts = store.facts
    keys = ("n_dialogues", "n_tokens", "n_live", "d_sae", "split", "dialogues_asked", "tokens_sha256", "sae_sha256")
    steering, tally = _steering(run, store.name)
    return {
        "store": {key: facts[key] for key in keys} | {"window": facts["options"]["window"]},
        "parts": facts["parts"],
        "part_tokens": facts["tokens"],
        "firing": firing_histograms(store),
        "judges": [{key: f[key] for key in ("judge", "n_contexts", "summary", "calibration")} for f in judged],
        "features": rows,
        "steering": steering,
        "steering_left_out": dict(tally),
    }


def _unexplored(run: Run, name: str) -> dict[str, Any]:
    return {
        "store": None,
        "sample": None,
        "judges": [],
        "features": None,
        "how": f"chatsae report {run.path} --sae {name}",
    }


def _steering(run: Run, sae: str) -> tuple[dict[str, list[dict[str, str]]], Counter[str]]:
    """Steering examples by feature, from RUN/steer/*.json of the shape in docs/report.md; others are counted."""
    found: dict[str, list[dict[str, str]]] = {}
    tally: Counter[str] = Counter()
    for path in sorted((run.path / "steer").glob("*.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["sae"] != sae:
                continue
            keys = ("label", "prompt", "base", "steered")
            rows = [{key: str(example[key]) for key in keys} for example in facts["examples"]]
            found.setdefault(str(int(facts["feature"])), []).extend(rows)
        except (OSError, ValueError, KeyError, TypeError):
            tally["steering files of another shape"] += 1
    return found, tally


def _figures(report: Report | None, name: str) -> dict[str, Any]:
    row = None if report is None else report.rows.get(name)
    if row is None:
        return {"figures": None, "gsnr": None}
    intervals, reasons = row.get("intervals", {}), row.get("reasons", {})
    figures = {}
    for key in HEADLINE:
        value, between = row.get(key), intervals.get(key)
        figures[key] = {
            "value": None if value is None else short(value),
            "interval": None if between is None else [short(edge) for edge in between],
            "reason": reasons.get(key),
        }
    gsnr = row.get("gsnr")
    return {"figures": figures, "gsnr": None if gsnr is None else gsnr.get("value")}


def _run_view(run: Run, name: str, report: Report | None, wanted: Wanted) -> dict[str, Any]:
    config = (run.path / "config.yaml").read_text(encoding="utf-8")
    facts = None if report is None else report.facts
    dialogues = wanted.dialogues or _dialogues_of(run)
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
