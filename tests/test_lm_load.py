"""Loading only what is needed, and the message for everything that cannot be loaded."""

import json
import logging
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import chatsae
from chatsae.batch import Message
from chatsae.errors import UserError
from chatsae.lm import checkpoint
from chatsae.lm.harvest import forward
from chatsae.lm.hf import quiet
from chatsae.lm.load import LanguageModel, demo_model_path, load_tokenizer, model_facts
from tiny_models import DECODERS, VOCAB, random_tokens, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model(tmp_path_factory.mktemp("sharded"), "qwen2", shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) >= 6
    return path


def test_facts_of_a_loaded_model(qwen: Path) -> None:
    lm = LanguageModel(qwen, [2, 0])
    assert lm.layers == (0, 2)
    assert (lm.name, lm.d_in, lm.n_layers, lm.vocab_size, lm.max_positions) == (str(qwen), 32, 4, VOCAB, 256)
    assert (lm.dtype, lm.device) == (torch.float32, torch.device("cpu"))
    assert len(lm.blocks) == 3
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert not any("lm_head" in name for name, _ in lm.model.named_parameters())
    assert LanguageModel(qwen, [0], dtype="bfloat16").model.dtype == torch.bfloat16
    assert LanguageModel(qwen).head


@pytest.mark.parametrize("family", [*DECODERS, "gpt2", "phi", "olmo2", "gpt-oss", "minicpm3", "phi3-longrope"])
def test_a_cut_model_gives_the_bits_of_the_whole_one(tmp_path: Path, family: str) -> None:
    path = tiny_model(tmp_path, family)
    cut = LanguageModel(path, [0, 1])
    whole = LanguageModel(path, [0, 1], head=True)
    tokens = random_tokens([5, 30, 2])
    assert len(cut.blocks) == 2
    assert len(whole.blocks) == 4
    assert cut.d_in == whole.d_in == 32
    assert torch.equal(forward(cut, tokens), forward(whole, tokens))


def test_shortening_the_configuration_instead_would_be_wrong(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "minicpm3")
    ids = random_tokens([9]).padded()
    right = LanguageModel(path, [0])
    short = transformers.AutoModel.from_pretrained(path, num_hidden_layers=1, dtype=torch.float32)
    short.layers[0].register_forward_hook(lambda module, args, out: seen.append(out))
    seen: list[torch.Tensor] = []
    short(input_ids=ids)
    error = (forward(right, random_tokens([9]))[0] - seen[0][0]).norm() / seen[0].norm()
    assert error > 0.1


def test_model_facts_count_the_parameters_without_weights(qwen: Path, tmp_path: Path) -> None:
    whole = LanguageModel(qwen).model
    shutil.copy(qwen / "config.json", tmp_path)
    facts = model_facts(tmp_path)
    assert facts.parameters == sum(p.numel() for p in whole.parameters())
    assert (facts.d_in, facts.n_layers, facts.vocab_size, facts.model_type) == (32, 4, VOCAB, "qwen2")
    assert facts.embedding_parameters == VOCAB * 32
    assert len(facts.block_parameters) == 4
    assert facts.parameters_through(3) == sum(
        p.numel() for n, p in whole.named_parameters() if "embed" in n or "layers" in n
    )


def test_with_head_is_loaded_once_and_shares_its_weights(qwen: Path) -> None:
    lm = LanguageModel(qwen, [1])
    before = forward(lm, random_tokens([6]))
    full = lm.with_head()
    assert full is lm.with_head() is full.with_head()
    assert full.head
    assert full.model.lm_head.weight.shape == (VOCAB, 32)
    assert lm.blocks is full.blocks
    assert torch.equal(before, forward(lm, random_tokens([6])))


def test_chat_is_the_greedy_continuation_of_the_template(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path, dirs_exist_ok=True)
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 5, "repetition_penalty": 3.0, "eos_token_id": 257}
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling))
    lm = LanguageModel(tmp_path, [1])
    ids = lm.tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    n_prompt = len(ids)
    with torch.inference_mode():
        while len(ids) < n_prompt + 12 and ids[-1] != 257:
            logits = lm.with_head().model(input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
    expected = lm.tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)
    assert lm.chat("Hi", max_new_tokens=12) == expected
    assert lm.chat([Message("user", "Hi")], max_new_tokens=12) == expected
    assert lm.chat([{"role": "user", "content": "Hi"}], max_new_tokens=12) == expected
    assert lm.chat("Ho", max_new_tokens=12) != expected
    with pytest.raises(UserError, match="leaves no room"):
        lm.chat("x" * 300)


def test_chat_without_a_template_is_refused(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        LanguageModel(tmp_path, [1]).chat("Hi")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('only users speak') }}")
    with pytest.raises(UserError, match=r"refuses a plain dialogue \(template: only users speak\)"):
        LanguageModel(tmp_path, [1]).chat("Hi")


def test_loading_is_silent_and_leaves_logging_as_it_was(
    qwen: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    LanguageModel(qwen, [1]).with_head()
    load_tokenizer(qwen)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert (logger.level, transformers.utils.logging.is_progress_bar_enabled()) == (level, bars)


def test_tokenizer_needs_no_model(qwen: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(qwen / file, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer("Grüße 🙂")["input_ids"]) == "Grüße 🙂"
    assert tokenizer.chat_template
    with pytest.raises(UserError, match=r"no tokenizer_config.json or tokenizer.json in this directory"):
        load_tokenizer(tmp_path / "..")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "nobody/nothing: not found locally, hub unreachable"),
        ("/no/such/directory", "/no/such/directory: no such directory"),
        ("../nowhere/at/all", "../nowhere/at/all: no such directory"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        LanguageModel(name, [0])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)
    with pytest.raises(UserError, match=message):
        model_facts(name)


def test_paths_that_are_no_checkpoint(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json in this directory"):
        LanguageModel(tmp_path, [0])
    with pytest.raises(UserError, match="a file; the directory"):
        LanguageModel(qwen / "config.json", [0])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be used"):
        LanguageModel(tmp_path, [0])
    (tmp_path / "config.json").write_text('{"model_type": "perceptron9"}')
    with pytest.raises(UserError, match="perceptron9"):
        LanguageModel(tmp_path, [0])
    shutil.copy(qwen / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"no model.safetensors"):
        LanguageModel(tmp_path, [0])


def test_code_of_a_model_runs_only_when_asked(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match=r"brings its own code.*trust_remote_code"):
        LanguageModel(tmp_path, [0])


@pytest.mark.parametrize(
    ("family", "message"), [("bert", "bert is not a decoder-only"), ("t5", "t5 is an encoder-decoder model")]
)
def test_other_kinds_of_model_are_refused(tmp_path: Path, family: str, message: str) -> None:
    path = tiny_model(tmp_path, family)
    with pytest.raises(UserError, match=message):
        LanguageModel(path, [0])
    with pytest.raises(UserError, match=message):
        model_facts(path)


def test_a_model_that_sees_the_future_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "gemma3", use_bidirectional_attention=True)  # nothing but running it tells
    with pytest.raises(UserError, match="its tokens see those after them"):
        LanguageModel(path, [1])


def test_a_model_whose_blocks_lay_tokens_out_otherwise_is_refused(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64)
    with quiet():
        transformers.XLNetLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layer 1: the block puts out \[4, 2, 32\]; \[2, 4, 32\]"):
        LanguageModel(tmp_path, [1])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], r"layer 4 does not exist: .* has layers 0..3"),
        ([0, -1], "layer -1 does not exist"),
        ([1, 1], "twice: 1, 1"),
    ],
)
def test_wrong_layers(qwen: Path, layers: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LanguageModel(qwen, layers)


def test_wrong_device_and_dtype(qwen: Path) -> None:
    with pytest.raises(UserError, match=r"model.device: abacus is not available"):
        LanguageModel(qwen, [0], device="abacus")
    with pytest.raises(UserError, match=r"model.device: cuda:77 is not available"):
        LanguageModel(qwen, [0], device="cuda:77")
    with pytest.raises(UserError, match=r"model.dtype: 'float8' is not one of auto, float32, bfloat16"):
        LanguageModel(qwen, [0], dtype="float8")


def test_missing_and_broken_shards(sharded: Path, tmp_path: Path) -> None:
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    for name, spoil, message in [
        ("gone", lambda file: file.unlink(), "this shard is missing"),
        ("short", lambda file: file.write_bytes(file.read_bytes()[:-100]), "truncated or corrupt"),
        ("empty", lambda file: file.write_bytes(b""), "truncated or corrupt"),
    ]:
        shutil.copytree(sharded, tmp_path / name)
        spoil(tmp_path / name / files[1])
        with pytest.raises(UserError, match=f"{files[1]}: {message}"):
            LanguageModel(tmp_path / name, [0])
    shutil.copytree(sharded, tmp_path / "index")
    (tmp_path / "index" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        LanguageModel(tmp_path / "index", [0])


def test_a_tensor_missing_from_the_checkpoint(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path, dirs_exist_ok=True)
    tensors = load_file(qwen / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing from the checkpoint, layers.0.mlp.up_proj.weight"):
        LanguageModel(tmp_path, [0])


def test_demo_is_the_bundled_model(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo_model_path() == Path(chatsae.__file__).parent / "demo" / "tiny-chat"
    monkeypatch.setattr(checkpoint, "demo_model_path", lambda: qwen)
    lm = LanguageModel("demo", [0])
    assert (lm.name, lm.d_in) == ("demo", 32)
    assert lm.chat("Hi", max_new_tokens=3) == LanguageModel(qwen).chat("Hi", max_new_tokens=3)
    monkeypatch.setattr(checkpoint, "demo_model_path", lambda: tmp_path / "absent")
    with pytest.raises(UserError, match="demo: the bundled model is missing"):
        LanguageModel("demo", [0])


def test_a_hub_model_in_the_cache_works_without_network(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--nobody--tiny"
    shutil.copytree(qwen, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    lm = LanguageModel("nobody/tiny", [1])
    assert torch.equal(forward(lm, random_tokens([5])), forward(LanguageModel(qwen, [1]), random_tokens([5])))
    assert lm.tokenizer.chat_template == load_tokenizer("nobody/tiny").chat_template
    assert lm.with_head().head
    assert model_facts("nobody/tiny").d_in == 32


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "no such directory, and no such model on the hub"),
        (404, "RevisionNotFound", "no revision 'v9'"),
        (403, "GatedRepo", "gated on the hub"),
        (500, "", "not found locally, hub unreachable"),
    ],
)
def test_what_the_hub_says_is_passed_on(status: int, code: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            with pytest.raises(UserError, match=message) as error:
                LanguageModel("nobody/nothing", [0], revision="v9")
        finally:
            server.shutdown()
            thread.join()
    assert str(error.value).startswith("nobody/nothing: ")
    assert "\n" not in str(error.value)
