"""Sizes of a model, without weights: the paper's models from a table, so that a plan of them needs no network."""

from typing import Any

import transformers
from transformers import PreTrainedConfig

from chatsae.lm.checkpoint import ModelFacts, locate, model_facts, read_config

# model_type, hidden_size, num_hidden_layers, vocab_size, max_position_embeddings, intermediate_size,
# num_attention_heads, num_key_value_heads, head_dim, tie_word_embeddings: from the config.json of each.
_PAPER_MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 4096, 32, 128256, 131072, 14336, 32, 8, 128, False),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 3072, 28, 128256, 131072, 8192, 24, 8, 128, True),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 2048, 16, 128256, 131072, 8192, 32, 8, 64, True),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 28, 152064, 32768, 18944, 28, 4, 128, False),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 2048, 36, 151936, 32768, 11008, 16, 2, 128, True),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 28, 151936, 32768, 8960, 12, 2, 128, True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 896, 24, 151936, 32768, 4864, 14, 2, 64, True),
}


def planning_facts(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, layer_path: str | None = None
) -> ModelFacts:
    """Like `model_facts`, but the paper's models need no network.

    Raises:
        UserError: the configuration of another model cannot be read.
    """
    if name not in _PAPER_MODELS:
        return model_facts(name, revision, trust_remote_code, layer_path=layer_path)
    kind, d_in, n_layers, vocab_size, positions, intermediate, heads, kv_heads, head_dim, tied = _PAPER_MODELS[name]
    biases = head_dim * (heads + 2 * kv_heads) if kind == "qwen2" else 0
    block = d_in * head_dim * 2 * (heads + kv_heads) + biases + 3 * d_in * intermediate + 2 * d_in
    embedding = vocab_size * d_in
    return ModelFacts(
        name=name,
        model_type=kind,
        d_in=d_in,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_positions=positions,
        parameters=embedding * (1 if tied else 2) + n_layers * block + d_in,
        embedding_parameters=embedding,
        block_parameters=(block,) * n_layers,
    )


def planning_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model; of the paper's models the sizes of the table alone, without network.

    Raises:
        UserError: see `planning_facts`.
    """
    if name not in _PAPER_MODELS:
        return read_config(locate(name, revision, trust_remote_code))
    kind, d_in, n_layers, vocab_size, positions, intermediate, heads, kv_heads, head_dim, tied = _PAPER_MODELS[name]
    build: Any = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
    return build(
        hidden_size=d_in,
        num_hidden_layers=n_layers,
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )
