"""Files: exact round trips, what sae_lens of all generations wrote, and refusal of what would be read wrongly."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from chatsae.errors import UserError
from chatsae.sae import SAE, JumpReLUSAE, init_sae
from chatsae.sae.interop import read_sparsity
from parity_inputs import batch
from sae_samples import spec

GOLDEN = Path(__file__).parent / "golden"
THEIRS = sorted(p.parent for p in GOLDEN.glob("sae_lens_*_files/*/cfg.json"))


@torch.no_grad()
def random_sae(architecture="standard", form="paper", d_in=4, factor=2, dtype=torch.float32, seed=0, **fields) -> SAE:
    s = replace(spec(d_in, architecture=architecture, form=form, factor=factor), **fields)
    generator = torch.Generator().manual_seed(seed)
    sae = init_sae(s, generator, dtype)
    for bias in (sae.b_enc, sae.b_dec):
        bias.normal_(generator=generator)
    if isinstance(sae, JumpReLUSAE):
        sae.set_threshold_(2 * torch.rand(s.d_sae, generator=generator, dtype=torch.float64) ** 4)
    return sae


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    architecture=st.sampled_from(["standard", "jumprelu"]),
    form=st.sampled_from(["paper", "v6"]),
    d_in=st.integers(1, 9),
    factor=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
    layer=st.integers(0, 80),
    apply_b_dec=st.booleans(),
    numbers=st.tuples(*[st.floats(1e-6, 10)] * 4),
)
def test_what_is_saved_comes_back_exactly(
    architecture, form, d_in, factor, dtype, seed, layer, apply_b_dec, numbers, tmp_path
):
    coefficient, lr, bandwidth, init_threshold = numbers
    fields = {
        "layer": layer,
        "apply_b_dec_to_input": apply_b_dec,
        "coefficient": coefficient,
        "lr": lr,
        "name": "übung",
    }
    fields |= {"bandwidth": bandwidth, "init_threshold": init_threshold}
    sae = random_sae(architecture, form, d_in, factor, dtype, seed, **fields)
    sae.save(tmp_path, metadata={"model_name": "m", "note": {"a": [1, 2.5, None]}})
    loaded = SAE.load(tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.spec == sae.spec
    for name, tensor in sae.file_tensors().items():
        assert loaded.file_tensors()[name].equal(tensor), name
        assert loaded.file_tensors()[name].dtype == dtype
    x = torch.randn(5, d_in, dtype=dtype)
    assert loaded(x).equal(sae(x))
    assert loaded.encode(x).equal(sae.encode(x))
    assert (loaded.metadata["model_name"], loaded.metadata["note"]) == ("m", {"a": [1, 2.5, None]})
    first = (tmp_path / "cfg.json").read_bytes(), (tmp_path / "sae_weights.safetensors").read_bytes()
    loaded.save(tmp_path)
    assert ((tmp_path / "cfg.json").read_bytes(), (tmp_path / "sae_weights.safetensors").read_bytes()) == first


def test_the_cfg_speaks_to_both_generations(tmp_path):
    random_sae("jumprelu", layer=7).save(tmp_path, metadata={"model_name": "m", "context_size": 64})
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["metadata"]["sae_lens_version"] >= "6.0.0"
    assert cfg["metadata"]["hook_name"] == cfg["hook_name"] == "blocks.7.hook_resid_post"
    assert cfg["metadata"]["hf_hook_name"] == "model.layers.7"
    assert (cfg["hook_layer"], cfg["context_size"], cfg["model_name"]) == (7, 64, "m")
    assert (cfg["activation_fn_str"], cfg["normalize_activations"], cfg["architecture"]) == ("relu", "none", "jumprelu")
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}


def test_firing_frequencies_are_kept(tmp_path):
    frequency = torch.tensor([0, 1e-6, 0.01, 0.5, 1, 0.25, 0.125, 1e-9])
    random_sae().save(tmp_path, sparsity=frequency)
    log = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(log, (frequency.double() + 1e-10).log10().float())
    loaded = read_sparsity(tmp_path)
    assert loaded is not None
    torch.testing.assert_close(loaded, frequency, rtol=1e-4, atol=1e-14)
    random_sae().save(tmp_path / "without")
    assert read_sparsity(tmp_path / "without") is None


@pytest.mark.parametrize("path", THEIRS, ids=lambda p: f"{p.parent.name}/{p.name}")
@torch.no_grad()
def test_directories_that_sae_lens_wrote(path):
    sae = SAE.load(path)
    expected = load_file(path.parent / "outputs.safetensors")[path.name]
    torch.testing.assert_close(sae(batch(5, torch.float32)), expected, rtol=1e-5, atol=1e-5)
    assert sae.spec.architecture == path.name.split("-")[0]
    assert sae.spec.form == ("paper" if "5.10.7" in str(path) and sae.spec.architecture == "standard" else "v6")
    assert (sae.spec.layer, sae.spec.coefficient) == (3, 0.7)
    assert sae.spec.apply_b_dec_to_input == (path.name not in ("standard-runner", "standard-inference"))
    assert sae.metadata["model_name"] == "tiny"


def test_there_are_such_directories():
    assert len(THEIRS) == 8


# ---- directories written by hand, one variation at a time

V5 = {
    "architecture": "jumprelu",
    "d_in": 4,
    "d_sae": 8,
    "dtype": "float32",
    "hook_name": "blocks.2.hook_resid_post",
    "hook_layer": 2,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": False,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
    "sae_lens_version": "5.10.7",
}
V6 = {
    "architecture": "jumprelu",
    "d_in": 4,
    "d_sae": 8,
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.2.hook_resid_post"},
}


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    every = {**random_sae("jumprelu").file_tensors(), **changes}
    return {name: tensor for name, tensor in every.items() if tensor is not None}


def put(path: Path, cfg: dict, weights: dict[str, torch.Tensor] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors() if weights is None else weights, path / "sae_weights.safetensors")
    return path


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("base", [V5, V6], ids=["5", "6"])
def test_the_bases_of_the_variations_load(base, tmp_path):
    sae = SAE.load(put(tmp_path, base))
    assert sae.encode(X).equal(random_sae("jumprelu").encode(X))
    assert (sae.spec.layer, sae.spec.name) == (2, "L2-2x-jumprelu")


def test_log_thresholds(tmp_path):
    weights = tensors()
    weights["log_threshold"] = weights.pop("threshold").log()
    loaded = SAE.load(put(tmp_path, V6, weights))
    assert isinstance(loaded, JumpReLUSAE)
    torch.testing.assert_close(loaded.threshold, tensors()["threshold"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("key", ["finetuning_scaling_factor", "scaling_factor"])
def test_finetuning_factors_go_into_the_decoder(key, tmp_path):
    scaling = torch.linspace(0.5, 2, 8)
    loaded = SAE.load(put(tmp_path, {**V5, "finetuning_scaling_factor": True}, tensors(**{key: scaling})))
    sae = random_sae("jumprelu")
    torch.testing.assert_close(loaded(X), sae.decode(sae.encode(X) * scaling))


@pytest.mark.parametrize("key", ["finetuning_scaling_factor", "scaling_factor"])
def test_factors_of_one_are_nothing(key, tmp_path):
    loaded = SAE.load(put(tmp_path, V5, tensors(**{key: torch.ones(8)})))
    assert loaded(X).equal(random_sae("jumprelu")(X))


def test_names_of_sae_lens_2(tmp_path):
    cfg = {"d_in": 4, "d_sae": 8, "hook_point": "blocks.5.hook_resid_post", "hook_point_layer": 5}
    cfg |= {"hook_point_head_index": None, "normalize_activations": False}
    loaded = SAE.load(put(tmp_path, cfg, tensors(threshold=None, scaling_factor=torch.ones(8))))
    assert (loaded.spec.architecture, loaded.spec.form, loaded.spec.layer) == ("standard", "paper", 5)
    assert loaded.spec.apply_b_dec_to_input  # what sae_lens takes where nothing is said


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.9.hook_resid_post", 9),
        ("blocks.9.hook_resid_pre", 8),
        ("model.layers.9", 9),
        ("transformer.h.9", 9),
        ("blocks.9.hook_out", 9),
        ("blocks.9.hook_in", 8),
        (None, -1),
    ],
)
def test_hooks(hook, layer, tmp_path):
    cfg = {**V6, "metadata": {"sae_lens_version": "6.1.0", "hook_name": hook}}
    loaded = SAE.load(put(tmp_path, cfg))
    assert loaded.spec.layer == layer
    loaded.save(tmp_path / "again")
    assert SAE.load(tmp_path / "again").spec == loaded.spec


def test_half_precision_is_read_into_float32(tmp_path):
    loaded = SAE.load(put(tmp_path, {**V6, "dtype": "bfloat16"}, {k: v.bfloat16() for k, v in tensors().items()}))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.W_enc.equal(tensors()["W_enc"].bfloat16().float())


def test_thresholds_one_step_below_zero_act_as_zero_as_in_sae_lens_6(tmp_path):
    threshold = torch.tensor([-1e-4, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    loaded = SAE.load(put(tmp_path, V6, tensors(threshold=threshold)))
    assert isinstance(loaded, JumpReLUSAE)
    assert loaded.threshold.equal(threshold.clamp_min(0))


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (V5, {"activation_fn_str": "tanh-relu"}, r"activation_fn_str is 'tanh-relu'; only relu"),
        (V5, {"activation_fn": "gelu"}, r"activation_fn is 'gelu'; only relu"),
        (
            V5,
            {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": None},
            "TopK SAEs are not",
        ),
        (V5, {"architecture": "gated"}, r"architecture is 'gated'; not supported yet; standard and jumprelu are"),
        (V6, {"architecture": "topk", "k": 3}, r"architecture is 'topk'; not supported yet"),
        (V6, {"architecture": "batchtopk"}, r"architecture is 'batchtopk'; not supported yet"),
        (V6, {"architecture": "transcoder"}, r"architecture is 'transcoder'; not supported yet"),
        (V6, {"architecture": "quantum"}, r"architecture is 'quantum'; not known; standard and jumprelu are supported"),
        (V6, {"architecture": None}, r"architecture is missing"),
        (V5, {"normalize_activations": "expected_average_only_in"}, r"final checkpoint.*intermediate.*W_enc \*= s"),
        (V5, {"normalize_activations": True}, r"final checkpoint.*intermediate.*W_enc \*= s"),
        (V6, {"normalize_activations": "expected_average_only_in"}, r"expect scaled activations.*W_enc \*= s"),
        (V6, {"normalize_activations": "layer_norm"}, r"normalize_activations is 'layer_norm'; only \"none\""),
        (V6, {"reshape_activations": "hook_z"}, r"reshape_activations is 'hook_z'"),
        (V5, {"hook_name": "blocks.1.attn.hook_z"}, r"hook_name is 'blocks.1.attn.hook_z'; only the residual stream"),
        (V5, {"hook_name": "blocks.0.hook_resid_pre"}, r"hook_name is 'blocks.0.hook_resid_pre'; only the residual"),
        (V5, {"hook_head_index": 3}, r"hook_head_index is 3; SAEs of one attention head"),
        (V6, {"d_in": "4"}, r"d_in is '4'; a whole number"),
        (V6, {"d_sae": None}, r"d_sae is None; a whole number"),
        (V6, {"d_sae": 0}, r"d_sae is 0; a whole number of at least 1"),
        (V6, {"apply_b_dec_to_input": "yes"}, r"apply_b_dec_to_input is 'yes'; true or false"),
        (V5, {"activation_fn_kwargs": {"k": 4}}, r"activation_fn_kwargs is {'k': 4}; TopK SAEs are not"),
        (V5, {"activation_fn_str": None, "activation_fn_kwargs": {"k": 4}}, r"activation_fn_kwargs.*TopK SAEs are not"),
        (V5, {"activation_fn_kwargs": {"slope": 0.1}}, r"activation_fn_kwargs is {'slope': 0.1}; only relu"),
        (V6, {"metadata": {**V6["metadata"], "activation_fn": "topk"}}, r"activation_fn is 'topk'; TopK"),
        (V6, {"k": 4}, r"k is 4; TopK SAEs are not"),
        (V6, {"rescale_acts_by_decoder_norm": True}, r"rescale_acts_by_decoder_norm is True; activations that"),
        (V5, {"is_transcoder": True, "d_out": 4}, r"is_transcoder is True; transcoders"),
        (V5, {"d_out": 4}, r"d_out is 4; transcoders"),
        (V5, {"is_transcoder": False, "d_out": 5}, r"d_out is 5; transcoders"),
        (V5, {"hook_name_out": "blocks.2.hook_mlp_out"}, r"hook_name_out is 'blocks.2.hook_mlp_out'; transcoders"),
        (V6, {"metadata": {**V6["metadata"], "hook_layer_out": 3}}, r"hook_layer_out is 3; transcoders"),
        (
            V5,
            {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
            r"center_writing_weights is",
        ),
        (V5, {"model_kwargs": {"center_writing_weights": True}}, r"center_writing_weights is True; Transformer"),
        (V5, {"center_writing_weights": True}, r"center_writing_weights is True; Transformer"),
        (
            V6,
            {"metadata": {**V6["metadata"], "model_from_pretrained_kwargs": {"center_writing_weights": True}}},
            r"center_writing_weights is True",
        ),
        (V5, {"finetuning_scaling_factor": True}, r"finetuning_scaling_factor is True; sae_weights.* no such tensor"),
        (V5, {"l1_coefficient": "five"}, r"l1_coefficient is 'five'; a number"),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else "",
)
def test_settings_that_would_be_read_wrongly_are_refused(base, changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        SAE.load(put(tmp_path, {**base, **changes}))
    assert str(tmp_path / "cfg.json") in str(error.value)


def test_settings_that_change_nothing_are_read(tmp_path):
    harmless = {"is_transcoder": False, "d_out": 4, "activation_fn_kwargs": {}, "k": None, "hook_name_out": None}
    harmless |= {"model_from_pretrained_kwargs": {"center_writing_weights": False, "fold_ln": True}}
    assert SAE.load(put(tmp_path, {**V5, **harmless})).encode(X).equal(random_sae("jumprelu").encode(X))


def test_a_batchtopk_sae_that_was_saved_as_a_jumprelu_one_is_read(tmp_path):
    details = {"k": 32, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01}
    trained = {"training_architecture": "batchtopk", "training_architecture_details": details}
    loaded = SAE.load(put(tmp_path, {**V6, "metadata": {**V6["metadata"], **trained}}))
    assert loaded.encode(X).equal(random_sae("jumprelu").encode(X))


def test_a_sparsify_sae_is_called_one(tmp_path):
    cfg = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": 32, "d_in": 4}
    with pytest.raises(UserError, match=r"cfg\.json: a sparsify SAE \(k = 32\); TopK SAEs are not supported"):
        SAE.load(put(tmp_path, cfg))


ONES = torch.ones(8)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (V6, {"b_enc": None}, r"the tensor 'b_enc' of a jumprelu SAE is missing"),
        (V6, {"threshold": None}, r"the tensor 'threshold' of a jumprelu SAE is missing"),
        (V6, {"b_gate": ONES}, r"holds 'b_gate'"),
        (V6, {"log_threshold": ONES}, r"both threshold and log_threshold"),
        (V6, {"W_enc": torch.ones(8, 4)}, r"W_enc has shape \[8, 4\], cfg.json says \[4, 8\]; it is transposed"),
        (V6, {"W_dec": torch.ones(9, 4)}, r"W_dec has shape \[9, 4\], cfg.json says \[8, 4\]$"),
        (V6, {"b_dec": torch.ones(8)}, r"b_dec has shape \[8\], cfg.json says \[4\]$"),
        (V6, {"threshold": torch.ones(())}, r"threshold has shape \[\], cfg.json says \[8\]"),
        (V6, {"threshold": -ONES}, r"threshold holds -1; thresholds are never negative. Are these logarithms\?"),
        (V5, {"threshold": -1e-4 * ONES}, r"threshold holds -0.0001; thresholds are never negative"),
        (V6, {"W_enc": torch.full((4, 8), math.nan)}, r"W_enc holds NaN or inf"),
        (
            V6,
            {"b_enc": torch.ones(8).to(torch.float8_e4m3fn)},
            r"b_enc has dtype torch.float8_e4m3fn; a floating",
        ),
        (V6, {"b_enc": torch.ones(8, dtype=torch.int32)}, r"b_enc has dtype torch.int32; a floating-point dtype"),
        (V5, {"scaling_factor": 2 * ONES}, r"scaling_factor is not all ones.*finetuning_scaling_factor"),
        (V5, {"finetuning_scaling_factor": 2 * ONES}, r"finetuning_scaling_factor is not all ones"),
        (V5, {"scaling_factor": torch.ones(3)}, r"scaling_factor has shape \[3\], cfg.json says \[8\]"),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else "",
)
def test_tensors_that_do_not_fit_are_refused(base, changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        SAE.load(put(tmp_path, base, tensors(**changes)))
    assert str(tmp_path / "sae_weights.safetensors") in str(error.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = put(tmp_path, V6) / "sae_weights.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            SAE.load(tmp_path)
    path.write_bytes(whole)
    SAE.load(tmp_path)


def test_a_cfg_cut_anywhere_is_refused(tmp_path):
    path = put(tmp_path, V6) / "cfg.json"
    whole = path.read_text()
    for length in range(0, len(whole) - 1, 11):
        path.write_text(whole[:length])
        with pytest.raises(UserError, match=r"cfg\.json is damaged"):
            SAE.load(tmp_path)
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="an object was expected, not a list"):
        SAE.load(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is damaged"):
        SAE.load(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is no directory|nowhere does not exist"):
        SAE.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no cfg\.json"):
        SAE.load(tmp_path)
    put(tmp_path, V6)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no sae_weights\.safetensors"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"form": "v9"}, r"metadata\.chatsae\.form is 'v9', not one of paper, v6"),
        ({"layer": "2"}, r"metadata\.chatsae\.layer is '2'; int was expected"),
        ({"name": None}, r"metadata\.chatsae\.name is None; str was expected"),
    ],
)
def test_our_own_facts_are_checked(own, message, tmp_path):
    random_sae().save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"]["chatsae"] |= own
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match=message):
        SAE.load(tmp_path)


def test_a_place_that_cannot_be_written_and_metadata_that_is_not_json(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* cannot be written: "):
        random_sae().save(tmp_path / "file")
    with pytest.raises(UserError, match="metadata of L1-2x-standard cannot be written as JSON"):
        random_sae().save(tmp_path / "sae", metadata={"x": object()})
    assert not (tmp_path / "sae").exists()


def test_a_failed_save_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    random_sae(seed=1).save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chatsae.sae.interop.save_file", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        random_sae(seed=2).save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_loading_an_sae_imports_no_language_model_code():
    script = f"import sys; from chatsae.sae import SAE; SAE.load({str(THEIRS[0])!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"transformers", "tokenizers", "datasets", "chatsae.lm", "chatsae.data"} & set(loaded)
