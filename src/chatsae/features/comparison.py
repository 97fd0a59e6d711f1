"""The scores of several runs' SAEs of the same name set side by side: FAST, BT(F) and BT(P), say.

Features of different SAEs have nothing to do with each other, so what is compared is samples. Three differences are
given: of independent samples; of features paired by the rank of their density, since rare features score differently
from frequent ones; and of runs paired by their seed, where there are several.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from chatsae.features.judging import read_judgements
from chatsae.features.scores import HIGH, difference, distribution, scores_of
from chatsae.files import damaged, read_object
from chatsae.runs import Run
from chatsae.statistics import paired

ORDER = ("fast", "bt-f-isolated", "bt-f", "bt-p")
"""Of two methods the one that stands first here is set against the other."""


@dataclass(frozen=True)
class Judged:
    """The verdicts on an SAE of a run that have a score; density is None where the run's features are gone."""

    label: str
    path: str
    seed: int
    scores: np.ndarray
    density: np.ndarray | None
    without_score: Mapping[str, int]

    def by_density(self) -> np.ndarray | None:
        """The scores, of the rarest feature first."""
        return None if self.density is None else self.scores[np.argsort(self.density, kind="stable")]


def compare_scores(runs: Sequence[Run], saes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """For every SAE (of `saes`, by default of all), judge and number of contexts that two runs have: the comparison.

    Read from RUN/judge and RUN/features. Runs that were judged on other dialogues than most are left out and counted.

    Raises:
        UserError: a file is damaged.
    """
    labels = _labels(runs)
    found: dict[tuple[str, str, int], list[tuple[Run, str, dict[str, Any]]]] = {}
    for run, label in zip(runs, labels, strict=True):
        for folder in sorted(p for p in (run.path / "judge").glob("*") if p.is_dir()):
            if not saes or folder.name in saes:
                for facts in read_judgements(run.path, folder.name):
                    key = facts["sae"], facts["judge"], facts["n_contexts"]
                    found.setdefault(key, []).append((run, label, facts))
    compared = []
    for (sae, judge, n_contexts), rows in found.items():
        tokens = Counter(facts["store"]["tokens_sha256"] for _, _, facts in rows)
        most = tokens.most_common(1)[0][0]
        same = [_judged(*row) for row in rows if row[2]["store"]["tokens_sha256"] == most]
        if len(same) < 2:
            continue
        left_out = {"judged on other dialogues": len(rows) - len(same)} if len(rows) > len(same) else {}
        about = {"sae": sae, "judge": judge, "n_contexts": n_contexts, "left_out": left_out}
        compared.append(about | compare_judged(same))
    return compared


def compare_judged(judged: Sequence[Judged]) -> dict[str, Any]:
    """The methods with their scores, and each pair of them."""
    groups: dict[str, list[Judged]] = {}
    for one in sorted(judged, key=lambda one: (_rank(one.label), one.label, one.seed)):
        groups.setdefault(one.label, []).append(one)
    return {
        "methods": [_method(label, group) for label, group in groups.items()],
        "pairs": [{"first": a, "second": b, **_pair(groups[a], groups[b])} for a, b in combinations(groups, 2)],
    }


def cdf(scores: Sequence[float]) -> dict[str, list[float]]:
    """The distinct scores (to 0.01), ascending, and the share of all that are not above each."""
    values, counts = np.unique(np.round(scores, 2), return_counts=True)
    return {"score": values.tolist(), "share": (np.cumsum(counts) / max(len(scores), 1)).tolist()}


def cdf_band(n: int, level: float = 0.95) -> float | None:
    """Half the width of a band that holds the whole CDF (Dvoretzky, Kiefer, Wolfowitz, Massart 1990)."""
    return math.sqrt(math.log(2 / (1 - level)) / (2 * n)) if n else None


def student_interval(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """Of the mean of a few independent values, by Student's t; None of fewer than two."""
    n = len(values)
    if n < 2:
        return None
    half = student_quantile(n - 1, (1 + level) / 2) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return [float(np.mean(values)) - half, float(np.mean(values)) + half]


def _labels(runs: Sequence[Run]) -> list[str]:
    """The method of each run; the path, where two runs have the same method and seed."""
    labels = []
    for run in runs:
        random = run.config.model.random_weights is not None
        labels.append(run.config.data.method + (" (random weights)" if random else ""))
    seeds = [run.config.train.seed for run in runs]
    if len(set(zip(labels, seeds, strict=True))) < len(runs):
        return [str(run.path) for run in runs]
    return labels


def _judged(run: Run, label: str, facts: Mapping[str, Any]) -> Judged:
    rows = [v for v in facts["verdicts"] if v["score"] is not None]
    known = _densities(run.path / "features" / facts["sae"], facts["store"])
    density = None if known is None else known[[v["feature"] for v in rows]]
    without = Counter(v["reason"] or "unknown" for v in facts["verdicts"] if v["score"] is None)
    scores = np.array(scores_of(rows), dtype=np.float64)
    return Judged(label, str(run.path), run.config.train.seed, scores, density, without)


def _densities(store: Path, judged: Mapping[str, Any]) -> np.ndarray | None:
    """The density of every feature; None where the store is not the one that was judged."""
    if not (store / "facts.json").is_file():
        return None
    advice = "`chatsae features RUN --rebuild` makes it anew"
    facts = read_object(store / "facts.json", advice, {"sae_sha256": str, "tokens_sha256": str})
    try:
        if any(facts[key] != judged[key] for key in ("sae_sha256", "tokens_sha256")):
            return None
        return pq.read_table(store / "features.parquet", columns=["density"])["density"].to_numpy()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise damaged(store, error, advice) from None


def _method(label: str, group: Sequence[Judged]) -> dict[str, Any]:
    scores = np.concatenate([one.scores for one in group]).tolist()
    without: Counter[str] = Counter()
    for one in group:
        without.update(one.without_score)
    return {
        "label": label,
        "runs": [one.path for one in group],
        "seeds": [one.seed for one in group],
        **distribution(scores, without),
        "cdf": cdf(scores),
        "cdf_band": cdf_band(len(scores)),
    }


def _pair(first: Sequence[Judged], second: Sequence[Judged]) -> dict[str, Any]:
    both = [np.concatenate([one.scores for one in group]).tolist() for group in (first, second)]
    seeds = [{one.seed: one for one in group} for group in (first, second)]
    shared = [(seeds[0][seed], seeds[1][seed]) for seed in seeds[0] if seed in seeds[1]]
    found = difference(*both)
    return {
        "high": found["high"],
        "mean": found["mean"],
        "by_density": _paired_by_density(shared or [(_pooled(first), _pooled(second))]),
        "by_seed": _paired_by_seed(shared),
    }


def _pooled(group: Sequence[Judged]) -> Judged:
    density = [one.density for one in group if one.density is not None]
    whole = np.concatenate(density) if len(density) == len(group) else None
    return Judged(group[0].label, "", -1, np.concatenate([one.scores for one in group]), whole, {})


def _paired_by_density(pairs: Sequence[tuple[Judged, Judged]]) -> dict[str, Any] | None:
    rows: list[np.ndarray] = []
    for first, second in pairs:
        ranked = [scores for one in (first, second) if (scores := one.by_density()) is not None and len(scores)]
        if len(ranked) < 2:
            return None
        n = min(map(len, ranked))
        rows.append(np.stack([scores[np.linspace(0, len(scores) - 1, n).round().astype(int)] for scores in ranked]))
    a, b = np.concatenate(rows, axis=1)
    return {"n_pairs": len(a), "high": _paired((a >= HIGH).astype(np.float64), b >= HIGH), "mean": _paired(a, b)}


def _paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any] | None:
    ones = np.ones(len(first))
    found = paired((first, ones), (second.astype(np.float64), ones))
    if found is None:
        return None
    facts = asdict(found)
    return {"difference": facts["difference"], "interval": list(facts["interval"]), "p_value": facts["p_value"]}


def _paired_by_seed(pairs: Sequence[tuple[Judged, Judged]]) -> dict[str, Any] | None:
    pairs = [(a, b) for a, b in pairs if len(a.scores) and len(b.scores)]
    if len(pairs) < 2:
        return None
    high = [float((a.scores >= HIGH).mean() - (b.scores >= HIGH).mean()) for a, b in pairs]
    mean = [float(a.scores.mean() - b.scores.mean()) for a, b in pairs]
    return {"seeds": [a.seed for a, _ in pairs], "high": _over_seeds(high), "mean": _over_seeds(mean)}


def _over_seeds(differences: Sequence[float]) -> dict[str, Any]:
    mean = float(np.mean(differences))
    return {"differences": list(differences), "mean": mean, "interval": student_interval(differences)}


def _rank(label: str) -> int:
    return ORDER.index(label) if label in ORDER else len(ORDER)


def student_quantile(freedom: int, p: float) -> float:
    """The quantile of Student's t above 0.5, by bisection of its distribution (Simpson's rule)."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        # t = sqrt(freedom) tan(angle) turns the tail into a bounded integral of cos(angle)^(freedom - 1)
        angle = np.linspace(0, math.atan(middle / math.sqrt(freedom)), 2001)
        y = np.cos(angle) ** (freedom - 1)
        area = float((y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum()) * (angle[1] - angle[0]) / 3)
        low, high = (middle, high) if 0.5 + constant * math.sqrt(freedom) * area < p else (low, middle)
    return (low + high) / 2
