"""`chatsae export`: the features or the evaluation of a run, in the formats of other tools. Nothing is sent."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from chatsae import console
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.exporting import check_replaceable, directory, identifier, listed, public, write_json
from chatsae.features.collect import Reading
from chatsae.features.export import delphi, neuronpedia, saebench, saedashboard
from chatsae.features.export.subject import Explanation, Names, Subject
from chatsae.features.judging import chosen, read_judgements
from chatsae.features.session import RunFeatures
from chatsae.features.store import FeatureStore
from chatsae.lm.facts import planning_facts
from chatsae.run_model import trained_model
from chatsae.runs import Run

Format = Literal["neuronpedia", "neuronpedia-bulk", "saedashboard", "delphi", "saebench"]

_WRITERS: dict[str, Callable[[Subject, Path], None]] = {
    "neuronpedia": neuronpedia.write_upload,
    "neuronpedia-bulk": neuronpedia.write_bulk,
    "saedashboard": saedashboard.write,
}
_LEAST_SCORE = 2
"""Below it the judge saw no pattern, so that there is nothing to explain."""
_COLUMNS = (Column("SAE"), Column("features"), Column("files"), Column("MB"), Column("directory"))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is exported, and the ids it gets; empty ones are made of the run."""

    format: Format
    sae: str | None = None
    out: Path | None = None
    features: int = 0
    """0: all that have contexts."""
    model_id: str = ""
    set_name: str = ""
    creator_id: str = ""


def export(path: Path, wanted: Wanted) -> tuple[list[dict[str, Any]], str]:
    """What was written, by SAE, as JSON holds it and as a text table; features are built where they are missing.

    Raises:
        UserError: there is no run or no such SAE, its features or its report cannot be had, an id cannot be, or the
            directory holds something else.
    """
    if wanted.features < 0:
        raise UserError(f"--features must be at least 0, not {wanted.features}")
    when = datetime.now(UTC)
    written = _evaluation(path, wanted, when) if wanted.format == "saebench" else _features(path, wanted, when)
    rows = [
        {"SAE": facts["sae"], "directory": facts["directory"], "features": facts.get("features")}
        | {"files": len(facts["files"]), "MB": sum(facts["files"].values()) / 1e6}
        for facts in written
    ]
    for facts in written:
        for reason, n in facts["left_out"].items():
            console.say(f"{facts['sae']}: {n:,} × {reason}")
    return written, console.table(f"Exported as {wanted.format}", _COLUMNS, rows)


def _evaluation(path: Path, wanted: Wanted, when: datetime) -> list[dict[str, Any]]:
    for flag, value in (("--features", wanted.features), ("--creator-id", wanted.creator_id)):
        if value:
            raise UserError(f"{flag}: an evaluation has none; leave it out with --format saebench")
    run = Run.read(path)
    there = {p.name: p for p in run.sae_directories()}
    if wanted.sae is not None and wanted.sae not in there:
        raise UserError(f"run {path} has no SAE {wanted.sae!r}; it has {', '.join(there)}")
    names = list(there) if wanted.sae is None else [wanted.sae]
    targets = {name: _out(path, wanted) / name for name in names}
    for target in targets.values():
        check_replaceable(target)
    report, dataset = saebench.read_report(path / "report.json"), _dataset(run)
    results = {
        name: saebench.result(
            report, run, there[name], release=_names(run, name, wanted).set_name, dataset=dataset, when=when
        )
        for name in names
    }
    written = []
    for name, result in results.items():
        unknown = len(result["eval_result_unstructured"]["unknown"])
        left_out = {f"figures that the report does not hold, written as {saebench.UNKNOWN}": unknown} if unknown else {}
        facts: dict[str, Any] = {"format": wanted.format, "sae": name, "left_out": left_out}
        with directory(targets[name], facts) as folder:
            write_json(folder / f"{name}_eval_results.json", result)
        written.append(listed(targets[name], facts))
    return written


def _features(path: Path, wanted: Wanted, when: datetime) -> list[dict[str, Any]]:
    run = RunFeatures(path, () if wanted.sae is None else (wanted.sae,))
    names = {name: _names(run.run, name, wanted) for name in run.saes}
    sources = Counter((each.model_id, each.source(run.saes[name].spec.layer)) for name, each in names.items())
    if wanted.format != "delphi" and max(sources.values()) > 1:
        raise UserError("--set-name: several SAEs of one layer cannot have one name; choose one of them with --sae")
    targets = {name: _target(path, wanted, name, names[name], sae.spec.layer) for name, sae in run.saes.items()}
    for target in targets.values():
        check_replaceable(target)
    stores = _with_contexts(path, run.stores(), wanted.features)
    written = []
    for name, store in stores.items():
        tally: Counter[str] = Counter()
        subject = Subject(
            store=store,
            sae=run.saes[name],
            names=names[name],
            features=tuple(chosen(store.indices.tolist(), wanted.features, 0)),
            dataset=_dataset(run.run),
            when=when,
            explanations=_explanations(path, name, str(store.facts["sae_sha256"]), tally),
            method=run.run.config.data.method,
            n_layers=_n_layers(run.run, tally) if wanted.format == "neuronpedia-bulk" else None,
            tally=tally,
        )
        written.append(_write(run, subject, wanted.format, targets[name]))
    return written


def _with_contexts(path: Path, stores: Mapping[str, FeatureStore], asked: int) -> dict[str, FeatureStore]:
    """The stores that can be exported; one whose features are all dead is left out, and said.

    Raises:
        UserError: there is none, or more features are asked for than one has.
    """
    found = {name: store for name, store in stores.items() if len(store)}
    empty = [name for name in stores if name not in found]
    if not found:
        raise UserError(f"no feature of {', '.join(empty)} has contexts, since none fired on the dialogues")
    for name, store in found.items():
        if asked > len(store):
            raise UserError(
                f"--features: {asked} asked for, but {len(store)} of {name} have contexts; "
                f"`chatsae features {path} --features {asked}` makes them"
            )
    if empty:
        console.warn(f"left out, since none of their features fired on the dialogues: {', '.join(empty)}")
    return found


def _target(path: Path, wanted: Wanted, name: str, names: Names, layer: int) -> Path:
    """The directory of an SAE; delphi's tells SAEs by their name in the run, the others by their ids."""
    out = _out(path, wanted)
    return out / name if wanted.format == "delphi" else out / names.model_id / names.source(layer)


def _write(run: RunFeatures, subject: Subject, form: Format, target: Path) -> dict[str, Any]:
    store = subject.store
    facts: dict[str, Any] = {"format": form, "sae": store.name, "features": len(subject.features)}
    facts["sae_sha256"] = store.facts["sae_sha256"]
    facts["left_out"] = subject.tally  # counted while the directory is written
    if form == "delphi":
        lm, tokens = run.lm, run.tokens(store.facts["dialogues_asked"])
        with directory(target, facts) as folder:
            delphi.write(
                subject.sae,
                lm,
                tokens,
                subject.features,
                folder,
                reading=Reading(**store.facts["reading"]),
                dataset=subject.dataset,
                split=store.facts["split"],
                tally=subject.tally,
            )
    else:
        with directory(target, facts) as folder:
            _WRITERS[form](subject, folder)
    return listed(target, facts)


def _out(path: Path, wanted: Wanted) -> Path:
    return wanted.out or path / "exports" / wanted.format


def _names(run: Run, sae: str, wanted: Wanted) -> Names:
    """The ids of an SAE: those asked for, or the model's name without its owner and `chatsae-METHOD-SAE`."""
    config = run.config
    short = sae.split("-", 1)[-1]  # without the layer, which a source names by itself
    return Names(
        wanted.model_id or identifier(Path(config.model.name).name),
        wanted.set_name or identifier(f"chatsae-{config.data.method}-{short}"),
        wanted.creator_id,
    )


def _dataset(run: Run) -> str:
    """The corpora that were read; of a local file its name, since paths are nobody's business."""
    return public(", ".join(run.config.eval.sources or run.config.data.sources))


def _n_layers(run: Run, tally: Counter[str]) -> int | None:
    try:
        model = trained_model(run)
        return planning_facts(model.name, model.revision, model.trust_remote_code, layer_path=model.layer_path).n_layers
    except UserError as error:
        tally[f"number of the model's layers: {error}"] += 1
        return None


def _explanations(path: Path, sae: str, digest: str, tally: Counter[str]) -> dict[int, list[Explanation]]:
    """What the judges of a run said of each feature; the same words once, and none of what they found no pattern in."""
    found: dict[int, list[Explanation]] = {}
    for facts in read_judgements(path, sae):
        if facts["store"]["sae_sha256"] != digest:
            tally[f"judgements of other weights than the SAE has now ({facts['judge']})"] += 1
            continue
        for verdict in facts["verdicts"]:
            text, score = verdict["explanation"], verdict["score"]
            if text and (score is None or score < _LEAST_SCORE):
                tally[f"explanations without a score of at least {_LEAST_SCORE}, left out"] += 1
                continue
            some = found.setdefault(verdict["feature"], [])
            if text and text not in [explanation.text for explanation in some]:
                notes = f"{facts['judge']}, {verdict['n_contexts']} contexts, score {score:.2f} of 5"
                some.append(Explanation(text, notes))
    return found
