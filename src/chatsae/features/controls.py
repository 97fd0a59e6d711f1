"""What an SAE's scores have to beat: random directions of the same stream, and an SAE of a model that learned nothing.

Both are judged from contexts in the same dialogues, by the same judge, beside the SAE's features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chatsae import console
from chatsae.errors import UserError
from chatsae.features.records import Feature
from chatsae.features.scores import ABOVE_CHANCE, distribution, reasons, scores_of, share
from chatsae.features.session import Ask, RunFeatures
from chatsae.features.store import FeatureStore
from chatsae.features.verdict import Judge
from chatsae.files import shared_name
from chatsae.recipe import differences, load_recipe
from chatsae.runs import Run

Kind = Literal["random_directions", "random_weights"]

_QUANTILES = (0.1, 0.5, 0.9)
_SAME_MODEL = tuple(f"model.{name}" for name in ("name", "layers", "layer_path", "revision"))


@dataclass(frozen=True)
class Control:
    """Features that stand beside those of an SAE.

    what: how they were made, in a sentence. density: quantiles (0.1, 0.5, 0.9) over the SAE's features that are
    judged, and over these. run: whose SAE they are from, where it is another's.
    """

    kind: Kind
    what: str
    features: Sequence[Feature]
    density: Mapping[str, list[float] | None]
    run: str | None = None

    def judged(self, judge: Judge, n_contexts: int) -> dict[str, Any]:
        """What a judge makes of them, as JSON holds it."""
        verdicts = list(judge.verdicts(self.features, n_contexts=n_contexts))
        scores = scores_of(verdicts)
        return {
            "what": self.what,
            "run": self.run,
            "summary": distribution(scores, reasons(verdicts)),
            "false_positives": share(score > ABOVE_CHANCE for score in scores),
            "density": dict(self.density),
            "verdicts": [asdict(verdict) for verdict in verdicts],
        }


def direction_controls(
    run: RunFeatures,
    stores: Mapping[str, FeatureStore],
    judged: Mapping[str, Sequence[Feature]],
    n: int,
    *,
    n_contexts: int,
) -> dict[str, Control]:
    """The first `n` random directions beside each SAE (`chatsae.features.random_directions`).

    Raises:
        UserError: see `RunFeatures.random_stores`.
    """
    found = {}
    for name, store in run.random_stores(stores, max(n, Ask().directions)).items():
        features = [store.feature(i, contexts=n_contexts) for i in range(n)]
        what = (
            f"{n} random unit directions of the residual stream after layer {store.facts['layer']}, each with a "
            "threshold at which it fires as often as a feature of the SAE"
        )
        found[name] = Control("random_directions", what, features, _densities(judged[name], features))
    return found


def null_run(run: Run, path: Path | None = None) -> RunFeatures | None:
    """The run of the same recipe on a model with random weights: the one at `path`, or one beside `run`, or None.

    Raises:
        UserError: the run at `path` has other settings than this one's with random weights.
    """
    if path is not None:
        config = Run.read(path).config
        if config.model.random_weights is None:
            raise UserError(f"--null-run {path}: its recipe has no model.random_weights; it is no null")
        other = differences(replace(config, model=replace(config.model, random_weights=None)), run.config)
        if wrong := [line for line in other if line.split(":")[0] in _SAME_MODEL]:
            raise UserError(f"--null-run {path} is of another model than {run.path}: {'; '.join(wrong)}")
        if other:
            console.warn(f"{path} differs from {run.path} in more than its weights: {'; '.join(other)}")
        return RunFeatures(path)
    for beside in _siblings(run):
        try:
            return RunFeatures(beside)
        except UserError as problem:
            console.say(f"{beside} could be a null, but: {problem}")
    return None


def weight_controls(
    null: RunFeatures,
    run: RunFeatures,
    stores: Mapping[str, FeatureStore],
    judged: Mapping[str, Sequence[Feature]],
    n: int,
    *,
    n_contexts: int,
) -> dict[str, Control]:
    """`n` features of the SAE of the same name on a model with random weights, from the same dialogues.

    Raises:
        UserError: it has none of these SAEs, or finds other dialogues.
    """
    shared = [name for name in stores if name in null.saes]
    if not shared:
        raise UserError(f"{null.run.path} has none of the SAEs {', '.join(stores)}; it has {', '.join(null.saes)}")
    run.release()  # two models may be more than fits
    asks: dict[Ask, list[str]] = {}
    for name in shared:
        asks.setdefault(_same_ask(stores[name]), []).append(name)
    own: dict[str, FeatureStore] = {}
    for ask, names in asks.items():
        part = RunFeatures(null.run.path, names)
        own |= part.stores(ask)
        part.release()
    return {name: _weight_control(null, run, stores[name], own[name], judged[name], n, n_contexts) for name in shared}


def _weight_control(
    null: RunFeatures,
    run: RunFeatures,
    store: FeatureStore,
    own: FeatureStore,
    judged: Sequence[Feature],
    n: int,
    n_contexts: int,
) -> Control:
    if own.facts["tokens_sha256"] != store.facts["tokens_sha256"]:
        raise UserError(
            f"{null.folder / own.name} is of other dialogues than {run.folder / store.name}: the runs differ in data, "
            f"or `chatsae features {null.run.path} --rebuild --dialogues {store.facts['dialogues_asked']}` is needed"
        )
    indices = np.sort(np.random.default_rng(0).permutation(own.indices)[:n])
    features = [own.feature(i, contexts=n_contexts) for i in indices.tolist()]
    what = (
        f"{len(features)} features of the SAE of the same name in {shared_name(str(null.run.path))}, trained on the "
        f"same model with random weights (seed {null.run.config.model.random_weights})"
    )
    return Control("random_weights", what, features, _densities(judged, features), shared_name(str(null.run.path)))


def _same_ask(store: FeatureStore) -> Ask:
    options = store.facts["options"]
    names = ("contexts", "window", "one_per_dialogue", "seed")
    own: dict[str, Any] = {name: options[name] for name in names}
    return Ask(dialogues=store.facts["dialogues_asked"], directions=0, **own)


def _siblings(run: Run) -> Iterator[Path]:
    """Runs beside this one with the same recipe but for random weights."""
    if run.config.model.random_weights is not None:
        return
    for path in sorted(run.path.resolve().parent.glob("*/config.yaml")):
        try:
            config = load_recipe(path)
        except UserError:
            continue  # not a run of this version: nothing that was asked for
        own = replace(config, model=replace(config.model, random_weights=None))
        if config.model.random_weights is not None and own == run.config:
            yield path.parent


def _densities(features: Sequence[Feature], control: Sequence[Feature]) -> dict[str, list[float] | None]:
    both = {"sae": features, "control": control}
    return {
        key: np.quantile([f.density for f in some], _QUANTILES).tolist() if some else None for key, some in both.items()
    }
