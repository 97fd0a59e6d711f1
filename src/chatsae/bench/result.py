"""What a benchmark reports: rows, and claims about them with their goals."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chatsae import console
from chatsae.console import Column

_CLAIMS = (Column("claim"), Column("value"), Column("goal"), Column("holds"))


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement about the rows of one run; `goal` as people write it, such as ">= 5"."""

    claim: str
    value: float
    goal: str
    holds: bool

    @classmethod
    def at_least(cls, claim: str, value: float, bound: float) -> "Claim":
        """Holds when value >= bound."""
        return cls(claim, value, f">= {_number(bound)}", value >= bound)

    @classmethod
    def at_most(cls, claim: str, value: float, bound: float) -> "Claim":
        """Holds when value <= bound."""
        return cls(claim, value, f"<= {_number(bound)}", value <= bound)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One run of a benchmark; `columns` are those of the rows that its table shows."""

    bench: str
    columns: Sequence[Column]
    conditions: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    claims: Sequence[Claim]

    @property
    def holds(self) -> bool:
        """Whether every claim does."""
        return all(claim.holds for claim in self.claims)

    def facts(self) -> dict[str, Any]:
        """Everything, as JSON can hold it, with the machine it ran on."""
        from chatsae.runs import environment

        return {
            "bench": self.bench,
            "machine": environment(),
            "conditions": dict(self.conditions),
            "rows": [dict(row) for row in self.rows],
            "claims": [asdict(claim) for claim in self.claims],
        }

    def table(self) -> str:
        """The rows, and below them the claims."""
        notes = "\n".join(f"{row[self.columns[0].key]}: {row['note']}" for row in self.rows if row.get("note"))
        claims = [asdict(claim) | {"holds": "yes" if claim.holds else "NO"} for claim in self.claims]
        tables = console.table(self.bench, self.columns, self.rows), console.table("claims", _CLAIMS, claims)
        return "\n\n".join(part for part in (tables[0], notes, tables[1]) if part)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
