"""The tool behind docs/models.md, and that the page is its own."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto import modeling_auto

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from modeltable import families, measure, page
    finally:
        sys.path.pop(0)
    return type("Table", (), {"families": families, "measure": measure, "page": page})


def test_the_page_is_of_the_transformers_that_is_pinned() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    (version, torch_version) = re.findall(r"with transformers (\S+) and torch (\S+) on", PAGE)[0]
    assert version == pinned["transformers"]
    assert torch_version == pinned["torch"]


def test_every_family_of_transformers_is_in_the_page(table: Any) -> None:
    rows = table.page.families_in(PAGE)
    assert set(rows) >= {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert set(rows) >= {*modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    read = {family for family, cells in rows.items() if len(cells) > 1}
    assert len(read & {*table.families.causal_families()}) >= 100
    assert {"gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "llava"} <= read
    assert all(
        cells[0] in ("cut", "whole") and cells[1] in ("padded", "packed", "single") for cells in map(rows.get, read)
    )
    assert not re.search(r"not caught|/tmp|site-packages", PAGE)  # what a user gets is a message


@pytest.mark.parametrize(
    "family", ["qwen2", "gpt_oss", "mamba", "internvl", "qwen2_audio", "longcat_flash", "bert", "gemma3n_text"]
)
def test_a_row_is_that_of_the_page(table: Any, family: str, tmp_path: Path) -> None:
    row = table.measure.measure(family, tmp_path)
    cells = table.page.families_in(PAGE)[family]
    ours = table.page.families_in(table.page.lines([row]))[family]
    if row.error:
        assert ours == cells
        return
    numbers = re.compile(r"^\d\.\de[-+]\d\d, \d\.\de[-+]\d\d$")
    assert [numbers.sub("exact", cell) for cell in ours] == [numbers.sub("exact", cell) for cell in cells]
    assert "exact" in [numbers.sub("exact", cell) for cell in ours]


def test_a_family_that_hangs_or_dies_costs_its_own_row_only(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.measure, "TIMEOUT", 0.0)
    (row,) = table.measure.rows(["qwen2"])
    assert (row.family, row.unbuilt) == ("qwen2", "took over 0 s")


def test_what_is_no_small_model_is_said(table: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table.families, "MAX_PARAMETERS", 1000)
    row = table.measure.measure("qwen2", tmp_path)
    assert re.fullmatch(r"ValueError: still [\d,]+ parameters", row.unbuilt)
    text = table.page.page([row], [])
    assert table.page.families_in(text) == {"qwen2": [row.unbuilt]}
    assert "| language models | 1 | 0 | 0 | 0 | 0 | 0 | 1 |" in text
