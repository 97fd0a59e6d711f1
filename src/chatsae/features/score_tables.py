"""Scores as text tables, for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chatsae import console
from chatsae.console import Column
from chatsae.features.scores import high, mean, scores_of

_BESIDE = (
    Column("SAE"),
    Column("null"),
    Column("n", "features"),
    Column("high", "4 and 5"),
    Column("mean"),
    Column("high_above", "SAE minus null,\npoints of 4 and 5"),
    Column("mean_above", "SAE minus null,\nmean"),
)
_NULLS = {
    "random": "windows around random tokens",
    "shuffled": "the SAE's contexts, dealt out anew",
    "random_directions": "random directions",
    "random_weights": "SAE of a model with random weights",
}
_COLUMNS = (
    Column("SAE"),
    Column("judge"),
    Column("n", "features"),
    Column("high", "4 and 5"),
    Column("mean"),
    Column("above_null", "above\nnulls"),
    Column("accuracy", "judge right\non planted"),
    Column("false_positives", "nulls\nabove 2"),
    Column("kappa", "retest κ"),
    Column("without_score", "without\nscore"),
)
_METHODS = (
    Column("SAE"),
    Column("judge"),
    Column("label", "method"),
    Column("seeds"),
    Column("n", "features"),
    Column("high", "4 and 5"),
    Column("mean"),
)
_PAIRS = (
    Column("SAE"),
    Column("judge"),
    Column("pair", "difference"),
    Column("high", "points of 4 and 5"),
    Column("mean"),
    Column("by_density", "points of 4 and 5, paired\nby rank of density"),
    Column("p_value", "p"),
    Column("by_seed", "points of 4 and 5,\npaired by seed"),
)


def judgement_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What judges found, as text: a row per SAE, and how far each is above what has no meaning."""
    rows = [_row(facts) for facts in found.values()]
    beside = [row for facts in found.values() for row in _beside(facts)]
    tables = (
        console.table("Scores of 1 to 5, and how far to believe them", _COLUMNS, rows),
        console.table("Scores of what has no meaning, and how far the SAE is above it", _BESIDE, beside),
    )
    return "\n\n".join(tables)


def comparison_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Comparisons as text."""
    methods, pairs = [], []
    for one in found:
        about = {"SAE": one["sae"], "judge": f"{one['judge']}, {one['n_contexts']} contexts"}
        methods += [about | _method_row(method) for method in one["methods"]]
        pairs += [about | _pair_row(pair) for pair in one["pairs"]]
    tables = [console.table("Scores by method", _METHODS, methods)]
    if pairs:
        tables.append(console.table("The first method minus the second", _PAIRS, pairs))
    return "\n\n".join(tables)


def _beside(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    calibration = facts["calibration"]
    for kind, above in facts["summary"]["above"].items():
        control = calibration["controls"].get(kind)
        scores = calibration["null_scores"][kind] if control is None else scores_of(control["verdicts"])
        yield {
            "SAE": facts["sae"],
            "null": _NULLS[kind],
            "n": len(scores),
            "high": _share(high(scores)),
            "mean": mean(scores),
            "high_above": _difference(above["high"], percent=True),
            "mean_above": _difference(above["mean"]),
        }


def _row(facts: Mapping[str, Any]) -> dict[str, Any]:
    scores, calibration = facts["summary"], facts["calibration"]
    return {
        "SAE": facts["sae"],
        "judge": f"{facts['judge']}, {facts['n_contexts']} contexts",
        "n": scores["n"],
        "high": _share(scores["high"]),
        "mean": scores["mean"],
        "above_null": scores.get("above_null"),
        "accuracy": _share(calibration["accuracy"]),
        "false_positives": _share(calibration["false_positives"]["random"]),
        "kappa": _kappa(calibration["retest_kappa"], calibration["retest_kappa_interval"]),
        "without_score": sum(scores["without_score"].values()),
    }


def _difference(facts: Mapping[str, Any] | None, *, percent: bool = False) -> str | None:
    """A difference with its interval, for people."""
    if facts is None:
        return None
    scale, digits = (100, 1) if percent else (1, 2)
    text = f"{scale * facts['difference']:+.{digits}f}"
    if facts["interval"] is not None:
        low, top = (f"{scale * edge:+.{digits}f}" for edge in facts["interval"])
        text += f" [{low}, {top}]"
    return text


def _kappa(value: float | None, between: Sequence[float] | None) -> str | None:
    if value is None:
        return None
    return f"{value:.2f}" + (f" [{between[0]:.2f}, {between[1]:.2f}]" if between else "")


def _share(facts: Mapping[str, Any]) -> str | None:
    if facts["interval"] is None:
        return None
    low, high = facts["interval"]
    return f"{facts['share']:.1%} [{low:.1%}, {high:.1%}]"


def _method_row(method: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "label": method["label"],
        "seeds": ", ".join(map(str, method["seeds"])),
        "n": method["n"],
        "high": _share(method["high"]),
        "mean": method["mean"],
    }


def _pair_row(pair: Mapping[str, Any]) -> dict[str, Any]:
    dense = (pair["by_density"] or {}).get("high")
    seeds = (pair["by_seed"] or {}).get("high")
    over = None if seeds is None else {"difference": seeds["mean"], "interval": seeds["interval"]}
    return {
        "pair": f"{pair['first']} - {pair['second']}",
        "high": _difference(pair["high"], percent=True),
        "mean": _difference(pair["mean"]),
        "by_density": _difference(dense, percent=True),
        "p_value": None if dense is None else f"{dense['p_value']:.3f}",
        "by_seed": _difference(over, percent=True),
    }
