"""Random weights in place of a model's own: what an SAE finds in a model that has learned nothing."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from chatsae.errors import UserError


@torch.no_grad()
def randomise_(model: Any, decoder: nn.Module, blocks: nn.ModuleList, seed: int, name: str) -> None:
    """Fill every parameter with normal numbers of its own mean and variance (arXiv 2501.17727, embeddings included).

    A parameter's numbers follow from `seed` and its place in the decoder, so that a model that was loaded only as deep
    as it is read has the weights of the whole one.

    Raises:
        UserError: a parameter is quantised.
    """
    places = _places(model, decoder, blocks)
    for parameter, place in places:
        if not parameter.is_floating_point():
            raise UserError(f"model.random_weights: {name}: {place} is quantised; set model.quantization dequantize")
    for parameter, place in places:
        digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        own = parameter.float()
        mean = own.mean()
        parameter.copy_(noise.mul_((own - mean).square().mean().sqrt()).add_(mean))


def _places(model: Any, decoder: nn.Module, blocks: nn.ModuleList) -> list[tuple[Tensor, str]]:
    """Every parameter once, with a name that is the same whether or not the model is cut or has its head."""
    found: dict[int, tuple[Tensor, str]] = {}
    stacks = [(f"blocks.{i}", block) for i, block in enumerate(blocks)]
    for prefix, module in (*stacks, ("decoder", decoder), ("model", model)):
        for name, parameter in module.named_parameters():
            found.setdefault(id(parameter), (parameter, f"{prefix}.{name}"))
    return list(found.values())
