"""SAEDashboard: batch-N.json."""

from pathlib import Path
from typing import Any

from chatsae.exporting import write_json
from chatsae.features.export.neuronpedia import tables, vector
from chatsae.features.export.subject import Sample, Subject, number
from chatsae.features.export.writing import in_batches
from chatsae.features.records import Feature

BATCH = 128


def write(subject: Subject, folder: Path) -> None:
    """Write batch-N.json."""
    head = {
        "model_id": subject.names.model_id,
        "layer": subject.sae.spec.layer,
        "sae_set": subject.names.set_name,
        "sae_id_suffix": None,
    }
    for n, features in enumerate(in_batches(subject.each(), BATCH)):
        records = [dashboard(subject, feature) for feature in features]
        write_json(folder / f"batch-{n}.json", head | {"features": records}, compact=True)


def dashboard(subject: Subject, feature: Feature) -> dict[str, Any]:
    """A feature of batch-N.json."""
    return {
        "feature_index": feature.index,
        **tables(subject, feature),
        "n_prompts_total": subject.store.facts["n_dialogues"],
        "n_tokens_in_prompt": None,
        "dataset": subject.dataset,
        "activations": [_activation(feature, sample) for sample in subject.samples(feature)],
        "vector": vector(subject, feature),
    }


def _activation(feature: Feature, sample: Sample) -> dict[str, Any]:
    low, high, share = sample.interval or (-1.0, feature.max_act, -1.0)
    return {
        "bin_min": number(low),
        "bin_max": number(high),
        "bin_contains": number(share),
        "tokens": sample.tokens,
        "values": sample.values,
        "qualifying_token_index": sample.peak,
    }
