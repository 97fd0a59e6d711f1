"""Only the blocks that are needed are built and read, of any decoder-only architecture; the others are refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chatsae.errors import UserError
from chatsae.lm.forward import forward
from chatsae.lm.hf import quiet
from chatsae.lm.load import LanguageModel, model_facts
from chatsae.lm.tap import read_residuals
from tiny_models import MULTIMODAL, VOCAB, random_tokens, tiny_model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


_LINE = 64  # bytes


def spoil(checkpoint: Path, *parts: str) -> None:
    """Give every tensor whose name holds one of the parts a shape that cannot be loaded.

    The others stay at the same addresses modulo 64: files are mapped into memory, and the kernels of some CPUs add in
    another order where weights lie at other ones. The same file always gives the same bits, which a resume needs.
    """
    for file in checkpoint.glob("*.safetensors"):
        tensors, before = load_file(file), _begin(file)
        wrong = {k: torch.zeros(16 + v.numel() % 16, 1) for k, v in tensors.items() if any(part in k for part in parts)}
        assert wrong
        for padding in range(0, _LINE, 8):  # headers end at multiples of 8
            save_file(tensors | wrong, file, metadata={"format": "pt", "padding": " " * padding})
            if _begin(file) == before:
                break
        assert _begin(file) == before


def _begin(file: Path) -> int:
    """Where the tensors of a file begin, modulo 64."""
    return (8 + int.from_bytes(file.read_bytes()[:8], "little")) % _LINE


@pytest.mark.parametrize("family", ["qwen2", "qwen2-moe"])  # the tensors of an MoE are put together while they are read
def test_later_layers_are_not_read(tmp_path: Path, family: str) -> None:
    whole = tiny_model(tmp_path / "whole", family)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    spoil(broken, ".layers.2.", ".layers.3.", "lm_head")
    tokens = random_tokens([4, 7])
    lm = LanguageModel(broken, [1])
    assert lm.cut
    assert torch.equal(forward(lm, tokens), forward(LanguageModel(whole, [1], head=True), tokens))
    n_loaded = sum(p.numel() for p in lm.model.parameters())
    facts = model_facts(broken)
    assert n_loaded == facts.parameters_through(1) + facts.d_in  # the final norm is the one thing more
    with pytest.raises(UserError, match="weights cannot be loaded"):
        LanguageModel(broken, [2])


@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_text_part_of_a_multimodal_model(tmp_path: Path, family: str) -> None:
    path = tiny_model(tmp_path / "model", family)
    ids = random_tokens([9, 9]).padded()
    with quiet():
        whole = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        states = whole(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        logits = whole(input_ids=ids, use_cache=False).logits
    towers = {name.partition(".")[0] for name, _ in whole.model.named_children()} - {"language_model"}
    assert towers
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    spoil(broken, ".layers.2.", ".layers.3.", "lm_head", *(f"{tower}." for tower in towers))
    lm = LanguageModel(broken, [0, 1])
    assert (lm.n_layers, lm.d_in, lm.vocab_size, lm.cut, len(lm.blocks)) == (4, 32, VOCAB, True, 2)
    with torch.inference_mode():
        assert all(torch.equal(r, s) for r, s in zip(read_residuals(lm, ids), states[1:3], strict=True))
    full = LanguageModel(path, [1]).with_head()
    with torch.inference_mode():
        assert torch.equal(full.model(input_ids=ids, use_cache=False).logits, logits)
    n_parameters = sum(p.numel() for p in full.model.parameters())
    assert n_parameters == model_facts(path).parameters
    assert n_parameters < sum(p.numel() for p in whole.parameters())  # the towers are left out
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or corrupt"):
        LanguageModel(path, [0])


def test_layers_that_do_not_run_on_text_alone(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "mllama")  # block 2 looks at pictures
    assert LanguageModel(path, [3]).layers == (3,)
    with pytest.raises(UserError, match=r"layer 2 of .* does not run on text alone"):
        LanguageModel(path, [2])


MEMORY = """
import os, sys
from chatsae.lm.load import LanguageModel
LanguageModel(sys.argv[1], [1])  # all that is imported on the way
def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
for layer, head in ((4, False), (23, True)):
    if os.fork() == 0:
        before = kilobytes("VmRSS")
        LanguageModel(sys.argv[2], [layer], head=head)  # which also runs: files are mapped, and read when they are used
        os.write(1, f"{kilobytes('VmHWM') - before}\\n".encode())
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_five_of_24_layers_takes_a_third_of_the_memory(tmp_path: Path, qwen: Path) -> None:
    # Embedding and head have 300 rows here, so that they do not count; a large vocabulary is loaded in either case.
    sizes = {"num_hidden_layers": 24, "hidden_size": 384, "intermediate_size": 1536}
    path = tiny_model(tmp_path, "qwen2", shard_size="40MB", **sizes)
    assert len(list(path.glob("*.safetensors"))) >= 4
    done = subprocess.run([sys.executable, "-c", MEMORY, qwen, path], capture_output=True, text=True, check=True)
    five, whole = map(int, done.stdout.split())
    assert whole > 190_000  # the weights are 212 MB
    assert five <= 0.35 * whole


def test_blocks_that_are_no_single_stream_are_refused(tmp_path: Path) -> None:
    streams = tiny_model(tmp_path / "gemma3n", "gemma3n")
    with pytest.raises(UserError, match=r"layer 1: .* several residual streams cannot be read"):
        LanguageModel(streams, [1])
    cycles = tiny_model(tmp_path / "hrm", "hrm")
    with pytest.raises(UserError, match=r"no list of 24 decoder blocks in this model; model.layer_path"):
        LanguageModel(cycles, [1])
    with pytest.raises(UserError, match="block 0 runs 4 times in a forward"):
        LanguageModel(cycles, [1], layer_path="L_module.layers")


def test_a_list_of_blocks_can_be_named(tmp_path: Path, qwen: Path) -> None:
    path = tiny_model(tmp_path, "longcat")  # its config.json counts two layers per block
    with pytest.raises(UserError, match=r"no list of 8 decoder blocks in this model; model.layer_path"):
        LanguageModel(path, [1])
    lm = LanguageModel(path, [1], layer_path="layers")
    assert (lm.n_layers, lm.cut, len(lm.blocks)) == (4, True, 2)
    full = lm.with_head()
    assert len(full.blocks) == 4
    assert torch.equal(
        forward(LanguageModel(path, [1], layer_path="model.layers"), random_tokens([5])),
        forward(full, random_tokens([5])),
    )
    assert len(model_facts(path, layer_path="layers").block_parameters) == 4
    with pytest.raises(UserError, match=r"model.layer_path: no list of blocks at 'h'; there is model.layers"):
        LanguageModel(qwen, [1], layer_path="h")
    assert torch.equal(
        forward(LanguageModel(qwen, [1], layer_path="layers"), random_tokens([5])),
        forward(LanguageModel(qwen, [1]), random_tokens([5])),
    )
