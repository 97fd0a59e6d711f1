"""Exports of a run opened by the tools they are for: what these read is what the run holds."""

import gzip
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sae_lens
import torch
from neuronpedia_server import Neuronpedia
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerFast

from chatsae.batch import TokenBatch
from chatsae.evals.held_out import held_out
from chatsae.evals.session import evaluate_runs
from chatsae.features.export.command import Wanted, export
from chatsae.features.judging import SCHEMA_VERSION
from chatsae.features.session import RunFeatures
from chatsae.features.store import FeatureStore
from chatsae.lm.harvest import Harvest
from chatsae.sae.base import SAE
from feature_samples import FIRST, RARE, START, TOKEN, TWICE, plain_model, planted_run

NAME = "L1-1x-standard"
SCHEMAS = Path(__file__).parents[1] / "schemas"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with features, a verdict on one of them, and a report."""
    folder = tmp_path_factory.mktemp("exports")
    path = planted_run(folder / "of", plain_model(folder / "plain"), n=4000)
    sae = SAE.load(path / "saes" / NAME)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.b_dec += 0.01 * torch.randn(sae.b_dec.shape, generator=generator)  # else its mean cosine is NaN
        silent = ~sae.W_enc.any(dim=0)  # planted with zeros, of whose cosines there is nothing to compare
        sae.W_enc[:, silent] = torch.randn((len(sae.W_enc), int(silent.sum())), generator=generator)
    sae.save(path / "saes" / NAME)
    store = RunFeatures(path).stores()[NAME]
    verdict = {"feature": TOKEN, "judge": "j", "n_contexts": 4, "repeat": 0, "score": 5.0, "explanation": "ends"}
    found = {"schema_version": SCHEMA_VERSION, "judge": "j", "store": store.facts, "verdicts": [verdict]}
    (path / "judge" / NAME).mkdir(parents=True)
    (path / "judge" / NAME / "j-4.json").write_text(json.dumps(found))
    evaluate_runs(path, dialogues=40)
    return path


@pytest.fixture(scope="module")
def store(run: Path) -> FeatureStore:
    return FeatureStore.load(run / "features" / NAME)


def exported(run: Path, out: Path, form: Any) -> Path:
    """The directory of the run's one SAE in a format."""
    ((written,), _) = export(run, Wanted(format=form, out=out))
    return Path(written["directory"])


def streams(features: RunFeatures, tokens: TokenBatch) -> list[torch.Tensor]:
    """The stream of each dialogue [T, D], each read by itself."""
    read = {b.tokens.names: b.acts[0] for b in Harvest(features.lm, [tokens], token_budget=1, pool=1)}
    return [read[(name,)] for name in tokens.names]


# --- sae_lens ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sae_lens_has_the_features_of_a_run(run: Path) -> None:
    features = RunFeatures(run)
    x = torch.cat(streams(features, features.tokens(40)))
    ours, theirs = features.saes[NAME], sae_lens.SAE.load_from_disk(str(run / "saes" / NAME), device="cpu")
    assert theirs.encode(x).equal(ours.encode(x))
    assert theirs.decode(theirs.encode(x)).equal(ours(x))
    assert set(theirs.encode(x).any(0).nonzero()[:, 0].tolist()) == {TOKEN, START, RARE, FIRST, TWICE}


# --- SAEBench ---------------------------------------------------------------------------------------------------------


def test_sae_bench_opens_a_result(run: Path, tmp_path: Path) -> None:
    from sae_bench.evals.core.eval_output import CoreEvalOutput

    data = json.loads((exported(run, tmp_path, "saebench") / f"{NAME}_eval_results.json").read_text())
    read = CoreEvalOutput(**data)  # as its own convert_directory does; a missing key or a null is refused
    report = json.loads((run / "report.json").read_text())["saes"][NAME]
    metrics = asdict(read.eval_result_metrics)
    assert metrics == data["eval_result_metrics"]
    flat = {key: value for group in metrics.values() for key, value in group.items()}
    known = {
        "kl_div_with_sae": "kl",
        "ce_loss_score": "ce_recovered_zero",
        "ce_loss_with_ablation": "loss_zero_ablation",
        "ce_loss_without_sae": "loss",
        "explained_variance": "explained_variance",
        "mse": "mse_sum",
        "cossim": "cosine",
        "l2_ratio": "l2_ratio",
        "relative_reconstruction_bias": "relative_bias",
        "l0": "l0",
        "l1": "l1",
        "total_tokens_eval_reconstruction": "n_tokens",
        "total_tokens_eval_sparsity_variance": "n_tokens",
        "freq_over_1_percent": "dense_1pct",
        "freq_over_10_percent": "dense_10pct",
        "average_max_decoder_cosine_sim": "duplicate_cosine",
    }
    expected = {key: -1 if report[name] is None else report[name] for key, name in known.items()}
    assert {key: flat[key] for key in known} == expected
    assert [key for key in known if report[known[key]] is None] == ["ce_loss_score"]  # zero ablation is no worse
    assert flat["ce_loss_with_sae"] == report["loss"] + report["delta_loss"]
    assert flat["frac_alive"] == 1 - report["dead_fraction"]
    unknown = {key for key, value in flat.items() if value == -1}
    assert unknown == set(data["eval_result_unstructured"]["unknown"])
    assert unknown == {
        *("kl_div_score", "kl_div_with_ablation", "explained_variance_legacy", "l2_norm_in", "l2_norm_out"),
        *("normalized_freq_over_1_percent", "normalized_freq_over_10_percent", "ce_loss_score"),
    }
    config = read.eval_config
    assert (config.model_name, config.dataset, config.llm_dtype) == ("plain", "chat.jsonl", "auto")
    assert config.n_eval_reconstruction_batches * config.batch_size_prompts == report["n_dialogues"] == 40
    assert asdict(config).keys() == data["eval_config"].keys()  # no key is left to a default of theirs
    theirs = sae_lens.SAE.load_from_disk(str(run / "saes" / NAME), device="cpu").cfg.to_dict()
    cfg = read.sae_cfg_dict
    assert {key: cfg[key] for key in theirs if key != "metadata"} == {
        k: v for k, v in theirs.items() if k != "metadata"
    }
    assert str(run.parent) not in json.dumps(data)


def test_sae_bench_measures_the_same(run: Path, tmp_path: Path) -> None:
    """Its own calculators on the activations that were evaluated, all in one of its batches."""
    from sae_bench.evals.core import main as core
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    data = json.loads((exported(run, tmp_path, "saebench") / f"{NAME}_eval_results.json").read_text())
    flat = {key: value for group in data["eval_result_metrics"].values() for key, value in group.items()}
    features = RunFeatures(run)
    tokens = TokenBatch.concat(list(held_out(features.run, features.lm, 40).tokens))
    x = torch.cat(streams(features, tokens))
    own = sae_lens.SAE.load_from_disk(str(run / "saes" / NAME), device="cpu")
    _, sae, _ = load_and_format_sae("release", own, "cpu")
    model = SimpleNamespace(run_with_cache=lambda *args, **options: (None, {sae.cfg.hook_name: x[None]}))
    batches = SimpleNamespace(get_batch_tokens=lambda n: tokens.input_ids[None])
    asked = dict.fromkeys(("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics"), True)
    with torch.no_grad():
        scalars, by_feature = core.get_sparsity_and_variance_metrics(
            sae, model, batches, 1, **{f"compute_{k}": v for k, v in asked.items()}, eval_batch_size_prompts=1,
            model_kwargs={},
        )  # fmt: skip
        misc = core.calculate_misc_metrics(by_feature | core.get_featurewise_weight_based_metrics(sae))
    scalars["mse"] *= len(x)  # it divides by the tokens of the batch, and then takes the mean over them
    for key in ("mse", "cossim", "l2_ratio", "relative_reconstruction_bias", "l0", "l1"):
        assert flat[key] == pytest.approx(scalars[key], rel=1e-5), key
    for key, value in misc.items():
        if not key.startswith("normalized"):
            assert flat[key] == pytest.approx(value, rel=1e-5), key


def test_the_schema_of_the_tests_is_that_of_sae_bench() -> None:
    """Of its own model, without its titles and descriptions; run as a script, this file writes it."""
    assert json.loads((SCHEMAS / "saebench.json").read_text()) == saebench_schema()


def saebench_schema() -> Any:
    from sae_bench.evals.core.eval_output import CoreEvalOutput

    def bare(value: Any, named: bool = False) -> Any:
        """Without what checks nothing; the keys of `properties` are names of theirs."""
        if isinstance(value, list):
            return [bare(each) for each in value]
        if not isinstance(value, dict):
            return value
        dropped = () if named else ("title", "description", "default", "ui_default_display")
        return {k: bare(v, k in ("properties", "$defs")) for k, v in value.items() if k not in dropped}

    return bare(TypeAdapter(CoreEvalOutput).json_schema())


# --- delphi -----------------------------------------------------------------------------------------------------------


def latent_dataset(root: Path, **options: Any) -> Any:
    """Its loader at its defaults, with the tokenizer that the cache names."""
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset

    return LatentDataset(root, SamplerConfig(), ConstructorConfig(), **options)


def test_delphi_reads_the_latents_at_its_defaults(run: Path, store: FeatureStore, tmp_path: Path) -> None:
    root = exported(run, tmp_path, "delphi")
    dataset = latent_dataset(root, modules=["layers.1"])
    assert isinstance(dataset.tokenizer, PreTrainedTokenizerFast)
    features = RunFeatures(run)
    tokens = features.tokens(store.facts["dialogues_asked"])
    with torch.no_grad():
        acts = [features.saes[NAME].encode(x) for x in streams(features, tokens)]
    dialogues = [tuple(tokens.select([i]).input_ids.tolist()) for i in range(len(tokens))]
    windows = {}  # by its tokens, what every latent is on a window
    for ids, values in zip(dialogues, acts, strict=True):
        for start in range(0, len(ids), 32):
            part = torch.nn.functional.pad(values[start : start + 32], (0, 0, 0, max(0, start + 32 - len(ids))))
            windows.setdefault((start, ids[start : start + 32]), part)
    read = {latent.latent_index: (at, values) for latent, _, (at, values) in (d for b in dataset.buffers for d in b)}
    assert sorted(read) == store.indices.tolist()
    total = torch.cat(acts)
    for index, (_, values) in read.items():
        expected = total[:, index][total[:, index] > 1e-5]
        assert len(values) == len(expected) == store.columns["n_active"][index]
        assert torch.allclose(values.float().sort()[0], expected.sort()[0], rtol=1e-3)
    records = {record.latent.latent_index: record for record in dataset}
    assert set(records) == {i for i in read if record_windows(acts, i) >= 200} >= {TOKEN, START, FIRST}
    pad = features.lm.tokenizer.eos_token_id
    for index, record in records.items():
        assert len(record.examples) == record_windows(acts, index)
        silent = len(dataset.tokens.flatten()) // 32 - len(record.examples)
        assert (len(record.train), len(record.test)) == (40, 50)
        assert len(record.not_active) == (50 if silent >= 50 else 0)
        seen = {ids: values[:, index] for (_, ids), values in windows.items()}
        for example in [*record.examples[:50], *record.train, *record.test]:
            expected = seen[unpadded(example.tokens.tolist(), seen, pad)]
            assert torch.allclose(example.activations.float(), expected, rtol=1e-3)
        assert record.max_activation == pytest.approx(store.feature(index).max_act, rel=1e-3)
        assert record.examples[0].max_activation == max(e.max_activation for e in record.examples)
        dialogue = [e.tokens.tolist() for e in record.not_active if not (e.tokens == pad).all()]
        assert len(dialogue) >= 0.8 * len(
            record.not_active
        )  # of them up to seven are padding, at the end of the last row
        for ids in dialogue:
            assert not seen[unpadded(ids, seen, pad)].any()
        padded = sum(-(-len(ids) // 32) * 32 for ids in dialogues)
        assert record.per_token_frequency == pytest.approx(len(read[index][1]) / padded, rel=256 / padded)
    (record,) = latent_dataset(root, modules=["layers.1"], latents={"layers.1": torch.tensor([START])})
    assert record.latent.latent_index == START


def record_windows(acts: list[torch.Tensor], index: int) -> int:
    """Windows of 32 tokens in which a latent is active."""
    return sum(bool(part.any()) for values in acts for part in values[:, index].split(32))


def unpadded(ids: list[int], seen: dict[tuple[int, ...], Any], pad: int) -> tuple[int, ...]:
    """The tokens of a window of one dialogue, without what fills it up."""
    for n in range(32, 0, -1):
        if tuple(ids[:n]) in seen and ids[n:] == [pad] * (32 - n):
            return tuple(ids[:n])
    raise AssertionError(f"no window of a dialogue: {ids}")


# --- SAEDashboard -----------------------------------------------------------------------------------------------------


def test_sae_dashboard_opens_a_batch(run: Path, store: FeatureStore, tmp_path: Path) -> None:
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    data = json.loads((exported(run, tmp_path, "saedashboard") / "batch-0.json").read_text())
    batch = NeuronpediaDashboardBatch(**data)
    assert batch.to_dict() == data
    assert (batch.model_id, batch.layer) == ("plain", 1)
    assert [feature.feature_index for feature in batch.features] == store.indices.tolist()
    for feature in batch.features:
        known = store.feature(feature.feature_index)
        contexts = (*known.contexts, *known.sampled)
        assert [a.tokens for a in feature.activations] == [list(c.tokens) for c in contexts]
        for activation, context in zip(feature.activations, contexts, strict=True):
            assert activation.values == pytest.approx(context.acts, abs=5e-6)
            assert activation.values[activation.qualifying_token_index] == pytest.approx(context.value, abs=5e-6)
            top = context.quantile is None
            assert (activation.bin_min == activation.bin_contains == -1) == top
            assert activation.bin_min <= context.value <= activation.bin_max + 1e-5
        assert feature.frac_nonzero == pytest.approx(known.density, abs=1e-9)
        assert feature.pos_str == [token for token, _ in known.promoted]


# --- Neuronpedia ------------------------------------------------------------------------------------------------------


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def test_neuronpedias_client_uploads_the_body_that_chatsae_writes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_explanation import Explanation
    from neuronpedia.np_feature import Feature, Logit
    from neuronpedia.requests.feature_request import MAX_FEATURES_PER_BATCH, FeatureRequest

    from chatsae.features.export.neuronpedia import UPLOAD

    assert UPLOAD == MAX_FEATURES_PER_BATCH
    ours = json.loads((exported(run, tmp_path, "neuronpedia") / "batch-0.json").read_text())
    place = {"modelId": ours["modelId"], "source": ours["source"]}
    features = [
        Feature(
            **place,
            index=f["index"],
            density=f["density"],
            top_logits=[Logit(**logit) for logit in f["topLogits"]],
            bottom_logits=[Logit(**logit) for logit in f["bottomLogits"]],
            explanations=[Explanation(**place, index=f["index"], **e) for e in f["explanations"]],
            activations=[Activation(**place, index=f["index"], **a) for a in f["activations"]],
        )
        for f in ours["features"]
    ]
    with Neuronpedia(monkeypatch) as server:
        FeatureRequest().upload_batch(ours["modelId"], ours["source"], features)
    ((path, body),) = server.got
    assert path == "/api/feature/upload-batch"
    assert without_nulls(body) == without_nulls(ours)


def test_neuronpedias_client_reads_a_feature_of_the_bulk_import(
    run: Path, store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `Feature.get` on the rows as the import puts them into the database."""
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_feature import Feature

    folder = exported(run, tmp_path, "neuronpedia-bulk")
    rows = {
        kind: list(map(json.loads, gzip.decompress((folder / kind / "batch-0.jsonl.gz").read_bytes()).splitlines()))
        for kind in ("features", "activations", "explanations")
    }
    source = "1-chatsae-fast-1x-standard"
    with Neuronpedia(monkeypatch) as server:
        for row in rows["features"]:
            own = {
                kind: [{**each, "source": each["layer"]} for each in rows[kind] if each["index"] == row["index"]]
                for kind in ("activations", "explanations")
            }
            with pytest.raises(ValueError, match="between 0 and 1 inclusive, got -1"):  # SAEDashboard's mark of the top
                Activation.from_np_db_json(own["activations"][0])
            own["activations"] = [{**a, "binContains": max(a["binContains"], 0)} for a in own["activations"]]
            server.answers[f"/api/feature/plain/{source}/{row['index']}"] = row | own
        found = [Feature.get("plain", source, index) for index in store.indices.tolist()]
    assert [int(feature.index) for feature in found] == store.indices.tolist()
    assert {e.text for feature in found for e in feature.explanations or ()} == {"ends"}
    for feature in found:
        known = store.feature(int(feature.index))
        contexts = (*known.contexts, *known.sampled)
        assert feature.density == pytest.approx(known.density, abs=1e-9)
        assert [a.tokens for a in feature.activations or ()] == [list(c.tokens) for c in contexts]
        for activation, context in zip(feature.activations or (), contexts, strict=True):
            assert activation.values == pytest.approx(context.acts, abs=5e-6)
            assert (activation.quantileMin == -1) == (context.quantile is None)


if __name__ == "__main__":
    (SCHEMAS / "saebench.json").write_text(json.dumps(saebench_schema(), indent=1) + "\n")
