"""Say what a directory holds."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from chatsae.data.store.manifest import MANIFEST, Manifest
from chatsae.data.store.summary import prepared_table
from chatsae.errors import UserError
from chatsae.evals.report import Report, compare
from chatsae.recipe import to_yaml
from chatsae.runs import Run
from chatsae.sae.interop import read as read_sae


def describe(path: Path) -> dict[str, Any]:
    """What `path` is: an SAE, a run, prepared data, or a directory of runs; with its facts.

    Raises:
        UserError: it does not exist, or is none of these.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if (path / "cfg.json").is_file():
        spec, _, metadata = read_sae(path)
        return {"kind": "sae", "path": str(path), **asdict(spec), "metadata": metadata}
    if (path / "config.yaml").is_file():
        return _run_facts(Run.read(path))
    if (path / MANIFEST).is_file():
        return {"kind": "data", "path": str(path), **Manifest.read(path).facts}
    runs = [Run.read(p.parent) for p in sorted(path.glob("*/config.yaml"))]
    if not runs:
        kinds = "SAE (cfg.json), run (config.yaml), prepared data (manifest.json) or directory of runs"
        raise UserError(f"{path} holds no {kinds}")
    return {"kind": "runs", "path": str(path), "runs": [_run_facts(run) for run in runs]}


def show_text(facts: dict[str, Any]) -> str:
    """`describe` in words."""
    if facts["kind"] == "sae":
        lines = [f"{facts['path']}: an SAE"]
        return "\n".join(lines + [f"  {k}: {v}" for k, v in facts.items() if k not in ("kind", "path")])
    if facts["kind"] == "data":
        return prepared_table(Manifest.read(Path(facts["path"])))
    if facts["kind"] == "run":
        return _run_text(facts)
    together = all(run["report"] for run in facts["runs"])
    texts = [f"{facts['path']}: {len(facts['runs'])} runs"]
    texts += [_run_text(run | {"report": None} if together else run) for run in facts["runs"]]
    if together:
        texts.append(compare([Run.read(Path(run["path"])) for run in facts["runs"]]).table())
    return "\n\n".join(texts)


def _run_facts(run: Run) -> dict[str, Any]:
    metrics = run.metrics()
    saes = [p.name for p in run.sae_directories()] if (run.path / "summary.json").exists() else []
    report = run.path / "report.json"
    return {
        "kind": "run",
        "path": str(run.path),
        "model": run.config.model.name,
        "method": run.config.data.method,
        "state": "trained" if saes else f"stopped at step {metrics[-1]['step']:,}" if metrics else "not started",
        "tokens": run.config.train.tokens,
        "saes": saes,
        "last": metrics[-1] if metrics else None,
        "evaluated": report.exists(),
        "report": Report.load(report).rows if report.exists() else None,
        "config": to_yaml(run.config),
    }


def _run_text(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['path']}: {facts['state']}, {facts['method']} on {facts['model']}, {facts['tokens']:,} tokens",
        *(f"  saes/{name}" for name in facts["saes"]),
    ]
    if facts["last"]:
        for name, row in facts["last"]["saes"].items():
            lines.append(
                f"  {name} at step {facts['last']['step']:,}: mse {row['mse']:.4g}, l0 {row['l0']:.1f}, "
                f"dead {row['dead_fraction']:.1%}"
            )
    if facts["report"]:
        lines.append(Report(facts["report"], {}).table())
    elif facts["saes"] and not facts["evaluated"]:
        lines.append(f"  not evaluated yet: chatsae eval {facts['path']}")
    return "\n".join(lines)
