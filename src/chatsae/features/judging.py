"""Judge the features of a run, and the judge beside them; results lie under RUN/judge/SAE."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chatsae import console
from chatsae.errors import UserError
from chatsae.features.calibration import Pack, calibrate, make_pack, summary, whole_pairs
from chatsae.features.controls import Control, direction_controls, null_run, weight_controls
from chatsae.features.patterns.background import Background, random_contexts
from chatsae.features.random_directions import DIRECTIONS
from chatsae.features.records import Feature
from chatsae.features.scores import kappa, share
from chatsae.features.session import Ask, RunFeatures
from chatsae.features.store import FeatureStore
from chatsae.features.text import TokenText
from chatsae.features.verdict import Judge, Verdict
from chatsae.files import read_object, write_json

SCHEMA_VERSION = 1

Facts = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """The features of an SAE that are to be judged, and those with a known score beside them."""

    sae: str
    store: FeatureStore
    features: Sequence[Feature]
    pack: Pack
    controls: Sequence[Control] = ()

    def rounds(self, repeats: int = 1) -> Iterator[tuple[Sequence[Feature], int]]:
        """Every list of features that is judged, with its repeat."""
        planted = [each.feature for each in self.pack.planted]
        for repeat in range(repeats):
            yield self.features, repeat
        for repeat in (0, 1):
            yield planted, repeat
        yield self.pack.random, 0
        yield self.pack.shuffled, 0
        for control in self.controls:
            yield control.features, 0


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
    controls: int = DIRECTIONS,
    null: Path | None = None,
    seed: int = 0,
) -> Asked:
    """The features of every SAE that have contexts, or `limit` of them drawn by `seed`, with a pack for each.

    `controls` features of each control stand beside them: random directions, and where there is a run on a model with
    random weights, `null` or one of the same recipe beside this one, those of its SAE; 0: none.

    Raises:
        UserError: the features cannot be found, the dialogues are too few to calibrate a judge, or `null` is no null.
    """
    ask = ask or Ask()
    stores = run.stores(ask)
    if limit and any(len(store) < min(limit, store.facts["n_live"]) for store in stores.values()):
        stores = run.stores(replace(ask, features=limit, rebuild=False))
    background = background_of(run, next(iter(stores.values())))
    judged = {
        name: [store.feature(i, contexts=n_contexts) for i in chosen(store.indices.tolist(), limit, seed)]
        for name, store in stores.items()
    }
    beside = _controls(run, stores, judged, controls, null, n_contexts)
    work = []
    for name, features in judged.items():
        pack = make_pack(background, features, n_contexts=n_contexts, planted=planted, nulls=nulls, seed=seed)
        work.append(Work(name, stores[name], features, pack, beside[name]))
    return Asked(run, background, tuple(work), n_contexts, seed)


def _controls(
    run: RunFeatures,
    stores: Mapping[str, FeatureStore],
    judged: Mapping[str, Sequence[Feature]],
    n: int,
    null: Path | None,
    n_contexts: int,
) -> dict[str, list[Control]]:
    found: dict[str, list[Control]] = {name: [] for name in stores}
    other = null_run(run.run, null) if n else None
    made = [direction_controls(run, stores, judged, n, n_contexts=n_contexts)] if n else []
    if other is not None:
        try:
            made.append(weight_controls(other, run, stores, judged, n, n_contexts=n_contexts))
        except UserError as problem:
            if null is not None:
                raise
            console.warn(f"{other.run.path} is left out as a null: {problem}")
    for controls in made:
        for name, control in controls.items():
            found[name].append(control)
    return found


def judge_features(
    run: RunFeatures,
    judge_for: Callable[[Background], Judge],
    *,
    ask: Ask | None = None,
    n_contexts: int = 20,
    limit: int = 0,
    planted: int = 4,
    nulls: int = 20,
    controls: int = DIRECTIONS,
    null: Path | None = None,
    seed: int = 0,
    repeats: int = 1,
) -> dict[str, dict[str, Any]]:
    """Verdicts on the features of every SAE that have contexts, or on `limit` of them drawn by `seed`; by SAE.

    With them goes the calibration of the judge: `planted` features for each number of deviating contexts, `nulls` of
    each kind, and controls (see `gather_work`). What is found is written to RUN/judge/SAE/JUDGE-N.json, N being
    `n_contexts`.

    Raises:
        UserError: the features cannot be found, or the dialogues are too few to calibrate the judge.
    """
    asked = gather_work(
        run,
        ask=ask,
        n_contexts=n_contexts,
        limit=limit,
        planted=planted,
        nulls=nulls,
        controls=controls,
        null=null,
        seed=seed,
    )
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
    n_contexts = asked.n_contexts
    with console.progress(f"judge {work.sae}", sum(len(some) for some, _ in work.rounds(repeats))) as advance:
        counted = _Counted(judge, advance)
        times = [list(counted.verdicts(work.features, n_contexts=n_contexts, repeat=r)) for r in range(repeats)]
        calibration = calibrate(counted, work.pack, work.controls, n_contexts=n_contexts)
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
    write_json(path, found)
    return found


@dataclass(frozen=True)
class _Counted:
    """A judge whose verdicts are counted as they come."""

    judge: Judge
    advance: Callable[[int], None]

    @property
    def name(self) -> str:
        return self.judge.name

    def verdicts(self, features: Iterable[Feature], *, n_contexts: int, repeat: int = 0) -> Iterator[Verdict]:
        for verdict in self.judge.verdicts(features, n_contexts=n_contexts, repeat=repeat):
            yield verdict
            self.advance(1)


def agreement(first: Sequence[Verdict], again: Sequence[Verdict]) -> dict[str, Any]:
    """How far two verdicts on the same features agree, where both have a score: exactly (rounded), and weighted."""
    pairs = whole_pairs([v.score for v in first], [v.score for v in again])
    value, between = kappa(pairs)
    return {"exact": share(a == b for a, b in pairs), "kappa": value, "kappa_interval": between}


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
        facts = read_object(path, f"delete it, `chatsae judge {run}` writes it anew", {"schema_version": int})
        version = facts["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(f"{path} has schema {version}, this chatsae reads {SCHEMA_VERSION}; delete it")
        found.append(facts)
    return found
