"""Neuronpedia: bodies of POST /api/feature/upload-batch, and the files of a bulk import. Nothing is sent."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatsae.exporting import write_json
from chatsae.features.export.subject import Sample, Subject, histogram, number
from chatsae.features.export.writing import in_batches, write_lines
from chatsae.features.records import Feature

UPLOAD = 128
"""Features that an upload takes at most."""
BULK = 256
"""Features of a bulk file."""

_VISIBILITY = "PRIVATE"


def write_upload(subject: Subject, folder: Path) -> None:
    """Write batch-N.json, each the body of one request; a feature without a context is left out and counted."""
    found = (upload(subject, feature) for feature in subject.each())
    for n, features in enumerate(in_batches((record for record in found if record is not None), UPLOAD)):
        body = {"modelId": subject.names.model_id, "source": subject.source, "features": features}
        write_json(folder / f"batch-{n}.json", body, compact=True)


def upload(subject: Subject, feature: Feature) -> dict[str, Any] | None:
    """A feature of an upload; None, and counted, where it has no context."""
    samples = subject.samples(feature)
    if not samples:
        subject.count("features without a context, left out")
        return None

    def logits(ranked: tuple[tuple[str, float], ...]) -> list[dict[str, Any]] | None:
        return [{"token": token, "value": value} for token, value in subject.logits(ranked)] or None

    return {
        "index": feature.index,
        "density": number(feature.density, 9),
        "topLogits": logits(feature.promoted),
        "bottomLogits": logits(feature.suppressed),
        "explanations": [{"text": explanation.text} for explanation in subject.explained(feature)],
        "activations": [_uploaded(sample) for sample in samples],
    }


def _uploaded(sample: Sample) -> dict[str, Any]:
    value: dict[str, Any] = {"tokens": sample.tokens, "values": sample.values}
    if sample.interval is not None:
        low, high, share = sample.interval
        value |= {"quantileMin": number(low), "quantileMax": number(high), "quantileFraction": number(share)}
    return value


def write_bulk(subject: Subject, folder: Path) -> None:
    """Write release, model, sourceset and source.jsonl, and features, activations and explanations in batches."""
    for name, record in (
        ("release", release(subject)),
        ("model", model(subject)),
        ("sourceset", source_set(subject)),
        ("source", source(subject)),
    ):
        write_lines(folder / f"{name}.jsonl", [record])
    for n, features in enumerate(in_batches(subject.each(), BULK)):
        file = f"batch-{n}.jsonl.gz"
        write_lines(folder / "features" / file, [bulk_feature(subject, feature) for feature in features])
        write_lines(
            folder / "activations" / file, [row for feature in features for row in activations(subject, feature)]
        )
        if explained := [row for feature in features for row in explanations(subject, feature)]:
            write_lines(folder / "explanations" / file, explained)


def tables(subject: Subject, feature: Feature) -> dict[str, Any]:
    """The tables and histograms that bulk features and SAEDashboard share; what the store does not hold is empty."""
    heights, values = histogram(feature)
    found: dict[str, Any] = {
        f"{table}_{column}": []
        for table, columns in (
            ("neuron_alignment", ("indices", "values", "l1")),
            ("correlated_neurons", ("indices", "pearson", "l1")),
            ("correlated_features", ("indices", "pearson", "l1")),
        )
        for column in columns
    }
    for key, ranked in (("neg", feature.suppressed), ("pos", feature.promoted)):
        logits = subject.logits(ranked)
        found[f"{key}_str"] = [token for token, _ in logits]
        found[f"{key}_values"] = [value for _, value in logits]
    return found | {
        "frac_nonzero": number(feature.density, 9),
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": values,
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "decoder_weights_dist": [],
    }


def vector(subject: Subject, feature: Feature) -> list[float]:
    """The feature's decoder direction."""
    return [round(value, 7) for value in subject.sae.W_dec[feature.index].detach().double().tolist()]


def bulk_feature(subject: Subject, feature: Feature) -> dict[str, Any]:
    """A line of features/batch-N.jsonl.gz."""
    names, layer = subject.names, subject.sae.spec.layer
    near = [(index, value) for index, cosine in feature.decoder_neighbours if (value := number(cosine)) is not None]
    return {
        "modelId": names.model_id,
        "layer": subject.source,
        "index": str(feature.index),
        "creatorId": names.creator_id,
        "createdAt": subject.created,
        "maxActApprox": number(feature.max_act),
        "hasVector": True,
        "vector": vector(subject, feature),
        "vectorLabel": None,
        "vectorDefaultSteerStrength": None,
        "hookName": f"blocks.{layer}.hook_resid_post",
        "topkCosSimIndices": [index for index, _ in near],
        "topkCosSimValues": [value for _, value in near],
        **tables(subject, feature),
        "sourceSetName": names.set_name,
    }


def activations(subject: Subject, feature: Feature) -> Iterator[dict[str, Any]]:
    """The lines of a feature in activations/batch-N.jsonl.gz."""
    for n, sample in enumerate(subject.samples(feature)):
        top = max(range(len(sample.values)), key=sample.values.__getitem__)
        low, high, share = sample.interval or (-1.0, feature.max_act, -1.0)
        yield {
            "id": _id(subject, "activation", feature.index, n),
            "tokens": sample.tokens,
            "index": str(feature.index),
            "layer": subject.source,
            "modelId": subject.names.model_id,
            "maxValue": sample.values[top],
            "maxValueTokenIndex": top,
            "minValue": min(sample.values),
            "values": sample.values,
            "creatorId": subject.names.creator_id,
            "dataSource": subject.dataset,
            "dataIndex": str(sample.context.index),
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "createdAt": subject.created,
            "lossValues": [],
            "logitContributions": None,
            "binMin": number(low),
            "binMax": number(high),
            "binContains": number(share),
            "qualifyingTokenIndex": sample.peak,
            "zIndices": [],
            "zValues": [],
        }


def explanations(subject: Subject, feature: Feature) -> Iterator[dict[str, Any]]:
    """The lines of a feature in explanations/batch-N.jsonl.gz."""
    for n, explanation in enumerate(subject.explained(feature)):
        yield {
            "id": _id(subject, "explanation", feature.index, n),
            "modelId": subject.names.model_id,
            "layer": subject.source,
            "index": str(feature.index),
            "description": explanation.text,
            "authorId": subject.names.creator_id,
            "embedding": None,
            "triggeredById": None,
            "typeName": None,
            "explanationModelName": None,
            "notes": explanation.notes,
            "createdAt": subject.created,
        }


def model(subject: Subject) -> dict[str, Any]:
    """The line of model.jsonl."""
    names = subject.names
    return {
        "id": names.model_id,
        "instruct": True,
        "creatorId": names.creator_id,
        "displayNameShort": names.model_id,
        "displayName": names.model_id,
        "tlensId": None,
        "dimension": subject.sae.spec.d_in,
        "visibility": _VISIBILITY,
        "defaultSourceSetName": names.set_name,
        "defaultSourceId": subject.source,
        "inferenceEnabled": False,
        "layers": subject.n_layers,
        "neuronsPerLayer": None,
        "createdAt": subject.created,
        "owner": "",
        "updatedAt": subject.created,
        "website": None,
    }


def source(subject: Subject) -> dict[str, Any]:
    """The line of source.jsonl."""
    facts, names = subject.store.facts, subject.names
    return {
        "id": subject.source,
        "modelId": names.model_id,
        "setName": names.set_name,
        "creatorId": names.creator_id,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "inferenceHosts": [],
        "saelensConfig": None,
        "saelensRelease": None,
        "saelensSaeId": None,
        "hfRepoId": None,
        "hfFolderId": None,
        "visibility": _VISIBILITY,
        "defaultOfModelId": None,
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "num_prompts": facts["n_dialogues"],
        "num_tokens_in_prompt": None,
        "dataset": subject.dataset,
        "notes": f"{facts['n_dialogues']} dialogues, each read whole; {facts['n_tokens']} tokens",
        "createdAt": subject.created,
    }


def source_set(subject: Subject) -> dict[str, Any]:
    """The line of sourceset.jsonl."""
    names = subject.names
    return {
        "modelId": names.model_id,
        "name": names.set_name,
        "creatorId": names.creator_id,
        "hasDashboards": True,
        "visibility": _VISIBILITY,
        "description": _description(subject),
        "type": "Residual Stream",
        "creatorName": "",
        "urls": [],
        "creatorEmail": None,
        "releaseName": names.set_name,
        "defaultOfModelId": None,
        "defaultRange": 1,
        "defaultShowBreaks": True,
        "showDfa": False,
        "showCorrelated": False,
        "showHeadAttribution": False,
        "showUmap": False,
        "createdAt": subject.created,
    }


def release(subject: Subject) -> dict[str, Any]:
    """The line of release.jsonl."""
    names = subject.names
    return {
        "name": names.set_name,
        "description": _description(subject),
        "creatorName": "",
        "creatorId": names.creator_id,
        "visibility": _VISIBILITY,
        "isNewUi": True,
        "featured": False,
        "descriptionShort": names.set_name,
        "urls": [],
        "creatorEmail": None,
        "creatorNameShort": "",
        "defaultSourceSetName": names.set_name,
        "defaultSourceId": subject.source,
        "defaultUmapSourceIds": [],
        "createdAt": subject.created,
    }


def _description(subject: Subject) -> str:
    spec = subject.sae.spec
    method = f", trained with {subject.method.upper()}" if subject.method else ""
    return f"{spec.architecture} SAEs with {spec.d_sae} features on the residual stream{method}"


def _id(subject: Subject, *what: object) -> str:
    """An id that is the same in every export of the same weights."""
    parts = (subject.names.model_id, subject.source, subject.store.facts["sae_sha256"], *what)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
