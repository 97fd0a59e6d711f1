"""Small random checkpoints of real architectures, saved as Hugging Face directories."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from chatsae.batch import TokenBatch
from chatsae.lm.harvest import bare_tokens
from chatsae.lm.hf import quiet

VOCAB = 300
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # at the usual 0.02 attention hardly mixes tokens, and a leak would not show
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 257,
}
_FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0]}
_ROPE = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        **_FACTORS,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
_OWN = object()  # in place of a common value: the class's own
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    "llama": ("LlamaConfig", {"rope_parameters": _ROPE["llama3"]}),
    "llama-dynamic": ("LlamaConfig", {"rope_parameters": _ROPE["dynamic"]}),
    "phi3-longrope": ("Phi3Config", {"rope_parameters": _ROPE["longrope"], "original_max_position_embeddings": 64}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    # scales every block by the number of layers, so that a shortened configuration would change all activations
    "minicpm3": ("MiniCPM3Config", {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}),
    "gpt2": ("GPT2Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "phi": ("PhiConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16},
    ),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 4}),
    "mamba": ("MambaConfig", {"state_size": 8}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {"head_dim": 8, "num_kv_shared_layers": 0, "sliding_window": 16, "vocab_size_per_layer_input": VOCAB},
    ),
    "longcat": (
        "LongcatFlashConfig",
        {
            "num_hidden_layers": _OWN,
            "num_layers": 4,
            "num_key_value_heads": 4,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
        },
    ),
    "hrm": ("HrmTextConfig", {"H_cycles": 2, "L_cycles": 2}),
    "bert": ("BertConfig", {"pad_token_id": 0}),
    "t5": ("T5Config", {"pad_token_id": 0, "decoder_start_token_id": 0}),
}
DECODERS = ("qwen2", "llama", "qwen3", "gemma2", "gemma3", "mixtral", "qwen2-moe")

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_heads": 4}
_PATCHES = {"image_size": 16, "patch_size": 4}
_TURNED = {"depth": 2, "out_hidden_size": 32, "patch_size": 4}
# class of the configuration, and what its text part and its vision part have of their own
_MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3-vl": ("Gemma3Config", {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16}, _PATCHES),
    "llava": ("LlavaConfig", {"model_type": "llama"}, {"model_type": "clip_vision_model", **_PATCHES}),
    "mistral3": ("Mistral3Config", {"model_type": "mistral", "head_dim": 8}, {"model_type": "pixtral", **_PATCHES}),
    "qwen2-vl": ("Qwen2VLConfig", _MROPE, {**_TURNED, "embed_dim": 32}),
    "qwen2.5-vl": ("Qwen2_5_VLConfig", _MROPE, {**_TURNED, "fullatt_block_indexes": [1]}),
    "qwen3-vl": ("Qwen3VLConfig", {**_MROPE, "head_dim": 8}, {**_TURNED, "deepstack_visual_indexes": [0]}),
    "mllama": (
        "MllamaConfig",
        {"model_type": "mllama_text_model", "cross_attention_layers": [2], "bos_token_id": 1},
        {**_PATCHES, "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64},
    ),
}
MULTIMODAL = ("gemma3-vl", "llava", "mistral3", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a family's tiny model; `overrides` are of its text part."""
    if family in _MULTIMODAL:
        name, text, vision = _MULTIMODAL[family]
        return getattr(transformers, name)(
            text_config={**_COMMON, **text, **overrides}, vision_config={**_EYES, **vision}, tie_word_embeddings=False
        )
    name, own = _FAMILIES[family]
    values = {**_COMMON, **own, **overrides}
    return getattr(transformers, name)(**{field: value for field, value in values.items() if value is not _OWN})


def tiny_model(directory: Path, family: str = "qwen2", *, shard_size: str = "1GB", **overrides: Any) -> Path:
    """Save a random model of the family in a directory and return it; small `shard_size` gives several files."""
    with quiet():
        config = tiny_config(family, **overrides)
    torch.manual_seed(0)
    if config.is_encoder_decoder:
        model: Any = transformers.AutoModelForSeq2SeqLM.from_config(config)
    elif family == "bert":
        model = transformers.AutoModelForMaskedLM.from_config(config)
    elif family in _MULTIMODAL:
        model = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that nothing is a neutral one or zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    with quiet():
        model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def tiny_tokenizer(directory: Path) -> Path:
    """Save a byte-level tokenizer with a ChatML template beside a tiny model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    wrapped.save_pretrained(directory)
    return directory


def random_tokens(lengths: list[int], seed: int = 0, vocab: int = VOCAB) -> TokenBatch:
    """Sequences of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return bare_tokens([torch.randint(vocab, (n,), generator=generator) for n in lengths])
