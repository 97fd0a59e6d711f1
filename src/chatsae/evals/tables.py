"""How the rows of reports are shown: figures without norm sinks first, where there are sinks; errors by part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatsae import console
from chatsae.batch import PARTS
from chatsae.console import Column
from chatsae.lm.norms import SINK_RATIO


@dataclass(frozen=True, slots=True)
class Measured(Column):
    """A column with half of the 95 % interval behind the value, where the row has one."""

    def cell(self, row: Mapping[str, Any]) -> str:
        text = Column(self.key).cell(row)
        interval = row.get("intervals", {}).get(self.key)
        if interval is not None:
            text += f" ±{(interval[1] - interval[0]) / 2:.1g}"
        return f"{text} ({Column(self.beside).cell(row)})" if self.beside else text


COLUMNS = (
    Measured("mse", "mse\n(log2)", best="min", beside="log2_mse"),
    Measured("mse_st", "mse_st\n(log2)", best="min", beside="log2_mse_st"),
    Measured("mse_st_template", "mse_st by\ntemplate (log2)", best="min", beside="log2_mse_st_template"),
    Column("l0", "l0"),
    Measured("explained_variance", "explained\nvariance", best="max"),
    Column("dead_fraction", "dead", best="min"),
    Measured("delta_loss", "delta_loss\n(%)", best="min", beside="delta_loss_percent"),
)
NO_SINKS = (
    Column("explained_variance_no_sinks", "explained var.\nno sinks (all)", best="max", beside="explained_variance"),
    Column("mse_no_sinks", "mse\nno sinks", best="min"),
    Column("l0_no_sinks", "l0\nno sinks (all)", beside="l0"),
)
"""What leads where there are sinks: they hold so much of the squared norm that a figure of all tokens tells of them
alone. The columns of `COLUMNS` that stand in brackets here are left out there."""


def has_sinks(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any row was measured on tokens among which there are norm sinks."""
    return any(row.get("sink_share") for row in rows)


def columns(rows: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """The columns of a table of these rows, without the names in front."""
    if not has_sinks(rows):
        return COLUMNS
    beside = {column.beside for column in NO_SINKS}
    return (*NO_SINKS, *(column for column in COLUMNS if column.key not in beside))


def caption(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows were measured on, and what sinks are where there are any."""
    shown = {k: v for k, v in facts.items() if k not in ("tokens_sha256", "sinks_pass")}
    text = ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in shown.items())
    if "sinks_pass" in facts:
        text += "\nwhere an SAE is spliced in, sinks keep the model's own activation (--sinks-pass)"
    if not has_sinks(rows):
        return text
    most = max(rows, key=lambda row: row.get("sink_share") or 0.0)
    return (
        f"{text}\nsinks: tokens longer than {SINK_RATIO:g} medians, up to {most['sink_share']:.2%} of the tokens and "
        f"{most['sink_norm_share']:.1%} of their squared norm; figures without them are means over tokens"
    )


def row_parts(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The `mse` (eq. 7) of a report's row by `chatsae.batch.PARTS`, None where a part has no token."""
    found = row.get("groups", {}).get("part", {})
    return {part: found.get(part, {}).get("mse") for part in PARTS}


def parts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of rows that hold `row_parts`; empty where none knows any, as of reports of older versions."""
    if all(row[part] is None for row in rows for part in PARTS):
        return ""
    several = any("method" in row for row in rows)
    names = [Column("SAE"), *([Column("method")] if several else [])]
    headers = ("position 0", "constant prefix", "template beyond it", "content")
    errors = [Column(p, header, best="min" if several else None) for p, header in zip(PARTS, headers, strict=True)]
    title = "MSE by part (eq. 7: mean over the tokens of a dialogue, then over dialogues)"
    return console.table(title, [*names, *errors], rows, group="SAE" if several else None)
