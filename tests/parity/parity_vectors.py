"""Exported steering vectors beside repeng, which reads and applies them, and beside Neuronpedia's own client."""

from pathlib import Path

import numpy as np
import pytest
import torch
from neuronpedia_server import Neuronpedia

import chatsae
from chatsae.lm.load import LanguageModel
from chatsae.steering.export.constant import constants
from chatsae.steering.export.vectors import neuronpedia_vector, write_control_vector
from chatsae.steering.spec import SteerSpec


@pytest.fixture
def repeng(monkeypatch):
    """The package, which was written for NumPy 1 and names a type of it in a signature."""
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    return pytest.importorskip("repeng", reason="pip install --no-deps -r tests/parity/requirements-exports.txt")


@pytest.mark.parametrize("strength", [30.0, -12.0])
def test_repeng_steers_as_chatsae_does(repeng, tmp_path: Path, strength: float):
    lm = LanguageModel("demo", [3], head=True)
    generator = torch.Generator().manual_seed(0)
    specs = [
        SteerSpec(vector=torch.randn(lm.d_in, generator=generator), layer=layer, strength=strength) for layer in (0, 3)
    ]
    directions = constants(specs)
    write_control_vector(tmp_path / "v.gguf", directions, "qwen2")
    read = repeng.ControlVector.import_gguf(tmp_path / "v.gguf")
    assert read.model_type == "qwen2"
    assert set(read.directions) == {0, 3}
    for layer, vector in directions.items():
        assert np.array_equal(read.directions[layer], vector.float().numpy())
    ids = torch.randint(lm.vocab_size, (1, 20), generator=generator)  # its hook takes one row from transformers 5
    with torch.inference_mode():
        plain = lm.model(ids, use_cache=False).logits
        with chatsae.steer(lm, specs=specs):
            wanted = lm.model(ids, use_cache=False).logits
        control = repeng.ControlModel(lm.model, [0, 3])
        control.set_control(read)
        got = control(input_ids=ids, use_cache=False).logits
        control.set_control(read, -1.0)
        opposite = control(input_ids=ids, use_cache=False).logits
    change = (wanted - plain).abs().max()
    assert change > 1
    assert (got - wanted).abs().max() < 1e-5 * change
    assert (opposite - wanted).abs().max() > 0.1 * change


def test_repeng_writes_what_chatsae_writes(repeng, tmp_path: Path):
    """Its own exporter: the same keys, the same tensors."""
    gguf = pytest.importorskip("gguf")
    spec = SteerSpec(vector=torch.randn(40, generator=torch.Generator().manual_seed(0)), layer=2, strength=3.0)
    directions = constants([spec])
    write_control_vector(tmp_path / "ours.gguf", directions, "qwen2")
    theirs = repeng.ControlVector("qwen2", {layer: vector.float().numpy() for layer, vector in directions.items()})
    theirs.export_gguf(tmp_path / "theirs.gguf")
    found = []
    for name in ("ours", "theirs"):
        reader = gguf.GGUFReader(tmp_path / f"{name}.gguf")
        keys = {key: (field.types, field.contents()) for key, field in reader.fields.items()}
        found.append((keys, {t.name: (t.tensor_type, t.data.tolist()) for t in reader.tensors}))
    assert found[0] == found[1]


def test_neuronpedias_client_sends_the_body_that_chatsae_writes(monkeypatch):
    """Its client, against a server on this machine that keeps what it gets."""
    pytest.importorskip("neuronpedia", reason="pip install --no-deps -r tests/parity/requirements-exports.txt")
    from neuronpedia.np_vector import NPVector

    spec = SteerSpec(vector=torch.randn(40, generator=torch.Generator().manual_seed(0)), layer=3, strength=-12.5)
    ours = neuronpedia_vector(spec, "qwen2.5-7b-it", "L3 feature 5")
    unit = torch.as_tensor(spec.vector).double()
    names = {"modelId": "m", "source": "3-neuronpedia-resid-post", "index": "1", "label": "", "hookName": ""}
    with Neuronpedia(monkeypatch) as server:
        server.answers["/api/vector/new"] = {"vector": names | {"values": [], "defaultSteerStrength": 0}, "url": "u"}
        NPVector.new("L3 feature 5", "qwen2.5-7b-it", 3, "hook_resid_post", (unit / unit.norm()).tolist(), -12.5)
    assert server.got == [("/api/vector/new", ours)]
