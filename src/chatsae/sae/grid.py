"""The SAEs of a grid, by name."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch

from chatsae.config import SAEConfig, SAESpec, sae_specs
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae


@runtime_checkable
class _HasResidualStream(Protocol):
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def d_in(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def grid(lm: _HasResidualStream, *, seed: int = 42, **fields: Any) -> dict[str, SAE]:
    """Fresh SAEs for every layer that `lm` reads, on its device; `fields` are those of `SAEConfig`.

    Raises:
        UserError: the fields contradict each other (see `chatsae.config.check_sae`).
    """
    saes = build_grid(sae_specs(SAEConfig(**fields), layers=lm.layers, d_in=lm.d_in), seed)
    return {name: sae.to(lm.device) for name, sae in saes.items()}


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
