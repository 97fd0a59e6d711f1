"""`chatsae export` of steering: a feature at a strength, or a recipe, for programs that know nothing of chatsae."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from chatsae import console
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.exporting import check_identifier, check_replaceable, directory, identifier, listed, write_json
from chatsae.lm.facts import planning_facts
from chatsae.lm.load import load_model
from chatsae.run_model import trained_model
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.steering.export.bias import write_folded
from chatsae.steering.export.constant import constants
from chatsae.steering.export.vectors import check_llama_cpp, neuronpedia_vector, write_control_vector
from chatsae.steering.spec import SteerSpec, load_specs

Format = Literal["gguf", "repeng", "neuronpedia-vector", "bias"]
FORMATS: tuple[Format, ...] = get_args(Format)

_VECTOR = "control_vector.gguf"
_COLUMNS = (Column("name"), Column("layers"), Column("strengths"), Column("files"), Column("MB"), Column("directory"))
_HOW = {
    "gguf": f"llama-server -m MODEL.gguf --control-vector {_VECTOR}",
    "repeng": f"ControlModel(model, layers).set_control(ControlVector.import_gguf({_VECTOR!r}))",
    "neuronpedia-vector": "POST /api/vector/new with your API key, one request a file",
    "bias": "transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY)",
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is exported: a feature of a run's SAE at a strength, or the specs of a recipe."""

    format: Format
    feature: int | None = None
    alpha: float | None = None
    recipe: Path | None = None
    sae: str | None = None
    out: Path | None = None
    model_id: str = ""


def export_steering(path: Path, wanted: Wanted) -> tuple[list[dict[str, Any]], str]:
    """What was written, as JSON holds it and as a text table.

    Raises:
        UserError: there is no such run, SAE, feature or recipe, the steering is more than a constant, or the format or
            the architecture cannot hold it.
    """
    run = Run.read(path)
    name, specs, labels = _asked(run, wanted)
    directions = constants(specs)
    facts: dict[str, Any] = {
        "format": wanted.format,
        "name": name,
        "specs": [
            {"label": label, "layer": spec.place, "alpha": spec.strength}
            for label, spec in zip(labels, specs, strict=True)
        ],
        "adds": "alpha times the unit direction to the stream after the layer, at every token, position 0 included",
        "use": _HOW[wanted.format],
        "left_out": {},
    }
    target = (wanted.out or path / "exports" / wanted.format) / name
    check_replaceable(target)
    write = _writer(run, wanted, specs, labels)
    with directory(target, facts) as folder:
        facts |= write(folder)
    written = listed(target, facts)
    console.say(f"use: {facts['use']}")
    if wanted.format == "bias":
        error, change = facts["logits_differ"], facts["steering_changes_logits"]
        console.say(
            f"written as {facts['model_type']} in {facts['dtype']} and read back: logits differ from the steered"
        )
        console.say(f"model's by {error:.2g} at most; steering changes them by {change:.2g}")
    row = {
        "name": name,
        "layers": ", ".join(map(str, directions)),
        "strengths": ", ".join(f"{spec.strength:g}" for spec in specs),
        "files": len(written["files"]),
        "MB": sum(written["files"].values()) / 1e6,
        "directory": str(target),
    }
    return [written], console.table(f"Exported as {wanted.format}", _COLUMNS, [row])


def _asked(run: Run, wanted: Wanted) -> tuple[str, list[SteerSpec], list[str]]:
    """A name for the directory, the specs with their SAEs in memory, and a label for each."""
    if wanted.recipe is not None:
        for flag, value in (("--feature", wanted.feature), ("--alpha", wanted.alpha), ("--sae", wanted.sae)):
            if value is not None:
                raise UserError(f"{flag}: a recipe says that itself; leave out {flag} or --recipe")
        specs = [spec.loaded() for spec in load_specs(wanted.recipe)]
        return wanted.recipe.stem, specs, [_label(spec) for spec in specs]
    if wanted.feature is None or wanted.alpha is None:
        missing = "--feature" if wanted.feature is None else "--alpha"
        raise UserError(f"{missing} is missing: --format {wanted.format} takes a feature and its strength, or --recipe")
    paths = {p.name: p for p in run.sae_directories()}
    if wanted.sae is None and len(paths) > 1:
        raise UserError(f"run {run.path} has several SAEs; choose one with --sae: {', '.join(paths)}")
    sae = wanted.sae or next(iter(paths))
    if sae not in paths:
        raise UserError(f"run {run.path} has no SAE {sae!r}; it has {', '.join(paths)}")
    spec = SteerSpec(sae=SAE.load(paths[sae]), feature=wanted.feature, strength=wanted.alpha)
    return f"{sae}-f{wanted.feature}-a{wanted.alpha:g}", [spec], [_label(spec)]


def _label(spec: SteerSpec) -> str:
    return f"{spec.sae.spec.name} feature {spec.feature}" if isinstance(spec.sae, SAE) else f"vector after {spec.place}"


def _writer(
    run: Run, wanted: Wanted, specs: Sequence[SteerSpec], labels: Sequence[str]
) -> Callable[[Path], dict[str, Any]]:
    """What writes the files of a format into a directory and returns further facts; what cannot be is refused here."""
    model, directions = trained_model(run), constants(specs)
    if wanted.model_id and wanted.format != "neuronpedia-vector":
        raise UserError(f"--model-id: {wanted.format} has none; leave it out")
    if wanted.format == "bias":
        lm = load_model(model, head=True)
        return lambda folder: write_folded(lm, specs, folder)
    known = planning_facts(model.name, model.revision, model.trust_remote_code, layer_path=model.layer_path)
    for layer, vector in directions.items():
        if not 0 <= layer < known.n_layers:
            raise UserError(f"steering: layer {layer} does not exist: {model.name} has layers 0..{known.n_layers - 1}")
        if len(vector) != known.d_in:
            raise UserError(f"steering: the direction has {len(vector)} numbers, {model.name} has d_in {known.d_in}")
    if wanted.format == "neuronpedia-vector":
        model_id = wanted.model_id or identifier(Path(model.name).name)
        check_identifier("--model-id", model_id)
        bodies = [neuronpedia_vector(spec, model_id, label) for spec, label in zip(specs, labels, strict=True)]
        return lambda folder: _write_bodies(bodies, folder)
    if wanted.format == "gguf":
        check_llama_cpp(directions)

    def write(folder: Path) -> dict[str, Any]:
        write_control_vector(folder / _VECTOR, directions, known.model_type)
        return {"model_hint": known.model_type}

    return write


def _write_bodies(bodies: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    for i, body in enumerate(bodies):
        write_json(folder / f"vector-{i}.json", body, compact=True)
    return {"model_id": bodies[0]["modelId"]}
