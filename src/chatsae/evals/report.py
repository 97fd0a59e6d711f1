"""Reports: the metrics of a run's SAEs, and the table that sets runs side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.files import write_json
from chatsae.runs import Run

COLUMNS = (
    Column("mse", "mse\n(log2)", best="min", beside="log2_mse"),
    Column("mse_st", "mse_st\n(log2)", best="min", beside="log2_mse_st"),
    Column("mse_st_template", "mse_st by\ntemplate (log2)", best="min", beside="log2_mse_st_template"),
    Column("l0", "l0"),
    Column("explained_variance", "explained\nvariance", best="max"),
    Column("dead_fraction", "dead", best="min"),
    Column("delta_loss", "delta_loss\n(%)", best="min", beside="delta_loss_percent"),
)


@dataclass(frozen=True)
class Report:
    """Metrics by SAE name, and what they were measured on."""

    rows: dict[str, dict[str, Any]]
    facts: dict[str, Any]

    def table(self) -> str:
        """The report as text."""
        rows = [{"SAE": name, **row} for name, row in self.rows.items()]
        columns = [Column("SAE"), *(replace(column, best=None) for column in COLUMNS)]
        return console.table("Held-out dialogues", columns, rows, caption=_caption(self.facts))

    def save(self, path: Path | str) -> None:
        """Write report.json."""
        write_json(Path(path), {"facts": self.facts, "saes": self.rows})

    @classmethod
    def load(cls, path: Path | str) -> "Report":
        """Read report.json.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(rows=data["saes"], facts=data["facts"])
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; `chatsae eval {Path(path).parent}` writes it") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); `chatsae eval {Path(path).parent}` writes it anew") from None


@dataclass(frozen=True)
class Comparison:
    """One row per SAE of several runs."""

    rows: list[dict[str, Any]]
    facts: dict[str, Any]

    def table(self) -> str:
        """The rows grouped by SAE, the best of each group marked with a star."""
        return console.table(
            "Methods on the same held-out dialogues (* best of its SAE)",
            [Column("SAE"), Column("method"), *COLUMNS],
            self.rows,
            group="SAE",
            caption=_caption(self.facts),
        )

    def save(self, path: Path | str) -> None:
        """Write compare.json."""
        write_json(Path(path), {"facts": self.facts, "rows": self.rows})


def compare(runs: Sequence[Run]) -> Comparison:
    """Set the reports of several runs side by side.

    Raises:
        UserError: a run has no report, or the reports were measured on different dialogues.
    """
    reports = [(run, Report.load(run.path / "report.json")) for run in runs]
    facts = reports[0][1].facts
    for run, report in reports[1:]:
        if report.facts != facts:
            raise UserError(
                f"{run.path} was evaluated on other dialogues than {reports[0][0].path} "
                f"({report.facts} against {facts}); evaluate both alike first"
            )
    rows = [
        {"SAE": name, "method": run.config.data.method, "run": str(run.path), **row}
        for run, report in reports
        for name, row in report.rows.items()
    ]
    order = list(dict.fromkeys(row["SAE"] for row in rows))
    return Comparison(rows=sorted(rows, key=lambda row: order.index(row["SAE"])), facts=facts)


def _caption(facts: dict[str, Any]) -> str:
    shown = {k: v for k, v in facts.items() if k != "tokens_sha256"}
    return ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in shown.items())
