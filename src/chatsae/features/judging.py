"""Judge the features of a run, and the judge beside them; results lie under RUN/judge/SAE."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chatsae import console
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.features.calibration import Pack, calibrate, make_pack, share, summary
from chatsae.features.patterns.background import Background, random_contexts
from chatsae.features.records import Feature
from chatsae.features.session import Ask, RunFeatures
from chatsae.features.store import FeatureStore
from chatsae.features.text import TokenText
from chatsae.features.verdict import Judge, Verdict
from chatsae.files import write_json
from chatsae.statistics import quadratic_kappa

SCHEMA_VERSION = 1

Facts = dict[str, Any]

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


@dataclass(frozen=True)
class Work:
    """The features of an SAE that are to be judged, and those with a known score beside them."""

    sae: str
    store: FeatureStore
    features: Sequence[Feature]
    pack: Pack

    def rounds(self, repeats: int = 1) -> Iterator[tuple[Sequence[Feature], int]]:
        """Every list of features that is judged, with its repeat."""
        planted = [each.feature for each in self.pack.planted]
        for repeat in range(repeats):
            yield self.features, repeat
        for repeat in (0, 1):
            yield planted, repeat
        yield self.pack.random, 0
        yield self.pack.shuffled, 0


@dataclass(frozen=True)
class Asked:
    """The features of a run's SAEs that are to be judged from `n_contexts` contexts."""

    run: RunFeatures
    background: Background
    work: tuple[Work, ...]
    n_contexts: int
    seed: int


def gather_work(
    run: RunFeatures,
    *,
    ask: Ask | None = None,
    n_contexts: int = 20,
    limit: int = 0,
    planted: int = 4,
    nulls: int = 20,
    seed: int = 0,
) -> Asked:
    """The features of every SAE that have contexts, or `limit` of them drawn by `seed`, with a pack for each.

    Raises:
        UserError: the features cannot be found, or the dialogues are too few to calibrate a judge.
    """
    ask = ask or Ask()
    stores = run.stores(ask)
    if limit and any(len(store) < min(limit, store.facts["n_live"]) for store in stores.values()):
        stores = run.stores(replace(ask, features=limit, rebuild=False))
    background = background_of(run, next(iter(stores.values())))
    work = []
    for name, store in stores.items():
        features = [store.feature(i, contexts=n_contexts) for i in chosen(store.indices.tolist(), limit, seed)]
        pack = make_pack(background, features, n_contexts=n_contexts, planted=planted, nulls=nulls, seed=seed)
        work.append(Work(name, store, features, pack))
    return Asked(run, background, tuple(work), n_contexts, seed)


def judge_features(
    run: RunFeatures,
    judge_for: Callable[[Background], Judge],
    *,
    ask: Ask | None = None,
    n_contexts: int = 20,
    limit: int = 0,
    planted: int = 4,
    nulls: int = 20,
    seed: int = 0,
    repeats: int = 1,
) -> dict[str, dict[str, Any]]:
    """Verdicts on the features of every SAE that have contexts, or on `limit` of them drawn by `seed`; by SAE.

    With them goes the calibration of the judge: `planted` features for each number of deviating contexts and `nulls`
    of each kind. What is found is written to RUN/judge/SAE/JUDGE-N.json, N being `n_contexts`.

    Raises:
        UserError: the features cannot be found, or the dialogues are too few to calibrate the judge.
    """
    asked = gather_work(run, ask=ask, n_contexts=n_contexts, limit=limit, planted=planted, nulls=nulls, seed=seed)
    return judge_work(asked, judge_for(asked.background), repeats=repeats)


def judge_work(
    asked: Asked, judge: Judge, *, repeats: int = 1, more: Callable[[Work, Sequence[Verdict]], Facts] | None = None
) -> dict[str, dict[str, Any]]:
    """Judge what was asked, `repeats` times, and write what is found; the summary is of the first time.

    `more` adds to the file of an SAE, from the first verdicts.
    """
    return {work.sae: _judge(asked, work, judge, repeats, more) for work in asked.work}


def _judge(
    asked: Asked, work: Work, judge: Judge, repeats: int, more: Callable[[Work, Sequence[Verdict]], Facts] | None
) -> dict[str, Any]:
    n_contexts, times = asked.n_contexts, []
    with console.progress(f"judge {work.sae}", len(work.features) * repeats) as advance:
        for repeat in range(repeats):
            times.append([])
            for verdict in judge.verdicts(work.features, n_contexts=n_contexts, repeat=repeat):
                times[-1].append(verdict)
                advance(1)
    calibration = calibrate(judge, work.pack, n_contexts=n_contexts)
    found = {
        "schema_version": SCHEMA_VERSION,
        "sae": work.sae,
        "judge": judge.name,
        "n_contexts": n_contexts,
        "seed": asked.seed,
        "store": {key: work.store.facts[key] for key in ("model", "sae_sha256", "tokens_sha256", "n_dialogues")},
        "summary": summary(times[0], calibration),
        "calibration": calibration,
        "verdicts": [asdict(verdict) for verdict in times[0]],
        "repeats": [[asdict(verdict) for verdict in verdicts] for verdicts in times[1:]],
        "agreement": [agreement(times[0], verdicts) for verdicts in times[1:]],
    }
    found |= {} if more is None else more(work, times[0])
    path = asked.run.run.path / "judge" / work.sae / f"{judge.name}-{n_contexts}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found


def agreement(first: Sequence[Verdict], again: Sequence[Verdict]) -> dict[str, Any]:
    """How far two verdicts on the same features agree, where both have a score: exactly (rounded), and weighted."""
    pairs = [
        (round(a.score), round(b.score))
        for a, b in zip(first, again, strict=True)
        if a.score is not None and b.score is not None
    ]
    return {"exact": share(a == b for a, b in pairs), "kappa": quadratic_kappa(pairs)}


def background_of(run: RunFeatures, store: FeatureStore) -> Background:
    """Random tokens of the dialogues that a store was made from."""
    tokens = run.tokens(store.facts["dialogues_asked"])
    window = store.facts["options"]["window"]
    return Background.of(random_contexts(tokens, TokenText(run.lm.tokenizer), window=window))


def chosen(indices: Sequence[int], limit: int, seed: int) -> list[int]:
    """`limit` of the features, drawn by a seed and ascending; 0: all."""
    if not limit or limit >= len(indices):
        return list(indices)
    return sorted(np.random.default_rng(seed).choice(indices, size=limit, replace=False).tolist())


def read_judgements(run: Path, sae: str) -> list[dict[str, Any]]:
    """Every result under RUN/judge/SAE, by name of the file.

    Raises:
        UserError: one is damaged, or another version of chatsae wrote it.
    """
    found = []
    for path in sorted((run / "judge" / sae).glob("*.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            version = facts["schema_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, `chatsae judge {run}` writes it anew") from None
        if version != SCHEMA_VERSION:
            raise UserError(f"{path} has schema {version}, this chatsae reads {SCHEMA_VERSION}; delete it")
        found.append(facts)
    return found


def judgement_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What judges found, as text; a row per SAE."""
    rows = [_row(facts) for facts in found.values()]
    return console.table("Scores of 1 to 5, and how far to believe them", _COLUMNS, rows)


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
        "kappa": calibration["retest_kappa"],
        "without_score": sum(scores["without_score"].values()),
    }


def _share(facts: Mapping[str, Any]) -> str | None:
    if facts["interval"] is None:
        return None
    low, high = facts["interval"]
    return f"{facts['share']:.1%} [{low:.1%}, {high:.1%}]"
