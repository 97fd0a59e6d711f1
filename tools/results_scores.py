"""The scores of features in docs/results.md: the pattern judge on the SAEs of every method and seed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatsae.features.judging import judge_features, read_judgements
from chatsae.features.patterns.judge import PatternJudge
from chatsae.features.session import Ask, RunFeatures
from chatsae.statistics import wilson
from results_tables import METHODS

DIALOGUES = 300
CONTEXTS = (5, 20)
NAMES = {"bt-p": "BT(P)", "bt-f": "BT(F)", "bt-f-isolated": "BT(F)-isolated", "fast": "FAST"}

Scores = Mapping[tuple[str, str, int], Sequence[Mapping[str, Any]]]
"""Results of the judge by (SAE, method, contexts), one per seed."""


def score(out: Path, seeds: Sequence[int]) -> Scores:
    """What the pattern judge says of every run under `out`; what it has said is not asked again."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for seed in seeds:
        for method in METHODS:
            path = out / f"seed-{seed}" / method
            for n_contexts in CONTEXTS:
                for name, facts in _scored(path, n_contexts).items():
                    found.setdefault((name, method, n_contexts), []).append(facts)
    return found


def _scored(path: Path, n_contexts: int) -> dict[str, dict[str, Any]]:
    run = RunFeatures(path)
    stores = run.stores(Ask(dialogues=DIALOGUES))
    there = {
        name: facts
        for name, store in stores.items()
        for facts in read_judgements(path, name)
        if (facts["judge"], facts["n_contexts"]) == ("pattern", n_contexts)
        and facts["store"]["sae_sha256"] == store.facts["sae_sha256"]
        and facts["store"]["tokens_sha256"] == store.facts["tokens_sha256"]
    }
    if set(there) == set(stores):
        return there
    return judge_features(run, PatternJudge, ask=Ask(dialogues=DIALOGUES), n_contexts=n_contexts)


def score_table(found: Scores) -> str:
    """Shares of scores 4 and 5 over all seeds, with intervals, per SAE and method."""
    lines = ["| SAE | contexts | " + " | ".join(NAMES[m] for m in METHODS) + " |", "|---|--:|" + "--:|" * len(METHODS)]
    for name, n_contexts in sorted({(name, n) for name, _, n in found}):
        cells = [_share(found[name, method, n_contexts]) for method in METHODS]
        lines.append(f"| {name} | {n_contexts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def score_sentence(found: Scores) -> str:
    """FAST against the others, on 20 contexts, and what the judge makes of features without a meaning."""
    parts = []
    for name in sorted({name for name, _, _ in found}):
        fast = _counts(found[name, "fast", 20])
        over = [f"{NAMES[m]} {_difference(fast, _counts(found[name, m, 20]))}" for m in METHODS[:-1]]
        parts.append(f"{name}: {', '.join(over)}")
    judged = [row["calibration"] for (_, _, n_contexts), rows in found.items() if n_contexts == 20 for row in rows]
    right = [calibration["accuracy"] for calibration in judged]
    nulls = [calibration["false_positives"]["random"] for calibration in judged]
    return (
        f"What FAST has over the others in scores of 4 and 5 on 20 contexts, in points: {'; '.join(parts)}. There the "
        f"judge scored {sum(r['n'] for r in right):,} of {sum(r['of'] for r in right):,} planted features right and "
        f"{sum(n['n'] for n in nulls):,} of {sum(n['of'] for n in nulls):,} of random tokens above 2."
    )


def _counts(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    high = [row["summary"]["high"] for row in rows]
    return sum(share["n"] for share in high), sum(share["of"] for share in high)


def _share(rows: Sequence[Mapping[str, Any]]) -> str:
    n, of = _counts(rows)
    between = wilson(n, of)
    return f"{n / of:.1%} [{between[0]:.1%}, {between[1]:.1%}]" if between else "–"


def _difference(first: tuple[int, int], second: tuple[int, int]) -> str:
    """Of two shares, with the 95 % interval of two independent samples of features."""
    (a, n), (b, m) = first, second
    p, q = a / n, b / m
    half = 1.96 * math.sqrt(p * (1 - p) / n + q * (1 - q) / m)
    return f"{100 * (p - q):+.1f} ± {100 * half:.1f}"
