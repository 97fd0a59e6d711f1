"""The table of the paper's models: published sizes, and what transformers builds from the same numbers."""

import pytest
import torch
import transformers

from chatsae.lm.facts import _PAPER_MODELS, planning_facts

# Parameters as the safetensors metadata of each repository states them.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
}


@pytest.mark.parametrize("name", _PAPER_MODELS)
def test_sizes_equal_the_published_ones_and_those_of_the_real_architecture(name):
    facts = planning_facts(name)
    assert facts.parameters == PUBLISHED[name]
    kind, d_in, n_layers, vocab_size, positions, intermediate, heads, kv_heads, head_dim, tied = _PAPER_MODELS[name]
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](
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
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == facts.parameters
    blocks = tuple(sum(p.numel() for p in block.parameters()) for block in model.model.layers)
    assert blocks == facts.block_parameters
    through = model.get_input_embeddings().weight.numel() + sum(blocks[:5])
    assert facts.parameters_through(4) == through
