"""Reports: the metrics of a run's SAEs, and the table that sets runs side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from chatsae import console
from chatsae.config import sae_specs
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.evals.figures import COLUMNS as SUMS
from chatsae.evals.figures import Table, ratios
from chatsae.evals.paper import SOURCE, differences_from_paper, paper_model, paper_row
from chatsae.evals.schema import VERSION
from chatsae.evals.tables import caption, columns, parts_table, row_parts
from chatsae.files import damaged, read_object, shared_name, shared_names, whole, write_json
from chatsae.runs import Run
from chatsae.statistics import Paired, paired

PAIRED = ("mse", "mse_st", "mse_st_template", "mse_st_no_prefix", "fvu", "delta_loss", "kl")
"""The figures whose difference between methods `compare` tests."""

_NOT_COMPARED = ("groups", "reasons")  # of the rows of a comparison: they stay in the reports
_OWN_FACTS = ("random_weights", "sources", "overlap")  # in which reports on the same dialogues may differ


@dataclass(frozen=True)
class DialogueSums:
    """What intervals and paired tests are made of: by SAE, `chatsae.evals.figures.COLUMNS` of each dialogue.

    `keys` tell dialogues by their tokens, in ascending order.
    """

    keys: list[str]
    tables: dict[str, Table]

    def save(self, path: Path) -> None:
        """Write a Parquet file: one row per SAE and dialogue.

        Raises:
            UserError: it cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {
            "sae": pa.array([name for name in self.tables for _ in self.keys]).dictionary_encode(),
            "dialogue": self.keys * len(self.tables),
        }
        for column in SUMS:
            columns[column] = np.concatenate([table[column] for table in self.tables.values()])
        with whole(path) as new:
            pq.write_table(pa.table(columns), new, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> "DialogueSums":
        """Read what `save` wrote.

        Raises:
            UserError: it is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
            names, keys = (np.array(table[column].to_pylist(), dtype=object) for column in ("sae", "dialogue"))
            sums = {column: table[column].to_numpy() for column in SUMS}
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged ({reason}); `chatsae eval {path.parent}` writes it anew") from None
        order = list(dict.fromkeys(names))
        chosen = {name: names == name for name in order}
        tables = {name: {c: values[chosen[name]] for c, values in sums.items()} for name in order}
        return cls(list(keys[chosen[order[0]]]), tables)


@dataclass(frozen=True)
class Report:
    """Metrics by SAE name, what they were measured on, and the sums by dialogue where they are there."""

    rows: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    dialogues: DialogueSums | None = field(default=None, compare=False, repr=False)
    version: int = field(default=VERSION, compare=False)

    def with_figures(self, figures: Mapping[str, Mapping[str, Any]]) -> "Report":
        """The report with more figures of some SAEs, by name; a reason for their absence goes."""
        rows = {}
        for name, row in self.rows.items():
            new = dict(figures.get(name, {}))
            reasons = {key: why for key, why in row.get("reasons", {}).items() if new.get(key) is None}
            rows[name] = {**row, **new, "reasons": reasons | dict(new.get("reasons", {}))}
        return replace(self, rows=rows)

    def table(self) -> str:
        """The report as text."""
        rows = [{"SAE": name, **row} for name, row in self.rows.items()]
        shown = [Column("SAE"), *(replace(column, best=None) for column in columns(rows))]
        return console.table("Held-out dialogues", shown, rows, caption=caption(self.facts, rows))

    def text(self) -> str:
        """The report as text, with the errors by part of the dialogue."""
        parts = [{"SAE": name, **row_parts(row)} for name, row in self.rows.items()]
        return "\n\n".join(filter(None, [self.table(), parts_table(parts)]))

    def facts_json(self) -> dict[str, Any]:
        """What report.json holds."""
        return {"schema": self.version, "facts": self.facts, "saes": self.rows}

    def save(self, path: Path | str) -> None:
        """Write report.json (docs/report-schema.json), and beside it report.parquet with the sums by dialogue."""
        path = Path(path)
        path.with_suffix(".parquet").unlink(missing_ok=True)  # never beside the figures of another evaluation
        write_json(path, self.facts_json())
        if self.dialogues is not None:
            self.dialogues.save(path.with_suffix(".parquet"))

    @classmethod
    def load(cls, path: Path | str) -> "Report":
        """Read report.json, of any version so far, and report.parquet if it is there.

        Raises:
            UserError: it is missing or damaged, or of a later version.
        """
        path = Path(path)
        anew = f"`chatsae eval {path.parent}` writes it"
        if not path.exists():
            raise UserError(f"{path} does not exist; {anew}")
        data = read_object(path, f"{anew} anew", {"saes": dict, "facts": dict})
        rows, facts, version = data["saes"], data["facts"], data.get("schema", 0)
        if version not in range(VERSION + 1):
            raise UserError(f"{path}: schema is {version!r}; this chatsae reads up to {VERSION}; {anew} anew")
        if any(not isinstance(row, dict) for row in rows.values()):
            raise damaged(path, "an object was expected for each SAE", f"{anew} anew")
        sums = path.with_suffix(".parquet")
        dialogues = DialogueSums.load(sums) if sums.exists() else None
        return cls(rows=rows, facts=facts, dialogues=dialogues, version=version)


def paired_test(first: Report, second: Report, sae: str, figure: str, *, other: str | None = None) -> Paired | None:
    """A figure of an SAE in one report against the other's (of the SAE `other`, or that of the same name).

    None where the figure is not defined. Figures are those of `chatsae.evals.figures.ratios`.

    Raises:
        UserError: a report has no sums by dialogue, or they are of other dialogues; or the SAE or figure is unknown.
    """
    tables = []
    for report, name in ((first, sae), (second, other or sae)):
        if report.dialogues is None:
            raise UserError("a report has no sums by dialogue (report.parquet); evaluate the run anew")
        if name not in report.dialogues.tables:
            raise UserError(f"no SAE {name!r} in the report; it has {', '.join(report.dialogues.tables)}")
        tables.append(report.dialogues.tables[name])
    if first.dialogues is None or second.dialogues is None or first.dialogues.keys != second.dialogues.keys:
        raise UserError("the reports were measured on different dialogues; evaluate both alike first")
    parts = [ratios(table) for table in tables]
    if figure not in parts[0]:
        raise UserError(f"{figure!r} is no figure that can be compared; there are {', '.join(parts[0])}")
    return paired(parts[0][figure], parts[1][figure])


@dataclass(frozen=True)
class Comparison:
    """One row per SAE of several runs; and per SAE, pair of methods and figure of `PAIRED` the paired test.

    `paper`: the paper's rows on the same model, layer, width, architecture and method, measured on its own dialogues.
    `parts`: of each row its `mse` (eq. 7) by part of the dialogue (`chatsae.evals.tables.row_parts`).
    """

    rows: list[dict[str, Any]]
    facts: dict[str, Any]
    paired: list[dict[str, Any]] = field(default_factory=list)
    paper: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """The rows grouped by SAE, the best of each group marked with a star; the paper's below them, never marked."""
        quoted = [row | {"method": f"{row['method']}: {row['source']}"} for row in self.paper]
        order = list(dict.fromkeys(row["SAE"] for row in self.rows))
        return console.table(
            "Methods on the same held-out dialogues (* best of its SAE)",
            [Column("SAE"), Column("method"), *columns(self.rows)],
            sorted([*self.rows, *quoted], key=lambda row: order.index(row["SAE"])),
            group="SAE",
            unranked="source",
            caption="\n".join([caption(self.facts, self.rows), *_paper_notes(self.paper)]),
        )

    def text(self) -> str:
        """The table, and the errors by part of the dialogue."""
        return "\n\n".join(filter(None, [self.table(), parts_table(self.parts)]))

    def facts_json(self) -> dict[str, Any]:
        """What JSON holds."""
        return {"facts": self.facts, "rows": self.rows, "paired": self.paired, "paper": self.paper, "parts": self.parts}

    def save(self, path: Path | str) -> None:
        """Write compare.json."""
        write_json(Path(path), self.facts_json())


def load_reports(runs: Sequence[Run]) -> list[tuple[Run, Report]]:
    """The reports of several runs.

    Raises:
        UserError: there is no run, a run has no report, or the reports were measured on different dialogues.
    """
    if not runs:
        raise UserError("there is no run to compare")
    reports = [(run, Report.load(run.path / "report.json")) for run in runs]
    facts = reports[0][1].facts
    for run, report in reports[1:]:
        if _on(report) != _on(reports[0][1]):
            raise UserError(
                f"{run.path} was evaluated on other dialogues, or otherwise, than {reports[0][0].path} "
                f"({report.facts} against {facts}); evaluate both alike first"
            )
    return reports


def _on(report: Report) -> dict[str, Any]:
    """The model and the dialogues of a report, and whether sinks pass; their bounds may be those of each run."""
    own = {key: value for key, value in report.facts.items() if key not in _OWN_FACTS}
    own["sinks_pass"] = "sinks_pass" in own
    return own | {"model": shared_name(str(own.get("model")))}  # an older one has its path


def _method(run: Run, report: Report, row: Mapping[str, Any]) -> str:
    """The method; a control stands beside its SAE as `fast~pca`."""
    random = ["random-model"] if report.facts.get("random_weights") is not None else []
    control = [row["control"]["kind"]] if "control" in row else []
    return "~".join([run.config.data.method, *random, *control])


def compare(runs: Sequence[Run], *, paper: str | None = None) -> Comparison:
    """Set the reports of several runs side by side, and the paper's rows where it has the same SAE.

    Args:
        runs: evaluated runs.
        paper: the model of the paper to take for that of the runs, whose name need not match then.

    Raises:
        UserError: see `load_reports` and `chatsae.evals.paper.paper_model`.
    """
    forced = None if paper is None else paper_model(paper)
    reports = load_reports(runs)
    paths = shared_names([str(run.path) for run in runs])
    named = [
        ({"SAE": row.get("control", {}).get("of", name), "method": _method(run, report, row), "run": path}, row)
        for path, (run, report) in zip(paths, reports, strict=True)
        for name, row in report.rows.items()
    ]
    order = list(dict.fromkeys(who["SAE"] for who, _ in named))
    named.sort(key=lambda one: order.index(one[0]["SAE"]))
    return Comparison(
        rows=[who | {k: value for k, value in row.items() if k not in _NOT_COMPARED} for who, row in named],
        facts=reports[0][1].facts,
        paired=_tests(reports, order),
        paper=_paper_rows(reports, forced),
        parts=[who | row_parts(row) for who, row in named],
    )


def _paper_rows(reports: Sequence[tuple[Run, Report]], model: str | None) -> list[dict[str, Any]]:
    """The paper's row for each SAE that has one; several runs of one method share it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run, report in reports:
        config = run.config
        for spec in sae_specs(config.sae, layers=tuple(sorted(config.model.layers)), d_in=1):
            row = paper_row(model or config.model.name, spec, config.data.method)
            if row is not None and spec.name in report.rows:
                value = {"SAE": spec.name, "method": row.method, "source": row.source, "model": row.model}
                differs = differences_from_paper(config, spec)
                found.setdefault((spec.name, row.method), value | row.figures() | {"differs": differs})
    return list(found.values())


def _paper_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What to know about the paper's rows."""
    if not rows:
        return []
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    notes = [f"paper: {SOURCE}, {models}, on its own dialogues; its l0 is not known"]
    differs = {tuple(row["differs"]): row["SAE"] for row in reversed(rows)}
    return notes + [f"{sae} was trained with {', '.join(lines)}" for lines, sae in reversed(differs.items()) if lines]


def _tests(reports: Sequence[tuple[Run, Report]], saes: Sequence[str]) -> list[dict[str, Any]]:
    """The paired tests between the runs that have sums by dialogue."""
    found, paths = [], shared_names([str(run.path) for run, _ in reports])
    for sae in saes:
        able = [(i, r) for i, (_, r) in enumerate(reports) if r.dialogues is not None and sae in r.dialogues.tables]
        for (i, a), (j, b) in combinations(able, 2):
            for figure in PAIRED:
                test = paired_test(a, b, sae, figure)
                who = {"SAE": sae, "first": paths[i], "second": paths[j], "figure": figure}
                values = dict.fromkeys(Paired.__dataclass_fields__) if test is None else asdict(test)
                found.append(who | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})
    return found
