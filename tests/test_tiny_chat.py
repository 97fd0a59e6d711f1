"""The bundled tiny chat model: loads with plain transformers and is what its card says."""

import importlib
import json
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import chatsae.demo
from chatsae.batch import SPLITS
from chatsae.data import pydocs

DIRECTORY = Path(chatsae.demo.__file__).parent / "tiny-chat"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return json.loads((DIRECTORY / "card.json").read_text())


@pytest.fixture(scope="module")
def same_python(card: dict[str, Any]) -> bool:
    """Whether the documentation is that of the Python whose numbers the card has."""
    return platform.python_version() == card["corpus"]["python"]


@pytest.fixture(scope="module")
def heldout(card: dict[str, Any], same_python: bool) -> list[list[dict[str, str]]]:
    """The card's held-out dialogues, made from the documentation of this Python.

    Of the 64 objects of Python 3.11.7, 3.12.1 has 58 and 3.13.0 has 48.
    """
    known = {d.id: [asdict(m) for m in d.messages] for d in pydocs.dialogues("eval")}
    found = [known[i] for i in card["heldout"]["ids"] if i in known]
    assert len(found) == 64 if same_python else len(found) >= 32
    return found


def answer_spans(ids: list[int], tokenizer: Any) -> Iterator[tuple[int, int]]:
    """Start and end of each assistant answer, <|im_end|> included."""
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for i in range(len(ids) - len(header)):
        if ids[i : i + len(header)] == header:
            start = i + len(header)
            yield start, ids.index(end, start) + 1


def test_it_is_small_and_of_the_qwen2_architecture(model: Any, card: dict[str, Any]):
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.num_parameters() == card["model"]["parameters"] <= 4_000_000
    size = (DIRECTORY / "model.safetensors").stat().st_size
    assert size == card["model"]["safetensors_bytes"] <= 8_000_000
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with safe_open(DIRECTORY / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(k).dtype for k in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_all_files_are_small_and_none_is_left_over():
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"chat_template.jinja", "README.md", "card.json"}
    assert {p.name for p in DIRECTORY.iterdir()} == expected


def test_tokenizer_has_4096_tokens_and_the_stated_specials(tokenizer: Any, model: Any):
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert [tokenizer.convert_tokens_to_ids(t) for t in CONTROL] == [0, 1, 2]
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 2048
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 0


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x  # é ∑ 你好\t", " a  b\n\n\nc ", "It's 1234 != 'x'.", "naïve"]
)
def test_any_text_comes_back(tokenizer: Any, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_role_names_are_single_tokens(tokenizer: Any, role: str):
    ids = tokenizer.encode(f"<|im_start|>{role}\nDo it.<|im_end|>\n", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["<|im_start|>", role, "Ċ"]


def test_template_adds_a_default_system_prompt(tokenizer: Any):
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered.startswith("<|im_start|>system\nYou are Tiny, ")
    assert rendered.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
    assert 10 <= len(rendered.split("<|im_end|>")[0].split()[1:]) <= 16


def test_template_renders_every_role(tokenizer: Any):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "tool", "content": "T1"},
        {"role": "tool", "content": "T2"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nT1\n</tool_response>\n<tool_response>\nT2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_template_refuses_an_unknown_role(tokenizer: Any):
    with pytest.raises(jinja2.TemplateError, match="unknown role gpt"):
        tokenizer.apply_chat_template([{"role": "gpt", "content": "Hi"}], tokenize=False)


@torch.inference_mode()
def test_heldout_loss_is_that_of_the_card(
    model: Any, tokenizer: Any, card: dict[str, Any], heldout: list[list[dict[str, str]]], same_python: bool
):
    total, tokens = 0.0, 0
    for messages in heldout:
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for start, end in answer_spans(ids, tokenizer):
            total -= logits[torch.arange(start - 1, end - 1), ids[start:end]].sum().item()
            tokens += end - start
    assert len(card["heldout"]["ids"]) == card["heldout"]["dialogues"] == 64
    assert (tokens == card["heldout"]["tokens"]) == same_python
    # with the documentation of Python 3.12.1 the loss is 1.9 % smaller, with that of 3.13.0 0.6 % larger
    assert total / tokens == pytest.approx(card["heldout"]["nats_per_token"], rel=1e-3 if same_python else 0.1)


def test_training_lowered_the_heldout_losses(card: dict[str, Any]):
    pages, dialogues = card["heldout_loss"]["pages"], card["heldout_loss"]["dialogues"]
    assert pages["after_phase_1"] < 0.6 * pages["before"]
    assert dialogues["after_phase_2"] < 0.75 * dialogues["after_phase_1"]


@torch.inference_mode()
def test_answers_end_as_often_as_the_card_says(
    model: Any, tokenizer: Any, card: dict[str, Any], heldout: list[list[dict[str, str]]]
):
    tokenizer.padding_side = "left"
    firsts = [m[: 1 + [t["role"] for t in m].index("user")] for m in heldout[:32]]
    inputs = tokenizer.apply_chat_template(
        firsts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=256, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    proper = 0
    for row in out:
        answer = row[: row.index(2)] if 2 in row else [0]
        proper += bool(answer) and not {0, 1} & set(answer)
    assert proper / len(out) >= card["generation"]["share"] - 0.1
    assert card["generation"]["share"] > 0.8
    assert card["generation"]["prompts"] >= 100


@torch.inference_mode()
def test_position_0_norms_are_those_of_the_card(
    model: Any, tokenizer: Any, card: dict[str, Any], heldout: list[list[dict[str, str]]], same_python: bool
):
    first, rest = [], []
    for messages in heldout:
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        middle = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0].norm(dim=-1)
        first.append(middle[0])
        rest.append(middle[1:])
    ratio = (torch.stack(first).mean() / torch.cat(rest).median()).item()
    rel = 1e-3 if same_python else 0.03  # 0.9 % with the documentation of Python 3.13.0
    assert ratio == pytest.approx(card["position_0_norms"][2], rel=rel)  # hidden state 3 is what layer 2 returns


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that made the model, importable."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")


@pytest.mark.usefixtures("tools")
def test_labels_of_training_are_the_answers(tokenizer: Any, heldout: list[list[dict[str, str]]]):
    batches = importlib.import_module("tinychat.batches")
    rows = tokenizer.apply_chat_template(heldout, return_dict=False)
    for row, (ids, labels) in zip(rows, (batches.dialogue_batch(tokenizer, [r]) for r in rows), strict=True):
        expected = [batches.IGNORED] * len(row)
        for start, end in answer_spans(row, tokenizer):
            expected[start - 1 : end - 1] = row[start:end]
        assert ids[0].tolist() == row
        assert labels[0].tolist() == expected
    ids, labels = batches.dialogue_batch(tokenizer, rows[:5])
    assert ids.shape == labels.shape == (5, max(map(len, rows[:5])))
    assert set(ids[labels != batches.IGNORED].tolist()).isdisjoint({tokenizer.pad_token_id})


@pytest.mark.usefixtures("tools")
def test_buckets_hold_every_dialogue_once(tokenizer: Any, heldout: list[list[dict[str, str]]]):
    batches = importlib.import_module("tinychat.batches")
    rows = tokenizer.apply_chat_template(heldout, return_dict=False)
    found = []
    for ids, _ in batches.bucketed(tokenizer, rows, 2000):
        assert ids.numel() <= 2000 or len(ids) == 1
        found += [[i for i in row if i != tokenizer.pad_token_id] for row in ids.tolist()]
    assert sorted(found) == sorted(rows)


def test_readme_states_the_numbers_of_the_card(card: dict[str, Any]):
    text = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    for losses in card["heldout_loss"].values():
        for stage in ("before", "after_phase_1", "after_phase_2"):
            assert f"{losses[stage]:.3f}" in text
    assert f"{card['generation']['share']:.1%}" in text
    assert all(f"{n:.2f}" in text for n in card["position_0_norms"])


COPIED = 10  # words in a row; phrases such as "is called automatically when the" are anyone's


def test_the_repository_holds_no_text_of_the_documentation():
    words = re.compile(r"[a-z]+")
    known = set()
    for split in SPLITS:
        for o in pydocs.objects(split):
            own = words.findall(o.doc.lower())
            known.update(tuple(own[i : i + COPIED]) for i in range(len(own) - COPIED + 1))
    assert len(known) > 50_000
    root = Path(__file__).parents[1]
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False)
    names = listed.stdout.split() or [str(p.relative_to(root)) for p in DIRECTORY.parent.rglob("*") if p.is_file()]
    for name in names:
        try:
            own = words.findall((root / name).read_text(encoding="utf-8").lower())
        except (UnicodeDecodeError, OSError):
            continue  # no text, or a file that is not in this tree any more
        copied = [" ".join(gram) for i in range(len(own)) if (gram := tuple(own[i : i + COPIED])) in known]
        assert not copied, (name, copied)
