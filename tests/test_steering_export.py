"""Exported steering does elsewhere what it does here: same layer, same sign, same strength, at every token."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import chatsae
from chatsae.cli import main
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.steering.export.bias import find_fold, write_folded
from chatsae.steering.export.constant import constants
from chatsae.steering.export.vectors import MOST_NUMBERS, control_vector, neuronpedia_vector
from chatsae.steering.spec import SteerSpec, Where
from export_schemas import check
from feature_samples import TOKEN, plain_model, planted_run
from sae_samples import spec as sae_spec
from tiny_models import tiny_model, tiny_tokenizer

LAYER = 3


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return LanguageModel("demo", [LAYER], head=True)


@pytest.fixture(scope="module")
def sae(demo: LanguageModel) -> SAE:
    """Decoder rows of other lengths than 1."""
    made = SAE.create(sae_spec(demo.d_in, layer=LAYER))
    made.W_dec.data.copy_(3 * torch.randn(made.W_dec.shape, generator=torch.Generator().manual_seed(0)))
    return made


def random_spec(d_in: int, layer: int, strength: float = 20.0, **options: Any) -> SteerSpec:
    vector = torch.randn(d_in, generator=torch.Generator().manual_seed(layer))
    return SteerSpec(vector=vector, layer=layer, strength=strength, **options)


def ids_of(lm: LanguageModel) -> torch.Tensor:
    return torch.randint(lm.vocab_size, (3, 20), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits.float()


def steered(lm: LanguageModel, specs: list[SteerSpec]) -> torch.Tensor:
    with chatsae.steer(lm, specs=specs):
        return logits(lm.model, ids_of(lm))


# --- control vectors --------------------------------------------------------------------------------------------------


def llama_cpp_buffer(path: Path) -> tuple[np.ndarray, int]:
    """What llama.cpp's loader makes of a file at scale 1: direction.N at the place N - 1, all of one width."""
    reader = gguf.GGUFReader(path)
    buffer = np.zeros(0, dtype=np.float32)
    width = len(reader.tensors[0].data)
    for tensor in reader.tensors:
        kind, _, number = tensor.name.partition(".")
        assert kind == "direction"  # another tensor makes it refuse the file
        assert int(number) > 0  # zero too
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.data.shape == (width,)
        at = width * (int(number) - 1)
        buffer = np.pad(buffer, (0, max(0, at + width - len(buffer))))
        buffer[at : at + width] += tensor.data
    return buffer, width


@contextmanager
def as_llama_cpp(lm: LanguageModel, path: Path, *, sign: int = 1, shift: int = 0) -> Iterator[None]:
    """Hooks that do what llama.cpp does: block il, from 1 on, reads the place il - 1 and adds it to its output."""
    buffer, width = llama_cpp_buffer(path)
    with ExitStack() as stack:
        for il in range(1, lm.n_layers):
            part = torch.from_numpy(buffer[width * (il - 1) : width * il].copy())
            block = lm.blocks[il + shift] if il + shift < lm.n_layers else None
            if len(part) == width and block is not None:
                handle = block.register_forward_hook(lambda module, args, out, part=part: out + sign * part)
                stack.callback(handle.remove)
        yield


@pytest.mark.parametrize("alpha", [40.0, -15.0])
def test_a_control_vector_steers_as_llama_cpp_reads_it(
    demo: LanguageModel, sae: SAE, tmp_path: Path, alpha: float
) -> None:
    specs = [SteerSpec(sae=sae, feature=5, strength=alpha)]
    path = tmp_path / "v.gguf"
    path.write_bytes(control_vector(constants(specs), "qwen2"))
    wanted, plain = steered(demo, specs), logits(demo.model, ids_of(demo))
    change = (wanted - plain).abs().max()
    assert change > 1
    with as_llama_cpp(demo, path):
        assert (logits(demo.model, ids_of(demo)) - wanted).abs().max() < 1e-5 * change
    for wrong in ({"sign": -1}, {"shift": 1}, {"shift": -1}):
        with as_llama_cpp(demo, path, **wrong):
            assert (logits(demo.model, ids_of(demo)) - wanted).abs().max() > 0.1 * change


def test_several_specs_add_up_by_layer(demo: LanguageModel, sae: SAE, tmp_path: Path) -> None:
    specs = [
        SteerSpec(sae=sae, feature=5, strength=12.0),
        SteerSpec(sae=sae, feature=6, strength=-7.0),
        random_spec(demo.d_in, 1, 9.0),
        random_spec(demo.d_in, demo.n_layers - 1, 5.0),  # the last layer has a place too
    ]
    path = tmp_path / "v.gguf"
    path.write_bytes(control_vector(constants(specs), "qwen2"))
    assert [t.name for t in gguf.GGUFReader(path).tensors] == ["direction.1", "direction.3", "direction.5"]
    wanted = steered(demo, specs)
    with as_llama_cpp(demo, path):
        got = logits(demo.model, ids_of(demo))
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@given(st.sets(st.integers(0, 200), min_size=1, max_size=5), st.integers(1, 70), st.text(max_size=9))
@settings(max_examples=25, deadline=None)
def test_the_reader_of_gguf_finds_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, layers: set[int], width: int, hint: str
) -> None:
    generator = torch.Generator().manual_seed(width)
    directions = {layer: torch.randn(width, generator=generator).double() for layer in layers}
    path = tmp_path_factory.mktemp("gguf") / "v.gguf"
    path.write_bytes(control_vector(directions, hint))
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": hint,
        "controlvector.layer_count": len(layers),
    }
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert set(found) == {f"direction.{layer}" for layer in layers}
    for layer, vector in directions.items():
        tensor = found[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.data_offset % gguf.GGUF_DEFAULT_ALIGNMENT == 0
        assert np.array_equal(tensor.data, vector.float().numpy())


# --- Neuronpedia ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, -30.0, 100.0, 250.0, -1000.0])
def test_a_neuronpedia_vector_times_its_strength_is_what_is_added(sae: SAE, alpha: float) -> None:
    spec = SteerSpec(sae=sae, feature=5, strength=alpha)
    body = neuronpedia_vector(spec, "qwen2.5-7b-it", "a feature")
    check(body, "neuronpedia-vector")
    keys = "modelId layerNumber hookType vector vectorDefaultSteerStrength vectorLabel"
    assert list(body) == keys.split()
    assert (body["modelId"], body["vectorLabel"]) == ("qwen2.5-7b-it", "a feature")
    assert (body["layerNumber"], body["hookType"]) == (LAYER, "hook_resid_post")
    row = sae.W_dec[5].detach().double()
    added = body["vectorDefaultSteerStrength"] * torch.tensor(body["vector"], dtype=torch.float64)
    assert torch.allclose(added, alpha * row / row.norm(), rtol=1e-12)
    if abs(alpha) <= 100:
        assert body["vectorDefaultSteerStrength"] == alpha
        assert torch.tensor(body["vector"]).norm() == pytest.approx(1)


def test_neuronpedia_takes_no_longer_vectors() -> None:
    neuronpedia_vector(random_spec(MOST_NUMBERS, 1), "m", "v")
    with pytest.raises(UserError, match=r"24,576 numbers at most, not 24,577"):
        neuronpedia_vector(random_spec(MOST_NUMBERS + 1, 1), "m", "v")


# --- what is no constant ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "ablate"}, "op is ablate"),
        ({"op": "set"}, "op is set"),
        ({"where": Where(phase="generated")}, r"where\.phase is 'generated'.*'both'"),
        ({"where": Where(roles=("user",))}, r"where\.roles is \('user',\)"),
        ({"where": Where(kinds=("control",))}, r"where\.kinds"),
        ({"where": Where(positions=(0,))}, r"where\.positions"),
        ({"where": Where(exclude=(0,))}, r"where\.exclude is \(0,\).*position 0 included"),
        ({"schedule": "decay"}, "schedule is decay"),
        ({"unit": "rel_norm"}, "rel_norm must be made absolute"),
        ({"strength": 0.0}, "strength is 0"),
        ({"strength": 1e300}, "too large for float32"),
    ],
)
def test_what_is_not_the_same_at_every_token_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        constants([random_spec(8, 1, **{"strength": 1.0} | options)])


def test_constants_need_something_of_one_width() -> None:
    with pytest.raises(UserError, match="nothing to export"):
        constants([])
    with pytest.raises(UserError, match="8 and 9 numbers"):
        constants([random_spec(8, 1), random_spec(9, 2)])
    with pytest.raises(UserError, match="after layer 1 is zero"):
        constants([random_spec(8, 1, 2.0), random_spec(8, 1, -2.0)])


# --- biases -----------------------------------------------------------------------------------------------------------

DOWN = "model.layers.{}.mlp.down_proj.bias"
FOLDS = {
    "gpt2": ("gpt2", {}, "transformer.h.{}.mlp.c_proj.bias", "gpt2"),
    "phi": ("phi", {}, "model.layers.{}.mlp.fc2.bias", "phi"),
    "bloom": ("bloom", {}, "transformer.h.{}.mlp.dense_4h_to_h.bias", "bloom"),
    "llama": ("llama", {}, DOWN, "llama"),
    "llama with a bias before": ("llama", {"attention_bias": True}, DOWN, "llama"),
    "llama tied": ("llama", {"tie_word_embeddings": True}, DOWN, "llama"),
    "qwen2": ("qwen2", {}, DOWN, "llama"),
    "mistral": ("mistral", {"sliding_window": None}, DOWN, "llama"),
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_folded_checkpoint_is_the_steered_model(name: str, tmp_path: Path) -> None:
    family, options, parameter, kind = FOLDS[name]
    lm = LanguageModel(tiny_tokenizer(tiny_model(tmp_path / "m", family, **options)), [1], head=True)
    specs = [random_spec(lm.d_in, 0, 4.0), random_spec(lm.d_in, 1, -8.0), random_spec(lm.d_in, 3, 6.0)]
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    facts = write_folded(lm, specs, tmp_path / "folded")
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())
    assert facts["parameters"] == {str(layer): parameter.format(layer) for layer in (0, 1, 3)}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")  # nothing of chatsae from here on
    assert read.config.model_type == facts["model_type"] == kind
    ids, wanted, plain = ids_of(lm), steered(lm, specs), logits(lm.model, ids_of(lm))
    got = logits(read, ids)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    change = (wanted - plain).abs().amax(-1)  # at every position, the first included
    assert change.min() > 0.1
    assert facts["steering_changes_logits"] > 1
    assert facts["logits_differ"] < 1e-4
    added = {key: p for key, p in read.named_parameters() if key not in before}
    assert len(added) == facts["added_biases"]
    assert all(not p.any() for key, p in added.items() if key not in facts["parameters"].values())
    assert AutoTokenizer.from_pretrained(tmp_path / "folded").chat_template == lm.tokenizer.chat_template


def test_the_bundled_model_can_be_folded_in_either_precision(demo: LanguageModel, sae: SAE, tmp_path: Path) -> None:
    specs = [SteerSpec(sae=sae, feature=5, strength=25.0)]
    write_folded(demo, specs, tmp_path / "a")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    wanted = steered(demo, specs)
    assert (logits(read, ids_of(demo)) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    low = LanguageModel("demo", [LAYER], head=True, dtype="bfloat16")
    facts = write_folded(low, specs, tmp_path / "b")
    assert facts["dtype"] == "bfloat16"
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert (logits(read, ids_of(demo)) - wanted).abs().max() < 0.02 * wanted.abs().max()  # of the bias alone
    assert facts["logits_differ"] < 0.2 * facts["steering_changes_logits"]


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen3", {}), ("qwen3", {"attention_bias": True}), ("gemma2", {}), ("mistral", {}), ("mixtral", {})],
)
def test_an_architecture_without_such_a_bias_is_refused(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """With attention_bias qwen3 has one of the right width, but the MLP reads the stream after it."""
    lm = LanguageModel(tiny_tokenizer(tiny_model(tmp_path / "m", family, **options)), [1], head=True)
    with pytest.raises(UserError, match=f"{family} has no bias that is added to the stream right after a layer"):
        write_folded(lm, [random_spec(lm.d_in, 1)], tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_a_fold_that_does_not_do_it_is_not_kept(
    demo: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with the steered model is a real one: another bias, and it fails."""
    from chatsae.steering.export import bias

    honest = find_fold(demo, [LAYER])
    wrong = bias.Fold({LAYER: honest.parameters[LAYER].replace("3", "2")}, honest.config, honest.added)
    monkeypatch.setattr(bias, "find_fold", lambda lm, layers: wrong)
    with pytest.raises(UserError, match="is not the steered model: logits differ"):
        write_folded(demo, [random_spec(demo.d_in, LAYER)], tmp_path / "folded")


def test_a_layer_that_does_not_exist_is_refused(demo: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"layer 6 does not exist: demo has layers 0\.\.5"):
        find_fold(demo, [6])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    return planted_run(folder / "of", plain_model(folder / "Plain_Model"))


def exported(run: Path, out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["export", str(run), "--out", str(out), "--json", *flags]) == 0
    (written,) = json.loads(capsys.readouterr().out)
    folder = Path(written["directory"])
    there = {p.name: p.stat().st_size for p in folder.iterdir()}
    assert there.pop("export.json") > 0
    assert written["files"] == there != {}
    assert json.loads((folder / "export.json").read_text())["specs"] == written["specs"]
    return written


def test_a_feature_of_a_run_is_exported_in_every_format(run: Path, tmp_path: Path, capsys: Any) -> None:
    lm = LanguageModel(run.parents[1] / "Plain_Model", [1], head=True)
    sae = SAE.load(run / "saes" / "L1-1x-standard")
    specs = [SteerSpec(sae=sae, feature=TOKEN, strength=-2.5)]
    wanted, what = steered(lm, specs), ["--feature", str(TOKEN), "--alpha", "-2.5"]
    for form in ("gguf", "repeng"):
        for _ in range(2):  # once more over what is there
            written = exported(run, tmp_path / form, capsys, "--format", form, *what)
        assert written["specs"] == [{"label": "L1-1x-standard feature 0", "layer": 1, "alpha": -2.5}]
        assert written["model_hint"] == "gpt2"
        folder = tmp_path / form / "L1-1x-standard-f0-a-2.5"
        assert str(folder) == written["directory"]
        with as_llama_cpp(lm, folder / "control_vector.gguf"):
            assert (logits(lm.model, ids_of(lm)) - wanted).abs().max() < 1e-5
    written = exported(run, tmp_path / "np", capsys, "--format", "neuronpedia-vector", *what)
    body = json.loads((Path(written["directory"]) / "vector-0.json").read_text())
    check(body, "neuronpedia-vector")
    assert (body["modelId"], body["vectorDefaultSteerStrength"]) == ("plain_model", -2.5)
    written = exported(run, tmp_path / "bias", capsys, "--format", "bias", *what)
    read = AutoModelForCausalLM.from_pretrained(written["directory"])
    assert (logits(read, ids_of(lm)) - wanted).abs().max() < 1e-5
    assert main(["export", str(run), "--format", "gguf", *what]) == 0
    told = capsys.readouterr()
    assert (run / "exports" / "gguf" / "L1-1x-standard-f0-a-2.5" / "control_vector.gguf").is_file()
    assert "L1-1x-standard-f0-a-2.5" in told.out
    assert "--control-vector" in told.err


def test_a_recipe_is_exported(run: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "calm.yaml"
    sae = run / "saes" / "L1-1x-standard"
    vector = [1.0] + [0.0] * 127
    entries = [{"sae": str(sae), "feature": TOKEN, "strength": 2}, {"vector": vector, "layer": 0, "strength": -3}]
    recipe.write_text(json.dumps({"steering": entries}))
    written = exported(run, tmp_path, capsys, "--format", "repeng", "--recipe", str(recipe))
    assert [s["layer"] for s in written["specs"]] == [1, 0]
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "calm" / "control_vector.gguf").tensors}
    assert tensors["direction.0"].tolist() == [-3.0] + [0.0] * 127
    assert np.linalg.norm(tensors["direction.1"]) == pytest.approx(2)
    written = exported(run, tmp_path / "np", capsys, "--format", "neuronpedia-vector", "--recipe", str(recipe))
    assert list(written["files"]) == ["vector-0.json", "vector-1.json"]
    assert main(["export", str(run), "--format", "gguf", "--recipe", str(recipe)]) == 2
    assert "llama.cpp's control vectors begin with layer 1" in capsys.readouterr().err
    for entry, message in (
        ({"vector": vector[:5], "layer": 1, "strength": 1}, "5 numbers"),
        ({"vector": vector, "layer": 4, "strength": 1}, "layer 4 does not exist"),
        ({"vector": vector, "layer": 1, "strength": 1, "where": {"roles": ["user"]}}, "where.roles"),
    ):
        recipe.write_text(json.dumps(entry))
        for form in ("gguf", "bias"):
            out = tmp_path / "refused"
            assert main(["export", str(run), "--format", form, "--recipe", str(recipe), "--out", str(out)]) == 2
            assert message in capsys.readouterr().err
            assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["gguf", "--feature", "3"], "--alpha is missing"),
        (["gguf", "--alpha", "3"], "--feature is missing"),
        (["gguf", "--feature", "128", "--alpha", "3"], "feature 128 does not exist"),
        (["gguf", "--feature", "3", "--alpha", "nan"], "--alpha must be a number, not nan"),
        (["gguf", "--feature", "3", "--alpha", "3", "--sae", "L9"], "has no SAE 'L9'"),
        (["gguf", "--feature", "3", "--alpha", "3", "--features", "2"], "--features: steering has none"),
        (["bias", "--feature", "3", "--alpha", "3", "--set-name", "a"], "--set-name: steering has none"),
        (["bias", "--feature", "3", "--alpha", "3", "--model-id", "a"], "--model-id: bias has none"),
        (["neuronpedia-vector", "--feature", "3", "--alpha", "3", "--model-id", "A B"], "lower-case"),
        (["gguf", "--feature", "3", "--recipe", "x.yaml"], "--feature: a recipe says that itself"),
        (["gguf", "--recipe", "missing.yaml"], "steering recipe missing.yaml does not exist"),
        (["delphi", "--feature", "0"], "--feature: only gguf, repeng, neuronpedia-vector, bias take it"),
        (["neuronpedia", "--alpha", "0"], "--alpha: only gguf"),
    ],
)
def test_a_command_that_cannot_be_names_its_flag(run: Path, flags: list[str], message: str, capsys: Any) -> None:
    assert main(["export", str(run), "--format", *flags]) == 2
    assert message in capsys.readouterr().err
