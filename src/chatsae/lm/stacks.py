"""Which architectures are decoder-only, and classes of them that build no more than a residual stream needs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from chatsae.errors import UserError
from chatsae.lm.tap import find_blocks


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that describes the decoder; all of it, but for multimodal models."""
    return config.get_text_config(decoder=True)


def refuse_others(config: PreTrainedConfig, name: str) -> None:
    """Refuse what is not a decoder-only language model, alone or inside a multimodal model.

    Raises:
        UserError: it is an encoder, an encoder-decoder, no language model, or does not say its layers and width.
    """
    kind, text = config.model_type, text_config(config)
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise UserError(f"{name}: {kind} is an encoder-decoder model; a decoder-only language model is needed")
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if encoder or not (remote or headed_class(config)):
        raise UserError(f"{name}: {kind} is not a decoder-only language model; a causal one is needed")
    for field in ("num_hidden_layers", "hidden_size"):
        value = getattr(text, field, None)
        if not isinstance(value, int):
            raise UserError(f"{name}: {kind} has no single stack of decoder blocks: its config.json says no {field}")
        if value < 1:
            raise UserError(f"{name}: config.json says {field} {value}; at least 1 was expected")


def decoder_of(model: Any, n_layers: int, layer_path: str | None = None) -> tuple[nn.Module, str, nn.ModuleList]:
    """The model without its head, the path of its blocks in it, and the blocks.

    Raises:
        UserError: there is no list of so many blocks.
    """
    decoder = model.get_decoder()
    for candidate in (model.base_model, model):
        try:
            return decoder, *find_blocks(decoder, n_layers, layer_path)
        except UserError:
            decoder = candidate  # some models call a part of their head "decoder"
    return decoder, *find_blocks(decoder, n_layers, layer_path)


def count_blocks(config: PreTrainedConfig, layer_path: str | None) -> int:
    """The number of decoder blocks; with `layer_path` that of the list it names, whatever config.json says.

    Raises:
        UserError: the path names no list of modules.
    """
    if layer_path is None:
        return text_config(config).num_hidden_layers
    with torch.device("meta"):
        model = build(config)
    found = [m for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and f".{p}".endswith(f".{layer_path}")]
    if not found:
        lists = [p for p, m in model.named_modules() if isinstance(m, nn.ModuleList)][:5]
        raise UserError(f"model.layer_path: no list of blocks at {layer_path!r}; there is {', '.join(lists)}")
    return len(found[0])


def build(config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """The whole model with its head, random; of a multimodal one only what text needs."""
    factory = headed_factory(config)
    if issubclass(factory, transformers.PreTrainedModel):
        return factory(config)
    return factory.from_config(config, trust_remote_code=trust_remote_code)


def multimodal(config: PreTrainedConfig) -> bool:
    """Whether the architecture takes something else beside text."""
    return type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING


def headed_class(config: PreTrainedConfig) -> Any:
    """The architecture's model with a language head; None where transformers knows none."""
    mappings = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING]
    if text_config(config) is not config:
        mappings.reverse()  # checkpoints have the names of the multimodal model
    return next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)


def headed_factory(config: PreTrainedConfig) -> Any:
    """What loads the whole model with its head; a multimodal one without its towers."""
    if not multimodal(config):
        return transformers.AutoModelForCausalLM  # which also knows code that comes with a model
    return _subclass(headed_class(config), lambda model: _keep_only(model, _decoder_and_head(model)))


def whole_factory(config: PreTrainedConfig) -> Any:
    """What loads every block, without the head where it can."""
    bare = type(config) in transformers.MODEL_MAPPING or "AutoModel" in (getattr(config, "auto_map", None) or {})
    return transformers.AutoModel if bare else transformers.AutoModelForCausalLM


def cut_classes(
    config: PreTrainedConfig, n_layers: int, keep: int, layer_path: str | None = None
) -> Iterator[type[nn.Module]]:
    """Classes of the architecture without the blocks after the first `keep` and without a head, best first.

    Of a multimodal model only the decoder is built. The configuration stays that of the whole model: some
    architectures scale every block by its number of layers.
    """

    def cut(model: Any) -> None:
        decoder, path, blocks = decoder_of(model, n_layers, layer_path)
        place = next(at for at, module in model.named_modules() if module is decoder)
        model.chatsae_stack = (place, path)
        _keep_only(model, [decoder])
        del blocks[keep:]

    # the names in a checkpoint are those of the class with the head, which some base models do not know
    for whole in (transformers.MODEL_MAPPING.get(type(config), None), headed_class(config)):
        if isinstance(whole, type):
            yield _subclass(whole, cut)


def _decoder_and_head(model: Any) -> list[nn.Module]:
    return [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]


def _keep_only(model: nn.Module, parts: list[nn.Module]) -> None:
    """Delete every module of the model that neither is in one of `parts` nor holds one."""
    if any(model is part for part in parts):
        return
    for name, child in list(model.named_children()):
        if any(module is part for module in child.modules() for part in parts):
            _keep_only(child, parts)
        else:
            delattr(model, name)


def _subclass(whole: Any, shorten: Callable[[Any], None]) -> type[nn.Module]:
    """A class that builds what `whole` builds and then leaves out what is not needed, before any weight is read."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, *args, **kwargs)
        shorten(self)
        left = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        tied = getattr(self, "all_tied_weights_keys", {})
        self.all_tied_weights_keys = {a: b for a, b in tied.items() if a in left and b in left}

    # transformers picks conversions of weights by the name and the module of the class
    names = {"__module__": whole.__module__, "__qualname__": whole.__qualname__, "__doc__": whole.__doc__}
    return type(whole.__name__, (whole,), {**names, "__init__": build})
