"""The SAEs of a grid, by name."""

from collections.abc import Iterable

import torch

from chatsae.config import SAESpec
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae


def build_grid(specs: Iterable[SAESpec], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, SAE]:
    """Fresh SAEs in the order of `specs`.

    Every SAE draws from a generator of its own, seeded with `seed`. SAEs of one form, d_in and d_sae therefore start
    from the same W_enc and W_dec, whatever else is in the grid: what a comparison shows is never the luck of a draw.

    Raises:
        ValueError: two specs have one name.
    """
    saes: dict[str, SAE] = {}
    for spec in specs:
        if spec.name in saes:
            raise ValueError(f"two SAEs of the grid have the name {spec.name!r}")
        saes[spec.name] = init_sae(spec, torch.Generator().manual_seed(seed), dtype)
    return saes
