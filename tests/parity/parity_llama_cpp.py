"""An exported control vector in llama.cpp itself: the log-probabilities of all tokens are those of `chatsae.steer`.

The wheel xllamacpp is llama.cpp's server. Its Python classes have no field for control vectors, so llama.cpp's own
parser of the command line fills them in: what is run is the `llama-server --control-vector FILE` of docs/exports.md.
"""

import ctypes
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import chatsae
from chatsae.config import ModelConfig, RunConfig, SAEConfig
from chatsae.lm.checkpoint import demo_model_path
from chatsae.lm.load import LanguageModel
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.steering.export.command import Wanted, export_steering
from chatsae.steering.spec import SteerSpec, load_specs
from sae_samples import spec

gguf = pytest.importorskip("gguf", reason="pip install --no-deps -r tests/parity/requirements-exports.txt")
xllamacpp = pytest.importorskip("xllamacpp", reason="pip install --no-deps -r tests/parity/requirements-exports.txt")

NAME = "L3-1x-standard"
PREFIXES = (1, 2, 9, 40)
"""Lengths of the prompts; of each the token that would follow is compared."""


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel("demo", [3], head=True, dtype="float32")


@pytest.fixture(scope="module")
def ids(lm: LanguageModel) -> torch.Tensor:
    return torch.randint(3, lm.vocab_size, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the bundled model with an SAE after layer 3 whose decoder rows are not of unit length."""
    config = RunConfig(
        model=ModelConfig(name="demo", layers=(3,)), sae=SAEConfig(architectures=("standard",), expansion_factors=(1,))
    )
    run = Run.open(tmp_path_factory.mktemp("llama") / "run", config)
    sae = SAE.create(spec(lm.d_in, layer=3, factor=1, name=NAME))
    with torch.no_grad():
        sae.W_dec.copy_(3 * torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(1)))
    sae.save(run.path / "saes" / NAME)
    run.close()
    return run.path


@pytest.fixture(scope="module")
def model(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a GGUF file in float32."""
    path, cfg = tmp_path_factory.mktemp("gguf") / "model.gguf", lm.model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    tokenizer = json.loads((demo_model_path() / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    assert sorted(tokens.values()) == list(range(lm.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, cfg.num_hidden_layers)
    for name, tensor in lm.model.state_dict().items():
        if name != "lm_head.weight":  # it is the embedding
            place, _, kind = name.rpartition(".")
            writer.add_tensor(f"{names.get_name(place)}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp(model: Path, ids: torch.Tensor, *flags: str) -> torch.Tensor:
    """The log-probabilities [P, V] behind each of PREFIXES, from `llama-server --model MODEL FLAGS`."""
    exact = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")  # by default float16
    line = ["llama-server", "--model", str(model), "--ctx-size", "256", "--threads", "1", *exact, *flags]
    library = ctypes.CDLL(sys.modules["xllamacpp.xllamacpp"].__file__)
    parse = library._Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E
    parse.restype = ctypes.c_bool
    params = xllamacpp.CommonParams()
    inside = ctypes.c_void_p(id(params) + object.__basicsize__)  # where the object holds llama.cpp's own record
    words = (ctypes.c_char_p * (len(line) + 1))(*(word.encode() for word in line), None)
    assert parse(len(line), words, inside, 4, None)  # 4: one of its programs; every flag here is one that all have
    assert (params.model.path, params.n_ctx) == (str(model), 256)
    server = xllamacpp.Server(params)
    found = torch.full((len(PREFIXES), 4096), torch.nan)
    for row, n in zip(found, PREFIXES, strict=True):
        asked = {"prompt": ids[:n].tolist(), "n_predict": 1, "n_probs": 4096, "temperature": 0, "cache_prompt": False}
        answer: Any = server.handle_completions(asked)
        for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[each["id"]] = each["logprob"]
    assert not found.isnan().any()
    return found


@torch.inference_mode()
def chatsaes(lm: LanguageModel, ids: torch.Tensor, specs: list[SteerSpec] | None = None) -> torch.Tensor:
    """The same of `chatsae.steer`."""
    with chatsae.steer(lm, specs=specs) if specs else nullcontext():
        logits = lm.model(ids[None], use_cache=False).logits[0]
    return logits[[n - 1 for n in PREFIXES]].log_softmax(-1)


def test_llama_cpp_reads_the_bundled_model(lm: LanguageModel, model: Path, ids: torch.Tensor) -> None:
    assert (llama_cpp(model, ids) - chatsaes(lm, ids)).abs().max() < 1e-3


@pytest.mark.parametrize("alpha", [25.0, -12.5])
def test_llama_cpp_steers_as_chatsae_does(
    run: Path, lm: LanguageModel, model: Path, ids: torch.Tensor, tmp_path: Path, alpha: float
) -> None:
    ((written,), _) = export_steering(run, Wanted(format="gguf", feature=7, alpha=alpha, out=tmp_path))
    file = str(Path(written["directory"]) / "control_vector.gguf")
    plain = chatsaes(lm, ids)
    wanted = chatsaes(lm, ids, [SteerSpec(sae=SAE.load(run / "saes" / NAME), feature=7, strength=alpha)])
    assert (wanted - plain).abs().amax(-1).min() > 1
    assert (llama_cpp(model, ids, "--control-vector", file) - wanted).abs().max() < 0.01
    assert (llama_cpp(model, ids, "--control-vector-scaled", f"{file}:1") - wanted).abs().max() < 0.01
    assert (llama_cpp(model, ids, "--control-vector-scaled", f"{file}:0") - plain).abs().max() < 0.01
    assert (llama_cpp(model, ids, "--control-vector-scaled", f"{file}:-1") - wanted).abs().max() > 1


def test_llama_cpp_adds_a_recipe_at_several_layers(
    run: Path, lm: LanguageModel, model: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Twice after one layer, and after the first and the last that it can steer."""
    vector = torch.randn(lm.d_in, generator=torch.Generator().manual_seed(2)).tolist()
    entries = [{"sae": str(run / "saes" / NAME), "feature": feature, "strength": 9} for feature in (3, 8)]
    entries += [{"vector": vector, "layer": layer, "strength": -6} for layer in (1, 5)]
    (tmp_path / "calm.yaml").write_text(json.dumps({"steering": entries}))
    asked = Wanted(format="gguf", recipe=tmp_path / "calm.yaml", out=tmp_path)
    ((written,), _) = export_steering(run, asked)
    file = str(Path(written["directory"]) / "control_vector.gguf")
    wanted = chatsaes(lm, ids, load_specs(tmp_path / "calm.yaml"))
    assert (wanted - chatsaes(lm, ids)).abs().amax(-1).min() > 1
    got = llama_cpp(model, ids, "--control-vector", file)
    assert (got - wanted).abs().max() < 0.01
    shifted = llama_cpp(model, ids, "--control-vector", file, "--control-vector-layer-range", "2", "5")
    assert (shifted - wanted).abs().max() > 0.1
