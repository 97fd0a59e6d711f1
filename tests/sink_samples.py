"""A model with a norm sink, and dialogues that hold it once."""

from pathlib import Path

import torch

from chatsae.batch import Dialogue, Message
from chatsae.lm.load import LanguageModel
from tiny_models import tiny_model, tiny_tokenizer

SAID = [
    Dialogue(str(i), "t", (Message("user", f"What is {w}?"), Message("assistant", "No.")))
    for i, w in enumerate(("one", "two q", "three"))
]
"""The second holds a q, which `with_sinks` makes a sink of."""


def with_sinks(folder: Path, layers: list[int]) -> LanguageModel:
    """A model in which the letter q is far longer than any other token."""
    lm = LanguageModel(tiny_tokenizer(tiny_model(folder)), layers, head=True)
    with torch.no_grad():
        weight = lm.model.get_input_embeddings().weight
        weight[lm.tokenizer.convert_tokens_to_ids("q")] = 1000 * weight.norm(dim=1).mean() / weight.shape[1] ** 0.5
    return lm
