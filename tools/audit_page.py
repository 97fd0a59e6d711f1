"""Audit a run and put what was found into docs/audit.md: `tools/audit_page.py RUN`."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatsae.audit.command import Ask, audit_run

PAGE = Path(__file__).parents[1] / "docs" / "audit.md"
BEGIN, END = "<!-- audit: begin -->\n", "<!-- audit: end -->\n"
_FEATURES = 4


def main(argv: Sequence[str]) -> int:
    """Audit the run and write the page."""
    facts, _ = audit_run(Path(argv[0]), Ask())
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{page(facts)}\n{END}{after}", encoding="utf-8")
    return 0


def page(facts: Mapping[str, Any]) -> str:
    """The tables of the page."""
    parts = [
        f"`{facts['model']}`, {facts['n_dialogues']} dialogues of the split `{facts['split']}`; "
        + "; ".join(_about(name, one) for name, one in facts["sets"].items())
        + "."
    ]
    for name, sae in facts["saes"].items():
        parts += [
            f"### {name}",
            _features(sae["sets"]),
            _causal(sae["sets"]),
            _probes(sae["sets"]),
            _roles(sae["roles"]),
        ]
    skipped = "; ".join(f"{n} × {reason}" for reason, n in facts["skipped"].items())
    return "\n\n".join([*parts, *([f"Left out: {skipped}."] if skipped else [])]) + "\n"


def _about(name: str, one: Mapping[str, Any]) -> str:
    hits = {side: f"{rate['hits']} of {rate['n']}" for side, rate in one["behaviour"].items()}
    return f"`{name}`: {hits['positive']} positive and {hits['negative']} negative prompts show the behaviour"


def _features(sets: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            one["feature"],
            f"`{one['place']}`".replace("|", "\\|"),
            f"{one['chosen_auroc']:.2f}",
            _with(one["auroc"], one["auroc_interval"]),
            _with(one["difference"], one["difference_interval"]),
            f"{one['p_holm']:.4f}",
            "yes" if one["significant"] else "no",
        ]
        for name, found in sets.items()
        for one in found["features"][:_FEATURES]
    ]
    names = ["set", "feature", "place", "AUROC where chosen", "AUROC", "mean difference", "p, Holm", "holds"]
    return _table(names, rows)


def _causal(sets: Mapping[str, Any]) -> str:
    rows, reasons = [], []
    for name, found in sets.items():
        reasons += [f"{name}: {reason}." for reason in found["causal"]["skipped"]]
        for one in found["causal"]["interventions"]:
            shares = [control["share"] for control in one["controls"]]
            rows.append(
                [
                    name,
                    f"{one['name']} {', '.join(map(str, one['features']))}",
                    _with(one["before"]["share"], one["before"]["interval"]),
                    _with(one["after"]["share"], one["after"]["interval"]),
                    f"{min(shares):.2f} to {max(shares):.2f}",
                    f"{one['rank_p']:.2f}",
                    f"{one['perplexity_ratio']:.2f} ({one['control_perplexity_ratio']:.2f})",
                    "yes" if one["acts"] else "no",
                ]
            )
    names = [
        "set",
        "operation",
        "before",
        "after",
        "controls, least to most",
        "rank p",
        "perplexity ratio (controls)",
        "acts",
    ]
    return "\n\n".join([_table(names, rows), " ".join(reasons)])


def _probes(sets: Mapping[str, Any]) -> str:
    by_name: dict[str, dict[str, str]] = {}
    for name, found in sets.items():
        for probe in found["probes"]["pooled"]:
            by_name.setdefault(probe["name"], {})[name] = _with(probe["auroc"], probe["auroc_interval"])
    rows = [[probe, *(cells.get(name, "-") for name in sets)] for probe, cells in by_name.items()]
    return _table(["probe, pooled: AUROC", *sets], rows)


def _roles(roles: Mapping[str, Any]) -> str:
    others = list(roles["median_reach"])
    held = sum(one["significant"] for one in roles["features"])
    rows: list[list[Any]] = [
        [one["feature"], _with(one["separation"]["auroc"], one["separation"]["auroc_interval"])]
        + ["-" if one["reach"][c][0] is None else f"{one['reach'][c][0]:.2f}" for c in others]
        for one in roles["features"][:_FEATURES]
    ]
    medians = [roles["median_reach"][c] for c in others]
    rows.append([f"median of {held}", "", *("-" if value is None else f"{value:.2f}" for value in medians)])
    return _table(["user feature", "AUROC", *(f"reach, {c}" for c in others)], rows)


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def _with(value: float, between: Sequence[float] | None) -> str:
    return f"{value:.2f}" if between is None else f"{value:.2f} ({between[0]:.2f}, {between[1]:.2f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
