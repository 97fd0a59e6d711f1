"""Where weights go and in which precision, and what is said when that cannot be."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatsae.errors import UserError
from chatsae.lm.forward import forward
from chatsae.lm.load import LanguageModel
from chatsae.lm.placement import pick_placement, refuse_offload
from tiny_models import random_tokens, tiny_model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def said(checkpoint: Path, **quantization: Any) -> Path:
    """Let the config.json of a checkpoint say that it is quantised."""
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    return checkpoint


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(UserError, match=r"model.device_map: 'everywhere' is not one of auto, balanced"):
        pick_placement(device_map="everywhere")
    with pytest.raises(UserError, match=r"model.device is cpu, model.device_map auto: only one"):
        pick_placement("cpu", device_map="auto")
    with pytest.raises(UserError, match=r"model.quantization: 'int3' is not one of checkpoint, dequantize, bnb-8bit"):
        pick_placement(quantization="int3")


def test_a_device_map_gives_the_same_bits(qwen: Path) -> None:
    pytest.importorskip("accelerate")
    lm = LanguageModel(qwen, [1], device_map="auto", dtype="float32")
    assert lm.device == lm.model.get_input_embeddings().weight.device
    assert lm.cut
    tokens = random_tokens([5, 9])
    assert torch.equal(
        forward(lm, tokens).cpu(), forward(LanguageModel(qwen, [1], device=lm.device, dtype="float32"), tokens).cpu()
    )
    assert lm.with_head().device == lm.device


def test_a_device_map_needs_accelerate(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(UserError, match=r"model.device_map needs the package accelerate: pip install accelerate"):
        LanguageModel(qwen, [1], device_map="auto")


def test_offloading_is_refused() -> None:
    for fits in ({}, {"": "cpu"}, {"": 0}, {"embed_tokens": 0, "layers.0": 1}, {"a": torch.device("cuda:0"), "b": 1}):
        refuse_offload(fits, "m")
    for away in ("cpu", "disk", torch.device("cpu")):
        with pytest.raises(UserError, match=r"m: does not fit .*: 1 modules, layers.1 first, would be offloaded"):
            refuse_offload({"layers.0": 0, "layers.1": away}, "m")
    with pytest.raises(UserError, match="does not fit"):
        refuse_offload({"layers.0": "disk"}, "m")


@pytest.mark.parametrize(
    ("package", "quantization", "message"),
    [
        (
            "bitsandbytes",
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes quantisation .* requires",
        ),
        ("optimum", {"quant_method": "gptq", "bits": 4}, "gptq.* cannot be used: .*optimum"),
        ("gptqmodel", {"quant_method": "awq", "bits": 4}, "awq.* cannot be used: .*gptqmodel"),
        (
            "torchao",
            {"quant_method": "torchao", "quant_type": "int4_weight_only"},
            "torchao.* cannot be used: .*torchao",
        ),
    ],
)
def test_a_package_that_quantised_weights_need(
    qwen: Path, tmp_path: Path, package: str, quantization: dict[str, Any], message: str
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    shutil.copytree(qwen, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=message) as error:
        LanguageModel(said(tmp_path, **quantization), [1])
    assert "\n" not in str(error.value)


def test_quantisation_that_does_not_hold_together(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"its quantisation \(ternary\) cannot be used: Unknown quantization type"):
        LanguageModel(said(tmp_path, quant_method="ternary"), [1])
    with pytest.raises(UserError, match=r"already quantised \(fp8\); model.quantization cannot do it again"):
        LanguageModel(said(tmp_path, quant_method="fp8"), [1], quantization="bnb-8bit")
    with pytest.raises(UserError, match=r"transformers cannot dequantise bitnet weights"):
        LanguageModel(said(tmp_path, quant_method="bitnet"), [1], quantization="dequantize")
    with pytest.raises(UserError, match=r"dequantize, but the checkpoint is not quantised"):
        LanguageModel(qwen, [1], quantization="dequantize")


def test_quantising_on_loading_needs_bitsandbytes(qwen: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    for quantization in ("bnb-8bit", "bnb-4bit"):
        with pytest.raises(UserError, match=f"requires bitsandbytes.*|{quantization}"):
            LanguageModel(qwen, [1], quantization=quantization)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may run fp8 as it is")
def test_fp8_weights_are_dequantised_only_when_asked(qwen: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    stored: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    for name, weight in load_file(qwen / "model.safetensors").items():
        stored[name] = exact[name] = weight
        if name.endswith("proj.weight"):
            scale = weight.abs().amax() / 448  # the largest of float8_e4m3fn
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
            exact[name] = stored[name].float() * scale
    for name, tensors in (("stored", stored), ("exact", exact)):
        shutil.copytree(qwen, tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    fp8 = said(tmp_path / "stored", quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    with pytest.raises(UserError, match=r"its fp8 weights cannot be used as they are here.*dequantize turns them into"):
        LanguageModel(fp8, [1])
    lm = LanguageModel(fp8, [1], quantization="dequantize")
    assert lm.cut
    tokens = random_tokens([5, 9])
    torch.testing.assert_close(forward(lm, tokens), forward(LanguageModel(tmp_path / "exact", [1]), tokens))
    whole = lm.with_head()
    assert whole.model.lm_head.weight.dtype == torch.float32
