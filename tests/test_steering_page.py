"""The section on steering of docs/results.md follows from the numbers, whichever way they fall."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chatsae.errors import UserError
from chatsae.steering.sweep import ARMS
from chatsae.steering.tokens import TokenFeature, TokenRow


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
        yield importlib.import_module("steering_page")


@pytest.fixture(scope="module")
def tool(page: ModuleType) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
        yield importlib.import_module("steering_results")


def row(token: str, *means: float, first: int = 0, place: str = "id") -> TokenRow:
    features = tuple(TokenFeature(first + i, mean, 0.25 * mean, 1.0) for i, mean in enumerate(means))
    return TokenRow(token, 1, place, 7, features)


ROWS = {
    ("fast", "L3-8x-jumprelu"): [row("<s>", 8.0, 3.0), row("<s>", 9.0, place="template"), row("<e>", 5.0, 4.0)],
    ("bt-p", "L3-8x-jumprelu"): [row("<s>", 1.0, 0.9, first=5), row("<e>", 2.0, 0.5, first=7)],
}


def difference(low: float, high: float) -> dict[str, Any]:
    return {"difference": (low + high) / 2, "interval": [low, high], "p_value": 0.5, "n": 10}


def facts(feature: int, end: float, random: list[float], log_ratio: float, auto: float | None) -> dict[str, Any]:
    """A sweep at 0, 10 and 20, the median norm being 10."""
    measures = {"kl_mean": difference(*random), "repetition": difference(-1, 1), "reread_mean": difference(0.1, 0.2)}
    measures |= {"log_perplexity_ratio": None, "length": difference(*random)}
    lengths = {"feature": (9.0, 3.0 if end else 0.0, 0.0), "random": (9.0, 9.0, 9.0)}
    window = {"from": 10.0, "from_interval": [10.0, None], "to": end, "to_interval": [0.0, 20.0], "open": end >= 10}
    apart = {"difference": 10.0, "interval": [5.0, 15.0]}
    return {
        "feature": feature,
        "median_norm": 10.0,
        "max_new_tokens": 64,
        "question_set": "python",
        "questions": ["a"] * 10,
        "strengths": [
            {"alpha": a, "rel_norm": a / 10, "kl": a / 50, "log_ratio": log_ratio, "grids": ["relative"]}
            for a in (0.0, 10.0, 20.0)
        ],
        "auto": {"alpha": auto, "rel_norm": None if auto is None else auto / 10, "bound": 0.5},
        "quality": {"words": "an answer holds if so", "share": 0.8, "acts": 0.5},
        "summary": [
            {"arm": arm, "strength": s, "measures": {"length": {"mean": mean}}}
            for arm, means in lengths.items()
            for s, mean in enumerate(means)
        ],
        "windows": dict.fromkeys(ARMS, window),
        "windows_against": {"random": apart, "other": {"difference": -1.0, "interval": [-2.0, -0.5]}},
        "against": [{"control": c, "strength": s, "measures": measures} for c in ("random", "other") for s in (1, 2)],
    }


@pytest.fixture
def sweeps(page: ModuleType) -> list[Any]:
    return [
        page.Sweep("<s>", "fast", facts(0, 10.0, [0.2, 0.4], 0.5, 15.0)),
        page.Sweep("<s>", "bt-p", facts(5, 0.0, [-0.4, -0.2], 0.7, None)),
    ]


def test_the_token_table_has_every_sae_below_its_token(page: ModuleType) -> None:
    lines = page.token_table(ROWS).splitlines()
    assert lines[2] == "| `<s>` | L3-8x-jumprelu | fast | 0: 8 (0.80) | 1: 3 (0.80) | – | – | – |"
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["fast", "bt-p", "fast", "bt-p"]
    assert page.token_table({("fast", "a"): [row("<|x|>", 1.0)]}).splitlines()[2].startswith("| `<\\|x\\|>` | a |")
    assert "first mean is at least twice the second in 2 of 4 rows (most: 4 times)" in page.tower_sentence(ROWS)
    told = page.exclusive_sentence(ROWS)
    assert "0.80 to 0.80 (fast jumprelu), 0.80 to 0.80 (bt-p jumprelu)" in told
    assert "fast jumprelu: 0 is first of 2 tokens" in told
    assert "bt-p jumprelu:" not in told


def test_the_window_table_is_in_median_norms(page: ModuleType, sweeps: list[Any]) -> None:
    cells = [cell.strip() for cell in page.window_table(sweeps).splitlines()[2].split("|")[1:-1]]
    assert cells[:6] == ["`<s>`", "fast", "0", "1.50", "1.00 [1.00, none]", "1.00 [0.00, 2.00]"]
    assert cells[-2:] == ["+1.00 [+0.50, +1.50]", "-0.10 [-0.20, -0.05]"]
    assert page.window_table(sweeps).splitlines()[3].split("|")[4].strip() == "–"


def test_the_reading_counts_what_is_sure(page: ModuleType, sweeps: list[Any]) -> None:
    told = page.window_sentence(sweeps)
    assert "**Reading:** in 2 of 2 sweeps a feature of special tokens keeps answers whole up to larger" in told
    assert "a window in 1 of 2 sweeps" in told
    assert "further than that of a random direction in 2 and less far in 0" in told
    assert "further than that of another feature in 0 and less far in 2" in told
    told = page.difference_sentence(sweeps)
    assert "KL is surely larger in 2 and smaller in 2 of 4" in told
    assert "perplexity is surely larger in 0 and smaller in 0 of 0" in told
    assert "repetition is surely larger in 0 and smaller in 0 of 4" in told
    told = page.length_sentence(sweeps)
    assert "than with a random direction: `<s>` 0 (fast) 0 and 2 of 2, `<s>` 5 (bt-p) 2 and 0 of 2; with 0" in told
    assert "with 0 (fast, `<s>`) every answer is empty from 2 norms on, with 5 (bt-p, `<s>`) every" in told
    assert "answer is empty from 1 norms on, which no random direction does." in told
    assert "in 4 of 4 (less in 0); within the window in 1 of 1" in page.reread_sentence(sweeps)
    assert "and the window: above it in 1; at the end of the windows that KL is 0 to 0.2." in page.auto_sentence(sweeps)
    assert "it never falls below 1 (least 1.6487)" in page.better_sentence(sweeps)
    better = [*sweeps, page.Sweep("<e>", "fast", facts(9, 10.0, [0, 0], -0.5, 15.0))]
    assert "the least is 0.6065, of feature 9 (fast) at 1 norms" in page.better_sentence(better)


def test_the_section_is_put_between_its_marks_and_kept(
    page: ModuleType, sweeps: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.md"
    assert "`make steering` writes this section" in page.kept_section(path)
    path.write_text("# Results\n\nBefore.\n")
    page.write_section(ROWS, 12, sweeps, 1000, path)
    first = path.read_text()
    assert first.startswith("# Results\n\nBefore.\n\n" + page.BEGIN)
    assert "over 12 held-out dialogues (7 `<s>`, 7 `<e>`)" in " ".join(first.split())
    assert first == f"# Results\n\nBefore.\n\n{page.kept_section(path)}\n"
    path.write_text(first + "\nAfter.\n")
    page.write_section(ROWS, 13, sweeps, 1000, path)
    again = path.read_text()
    assert again.endswith(page.END + "\n\nAfter.\n")
    assert "over 13 held-out dialogues" in " ".join(again.split())
    assert again.count(page.BEGIN) == 1


def test_features_are_not_swept_twice_and_missing_runs_are_named(tool: ModuleType, tmp_path: Path) -> None:
    found = tool.wanted(tool.Found(ROWS, 1))
    assert found == [
        ("<s>", "fast", "L3-8x-jumprelu", 0),
        ("<e>", "fast", "L3-8x-jumprelu", 1),
        ("<s>", "bt-p", "L3-8x-jumprelu", 5),
    ]
    with pytest.raises(UserError, match="no run fast and no run bt-f and no run bt-p; `make results` makes them"):
        tool.runs_of(tmp_path)


def test_a_figure_is_shrunk_but_for_its_scales(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    path.write_text('<use x="123.456789" y="9.876543" transform="scale(0.015625)"/><path d="M 10.05 -20.123"/>')
    tool.shrink(path)
    assert path.read_text() == ('<use x="123.4" y="9.876543" transform="scale(0.015625)"/><path d="M 10.0 -20.1"/>')
