"""A model whose residual stream is token and position by themselves, SAEs planted on it, and dialogues."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from chatsae.batch import Dialogue, Message, TokenBatch
from chatsae.config import DataConfig, HarvestConfig, ModelConfig, RunConfig, SAEConfig
from chatsae.data.render import render
from chatsae.lm.load import LanguageModel
from chatsae.runs import Run
from chatsae.sae.base import SAE
from sae_samples import spec
from tiny_models import tiny_model, tiny_tokenizer

D_IN = 128
HALF = D_IN // 2
TOKEN, START, RARE, FIRST, DEAD, TWICE = 0, 1, 2, 3, 4, 5
"""Features: `<|im_end|>`, `<|im_start|>`, the byte Z, position 0, nothing, and the letter e where it stands late."""


def plain_model(directory: Path) -> Path:
    """GPT-2 whose blocks add nothing: its stream is one half the token's embedding, one half the position's."""
    tiny_tokenizer(tiny_model(directory, "gpt2", n_embd=D_IN, n_head=4, hidden_size=D_IN, num_attention_heads=4))
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for block in model.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight.zero_()
                projection.bias.zero_()
        for i, table in enumerate((model.transformer.wte.weight, model.transformer.wpe.weight)):
            generator = torch.Generator().manual_seed(i)
            table.zero_()
            unit = torch.nn.functional.normalize(torch.randn(len(table), HALF, generator=generator), dim=1)
            table[:, i * HALF : (i + 1) * HALF] = unit
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def planted(lm: LanguageModel, name: str = "L1-1x-standard") -> SAE:
    """An SAE whose first features are those named above; the others are silent."""
    tokens = lm.with_head().model.transformer.wte.weight
    positions = lm.with_head().model.transformer.wpe.weight
    ids = {text: lm.tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|im_start|>", "Z", "e")}
    sae = SAE.create(spec(D_IN, factor=1, name=name))
    sae.b_enc.fill_(-100)
    for feature, text in ((TOKEN, "<|im_end|>"), (START, "<|im_start|>"), (RARE, "Z"), (TWICE, "e")):
        sae.W_enc[:, feature] = 4 * tokens[ids[text]]
        sae.b_enc[feature] = -3  # others have cosines below 0.75
    sae.W_enc[:, TWICE] += 0.1 * positions[30]  # and more at position 30 than anywhere else
    sae.W_enc[:, FIRST] = 4 * positions[0]
    sae.b_enc[FIRST] = -3
    sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(5))))
    sae.W_dec[TOKEN] = torch.nn.functional.normalize(tokens[ids["Z"]], dim=0)
    sae.W_dec[DEAD] = torch.nn.functional.normalize(sae.W_dec[TOKEN] + 0.1 * sae.W_dec[RARE], dim=0)
    return sae


def said(n: int, offset: int = 0) -> list[Dialogue]:
    """Dialogues of different lengths; every tenth holds a Z."""
    return [
        Dialogue(
            f"d{i}",
            "test",
            (
                Message("user", f"Number {i + offset}, please" + "." * (i % 5)),
                Message("assistant", ("Zero " if i % 10 == 3 else "") + "here we are é" + " and there" * (i % 4)),
            ),
        )
        for i in range(n)
    ]


def rendered(lm: LanguageModel, n: int = 30) -> TokenBatch:
    """Those dialogues as tokens."""
    return TokenBatch.concat(list(render(said(n), lm.tokenizer)))


def planted_run(folder: Path, model: Path, n: int = 400, architectures: tuple = ("standard",)) -> Path:
    """A finished run of the planted SAE whose source has `n` dialogues, a tenth of them to interpret."""
    folder.mkdir()
    source = folder / "chat.jsonl"
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in d.messages]} for d in said(n)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = RunConfig(
        model=ModelConfig(name=str(model), layers=(1,)),
        data=DataConfig(sources=(str(source),)),
        harvest=HarvestConfig(token_budget=400),
        sae=SAEConfig(architectures=architectures, expansion_factors=(1,)),
    )
    run = Run.open(folder / "run", config)
    planted(LanguageModel(model, [1], head=True)).save(run.path / "saes" / "L1-1x-standard")
    run.close()
    return run.path
