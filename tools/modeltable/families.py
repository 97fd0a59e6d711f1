"""Small random models of the architectures that transformers ships."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from chatsae.lm.hf import quiet
from chatsae.lm.stacks import headed_class
from modeltable.overrides import OVERRIDES

N_LAYERS = 6
LAYERS = (0, 1, 2, 3)  # a middle layer, and those before it
MAX_PARAMETERS = 20_000_000
_VOCAB = 512

# The largest value of a size, by its name in config.json; smaller defaults stay.
_CAPS = {
    N_LAYERS: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth num_blocks",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts swa_num_attention_heads linear_num_value_heads linear_num_heads mamba_num_heads "
    "index_n_heads indexer_n_heads",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k top_k_experts n_groups mamba_n_groups mamba_ngroups",
    1: "n_group topk_group num_expert_group num_nextn_predict_layers num_mtp_layers first_k_dense_replace",
    64: "hidden_size n_embd d_model embedding_size emb_dim dim dim_model intermediate_size ffn_dim dff dim_ff d_inner "
    "ffn_hidden_size encoder_ffn_dim decoder_ffn_dim n_inner word_embed_proj_dim feed_forward_size projection_dim "
    "shared_intermediate_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size "
    "out_hidden_size lru_width embedding_dim attention_window_size text_hidden_size",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size hidden_size_per_layer_input chunk_size "
    "mamba_chunk_size sliding_window sliding_window_size local_attention window_size attention_chunk_size image_size "
    "index_head_dim indexer_head_dim",
    16: "head_dim global_head_dim d_head kv_channels attention_head_size qk_nope_head_dim v_head_dim swa_head_dim "
    "qk_rope_head_dim q_lora_rank kv_lora_rank o_lora_rank linear_key_head_dim linear_value_head_dim linear_head_dim "
    "state_size ssm_state_size mamba_d_state mamba_head_dim mamba_d_head patch_size "
    "time_step_rank mamba_dt_rank",
    8: "rotary_dim",
    _VOCAB: "vocab_size audio_vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx "
    "max_target_positions max_source_positions seq_length max_seq_len",
}
CAPS = {name: cap for cap, names in _CAPS.items() for name in names.split()}


def causal_families() -> list[str]:
    """Every model_type of transformers' causal language models."""
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal_families() -> list[str]:
    """Every further model_type of its models that take text beside something else."""
    return sorted(set(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) - set(causal_families()))


def small_config(family: str) -> PreTrainedConfig:
    """The family's default configuration with every size cut down."""
    with quiet():
        return _shrink(transformers.CONFIG_MAPPING[family], OVERRIDES.get(family, {}))


def _shrink(config_class: Any, own: Mapping[str, Any], default: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """`own` are fields of the configuration; a dictionary for a part of it holds fields of that part."""
    if default is None:
        try:
            default = config_class()
        except ValueError:  # the defaults do not hold together
            default = config_class(**own)
    values: dict[str, Any] = default.to_dict()
    small: dict[str, Any] = {}
    for name, value in values.items():
        part = vars(default).get(name)
        if isinstance(part, PreTrainedConfig):
            small[name] = _shrink(type(part), own.get(name, {}), part)
        elif name in CAPS and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, CAPS[name])
        elif name in ("initializer_range", "init_std"):
            small[name] = 0.2  # at the usual 0.02 attention hardly mixes tokens, and a leak would not show
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            small[name] = {**value, "mrope_section": [4, 2, 2]}  # of head_dim 16
    if values.get("kv_lora_rank") is not None and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention shares nothing
    for i, name in enumerate(("bos_token_id", "eos_token_id", "pad_token_id")):
        if values.get(name) is not None:
            small[name] = i + 1
    small |= {name: value for name, value in own.items() if not isinstance(small.get(name), PreTrainedConfig)}
    return config_class(**small)


def build(config: PreTrainedConfig) -> Any:
    """A random model with its head.

    Raises:
        ValueError: it is still large.
    """
    model_class = headed_class(config)
    with quiet(), torch.device("meta"):
        n_parameters = sum(p.numel() for p in model_class(config).parameters())
    if n_parameters > MAX_PARAMETERS:
        raise ValueError(f"still {n_parameters:,} parameters")
    torch.manual_seed(0)
    with quiet():
        model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that nothing is a neutral one or zero
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save(model: Any, directory: Path) -> None:
    """As safetensors."""
    with quiet():
        model.save_pretrained(directory)
