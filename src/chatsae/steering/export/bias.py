"""Fold a constant into a bias: a checkpoint that any program runs as the steered model, with no hook."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from chatsae.errors import UserError
from chatsae.lm.hf import LOAD_ERRORS, one_line, quiet
from chatsae.lm.load import LanguageModel
from chatsae.lm.placement import quantization_of
from chatsae.lm.stacks import multimodal
from chatsae.lm.tap import splice
from chatsae.steering.export.constant import constants
from chatsae.steering.hooks import Steering
from chatsae.steering.spec import SteerSpec

_FLAGS = ("mlp_bias", "use_bias", "bias")
"""Fields of configurations that give an architecture the biases it lacks."""
_LLAMA_LIKE = ("qwen2", "mistral")
"""Architectures that are Llama with fewer biases, where they have no sliding window."""
_ROWS, _TOKENS = 2, 16  # that are read to compare


@dataclass(frozen=True, slots=True)
class Fold:
    """Where each layer's constant goes, and how the checkpoint is described then."""

    parameters: Mapping[int, str]
    """By layer the name of the bias."""
    config: PreTrainedConfig
    added: Mapping[str, tuple[int, ...]]
    """Biases that the checkpoint gets, with their shapes; all zero but for those above."""


def find_fold(lm: LanguageModel, layers: Sequence[int]) -> Fold:
    """The biases whose change changes the stream after these layers by just that, found by trying.

    A model without such a bias gets one where its architecture has it as an option, or where it is Llama but for that.

    Raises:
        UserError: there is no such bias, or the checkpoint could not be written as a whole.
    """
    full = lm.with_head()
    config = full.model.config
    for layer in layers:
        if not 0 <= layer < full.n_layers:
            raise UserError(f"steering: layer {layer} does not exist: {lm.name} has layers 0..{full.n_layers - 1}")
    if multimodal(config):
        raise UserError(
            f"{lm.name}: of a multimodal model only the text part is loaded; a bias cannot be folded into it"
        )
    if quantization_of(config) is not None or getattr(full.model, "is_quantized", False):
        raise UserError(f"{lm.name}: its weights are quantised; a bias can be folded into a model that is not")
    own = {name for name, _ in full.model.named_parameters(remove_duplicate=False)}
    for variant in _variants(config):
        shapes = _shapes(full, variant)
        added = {name: shape for name, shape in shapes.items() if name not in own}
        if own - set(shapes) or any(not name.endswith(".bias") for name in added):
            continue
        found = {layer: name for layer in layers if (name := _site(full, layer, shapes)) is not None}
        if len(found) == len(layers):
            return Fold(found, variant, added)
    raise UserError(
        f"{lm.name}: {config.model_type} has no bias that is added to the stream right after a layer, and no option "
        "to have one; --format gguf and repeng need none"
    )


def write_folded(lm: LanguageModel, specs: Sequence[SteerSpec], folder: Path) -> dict[str, Any]:
    """Write the model with the specs in its biases, read it back with plain transformers, and compare.

    The weights are those in memory, in their precision. Returns what was done, with the largest difference of the
    logits to the steered model's, and how much steering changes them.

    Raises:
        UserError: see `Steering`, `constants` and `find_fold`; or what was written cannot be read back, or is not the
            steered model.
    """
    full = lm.with_head()
    steering, directions = Steering(full, specs), constants(specs)
    fold = find_fold(lm, list(directions))
    state = {**full.model.state_dict()}
    dtype, device = full.model.dtype, full.device
    places: Any = getattr(full.model, "hf_device_map", {})  # of a model that is spread over several GPUs
    state |= {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in fold.added.items()}
    for layer, name in fold.parameters.items():
        state[name] = (state[name].double() + directions[layer].to(state[name].device)).to(state[name].dtype)
    try:
        with quiet():
            full.model.save_pretrained(folder, state_dict=state)
            fold.config.save_pretrained(folder)
            full.tokenizer.save_pretrained(folder)
            read = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, device_map=places if len(places) > 1 else None
            )
    except LOAD_ERRORS as error:
        raise UserError(
            f"{lm.name}: the folded checkpoint cannot be written and read back: {one_line(error)}"
        ) from None
    return {
        "parameters": {str(layer): name for layer, name in fold.parameters.items()},
        "added_biases": len(fold.added),
        "model_type": fold.config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        **_compared(full, steering, read.eval() if len(places) > 1 else read.eval().to(device)),
    }


def _compared(full: LanguageModel, steering: Steering, folded: Any) -> dict[str, float]:
    """How far the folded model's logits are from the steered model's; those of random tokens, position 0 included."""
    ids = _random_ids(full)
    with torch.inference_mode():
        plain = full.model(ids, use_cache=False).logits.float()
        with steering:
            wanted = full.model(ids, use_cache=False).logits.float()
        got = folded(ids, use_cache=False).logits.float()
    error, change = float((got - wanted).abs().max()), float((wanted - plain).abs().max())
    bound = 8 * torch.finfo(full.model.dtype).eps * full.n_layers * float(wanted.abs().max())
    if not error <= bound:
        raise UserError(
            f"{full.name}: the folded checkpoint is not the steered model: logits differ by {error:.3g}, where "
            f"rounding explains {bound:.3g}; nothing is written"
        )
    return {"logits_differ": error, "steering_changes_logits": change}


def _variants(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Configurations of the same function, with more biases: as it is, with an option, as Llama."""
    yield copy.deepcopy(config)
    for flag in _FLAGS:
        if getattr(config, flag, None) is False:
            other = copy.deepcopy(config)
            setattr(other, flag, True)
            yield other
    if config.model_type in _LLAMA_LIKE and not any("sliding" in kind for kind in _kinds(config)):
        yield _as_llama(config)


def _kinds(config: PreTrainedConfig) -> Sequence[str]:
    """What attends to a window: of the layers' names, or of the whole model."""
    kinds = getattr(config, "layer_types", None)
    return kinds or (["sliding_attention"] if getattr(config, "sliding_window", None) else [])


def _as_llama(config: PreTrainedConfig) -> PreTrainedConfig:
    known = transformers.LlamaConfig().to_dict()
    left_out = ("model_type", "architectures", "transformers_version", "attention_bias", "mlp_bias", "_name_or_path")
    same = {key: value for key, value in config.to_dict().items() if key in known and key not in left_out}
    return transformers.LlamaConfig(**same, architectures=["LlamaForCausalLM"], attention_bias=True, mlp_bias=True)


def _shapes(full: LanguageModel, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that a configuration gives; none where it cannot be built."""
    same = config.model_type == full.model.config.model_type
    factory: Any = type(full.model) if same else transformers.LlamaForCausalLM
    try:
        with quiet(), torch.device("meta"):
            model = factory(config)
    except LOAD_ERRORS:
        return {}
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def _site(full: LanguageModel, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The bias in a block that is added to the stream right after it; the last one that is."""
    block = full.blocks[layer]
    path = next(name for name, module in full.model.named_modules() if module is block)
    names = [n for n, shape in shapes.items() if n.startswith(f"{path}.") and n.endswith(".bias")]
    for name in reversed([n for n in names if shapes[n] == (full.d_in,)]):
        if _acts_like_the_stream(full, layer, full.model.get_submodule(name.removesuffix(".bias"))):
            return name
    return None


def _acts_like_the_stream(full: LanguageModel, layer: int, module: nn.Module) -> bool:
    """Whether a vector added to what the module puts out is added to the stream after the layer, and nothing else."""
    ids = _random_ids(full)
    before = _after(full, layer, ids)
    vector = torch.randn(full.d_in, generator=torch.Generator().manual_seed(1)).to(before)
    vector *= before.norm(dim=-1).median() / vector.norm()

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output + vector.to(output) if isinstance(output, Tensor) else output

    handle = module.register_forward_hook(add)
    try:
        after = _after(full, layer, ids)
    finally:
        handle.remove()
    error = (after - before - vector).norm(dim=-1) / (before.norm(dim=-1) + vector.norm())
    return float(error.max()) < 4 * torch.finfo(full.model.dtype).eps


def _after(full: LanguageModel, layer: int, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """The stream after a layer, in float32."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x.float().clone())
        return x

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(splice(full, layer, keep))
        full.model(ids, use_cache=False)
    return found[0]


def _random_ids(full: LanguageModel) -> Int[Tensor, "B T"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(full.vocab_size, (_ROWS, _TOKENS), generator=generator).to(full.device)
