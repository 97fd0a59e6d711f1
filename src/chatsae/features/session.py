"""The features of a run directory: built when they are missing, read when they are there."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from chatsae.features.collect import Reading, gather, pass_names, tokens_digest
from chatsae.features.firings import digest
from chatsae.features.random_directions import DIRECTIONS, RANDOM, random_directions, saved_directions
from chatsae.features.records import Options
from chatsae.features.store import FeatureStore
from chatsae.files import Lock
from chatsae.lm.load import LanguageModel, load_model
from chatsae.run_model import trained_model
from chatsae.runs import Run
from chatsae.sae.base import SAE

DIALOGUES = 10_000
_SPLIT = "interpret"
_PASS = ("kept", "sampled", "one_per_dialogue", "seed")  # options that a pass follows from


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
    directions: int = DIRECTIONS
    """Random directions that are read in the same pass; 0: none."""
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
        lm = load_model(trained_model(self.run), head=True)
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
            with self._locked():
                found |= self._make(ask, missing, {name: found[name] for name in other})
        elif (self.folder / ".pass").exists():
            with self._locked():
                self._forget_finished_pass()
        return {name: found[name] for name in self.saes}

    def random_stores(self, stores: Mapping[str, FeatureStore], n: int = DIRECTIONS) -> dict[str, FeatureStore]:
        """The stores of `n` or more random directions beside SAEs, from the same dialogues and with the same windows.

        They lie in RUN/features/random, made in the pass of the SAE's store, or where they are missing in their own.

        Raises:
            UserError: the dialogues cannot be read or are not those of the stores, or a directory is damaged.
        """
        found: dict[str, FeatureStore] = {}
        missing: dict[tuple[int, Options], list[str]] = {}
        for name, store in stores.items():
            wanted = replace(_options(store), features=0, also=())
            there = self._random_store(name, store, n)
            if there is None:
                missing.setdefault((store.facts["dialogues_asked"], wanted), []).append(name)
            else:
                found[name] = there[1] if _options(there[1]) == wanted else self._windows_anew(name, *there, wanted)
        for (limit, options), names in missing.items():
            with self._locked():
                found |= self._pass(names, limit, options, n, only_random=True)[1]
        for name, store in stores.items():
            if found[name].facts["tokens_sha256"] != store.facts["tokens_sha256"]:
                raise _other_dialogues(name)
        return {name: found[name] for name in stores}

    def release(self) -> None:
        """Let go of the model; it is loaded again where it is needed."""
        for name in ("lm", "reading"):
            self.__dict__.pop(name, None)

    def _make(self, ask: Ask, missing: Sequence[str], shown: Mapping[str, FeatureStore]) -> dict[str, FeatureStore]:
        made: dict[str, FeatureStore] = {}
        if missing:
            made = self._pass(missing, ask.dialogues or DIALOGUES, ask.options(), ask.directions)[0]
        for name, store in shown.items():
            tally: Counter[str] = Counter()
            tokens = self.tokens(store.facts["dialogues_asked"], tally)
            options = ask.options(_options(store))
            made[name] = _shown_anew(self.saes[name], self.lm, tokens, store, options, tally)
            made[name].save(self.folder / name)
            _tell(tally)
        return made

    def _pass(
        self, names: Sequence[str], limit: int, options: Options, n: int, *, only_random: bool = False
    ) -> tuple[dict[str, FeatureStore], dict[str, FeatureStore]]:
        """The stores of SAEs, and those of `n` random directions beside each, from one pass; or the latter only."""
        tally: Counter[str] = Counter()
        tokens, state = self.tokens(limit, tally), self.folder / ".pass"
        beside = self._directions(names, tokens, n) if n else {}
        made = build(
            {} if only_random else {name: self.saes[name] for name in names},
            self.lm,
            tokens,
            options,
            reading=self.reading,
            folder=state,
            facts={"split": _SPLIT, "dialogues_asked": limit, "max_length": self.run.config.data.max_length},
            beside={sae.spec.name: sae for sae in beside.values()},
            tally=tally,
        )
        random = {name: made.pop(sae.spec.name) for name, sae in beside.items()}
        for name, store in random.items():
            store.save(self._random(name) / "store")
        for name, store in made.items():  # last, so that where an SAE's store is, those of its directions are too
            store.save(self.folder / name)
        shutil.rmtree(state, ignore_errors=True)
        _tell(tally)
        return made, random

    def _forget_finished_pass(self) -> None:
        """Remove the state of a pass all of whose stores were written before a kill, or that nothing can go on from."""
        state = self.folder / ".pass"
        if (state / "state.json").is_file():
            since = (state / "state.json").stat().st_mtime_ns
            for name in pass_names(state):
                sae = name.removesuffix(RANDOM)
                store = self.folder / sae if name == sae else self._random(sae) / "store"
                if not store.is_dir() or (store / "facts.json").stat().st_mtime_ns < since:
                    return
        shutil.rmtree(state, ignore_errors=True)

    def _directions(self, names: Sequence[str], tokens: TokenBatch, n: int) -> dict[str, SAE]:
        """Random directions beside SAEs: those that were saved, with which a pass goes on, or new ones."""
        found: dict[str, SAE] = {}
        for name in names:
            saved = saved_directions(self._random(name) / "sae", self.saes[name], tokens_digest(tokens), n)
            if saved is not None:
                found[name] = saved.to(self.lm.device)
        if new := {name: self.saes[name] for name in names if name not in found}:
            for name, sae in random_directions(new, self.lm, tokens, reading=self.reading, n=n).items():
                sae.save(self._random(name) / "sae")
                found[name] = sae
        return found

    def _random(self, name: str) -> Path:
        return self.folder / "random" / name

    def _random_store(self, name: str, store: FeatureStore, n: int) -> tuple[SAE, FeatureStore] | None:
        """The random directions beside an SAE and their store, if it is from the same pass as the SAE's."""
        path, same = self._random(name), ("tokens_sha256", *_PASS)
        saved = saved_directions(path / "sae", self.saes[name], store.facts["tokens_sha256"], n)
        if saved is None or not (path / "store").exists():
            return None
        found = FeatureStore.load(path / "store")
        if found.facts["sae_sha256"] != digest(saved) or any(found.facts[k] != store.facts[k] for k in same):
            return None
        return saved, found

    def _windows_anew(self, name: str, sae: SAE, store: FeatureStore, options: Options) -> FeatureStore:
        tally: Counter[str] = Counter()
        tokens = self.tokens(store.facts["dialogues_asked"], tally)
        with self._locked():
            made = _shown_anew(sae.to(self.lm.device), self.lm, tokens, store, options, tally)
            made.save(self._random(name) / "store")
        _tell(tally)
        return made

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(exist_ok=True)
        lock = Lock(self.folder, "feature directory")
        try:
            yield
        finally:
            lock.close()


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
    same = all(getattr(before, n) == getattr(wanted, n) for n in _PASS)
    return same and ask.dialogues in (None, store.facts["dialogues_asked"])


def _asks_more(store: FeatureStore, ask: Ask) -> bool:
    return ask.options(_options(store), store.indices.tolist()) != _options(store)


def _shown_anew(
    sae: SAE, lm: LanguageModel, tokens: TokenBatch, store: FeatureStore, options: Options, tally: Counter[str]
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
        options,
        kept={name: store.kept},
        reading=Reading(**store.facts["reading"]),
        facts=facts,
        tally=tally,
    )[name]
    if made.facts["tokens_sha256"] != store.facts["tokens_sha256"]:
        raise _other_dialogues(name)
    return made


def _other_dialogues(name: str) -> UserError:
    return UserError(
        f"the dialogues are not those that the features of {name} were built from; "
        "`chatsae features RUN --rebuild` builds them anew"
    )


def _tell(tally: Counter[str]) -> None:
    for reason, n in tally.most_common():
        console.say(f"{n:,} × {reason}")


def describe(store: FeatureStore) -> str:
    """A line about a store, for people."""
    facts = store.facts
    return (
        f"{facts['sae']}: {len(store):,} of {facts['n_live']:,} live features (d_sae {facts['d_sae']:,}) "
        f"with contexts, over {facts['n_dialogues']:,} dialogues, {facts['n_tokens']:,} tokens of {facts['model']}"
    )
