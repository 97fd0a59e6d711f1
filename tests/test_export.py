"""What other tools are given: the exact keys of their formats, within their limits, and the numbers of the store."""

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import chatsae
from chatsae.batch import TokenBatch
from chatsae.cli import main
from chatsae.errors import UserError
from chatsae.evals.report import Report
from chatsae.evals.schema import FIGURES, VERSION
from chatsae.exporting import directory, identifier
from chatsae.features.collect import Reading
from chatsae.features.export import delphi, neuronpedia, saebench, saedashboard, schemas
from chatsae.features.export.command import Wanted, export
from chatsae.features.export.subject import Explanation, Names, Subject, printable
from chatsae.features.export.writing import in_batches
from chatsae.features.judging import SCHEMA_VERSION
from chatsae.features.records import Context, Feature
from chatsae.features.store import FeatureStore
from chatsae.features.verdict import Verdict
from chatsae.lm.load import LanguageModel
from feature_samples import DEAD, FIRST, RARE, START, TOKEN, TWICE, planted, planted_run

pytest_plugins = ["feature_fixtures"]

NAME = "L1-1x-standard"
WHEN = datetime(2030, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)

# the keys as the formats' own documentation lists them
TABLES = (
    "neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices "
    "correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices correlated_features_pearson "
    "correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights "
    "freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist"
)
KEYS = {
    "feature": "modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel "
    f"vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues {TABLES} sourceSetName",
    "activation": "id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource "
    "dataIndex dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin binMax binContains "
    "qualifyingTokenIndex zIndices zValues",
    "explanation": "id modelId layer index description authorId embedding triggeredById typeName explanationModelName "
    "notes createdAt",
    "model": "id instruct creatorId displayNameShort displayName tlensId dimension visibility defaultSourceSetName "
    "defaultSourceId inferenceEnabled layers neuronsPerLayer createdAt owner updatedAt website",
    "source": "id modelId setName creatorId hasDashboards inferenceEnabled inferenceHosts saelensConfig saelensRelease "
    "saelensSaeId hfRepoId hfFolderId visibility defaultOfModelId hasUmap hasUmapLogSparsity hasUmapClusters "
    "num_prompts num_tokens_in_prompt dataset notes createdAt",
    "sourceset": "modelId name creatorId hasDashboards visibility description type creatorName urls creatorEmail "
    "releaseName defaultOfModelId defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap "
    "createdAt",
    "release": "name description creatorName creatorId visibility isNewUi featured descriptionShort urls creatorEmail "
    "creatorNameShort defaultSourceSetName defaultSourceId defaultUmapSourceIds createdAt",
    "dashboard": f"feature_index {TABLES} n_prompts_total n_tokens_in_prompt dataset activations vector",
    "dashboard activation": "bin_min bin_max bin_contains tokens values qualifying_token_index",
    "delphi": "dataset_repo dataset_split dataset_name dataset_column batch_size cache_ctx_len n_tokens n_splits "
    "model_name",
    "saebench": "eval_type_id eval_config eval_id datetime_epoch_millis eval_result_metrics eval_result_details "
    "sae_bench_commit_hash sae_lens_id sae_lens_release_id sae_lens_version eval_result_unstructured",
    "saebench metrics": "model_behavior_preservation model_performance_preservation reconstruction_quality shrinkage "
    "sparsity token_stats misc_metrics",
}
BULK_SCHEMAS = {
    "feature": schemas.BULK_FEATURE,
    "activation": schemas.BULK_ACTIVATION,
    "explanation": schemas.BULK_EXPLANATION,
    "model": schemas.BULK_MODEL,
    "source": schemas.BULK_SOURCE,
    "sourceset": schemas.BULK_SOURCE_SET,
    "release": schemas.BULK_RELEASE,
}


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


def strict(text: str) -> Any:
    """JSON as its standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def check(value: Any, schema: dict[str, Any]) -> Any:
    """The value as a reader gets it, after its schema has been checked."""
    value = strict(json.dumps(value, allow_nan=False))
    jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)
    return value


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


def test_schemas_have_the_keys_of_the_formats() -> None:
    for kind, schema in BULK_SCHEMAS.items():
        assert set(schema["required"]) == set(schema["properties"]) == set(KEYS[kind].split()), kind
    dashboard = schemas.SAEDASHBOARD["properties"]["features"]["items"]
    assert set(schemas.SAEDASHBOARD["required"]) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert set(dashboard["required"]) == set(dashboard["properties"]) == set(KEYS["dashboard"].split())
    activation = dashboard["properties"]["activations"]["items"]
    assert set(activation["required"]) == set(activation["properties"]) == set(KEYS["dashboard activation"].split())
    assert set(schemas.DELPHI_CONFIG["required"]) == set(KEYS["delphi"].split())
    assert set(schemas.SAEBENCH["required"]) == set(KEYS["saebench"].split())
    metrics = schemas.SAEBENCH["properties"]["eval_result_metrics"]
    assert set(metrics["required"]) == set(KEYS["saebench metrics"].split())
    for schema in (schemas.UPLOAD, schemas.SAEDASHBOARD, schemas.DELPHI_CONFIG, schemas.SAEBENCH):
        jsonschema.Draft202012Validator.check_schema(schema)
        with pytest.raises(jsonschema.ValidationError, match="more"):
            jsonschema.validate({"more": 1}, {**schema, "required": []})


def test_an_upload_holds_what_the_store_knows(subject: Subject, tmp_path: Path) -> None:
    neuronpedia.write_upload(subject, tmp_path)
    body = check(strict((tmp_path / "batch-0.json").read_text()), schemas.UPLOAD)
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
    bodies = [check(strict(p.read_text()), schemas.UPLOAD) for p in sorted(tmp_path.iterdir())]
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
        check(row, BULK_SCHEMAS[kind])
        assert row["createdAt"] == "2030-01-02T03:04:05.678+00:00"
    rows = {kind: lines(tmp_path / kind / "batch-0.jsonl.gz") for kind in kinds}
    for kind in kinds:
        for row in rows[kind]:
            check(row, BULK_SCHEMAS[kind.removesuffix("s")])
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
    body = check(strict((tmp_path / "batch-0.json").read_text()), schemas.SAEDASHBOARD)
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
        check({"modelId": "m", "source": "1-s", "features": [uploaded]}, schemas.UPLOAD)
    for kind in ("feature", "activation", "explanation"):
        for row in bulk(subject, kind, feature):
            check(row, BULK_SCHEMAS[kind])
    head = {"model_id": "m", "layer": 1, "sae_set": "s", "sae_id_suffix": None}
    dashboard = check(head | {"features": [saedashboard.dashboard(subject, feature)]}, schemas.SAEDASHBOARD)
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
    check({"modelId": "m", "source": "1-s", "features": [uploaded]}, schemas.UPLOAD)


def slow_latents(
    lm: LanguageModel, tokens: TokenBatch, subject: Subject, features: list[int], ctx: int
) -> dict[tuple[int, int, int], float]:
    """Every activation, one token and one feature at a time."""
    found = {}
    for row in range(len(tokens)):
        stream = torch.cat([a.acts[0] for a in lm.harvest([tokens.select([row])])])
        acts = subject.sae.encode(stream).detach()
        for position in range(min(ctx, len(acts))):
            for feature in features:
                if (value := float(acts[position, feature])) > 1e-5:
                    found[row, position, feature] = value
    return found


@pytest.mark.parametrize("ctx", [None, 20])
def test_latents_are_every_activation(lm: LanguageModel, tokens: TokenBatch, subject: Subject, ctx: int | None) -> None:
    features, tally = [TOKEN, TWICE, FIRST], Counter[str]()
    tokens = tokens.select(range(8))
    found = delphi.latents(subject.sae, lm, tokens, features, reading=Reading.of(lm), ctx=ctx, tally=tally)
    longest = int(tokens.lengths.max())
    expected = slow_latents(lm, tokens, subject, features, ctx or longest)
    assert [tuple(row) for row in found.locations.tolist()] == sorted(expected)
    assert found.activations.tolist() == pytest.approx([expected[key] for key in sorted(expected)], rel=1e-3)
    assert found.tokens.shape == (8, ctx or longest)
    for row, ids in enumerate(found.tokens):
        own = tokens.select([row]).input_ids[: len(ids)].numpy()
        assert (ids[: len(own)] == own).all()
    assert found.n_tokens == sum(min(n, ctx or longest) for n in tokens.lengths.tolist())
    assert bool(tally) == (ctx is not None)
    assert sum(tally.values()) == len(tokens.input_ids) - found.n_tokens


def test_latents_that_float16_cannot_hold_are_its_largest(
    lm: LanguageModel, tokens: TokenBatch, subject: Subject
) -> None:
    with torch.no_grad():
        subject.sae.W_enc *= 1e6
        subject.sae.b_enc *= 1e6
    tally: Counter[str] = Counter()
    found = delphi.latents(subject.sae, lm, tokens, [TOKEN], reading=Reading.of(lm), tally=tally)
    assert set(found.activations.tolist()) == {65504.0}
    assert sum(tally.values()) == len(found.activations) > 0
    with pytest.raises(UserError, match="at least 1, not 0"):
        delphi.latents(subject.sae, lm, tokens, [TOKEN], reading=Reading.of(lm), ctx=0)


@pytest.mark.parametrize(("last", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint32)])
def test_locations_are_as_wide_as_they_have_to_be(last: int, dtype: type) -> None:
    place = np.array([[1, 0, last], [0, 2, 1], [0, 2, 0], [0, 0, 5]])
    found = delphi.collected(place, np.array([1, 2, 3, 4], np.float32), np.zeros((2, 3), np.int64), 6, Counter())
    assert found.locations.dtype == dtype
    assert found.locations.tolist() == [[0, 0, 5], [0, 2, 0], [0, 2, 1], [1, 0, last]]
    assert found.activations.tolist() == [4, 3, 2, 1]


def test_every_metric_of_saebench_is_a_figure_of_the_report() -> None:
    named = {name for keys in saebench.METRICS.values() for name in keys.values() if name}
    assert named - set(FIGURES) == {"loss_with_sae", "frac_alive"}
    assert saebench.SCHEMA == VERSION


def report(path: Path) -> None:
    """A report.json with figures that are null and one that is not finite."""
    figures = dict.fromkeys(FIGURES) | {"loss": 3.0, "delta_loss": 0.5, "dead_fraction": 0.25, "kl": 0.1, "n_tokens": 9}
    figures |= {"mse_sum": 8.0, "mse": 1.0, "dense_1pct": math.nan, "l0": 4.5}
    facts = {"model": "plain", "n_dialogues": 3, "max_length": 64, "tokens_sha256": "0"}
    Report({NAME: figures | {"groups": {}, "intervals": {}, "reasons": {}}}, facts).save(path)


def test_an_evaluation_is_written_as_saebench_has_it(tmp_path: Path, model: Path, capsys) -> None:
    run = planted_run(tmp_path / "of", model)
    assert main(["export", str(run), "--format", "saebench"]) == 2
    assert f"chatsae eval {run}" in capsys.readouterr().err
    report(run / "report.json")
    assert main(["export", str(run), "--format", "saebench", "--json"]) == 0
    (written,) = json.loads(capsys.readouterr().out)
    assert list(written["files"]) == [f"{NAME}_eval_results.json"]
    file = Path(written["directory"]) / f"{NAME}_eval_results.json"
    assert file.parent.parent == run / "exports" / "saebench"
    result = check(strict(file.read_text()), schemas.SAEBENCH)
    metrics = result["eval_result_metrics"]
    assert metrics["model_performance_preservation"] == {
        "ce_loss_score": None,
        "ce_loss_with_ablation": None,
        "ce_loss_with_sae": 3.5,
        "ce_loss_without_sae": 3.0,
    }
    assert metrics["misc_metrics"]["frac_alive"] == 0.75
    assert metrics["misc_metrics"]["freq_over_1_percent"] is None
    assert metrics["reconstruction_quality"]["mse"] == 8
    assert metrics["sparsity"]["l0"] == 4.5
    assert result["eval_config"]["n_dialogues"] == 3
    assert (result["sae_lens_id"], result["sae_lens_release_id"]) == (NAME, "chatsae-fast-1x-standard")
    assert main(["export", str(run), "--format", "saebench", "--features", "3"]) == 2
    assert "--features: an evaluation has none" in capsys.readouterr().err
    for text, message in (
        ("{", "damaged"),
        ('{"facts": {}, "saes": {}}', "holds no SAE"),
        ('{"schema": 9}', "damaged"),
    ):
        (run / "report.json").write_text(text)
        with pytest.raises(UserError, match=message):
            export(run, Wanted(format="saebench"))


def files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file())


def test_a_run_is_exported_in_every_format(tmp_path: Path, model: Path, capsys) -> None:
    run, out = planted_run(tmp_path / "of", model), tmp_path / "out"
    (store,) = (chatsae.FeatureStore.load(run / "features" / NAME) for _ in [0] if not export_all(run, out, capsys))
    source = out / "neuronpedia" / identifier(model.name) / "1-chatsae-fast-1x-standard"
    body = check(strict((source / "batch-0.json").read_text()), schemas.UPLOAD)
    assert [f["index"] for f in body["features"]] == store.indices.tolist()
    explained = {f["index"]: f["explanations"] for f in body["features"]}
    assert explained[TOKEN] == [{"text": "ends a turn"}]
    assert [explained[i] for i in explained if i != TOKEN] == [[]] * (len(explained) - 1)
    place = out / "delphi" / NAME / "layers.1"
    config = check(strict((place / "config.json").read_text()), schemas.DELPHI_CONFIG)
    with safe_open(place / "0_127.safetensors", "numpy") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert {name: str(array.dtype) for name, array in found.items()} == {
        "locations": "uint16",
        "activations": "float16",
        "tokens": "int64",
    }
    assert found["tokens"].shape == (store.facts["n_dialogues"], config["cache_ctx_len"])
    assert config["n_tokens"] == store.facts["n_tokens"]
    counts = np.bincount(found["locations"][:, 2], minlength=128)
    assert counts[store.indices].tolist() == store.columns["n_active"][store.indices].tolist()
    assert counts.sum() == len(found["activations"])
    assert np.isfinite(found["activations"]).all()
    for file in files(out):  # paths of this machine stay here, but for delphi's, which has to find the model
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert "delphi" in file.parts or str(tmp_path).encode() not in data, file


def export_all(run: Path, out: Path, capsys) -> int:
    """Features, then verdicts on one of them, then every export."""
    assert main(["features", str(run), "--contexts", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)[NAME]["facts"]
    verdicts = [
        asdict(Verdict(TOKEN, "someone", 4, 0, 5.0, explanation="ends a turn")),
        asdict(Verdict(START, "someone", 4, 0, None, reason="no answer")),
        asdict(Verdict(TWICE, "someone", 4, 0, 1.5, explanation="no pattern")),
    ]
    folder = run / "judge" / NAME
    folder.mkdir(parents=True)
    for name, sha256 in (("a", facts["sae_sha256"]), ("b", facts["sae_sha256"]), ("c", "of other weights")):
        found = {"schema_version": SCHEMA_VERSION, "judge": name, "store": {"sae_sha256": sha256}, "verdicts": verdicts}
        (folder / f"{name}-4.json").write_text(json.dumps(found))
    for form in ("neuronpedia", "neuronpedia-bulk", "saedashboard", "delphi"):
        for _ in range(2):  # once more over what is there
            assert main(["export", str(run), "--format", form, "--out", str(out / form), "--json"]) == 0
            (written,) = json.loads(capsys.readouterr().out)
        folder = Path(written["directory"])
        there = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files(folder)}
        assert there.pop("export.json") > 0
        assert written["files"] == there != {}
        assert written["left_out"] == {
            "judgements of other weights than the SAE has now (c)": 1,
            "explanations without a score of at least 2, left out": 2,
        }
    return 0


def test_an_export_never_replaces_other_files(tmp_path: Path, model: Path, capsys) -> None:
    run = planted_run(tmp_path / "of", model)
    assert main(["features", str(run), "--contexts", "4", "--dialogues", "9"]) == 0
    weights = (run / "saes" / NAME / "sae_weights.safetensors").read_bytes()
    assert main(["export", str(run), "--format", "delphi", "--out", str(run / "saes")]) == 2
    assert "holds other files than an export" in capsys.readouterr().err
    assert (run / "saes" / NAME / "sae_weights.safetensors").read_bytes() == weights
    for flags, message in (
        (["--features", "500"], "500 asked for, but"),
        (["--features", "-1"], "at least 0, not -1"),
        (["--model-id", "Qwen"], "lower-case"),
        (["--set-name", "a__b"], "single '_'"),
        (["--sae", "L9"], "has no SAE 'L9'"),
    ):
        assert main(["export", str(run), "--format", "neuronpedia", *flags]) == 2
        assert message in capsys.readouterr().err
    assert (
        main(["export", str(run), "--format", "saedashboard", "--features", "2", "--set-name", "mine", "--json"]) == 0
    )
    (written,) = json.loads(capsys.readouterr().out)
    assert written["features"] == 2
    assert written["directory"].endswith("1-mine")


def test_a_directory_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with directory(tmp_path / "a", {"n": 1}) as folder:
        (folder / "old").write_text("")
    with pytest.raises(ZeroDivisionError), directory(tmp_path / "a", {"n": 2}) as folder:
        (folder / "new").write_text(str(1 // 0))
    assert [p.name for p in files(tmp_path)] == ["export.json", "old"]
    with directory(tmp_path / "a", {"n": 3}) as folder:
        (folder / "new").write_text("")
    assert [p.name for p in files(tmp_path)] == ["export.json", "new"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert [list(b) for b in in_batches(range(5), 2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"), ("a b/C__d", "a-b-c_d"), ("é", "unnamed"), ("-x.", "x")],
)
def test_identifiers_are_lower_case(text: str, expected: str) -> None:
    assert identifier(text) == expected
    assert Names(identifier(text), expected).source(3) == f"3-{expected}"
