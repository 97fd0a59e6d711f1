"""Features that the page names elsewhere (special tokens, steering) beside those that were drawn: their contexts.

They lie under RUN/page, not RUN/features: the shares of scores are of features drawn at random, and these are not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.errors import UserError
from chatsae.features.build import show
from chatsae.features.collect import Reading
from chatsae.features.judging import background_of
from chatsae.features.patterns.judge import PatternJudge
from chatsae.features.records import Options
from chatsae.features.session import RunFeatures
from chatsae.features.store import FeatureStore
from chatsae.files import damaged, read_json, write_json


@dataclass(frozen=True)
class Named:
    """Contexts of some features, and what the pattern judge makes of them."""

    store: FeatureStore
    verdicts: Mapping[int, Mapping[str, Any]]

    def covers(self, features: Iterable[int], contexts: int) -> bool:
        """Whether it holds these features, with as many contexts or all that are kept."""
        options = self.store.facts["options"]
        enough = options["contexts"] >= min(contexts, options["kept"])
        return enough and set(features) <= set(self.store.indices.tolist())


def named_features(
    session: RunFeatures, store: FeatureStore, features: Iterable[int], *, contexts: int, judged: int
) -> Named | None:
    """Those of `features` that have no contexts in `store`; None where all have, or they cannot be made (a warning).

    Made from the pass that `store` keeps, without a second one, and kept in RUN/page/SAE-named.

    Args:
        contexts: of each feature that are wanted.
        judged: contexts that the pattern judge looks at.
    """
    lacking = sorted({index for index in features if 0 <= index < len(store.table)} - set(store.indices.tolist()))
    if not lacking:
        return None
    there = stored_named(session.run.path, store)
    if there is not None and there.covers(lacking, contexts):
        return there
    try:
        return _made(session, store, lacking, contexts, judged)
    except UserError as error:
        console.warn(f"{session.run.path}: features of the page's tables are without contexts: {error}")
        return None


def stored_named(run: Path, store: FeatureStore) -> Named | None:
    """What RUN/page/SAE-named holds of these weights and dialogues, or None.

    Raises:
        UserError: it is damaged.
    """
    folder = _folder(run, store.name)
    if not (folder / "verdicts.json").is_file():
        return None
    own = FeatureStore.load(folder)
    if any(own.facts[key] != store.facts[key] for key in ("sae_sha256", "tokens_sha256")):
        return None
    advice = f"delete {folder}, `chatsae report` writes it anew"
    verdicts = read_json(folder / "verdicts.json", advice)
    try:
        return Named(own, {verdict["feature"]: verdict for verdict in verdicts})
    except (KeyError, TypeError) as error:
        raise damaged(folder / "verdicts.json", error, advice) from None


def _made(session: RunFeatures, store: FeatureStore, features: list[int], contexts: int, judged: int) -> Named:
    name, lm = store.name, session.lm
    saved: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in store.facts["options"].items()}
    contexts = min(max(contexts, judged), saved["kept"])
    options = replace(Options(**saved), features=tuple(features), also=(), contexts=contexts)
    facts = {key: store.facts[key] for key in ("split", "dialogues_asked", "max_length", "sampled_tokens")}
    tokens = session.tokens(store.facts["dialogues_asked"])
    made = show(
        {name: session.saes[name]},
        lm,
        tokens,
        options,
        kept={name: store.kept},
        reading=Reading(**store.facts["reading"]),
        facts=facts,
    )[name]
    if made.facts["tokens_sha256"] != store.facts["tokens_sha256"]:
        raise UserError(f"the dialogues are not those that the features of {name} were built from")
    judge = PatternJudge(background_of(session, store))
    shown = [made.feature(index, contexts=judged) for index in features]
    verdicts = [asdict(verdict) for verdict in judge.verdicts(shown, n_contexts=judged)]
    folder = _folder(session.run.path, name)
    replace(made, kept={}).save(folder)  # the pass is in RUN/features
    write_json(folder / "verdicts.json", verdicts)
    return Named(made, {verdict["feature"]: verdict for verdict in verdicts})


def _folder(run: Path, sae: str) -> Path:
    return run / "page" / f"{sae}-named"
