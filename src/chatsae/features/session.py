"""The features of a run directory: built when they are missing, read when they are there."""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.batch import TokenBatch
from chatsae.config import RunConfig
from chatsae.data.store.splits import split_tokens
from chatsae.errors import UserError
from chatsae.features.build import build, check_index, show
from chatsae.features.collect import Reading, gather
from chatsae.features.firings import digest
from chatsae.features.records import Options
from chatsae.features.store import FeatureStore
from chatsae.files import Lock
from chatsae.lm.load import LanguageModel, load_model
from chatsae.runs import Run
from chatsae.sae.base import SAE

DIALOGUES = 10_000
_SPLIT = "interpret"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is wanted of a run's features; None: as it is there, or the default."""

    dialogues: int | None = None
    features: int | None = None
    only: tuple[int, ...] = ()
    """Features that have to be among those with contexts."""
    contexts: int | None = None
    window: int | None = None
    one_per_dialogue: bool | None = None
    seed: int | None = None
    rebuild: bool = False

    def options(self, before: Options | None = None, there: Iterable[int] = ()) -> Options:
        """What is there, or the default, with what is asked for; features that are `there` need not be added."""
        names = ("features", "contexts", "window", "one_per_dialogue", "seed")
        asked: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if "contexts" in asked:
            asked["kept"] = max(Options().kept, asked["contexts"])
        before = before or Options()
        asked["also"] = tuple(sorted({*before.also, *self.only} - (set(there) - set(before.also))))
        return replace(before, **asked)


class RunFeatures:
    """The SAEs of a run, its model (loaded at first use) and what is known about their features.

    Raises:
        UserError: there is no run, or it has no SAE, or none of a name that was given.
    """

    def __init__(self, path: Path, names: Sequence[str] = ()) -> None:
        self.run = Run.read(path)
        self.folder = self.run.path / "features"
        there = {p.name: p for p in self.run.sae_directories()}
        for name in names:
            if name not in there:
                raise UserError(f"run {path} has no SAE {name!r}; it has {', '.join(there)}")
        self.saes = {name: SAE.load(there[name]) for name in there if not names or name in names}

    @cached_property
    def lm(self) -> LanguageModel:
        """With its head; the SAEs are moved to its device."""
        lm = load_model(self.run.config.model, head=True)
        for sae in self.saes.values():
            sae.to(lm.device)
        return lm

    @cached_property
    def reading(self) -> Reading:
        """How the model is read where no pass says it."""
        harvest = self.run.config.harvest
        return Reading.of(self.lm, harvest.token_budget, harvest.on_nan)

    def tokens(self, limit: int, tally: Counter[str] | None = None) -> TokenBatch:
        """The first dialogues that the run holds out for interpretation, rendered.

        Raises:
            UserError: they cannot be read, or there is none.
        """
        if limit not in self._tokens:
            self._tokens = {limit: interpretation_split(self.run.config, self.lm, limit, tally)}
        return self._tokens[limit]

    _tokens: dict[int, TokenBatch] = {}  # noqa: RUF012 - replaced, never changed

    def stores(self, ask: Ask | None = None) -> dict[str, FeatureStore]:
        """The stores under RUN/features, built over the interpretation split of the run's chat sources where missing.

        Where more features or other windows are asked for, the pass is not repeated. One that was interrupted goes on.

        Raises:
            UserError: a number cannot be, the dialogues cannot be read, or a store is of other weights.
        """
        ask = ask or Ask()
        if ask.dialogues is not None and ask.dialogues < 1:
            raise UserError(f"--dialogues must be at least 1, not {ask.dialogues}")
        for sae in self.saes.values():
            check_index(sae, *ask.only)
        found: dict[str, FeatureStore] = {}
        for name, sae in self.saes.items():
            if not ask.rebuild and (store := _read(self.folder / name, sae)) is not None:
                found[name] = store
        missing = [name for name in self.saes if name not in found or not _passes(found[name], ask)]
        other = [name for name in found if name not in missing and _asks_more(found[name], ask)]
        if missing or other:
            self.folder.mkdir(exist_ok=True)
            lock = Lock(self.folder, "feature directory")
            try:
                found |= self._make(ask, missing, {name: found[name] for name in other})
            finally:
                lock.close()
        return {name: found[name] for name in self.saes}

    def _make(self, ask: Ask, missing: Sequence[str], shown: Mapping[str, FeatureStore]) -> dict[str, FeatureStore]:
        tally: Counter[str] = Counter()
        made: dict[str, FeatureStore] = {}
        lm, limit, state = self.lm, ask.dialogues or DIALOGUES, self.folder / ".pass"
        if missing:
            facts = {"split": _SPLIT, "dialogues_asked": limit, "max_length": self.run.config.data.max_length}
            saes = {name: self.saes[name] for name in missing}
            tokens = self.tokens(limit, tally)
            options = ask.options()
            made = build(saes, lm, tokens, options, reading=self.reading, folder=state, facts=facts, tally=tally)
        for name, store in shown.items():
            tokens = self.tokens(store.facts["dialogues_asked"], tally)
            made[name] = _shown_anew(self.saes[name], lm, tokens, store, ask, tally)
        for name, store in made.items():
            store.save(self.folder / name)
        if missing:
            shutil.rmtree(state, ignore_errors=True)
        for reason, n in tally.most_common():
            console.say(f"{n:,} × {reason}")
        return made


def feature_stores(path: Path, ask: Ask | None = None, names: Sequence[str] = ()) -> dict[str, FeatureStore]:
    """The stores of a run's SAEs; see `RunFeatures.stores`."""
    return RunFeatures(path, names).stores(ask)


def interpretation_split(
    config: RunConfig, lm: LanguageModel, limit: int, tally: Counter[str] | None = None
) -> TokenBatch:
    """The first dialogues that the run holds out for interpretation, rendered.

    Raises:
        UserError: they cannot be read, or there is none.
    """
    stream = split_tokens(config.data, lm.tokenizer, _SPLIT, sources=config.eval.sources, limit=limit, tally=tally)
    return gather(stream, limit)


def _read(path: Path, sae: SAE) -> FeatureStore | None:
    """The store of an SAE, or None where there is none.

    Raises:
        UserError: it is damaged, or of other weights.
    """
    if not path.exists():
        return None
    store = FeatureStore.load(path)
    if store.facts["sae_sha256"] != (now := digest(sae)):
        raise UserError(
            f"{path} is of other weights (sha256 {store.facts['sae_sha256'][:12]}) than the SAE has now ({now[:12]}); "
            "`chatsae features RUN --rebuild` makes it anew"
        )
    return store


def _options(store: FeatureStore) -> Options:
    saved: dict[str, Any] = store.facts["options"]
    lists: dict[str, Any] = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
    return Options(**(saved | lists))


def _passes(store: FeatureStore, ask: Ask) -> bool:
    """Whether the pass behind a store is the one asked for."""
    before, wanted = _options(store), ask.options(_options(store))
    same = all(getattr(before, n) == getattr(wanted, n) for n in ("kept", "sampled", "one_per_dialogue", "seed"))
    return same and ask.dialogues in (None, store.facts["dialogues_asked"])


def _asks_more(store: FeatureStore, ask: Ask) -> bool:
    return ask.options(_options(store), store.indices.tolist()) != _options(store)


def _shown_anew(
    sae: SAE, lm: LanguageModel, tokens: TokenBatch, store: FeatureStore, ask: Ask, tally: Counter[str]
) -> FeatureStore:
    """The store with other windows or features, from the pass that is kept in it.

    Raises:
        UserError: the dialogues are not those of that pass.
    """
    name = store.name
    facts = {key: store.facts[key] for key in ("split", "dialogues_asked", "max_length", "sampled_tokens")}
    made = show(
        {name: sae},
        lm,
        tokens,
        ask.options(_options(store)),
        kept={name: store.kept},
        reading=Reading(**store.facts["reading"]),
        facts=facts,
        tally=tally,
    )[name]
    if made.facts["tokens_sha256"] != store.facts["tokens_sha256"]:
        raise UserError(
            f"the dialogues are not those that the features of {name} were built from; "
            "`chatsae features RUN --rebuild` builds them anew"
        )
    return made


def describe(store: FeatureStore) -> str:
    """A line about a store, for people."""
    facts = store.facts
    return (
        f"{facts['sae']}: {len(store):,} of {facts['n_live']:,} live features (d_sae {facts['d_sae']:,}) "
        f"with contexts, over {facts['n_dialogues']:,} dialogues, {facts['n_tokens']:,} tokens of {facts['model']}"
    )
