"""The features of a run as the page shows them: stores, scores and token samples, made where they are missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatsae import console
from chatsae.errors import UserError
from chatsae.features.firings import digest
from chatsae.features.judging import judge_features, read_judgements
from chatsae.features.patterns.judge import PatternJudge
from chatsae.features.session import Ask, RunFeatures
from chatsae.features.store import FeatureStore
from chatsae.page.named import Named, named_features, stored_named
from chatsae.page.pack import SAMPLED, Dialogues, firing_histograms, packed_feature
from chatsae.page.sample import stored_sample, token_samples
from chatsae.page.special import special_tokens
from chatsae.page.steered import steered_features, steering
from chatsae.runs import Run

JUDGED = 20
"""Contexts that the pattern judge looks at."""

_DEMO_DIALOGUES = 300  # of the bundled model: a page in under two minutes


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the page is to show, and whether what is missing may be made."""

    features: int = 512
    """Of each SAE, at most."""
    contexts: int = 20
    saes: tuple[str, ...] = ()
    """SAEs with features; none: of one run all, of several the first of each."""
    dialogues: int | None = None
    build: bool = True

    def __post_init__(self) -> None:
        for name in ("features", "contexts"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")


def explored(run: Run, names: Sequence[str], wanted: Wanted, dialogues: Dialogues) -> dict[str, dict[str, Any]]:
    """Features, scores, token samples, special tokens and steering of some SAEs of a run."""
    session = RunFeatures(run.path, names)
    limit = wanted.dialogues or dialogues_of(run)
    special = special_tokens(run, names, dialogues=limit, build=wanted.build)  # first: it loads the model by itself
    if wanted.build:
        stores = _stores(session, wanted)
        samples: dict[str, Any] = dict(token_samples(session, next(iter(stores.values())).facts["dialogues_asked"]))
    else:
        stores = {n: FeatureStore.load(p) for n in names if (p := session.folder / n).exists()}
        samples = {n: stored_sample(run.path / "page" / f"{n}.json", sae) for n, sae in session.saes.items()}
    found = {}
    for name in names:
        own = {"sample": samples.get(name), "special": special.get(name), "steering": steering(run, name)}
        found[name] = unexplored(run, name) | own
        if name in stores:
            sha256 = digest(session.saes[name])
            if stores[name].facts["sae_sha256"] != sha256:
                console.warn(f"{session.folder / name} is of other weights than {name} has now; it is left out")
                continue
            found[name] |= _features(session, stores[name], _named(own), wanted, dialogues)
    return found


def _named(view: Mapping[str, Any]) -> list[int]:
    """The features that an SAE's tables of special tokens and steering name, ascending."""
    rows = (view["special"] or {"rows": []})["rows"]
    return sorted({f[0] for row in rows for f in row["features"]} | set(steered_features(view["steering"])))


def _stores(session: RunFeatures, wanted: Wanted) -> dict[str, FeatureStore]:
    """The stores of a run; those that are missing, and the pattern judge's scores where there are none, are made."""
    run, names = session.run, list(session.saes)
    missing = [name for name in names if not (session.folder / name).exists()]
    if missing:
        ask = Ask(
            dialogues=wanted.dialogues or dialogues_of(run),
            features=wanted.features,
            contexts=max(wanted.contexts, JUDGED),
        )
        _part(session, missing).stores(ask)
    stores = session.stores()
    unjudged = [name for name in names if not _judgements(run, stores[name])]
    if unjudged:
        try:
            judge_features(_part(session, unjudged), PatternJudge, n_contexts=JUDGED)
        except UserError as error:
            console.warn(f"{run.path}: the features are not scored: {error}")
    return stores


def _part(session: RunFeatures, names: Sequence[str]) -> RunFeatures:
    """Some SAEs of a run, with the model that is loaded already if they are all of them."""
    return session if set(names) == set(session.saes) else RunFeatures(session.run.path, names)


def dialogues_of(run: Run) -> int | None:
    """How many dialogues features are found on where no number is asked for; None: as many as `chatsae features`."""
    return _DEMO_DIALOGUES if run.config.model.name == "demo" else None


def _judgements(run: Run, store: FeatureStore) -> list[dict[str, Any]]:
    """The results of the judges that looked at these very features."""
    same = ("sae_sha256", "tokens_sha256")
    found = read_judgements(run.path, store.name)
    return [j for j in found if all(j["store"].get(key) == store.facts[key] for key in same)]


def _features(
    session: RunFeatures, store: FeatureStore, named: Sequence[int], wanted: Wanted, dialogues: Dialogues
) -> dict[str, Any]:
    """Features that were drawn, those that are `named` beside them, and what the judges say of them."""
    run, judged = session.run, _judgements(session.run, store)
    verdicts = [{v["feature"]: v for v in facts["verdicts"]} for facts in judged]
    drawn = store.indices[: wanted.features].tolist()
    extra = [index for index in named if 0 <= index < len(store.table) and index not in set(drawn)]
    beside = _beside(session, store, extra, wanted)
    if beside is not None:
        at = [i for i, facts in enumerate(judged) if (facts["judge"], facts["n_contexts"]) == ("pattern", JUDGED)]
        for i in at:
            verdicts[i] = {**beside.verdicts, **verdicts[i]}
    rows = []
    with console.progress(f"pack {run.path.name} {store.name}", len(drawn) + len(extra)) as advance:
        for index in drawn + extra:
            own = beside.store if beside is not None and index in beside.store.indices else store
            feature = own.feature(index, contexts=wanted.contexts, sampled=SAMPLED)
            found = [verdict.get(index) for verdict in verdicts]
            rows.append(packed_feature(feature, dialogues, store.facts["tokens_sha256"], found))
            advance(1)
    facts = store.facts
    keys = ("n_dialogues", "n_tokens", "n_live", "d_sae", "split", "dialogues_asked", "tokens_sha256", "sae_sha256")
    return {
        "store": {key: facts[key] for key in keys} | {"window": facts["options"]["window"]},
        "parts": facts["parts"],
        "part_tokens": facts["tokens"],
        "firing": firing_histograms(store),
        "judges": [_judge(facts) for facts in judged],
        "features": rows,
        "drawn": len(drawn),
    }


def _beside(session: RunFeatures, store: FeatureStore, features: Sequence[int], wanted: Wanted) -> Named | None:
    if wanted.build:
        return named_features(session, store, features, contexts=wanted.contexts, judged=JUDGED)
    return stored_named(session.run.path, store)


def _judge(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a judge's file says beside the verdicts on single features."""
    calibration = dict(facts["calibration"])
    controls = calibration.get("controls", {})
    calibration["controls"] = {
        kind: {key: value for key, value in control.items() if key != "verdicts"} for kind, control in controls.items()
    }
    keys = ("judge", "n_contexts", "summary")
    return {key: facts[key] for key in keys} | {"calibration": calibration, "agreement": facts.get("agreement", [])}


def unexplored(run: Run, name: str) -> dict[str, Any]:
    """An SAE without what `explored` finds."""
    return {
        "store": None,
        "sample": None,
        "special": None,
        "steering": None,
        "judges": [],
        "features": None,
        "how": f"chatsae report {run.path} --sae {name}",
    }
