"""Read the residual stream after chosen blocks, stop there, or put something else in its place."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from chatsae.errors import UserError

# What a model raises on input that it is not made for.
FORWARD_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, ImportError)

Hook = Callable[[nn.Module, tuple[object, ...], object], object]


@runtime_checkable
class Decoder(Protocol):
    """What reading and replacing a residual stream needs of a model; `LanguageModel` has it."""

    name: str
    layers: tuple[int, ...]
    n_layers: int
    d_in: int
    vocab_size: int
    max_positions: int | None
    rope_split: int | None
    decoder: nn.Module
    blocks: nn.ModuleList

    @property
    def device(self) -> torch.device: ...

    def with_head(self) -> "Decoder": ...


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised by the hook of the deepest layer asked for: nothing after it is needed."""


def find_blocks(decoder: nn.Module, n_layers: int, layer_path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks and their path in it: the shallowest list of modules with one entry per layer.

    `layer_path` names that list instead, as a path from the decoder or from the model round it.

    Raises:
        UserError: there is no such list.
    """
    found = [
        (path.count("."), path, module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if layer_path is not None:
        found = [entry for entry in found if layer_path == entry[1] or layer_path.endswith(f".{entry[1]}")]
    if not found:
        where = "in this model; model.layer_path names another" if layer_path is None else f"at {layer_path!r}"
        raise UserError(f"{type(decoder).__name__}: no list of {n_layers} decoder blocks {where}")
    _, path, blocks = min(found, key=lambda entry: entry[:2])
    return path, blocks


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache under the name that the module's forward gives it: transformers has called it `cache` since 5.24."""
    return {"cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values": cache}


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments, under either name; None where there is none."""
    return arguments.get("cache", arguments.get("past_key_values"))


def cache_of(output: Any) -> Any:
    """The cache in what a model puts out, under either name; None where it keeps none that counts its tokens."""
    cache = output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
    return None if tokens_in(cache) is None else cache


def tokens_in(cache: Any) -> int | None:
    """The tokens in a cache; None where there is no cache, or it does not count them (states in place of keys)."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None


def read_residuals(lm: Decoder, input_ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "B T D"]]:
    """The residual stream after each of `lm.layers`, in that order, on `lm.device`; later blocks do not run.

    No attention mask is given: a causal decoder's tokens cannot see padding on their right. The cache is off.

    Raises:
        UserError: a block does not put out one vector of d_in numbers per token.
    """
    found: dict[int, Tensor] = {}
    deepest = max(lm.layers)

    def reader(layer: int) -> Hook:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            found[layer] = _residual(output, layer, (*input_ids.shape, lm.d_in)).to(lm.device)
            if layer == deepest:
                raise StopForward

        return hook

    handles = [lm.blocks[layer].register_forward_hook(reader(layer)) for layer in lm.layers]
    try:
        lm.decoder(input_ids=input_ids.to(lm.device), use_cache=False)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in lm.layers]


def check_blocks(lm: Decoder, input_ids: Int[Tensor, "B T"]) -> list[Float[Tensor, "B T D"]]:
    """What `read_residuals` reads, from one forward that is watched: blocks must run once.

    Raises:
        UserError: a block runs several times, one of `lm.layers` never, one puts out no residual stream, or the model
            does not run on token ids alone.
    """
    deepest = max(lm.layers)
    runs = [0] * (deepest + 1)
    found: dict[int, Tensor] = {}

    def watch(layer: int) -> Hook:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            runs[layer] += 1
            if layer in lm.layers:
                found[layer] = _residual(output, layer, (*input_ids.shape, lm.d_in)).to(lm.device)

        return hook

    handles = [lm.blocks[layer].register_forward_hook(watch(layer)) for layer in range(deepest + 1)]
    try:
        with torch.inference_mode():
            lm.decoder(input_ids=input_ids.to(lm.device), use_cache=False)
    except FORWARD_ERRORS as error:
        if deepest not in found:  # what fails after the deepest block is not run later
            raise UserError(f"{lm.name}: the model does not run on token ids alone: {_line(error)}") from None
    finally:
        for handle in handles:
            handle.remove()
    for layer, n in enumerate(runs):
        if n > 1:
            raise UserError(f"{lm.name}: block {layer} runs {n} times in a forward; there is no one stream after it")
        if n == 0 and layer in lm.layers:
            raise UserError(f"model.layers: layer {layer} of {lm.name} does not run on text alone; choose another")
    return [found[layer] for layer in lm.layers]


def text_problem(model: Any) -> str | None:
    """Why a whole model does not run on token ids alone; None where it does."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    except FORWARD_ERRORS as error:
        return _line(error)
    return None


@contextmanager
def splice(
    lm: Decoder, layer: int, replace: Callable[[Float[Tensor, "B T D"]], Float[Tensor, "B T D"]]
) -> Iterator[None]:
    """Replace the residual stream after `layer` in every forward of the model while the context lasts.

    Acts on `lm` and `lm.with_head()` alike (generation included), which share their blocks from here on; a replacement
    that returns its argument changes no bit.

    Raises:
        UserError: the layer does not exist, or the replacement has another shape.
    """
    if not 0 <= layer < lm.n_layers:
        raise UserError(f"layer {layer} does not exist: {lm.name} has {lm.n_layers} layers, 0..{lm.n_layers - 1}")

    def hook(module: nn.Module, args: tuple[object, ...], output: object) -> object:
        x = _residual(output, layer, (None, None, lm.d_in))
        y = replace(x.to(lm.device))
        if y.shape != x.shape:
            raise UserError(f"layer {layer}: the replacement is {list(y.shape)}, the residual stream {list(x.shape)}")
        y = y.to(device=x.device, dtype=x.dtype)
        if isinstance(output, list):
            return [y, *output[1:]]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    handle = lm.with_head().blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _residual(output: object, layer: int, shape: tuple[int | None, ...]) -> Float[Tensor, "B T D"]:
    x = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(x, Tensor):
        raise UserError(f"layer {layer}: the block puts out a {type(x).__name__}, not a residual stream")
    if x.ndim != 3 or any(want not in (None, got) for want, got in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        several = "; a model with several residual streams cannot be read" if x.ndim == 4 else ""
        raise UserError(
            f"layer {layer}: the block puts out {list(x.shape)}; [{wanted}] (B, T, d_in) is expected{several}"
        )
    return x
