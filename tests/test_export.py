"""What other tools are given: the exact keys of their formats, within their limits, and the numbers of the store."""

import gzip
import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.batch import TokenBatch
from chatsae.features.export import neuronpedia, saedashboard
from chatsae.features.export.subject import Explanation, Names, Subject, printable
from chatsae.features.records import Context, Feature
from chatsae.features.store import FeatureStore
from chatsae.lm.load import LanguageModel
from export_schemas import check, strict
from feature_samples import DEAD, FIRST, RARE, START, TOKEN, TWICE, planted

pytest_plugins = ["feature_fixtures"]

WHEN = datetime(2030, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)


@pytest.fixture
def subject(store: FeatureStore, lm: LanguageModel) -> Subject:
    return Subject(
        store=store,
        sae=planted(lm),
        names=Names("plain", "chatsae-fast-1x-standard", "someone"),
        features=tuple(store.indices.tolist()),
        dataset="chat.jsonl",
        when=WHEN,
        method="fast",
        explanations={TOKEN: [Explanation("<|im_end|>", "pattern, 20 contexts, score 5.00 of 5")]},
    )


def lines(path: Path) -> list[Any]:
    """The rows of a JSONL file, split at nothing but line feeds."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert data.endswith(b"\n")
    return [strict(line.decode("utf-8")) for line in data[:-1].split(b"\n")]


def bulk(subject: Subject, kind: str, feature: Feature) -> list[dict[str, Any]]:
    """The lines of a feature."""
    if kind == "feature":
        return [neuronpedia.bulk_feature(subject, feature)]
    return list(
        {"activation": neuronpedia.activations, "explanation": neuronpedia.explanations}[kind](subject, feature)
    )


def test_an_upload_holds_what_the_store_knows(subject: Subject, tmp_path: Path) -> None:
    neuronpedia.write_upload(subject, tmp_path)
    body = check(strict((tmp_path / "batch-0.json").read_text()), "neuronpedia-upload")
    assert (body["modelId"], body["source"]) == ("plain", "1-chatsae-fast-1x-standard")
    features = {f["index"]: f for f in body["features"]}
    assert list(features) == [TOKEN, START, RARE, FIRST, TWICE]  # DEAD has no context
    assert subject.tally == {"features without a context, left out": 1}
    for index, found in features.items():
        known = subject.store.feature(index)
        contexts = (*known.contexts, *known.sampled)
        assert found["density"] == pytest.approx(known.density, abs=1e-9)
        assert [a["tokens"] for a in found["activations"]] == [list(c.tokens) for c in contexts]
        for activation, context in zip(found["activations"], contexts, strict=True):
            assert activation["values"] == pytest.approx(context.acts, abs=5e-6)
            assert ("quantileMin" in activation) == (context.quantile is not None)
        assert [x["token"] for x in found["topLogits"]] == [token for token, _ in known.promoted]
        assert [x["value"] for x in found["bottomLogits"]] == pytest.approx([v for _, v in known.suppressed], abs=5e-6)
    assert features[TOKEN]["explanations"] == [{"text": "<|im_end|>"}]
    assert features[START]["explanations"] == []


def test_an_upload_takes_at_most_128_features(subject: Subject, tmp_path: Path) -> None:
    neuronpedia.write_upload(replace(subject, features=(TOKEN,) * 100 + (DEAD,) + (START,) * 30), tmp_path)
    bodies = [check(strict(p.read_text()), "neuronpedia-upload") for p in sorted(tmp_path.iterdir())]
    assert [len(body["features"]) for body in bodies] == [128, 2]
    assert [f["index"] for body in bodies for f in body["features"]] == [TOKEN] * 100 + [START] * 30


def test_intervals_hold_the_share_of_activations_that_they_name(
    subject: Subject, lm: LanguageModel, tokens: TokenBatch
) -> None:
    stream = torch.cat([a.acts[0] for a in lm.harvest([tokens], token_budget=1, pool=1)])
    acts = subject.sae.encode(stream)[:, TWICE].detach().numpy()
    acts = acts[acts > 0]
    feature = subject.store.feature(TWICE)
    sampled = [sample for sample in subject.samples(feature) if sample.interval is not None]
    assert len(sampled) == 5
    for sample in sampled:
        assert sample.interval is not None
        low, high, share = sample.interval
        assert low <= sample.context.value <= high <= max(2 * low, feature.max_act)
        assert share == pytest.approx(float(((acts >= low) & (acts < 2 * low)).mean()), abs=2 / len(acts))
    heights, values = (neuronpedia.tables(subject, feature)[f"freq_hist_data_bar_{x}"] for x in ("heights", "values"))
    assert sum(heights) == pytest.approx(1, abs=1e-4)
    mean = feature.mean_act / feature.density
    assert np.dot(heights, values) == pytest.approx(mean, rel=0.2)  # bins are 41 % wide


def test_a_bulk_import_is_read_line_by_line(subject: Subject, tmp_path: Path) -> None:
    neuronpedia.write_bulk(subject, tmp_path)
    kinds = ("features", "activations", "explanations")
    files = [f"{name}.jsonl" for name in ("model", "release", "source", "sourceset")]
    files += [f"{name}/batch-0.jsonl.gz" for name in kinds]
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == sorted(files)
    for kind in ("model", "release", "source", "sourceset"):
        (row,) = lines(tmp_path / f"{kind}.jsonl")
        check(row, f"neuronpedia-bulk-{kind}")
        assert row["createdAt"] == "2030-01-02T03:04:05.678+00:00"
    rows = {kind: lines(tmp_path / kind / "batch-0.jsonl.gz") for kind in kinds}
    for kind in kinds:
        for row in rows[kind]:
            check(row, f"neuronpedia-bulk-{kind.removesuffix('s')}")
            assert (row["modelId"], row["layer"]) == ("plain", "1-chatsae-fast-1x-standard")
    assert [row["index"] for row in rows["features"]] == [str(i) for i in subject.features]
    assert [(row["index"], row["description"]) for row in rows["explanations"]] == [(str(TOKEN), "<|im_end|>")]
    for row, index in zip(rows["features"], subject.features, strict=True):
        known = subject.store.feature(index)
        assert row["vector"] == pytest.approx(subject.sae.W_dec[index].tolist(), abs=1e-7)
        assert row["topkCosSimIndices"] == [i for i, _ in known.decoder_neighbours]
        assert (row["pos_str"], row["neg_str"]) == tuple([t for t, _ in x] for x in (known.promoted, known.suppressed))
        assert row["maxActApprox"] == pytest.approx(known.max_act, abs=5e-6)
        own = [a for a in rows["activations"] if a["index"] == row["index"]]
        assert [a["dataIndex"] for a in own] == [str(c.index) for c in (*known.contexts, *known.sampled)]
        top = [True] * len(known.contexts) + [False] * len(known.sampled)
        assert [a["binMin"] == a["binContains"] == -1 for a in own] == top
    for row in rows["activations"]:
        top = row["maxValueTokenIndex"]
        assert row["values"][top] == row["maxValue"] == max(row["values"])
        assert row["minValue"] == min(row["values"])
        assert row["values"][row["qualifyingTokenIndex"]] > 0
    ids = [row["id"] for row in rows["activations"] + rows["explanations"]]
    assert len(set(ids)) == len(ids)


def test_a_dashboard_has_the_strongest_contexts_in_a_group_of_their_own(subject: Subject, tmp_path: Path) -> None:
    saedashboard.write(subject, tmp_path)
    body = check(strict((tmp_path / "batch-0.json").read_text()), "saedashboard")
    assert (body["model_id"], body["layer"], body["sae_set"]) == ("plain", 1, "chatsae-fast-1x-standard")
    assert [f["feature_index"] for f in body["features"]] == list(subject.features)
    for found in body["features"]:
        known = subject.store.feature(found["feature_index"])
        top = [a for a in found["activations"] if a["bin_contains"] == -1]
        assert [a["bin_min"] for a in top] == [-1] * len(known.contexts)
        assert [a["values"][a["qualifying_token_index"]] for a in top] == [round(c.value, 5) for c in known.contexts]
        assert all(a["bin_min"] <= max(a["values"]) for a in found["activations"])
        assert found["n_prompts_total"] == 30


@st.composite
def facts(draw: st.DrawFn) -> dict[str, Any]:
    """What a feature may be: any text, and any numbers where a store takes them as they are."""
    floats = st.floats(allow_nan=True, allow_infinity=True, width=32)
    text = st.text(st.characters(exclude_categories=[]), max_size=5)
    ranked = st.lists(st.tuples(text, floats), max_size=25).map(tuple)

    def context(quantile: float | None) -> dict[str, Any]:
        n = draw(st.sampled_from([1, 2, 1023, 1024, 1025, 1500]))
        values = draw(st.lists(floats if draw(st.booleans()) else st.floats(0, 100), min_size=1, max_size=4))
        pieces = draw(st.lists(text, min_size=1, max_size=4))
        return {
            "value": draw(st.floats(2**-20, 2**24)),
            "quantile": quantile,
            "peak": draw(st.integers(0, n - 1)),
            "tokens": tuple(pieces[i % len(pieces)] for i in range(n)),
            "acts": tuple(values[i % len(values)] for i in range(n)),
        }

    return {
        "density": draw(st.floats(0, 1)),
        "max_act": draw(st.floats(2**-20, 2**24)),
        "contexts": [context(None) for _ in range(draw(st.integers(0, 2)))],
        "sampled": [context(0.5) for _ in range(draw(st.integers(0, 2)))],
        "promoted": draw(ranked),
        "suppressed": draw(ranked),
        "value_counts": tuple(draw(st.lists(st.integers(0, 1000), min_size=64, max_size=64))),
    }


def made(facts: dict[str, Any]) -> Feature:
    """The feature of some facts; a strategy cannot make it, since type checks of records draw random numbers."""

    def context(own: dict[str, Any]) -> Context:
        zeros = (0,) * len(own["acts"])
        rest = {"input_ids": zeros, "role": zeros, "kind": zeros, "turn": zeros, "prefix": (False,) * len(zeros)}
        return Context(feature=7, dialogue="d", start=0, **rest, **own)

    contexts = {name: tuple(context(own) for own in facts[name]) for name in ("contexts", "sampled")}
    return Feature(index=7, decoder_neighbours=((3, 0.5), (4, math.nan)), **{**facts, **contexts})


@settings(max_examples=20, deadline=None)
@given(found=facts(), said=st.text(st.characters(exclude_categories=[]), max_size=3), n=st.sampled_from([1, 300]))
def test_any_feature_keeps_to_the_limits_and_nothing_goes_silently(
    store: FeatureStore, lm: LanguageModel, found: dict[str, Any], said: str, n: int
) -> None:
    feature = made(found)
    subject = Subject(
        store=store,
        sae=planted(lm),
        names=Names("m", "s"),
        features=(7,),
        dataset="",
        when=WHEN,
        explanations={7: [Explanation(said * n, "")]},
        tally=Counter(),
    )
    uploaded = neuronpedia.upload(subject, feature)
    contexts = (*feature.contexts, *feature.sampled)
    bad = sum(not all(math.isfinite(v) for v in c.acts) for c in contexts)
    assert subject.tally["contexts with an activation that is not finite, left out"] == bad
    if uploaded is None:
        assert bad == len(contexts)
        assert subject.tally["features without a context, left out"] == 1
    else:
        assert len(uploaded["activations"]) == len(contexts) - bad
        check({"modelId": "m", "source": "1-s", "features": [uploaded]}, "neuronpedia-upload")
    for kind in ("feature", "activation", "explanation"):
        for row in bulk(subject, kind, feature):
            check(row, f"neuronpedia-bulk-{kind}")
    head = {"model_id": "m", "layer": 1, "sae_set": "s", "sae_id_suffix": None}
    dashboard = check(head | {"features": [saedashboard.dashboard(subject, feature)]}, "saedashboard")
    assert dashboard["features"][0]["pos_str"] == [printable(t) for t, v in feature.promoted if math.isfinite(v)][:20]
    for sample in subject.samples(feature):
        assert len(sample.tokens) == len(sample.values) == min(1024, len(sample.context))
        start = sample.context.peak - sample.peak
        assert sample.values == [round(v, 5) for v in sample.context.acts[start : start + len(sample.values)]]
        text = "".join(sample.tokens)
        assert text.encode("utf-8").decode("utf-8") == text
        assert "\0" not in text


def test_tokens_that_are_parts_of_a_character_are_text(store: FeatureStore, lm: LanguageModel) -> None:
    (first, last) = lm.tokenizer.encode("é", add_special_tokens=False)
    shown = [c for i in store.indices.tolist() for c in store.contexts(i, top=False) if first in c.input_ids]
    pairs = [(c.tokens[i], c.tokens[i + 1]) for c in shown for i, t in enumerate(c.input_ids[:-1]) if t == first]
    assert set(pairs) == {("", "é")}
    assert len({first, last}) == 2
    assert printable("a\0\ud83d\ude00b\udc80") == "a" + "\ufffd" * 3 + "b\ufffd"
    assert printable("\U0001f600") == "\U0001f600"


def test_a_density_that_is_not_finite_is_null(subject: Subject) -> None:
    uploaded = neuronpedia.upload(subject, replace(subject.store.feature(TOKEN), density=math.nan))
    assert uploaded is not None
    assert uploaded["density"] is None
    check({"modelId": "m", "source": "1-s", "features": [uploaded]}, "neuronpedia-upload")
