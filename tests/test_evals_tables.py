"""What the tables of `chatsae eval` and `chatsae compare` lead with, and their errors by part."""

from dataclasses import replace

import pytest
import torch

from chatsae.batch import PARTS
from chatsae.evals.evaluate import evaluate
from chatsae.evals.report import Comparison, Report
from chatsae.evals.tables import COLUMNS, NO_SINKS, columns, parts_table, row_parts
from sae_samples import constant_sae
from sink_samples import SAID, with_sinks


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if f"│ {name} " in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    lm = with_sinks(tmp_path_factory.mktemp("qwen2"), [1])
    return evaluate({"zero": constant_sae(torch.zeros(lm.d_in))}, lm, SAID, resamples=20)


def test_figures_without_sinks_lead_where_there_are_sinks(report: Report) -> None:
    row = report.rows["zero"]
    assert row["groups"]["sink"]["yes"]["n_tokens"] == 1
    assert row["sink_norm_share"] > 0.98
    assert row["mse_no_sinks"] == row["groups"]["sink"]["no"]["mse_token"] < row["mse"] / 20
    assert row["l0_no_sinks"] == row["groups"]["sink"]["no"]["l0"]
    text = report.table()
    ev, all_tokens = row["explained_variance_no_sinks"], row["explained_variance"]
    assert cells(text, "zero")[1:4] == [f"{ev:.3g} ({all_tokens:.3g})", f"{row['mse_no_sinks']:.3g}", "0 (0)"]
    assert f"up to {row['sink_share']:.2%} of the tokens" in text.replace("\n", " ")
    shown = [column.key for column in columns([row])]
    assert shown[:3] == [column.key for column in NO_SINKS]
    assert set(shown[3:]) == {column.key for column in COLUMNS} - {"explained_variance", "l0"}


def test_tables_without_sinks_are_as_they_were(report: Report) -> None:
    rows = {"zero": report.rows["zero"] | {"sink_share": 0.0}}
    assert columns(list(rows.values())) == COLUMNS
    text = replace(report, rows=rows).table()
    assert "sink" not in text
    assert columns([{"mse": 1.0}]) == COLUMNS  # of a report of an older version


def test_nothing_is_cut_of_a_wide_table(report: Report) -> None:
    row = report.rows["zero"] | {"method": "bt-f-isolated~random-sae"}
    for name in ("mse", "mse_st", "mse_st_template", "delta_loss"):
        row |= {name: 0.00012345, f"log2_{name}": -12.345, "delta_loss_percent": -0.012345}
    intervals = {key: [0.000111, 0.000133] for key in row}
    rows = [row | {"SAE": "L18-16x-standard-0.00123", "intervals": intervals}] * 2
    text = Comparison(rows, report.facts).table()
    assert "…" not in text
    assert text.count("±") == 8


def test_errors_by_part_are_those_of_the_groups(report: Report) -> None:
    row = report.rows["zero"]
    errors = row_parts(row)
    assert errors == {part: row["groups"]["part"].get(part, {}).get("mse") for part in PARTS}
    text = report.text()
    assert text.startswith(report.table())
    assert "eq. 7" in text
    below = text[len(report.table()) :]
    assert cells(below, "zero")[1:] == ["-" if v is None else f"{v:.3g}" for v in errors.values()]
    methods = [{"SAE": "zero", "method": name, **errors} for name in ("fast", "bt-f")]
    methods[1]["content"] = 1e-9
    compared = Comparison([row | one for one in methods], report.facts, parts=methods).text()
    assert "1e-09*" in compared
    assert parts_table([{"SAE": "old", **row_parts({"mse": 1.0})}]) == ""
