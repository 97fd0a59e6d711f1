"""Sizes of a model from its configuration alone: what `chatsae plan` needs, without weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from chatsae.errors import UserError


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder-only model; `block_parameters` counts the weights of one block's matrices."""

    name: str
    d_in: int
    n_layers: int
    vocab_size: int
    block_parameters: int

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuse layers that the model does not have.

        Raises:
            UserError: names the layer and the range.
        """
        for layer in layers:
            if not 0 <= layer < self.n_layers:
                raise UserError(f"model.layers: {self.name} has layers 0 to {self.n_layers - 1}, not {layer}")


def block_parameters(d_in: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Weights of a block with grouped-query attention and a gated MLP: q, k, v, o and gate, up, down."""
    return d_in * head_dim * (2 * heads + 2 * kv_heads) + 3 * d_in * intermediate


# hidden_size, num_hidden_layers, vocab_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim
# of the paper's models, from their config.json: a plan needs no network and no access to a gated repository.
_PAPER_MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 32, 128256, 14336, 32, 8, 128),
    "meta-llama/Llama-3.2-3B-Instruct": (3072, 28, 128256, 8192, 24, 8, 128),
    "meta-llama/Llama-3.2-1B-Instruct": (2048, 16, 128256, 8192, 32, 8, 64),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 152064, 18944, 28, 4, 128),
    "Qwen/Qwen2.5-3B-Instruct": (2048, 36, 151936, 11008, 16, 2, 128),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 151936, 8960, 12, 2, 128),
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 151936, 4864, 14, 2, 64),
}


def model_facts(name: str, *, revision: str | None = None) -> ModelFacts:
    """Sizes of the paper's models from a table, of any other model from its config.json.

    Raises:
        UserError: the configuration cannot be read, or is not a decoder-only model's.
    """
    if name in _PAPER_MODELS:
        d_in, n_layers, vocab_size, *shape = _PAPER_MODELS[name]
        return ModelFacts(name, d_in, n_layers, vocab_size, block_parameters(d_in, *shape))
    from chatsae.lm.load import load_config

    config = load_config(name, revision=revision).get_text_config(decoder=True)
    heads = config.num_attention_heads
    shape = (
        config.intermediate_size,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    return ModelFacts(
        name,
        config.hidden_size,
        config.num_hidden_layers,
        config.vocab_size,
        block_parameters(config.hidden_size, *shape),
    )
