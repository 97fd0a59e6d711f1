"""The first blocks of a model with random numbers for weights: as fast as the model, and nothing is read from disk."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from chatsae.errors import UserError
from chatsae.lm import stacks
from chatsae.lm.hf import quiet

_VOCAB = 256  # looking up a token costs nothing beside a block, whatever the vocabulary
_MOST = {"cpu": 2**28, "cuda": 2**33}  # bytes of blocks, beyond the first: more say no more about their speed
_UNKNOWN_MEMORY = 2**32
_NOISE = 2**20 + 7  # random numbers that are repeated; prime to the sizes of weights


@dataclass(slots=True)
class StandIn:
    """A `Decoder` of the first blocks of a model, `layers` being the last of them; `n_layers` is that of the model."""

    name: str
    layers: tuple[int, ...]
    n_layers: int
    d_in: int
    vocab_size: int
    max_positions: int | None
    decoder: nn.Module
    blocks: nn.ModuleList
    device: torch.device
    rope_split: int | None = None

    def with_head(self) -> "StandIn":
        """Refused.

        Raises:
            UserError: there is no head.
        """
        raise UserError(f"{self.name}: a model built to be timed has no head")


def stand_in(
    config: PreTrainedConfig,
    layer: int,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    layer_path: str | None = None,
    trust_remote_code: bool = False,
) -> StandIn:
    """Blocks 0 to at most `layer`: as many as say how fast they are, at least one.

    Its activations mean nothing. The random numbers are not drawn from the global generators.

    Raises:
        UserError: one block has no room in half of the memory that is free.
    """
    with quiet(), torch.device("meta"):
        model = stacks.build(config, trust_remote_code)
    n_layers = stacks.count_blocks(config, layer_path)
    decoder, _, blocks = stacks.decoder_of(model, n_layers, layer_path)
    del blocks[_blocks_to_keep(blocks, layer, device, dtype) :]
    text = stacks.text_config(config)
    words = {model.get_input_embeddings().weight.shape[0], getattr(text, "vocab_size_per_layer_input", None)}
    for module in decoder.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings in words:
            module.weight = nn.Parameter(torch.empty(_VOCAB, module.embedding_dim, device="meta"))
            module.num_embeddings, module.padding_idx = _VOCAB, None
    decoder = decoder.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    _fill_(decoder)
    return StandIn(
        name=name,
        layers=(len(blocks) - 1,),
        n_layers=n_layers,
        d_in=text.hidden_size,
        vocab_size=_VOCAB,
        max_positions=getattr(text, "max_position_embeddings", None),
        decoder=decoder,
        blocks=blocks,
        device=device,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; a guess where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return _UNKNOWN_MEMORY


def _blocks_to_keep(blocks: nn.ModuleList, layer: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many of the blocks 0 to `layer` are built."""
    free, used, keep = free_bytes(device), 0, 0
    for block in blocks[: layer + 1]:
        used += dtype.itemsize * sum(p.numel() for p in block.parameters())
        if keep and used > min(_MOST.get(device.type, _MOST["cpu"]), free // 2):
            break
        if used > free // 2:
            raise UserError(f"one block takes {used / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        keep += 1
    return keep


@torch.no_grad()
def _fill_(decoder: nn.Module) -> None:
    """Numbers of the size of real weights: matrices random, so that experts are chosen evenly; vectors one."""
    noise = torch.empty(_NOISE).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            _repeat_(parameter, noise)
        else:
            parameter.fill_(1)
    for buffer in decoder.buffers():
        if buffer.is_floating_point():
            _repeat_(buffer, noise.abs())
        else:
            buffer.fill_(1)  # a mask that hides nothing, a scale that changes nothing


def _repeat_(tensor: Tensor, noise: Tensor) -> None:
    flat, noise = tensor.view(-1), noise.to(tensor)
    for start in range(0, flat.numel(), len(noise)):
        part = flat[start : start + len(noise)]
        part.copy_(noise[: len(part)])
