"""The model card: card.json with every number, and README.md written from it."""

import json
import platform
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from chatsae.data import pydocs
from tinychat.batches import encoded
from tinychat.measure import Loss
from tinychat.tokenizer import DEFAULT_SYSTEM
from tinychat.training import Trained

DEFINITIONS = {
    "pages": "eval split, seed 0: pages joined by <|endoftext|>, blocks of 512 tokens, every token but a block's first",
    "dialogues": "the first 500 of the eval split, seed 0: each dialogue alone, tokens of the assistant's answers and "
    "the <|im_end|> that closes each",
    "heldout": "the dialogues of `heldout.ids`, made by the Python of `corpus.python`, scored as above with the saved "
    "weights in float32",
    "ends_properly": "greedy answers to the first user turns of held-out dialogues, at most 256 new tokens, that have "
    "text, end with <|im_end|> and hold no other control token",
    "samples": "held-out dialogues with three user turns; the answers are the model's own, greedy, turn by turn",
    "position_0_norms": "mean norm of the residual stream at position 0 over the median norm at all other positions "
    "of those dialogues, after each layer",
}


def corpus_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Objects, pages, dialogues and tokens of seed 0, by split."""
    facts: dict[str, Any] = {"python": platform.python_version(), "left_out": dict(pydocs.dropped())}
    for split in ("train", "eval", "interpret"):
        texts = [d.text for d in pydocs.documents(split)]
        dialogues = list(pydocs.dialogues(split))
        facts[split] = {
            "documented_objects": sum(bool(o.doc) for o in pydocs.objects(split)),
            "pages": len(texts),
            "page_tokens": sum(len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]),
            "dialogues": len(dialogues),
            "dialogue_tokens": sum(len(ids) for ids in encoded(tokenizer, dialogues)),
        }
    return facts


def write_json(path: Path, card: dict[str, Any]) -> None:
    path.write_text(json.dumps(card | {"definitions": DEFINITIONS}, indent=2) + "\n")


def losses(before: Loss, pretrained: Loss, final: Loss) -> dict[str, Any]:
    return {
        "before": before.nats_per_token,
        "after_phase_1": pretrained.nats_per_token,
        "after_phase_2": final.nats_per_token,
        "tokens": final.tokens,
    }


def phase_facts(phase: Trained) -> dict[str, Any]:
    return asdict(phase) | {"tokens_per_second": phase.tokens_per_second}


def model_facts(model: Qwen2ForCausalLM, size: int) -> dict[str, Any]:
    c = model.config
    return {
        "parameters": model.num_parameters(),
        "safetensors_bytes": size,
        "hidden_size": c.hidden_size,
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "intermediate_size": c.intermediate_size,
        "vocab_size": c.vocab_size,
    }


def write_readme(path: Path, card: dict[str, Any]) -> None:
    """README.md, every number of which comes from the card."""
    m, corpus, loss, heldout, ends = (card[k] for k in ("model", "corpus", "heldout_loss", "heldout", "generation"))
    introduction = f"""
        A chat model of {m["parameters"]:,} parameters ({m["safetensors_bytes"] / 1e6:.1f} MB in bfloat16), made so that
        chatsae can show and test its whole method on any machine, without a download. It is a genuine checkpoint of the
        Qwen2 architecture that plain transformers loads: {m["layers"]} layers, hidden size {m["hidden_size"]}, query
        heads: {m["heads"]}, key-value heads: {m["kv_heads"]}, {m["vocab_size"]:,} tokens, tied embeddings. It answers
        in well-formed turns about the Python standard library. It has read little and knows little: what it says of an
        object it was not trained on is a guess in the right form."""
    training = f"""
        AdamW (0.9, 0.95), weight decay 0.1, gradients clipped to norm 1, cosine to a tenth of the peak rate, bfloat16
        autocast, seed {card["seed"]}, processes: {card["processes"]}. Phase 1: pages in blocks of 512 tokens. Phase 2:
        whole dialogues, each alone, in other words each time, with the loss on the assistant's answers."""
    behaviour = f"""
        {ends["ending_properly"]} of {ends["prompts"]} greedy answers ({ends["share"]:.1%}) to held-out first questions
        end with `<|im_end|>` within {ends["max_new_tokens"]} tokens and hold no stray control token."""
    held = f"{heldout['dialogues']} of them, by the ids in `card.json`"
    norms = " · ".join(f"{n:.2f}" for n in card["position_0_norms"])
    licence = f"""
        The weights and the tokenizer were trained on the documentation of Python {corpus["python"]}, copyright Python
        Software Foundation, PSF License Agreement (<https://docs.python.org/3/license.html>). Its text is not part of
        the package: the corpus is read from the Python that runs it."""
    text = f"""# tiny-chat

{_prose(introduction)}

Its ChatML template adds a system prompt when a chat has none: "{DEFAULT_SYSTEM}"

`make tiny-chat` makes it again from nothing. Every number below was computed by that command and stands in full in
`card.json`, with the definition of each.

## Corpus
The documentation of the standard library of Python {corpus["python"]}: docstrings and the topics of `help()`
(`chatsae.data.pydocs`). Splits are by a hash of the object's name; no object is in two of them. Of seed 0:

| split | documented objects | pages | tokens | dialogues | tokens |
|---|---|---|---|---|---|
{_corpus_rows(corpus)}
## Training
{_prose(training)}

| phase | steps | peak rate | tokens | with a loss | minutes | tokens/s |
|---|---|---|---|---|---|---|
{_phase_rows(card["phases"])}
## Held-out loss (nats per token)
| | before | after phase 1 | after phase 2 | tokens |
|---|---|---|---|---|
{_loss_row("pages", loss["pages"])}
{_loss_row("answers in dialogues", loss["dialogues"])}
| {held} | | | {heldout["nats_per_token"]:.3f} | {heldout["tokens"]:,} |

## Behaviour
{_prose(behaviour)}

Norm of the residual stream at position 0 over the median norm elsewhere, after layers 0 to {m["layers"] - 1}: {norms}.

## Samples (held-out objects, greedy)
{_samples(card["samples"])}
## Licence
{_prose(licence)}
"""
    path.write_text(text, encoding="utf-8")


def _prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120)


def _corpus_rows(corpus: dict[str, Any]) -> str:
    keys = ("documented_objects", "pages", "page_tokens", "dialogues", "dialogue_tokens")
    return "".join(
        f"| {split} | {' | '.join(f'{corpus[split][k]:,}' for k in keys)} |\n"
        for split in ("train", "eval", "interpret")
    )


def _phase_rows(phases: list[dict[str, Any]]) -> str:
    return "".join(
        f"| {p['name']} | {p['steps']:,} | {p['lr']:g} | {p['tokens']:,} | {p['label_tokens']:,} "
        f"| {p['seconds'] / 60:.1f} | {p['tokens_per_second']:,.0f} |\n"
        for p in phases
    )


def _loss_row(name: str, loss: dict[str, Any]) -> str:
    stages = " | ".join(f"{loss[stage]:.3f}" for stage in ("before", "after_phase_1", "after_phase_2"))
    return f"| {name} | {stages} | {loss['tokens']:,} |"


def _samples(samples: list[list[dict[str, str]]]) -> str:
    chats = ("\n".join(f"[{m['role']}] {m['content']}" for m in messages) for messages in samples)
    return "\n".join(f"````\n{chat}\n````\n" for chat in chats)
