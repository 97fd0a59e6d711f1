"""Random checkpoints in the shapes of real models, and what reading them costs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from chatsae.errors import UserError
from chatsae.lm.hf import quiet
from chatsae.lm.load import LanguageModel

VOCAB = 8192
_POSITIONS = 4096
_DEEP = 896  # d_in from which a model has as many layers as Qwen2.5-0.5B
# class of the configuration; MLP width over d_in; layers of a small model (both have about 12 M parameters at 256);
# query heads that share a key head, of Qwen2.5-0.5B and of Llama 3.2 1B
_SHAPES = {"qwen2": ("Qwen2Config", 4864 / 896, 8, 7), "llama": ("LlamaConfig", 3.5, 12, 4)}
FAMILIES = tuple(_SHAPES)


def check_size(size: int) -> None:
    """Refuses a d_in that has no whole number of heads.

    Raises:
        UserError: see above.
    """
    if size != 32 and (size < 64 or size % 64):
        raise UserError(f"size: expected d_in of the model, 32 or a multiple of 64, or 0 for the default, got {size}")


def random_checkpoint(family: str, size: int, layers: int, directory: Path) -> tuple[int, int]:
    """Saves a model with random weights; how many parameters and layers it has. `layers` 0: as suits the size."""
    name, width, depth, group = _SHAPES[family]
    heads = max(size // 64, 1)
    key_heads = max(k for k in range(1, heads + 1) if heads % k == 0 and (k == 1 or k * group <= heads))
    config: Any = getattr(transformers, name)(
        vocab_size=VOCAB,
        hidden_size=size,
        intermediate_size=int(size * width) // 8 * 8,
        num_hidden_layers=layers or (24 if size >= _DEEP else depth),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters()), config.num_hidden_layers


def flops(lm: LanguageModel, lengths: Iterable[int]) -> float:
    """Floating point operations of sequences of these lengths, up to the deepest layer read.

    Two for each weight of a matrix and token; attention over the tokens before and the token itself, as wide as d_in.
    """
    run = lm.blocks[: max(lm.layers) + 1]
    weights = sum(p.numel() for block in run for p in block.parameters() if p.ndim == 2)
    counts = list(lengths)
    return 2.0 * weights * sum(counts) + 2.0 * lm.d_in * len(run) * sum(n * (n + 1) for n in counts)
