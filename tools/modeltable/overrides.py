"""What the general rule of `families` gets wrong, by family; a dictionary holds fields of that part."""

from typing import Any

_HEADS = {"head_dim": 16}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_COMPASS = {
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
}
_ASSISTED = {
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}
_DOTS3 = {
    "num_key_value_heads": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "per_layer_config": {},
    "head_dim": 32,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
_XDROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 6, "n_head": 4},
    "glm46v": {"text_config": _MROPE},
    "glm4v": {"text_config": _MROPE},
    "glm4v_moe": {"text_config": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [2, 1, 1]}}},
    "glm_ocr": {"text_config": _MROPE},
    "minicpm3": {"num_key_value_heads": 4, "head_dim": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "mamba", "attention", "mamba", "moe"]},
    "paddleocr_vl": {"text_config": _MROPE},
    "qwen2_5_omni_thinker": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "chameleon": {
        "vocabulary_map": {"<image>": 5},
        "vq_config": {"base_channels": 32, "num_embeddings": 64, "embed_dim": 16},
    },
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": _COMPASS},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 5, "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "emu3": {"vocabulary_map": {"<image>": 5}, "vq_config": {"base_channels": 32, "codebook_size": 64}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": _ASSISTED},
    "gemma4_unified_assistant": {"text_config": _ASSISTED},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "hunyuan_vl": {"text_config": _HEADS | {"rope_parameters": _XDROPE}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": _HEADS,
    "mllama": {"text_config": {"cross_attention_layers": [4]}},
    "nemotron": {"num_key_value_heads": 2} | _HEADS,
    "qwen2_vl": {"vision_config": {"embed_dim": 64, "hidden_size": 64}, "text_config": _MROPE},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "step3p7": {"text_config": {"sliding_window": 32}},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 3},
}

LAYER_PATHS = {"longcat_flash": "layers"}
"""Families whose config.json counts something else than blocks, and where their blocks are."""
