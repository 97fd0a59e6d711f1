"""The SAEs of a grid, by name."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from chatsae.config import SAEConfig, SAESpec, sae_specs
from chatsae.errors import UserError
from chatsae.files import check_memory
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae
from chatsae.typed import Seed, convert, near

_COPIES = 4  # of every weight in training: the weight, its gradient and two moments of Adam, in float32


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
        UserError: a field is unknown, it or the seed cannot be, `lm` reads no layer, fields contradict each other (see
            `chatsae.config.check_sae`), or the memory of this machine cannot hold the SAEs.
    """
    seed = convert(seed, Seed, "seed")
    if not lm.layers:
        raise UserError("model.layers is empty; the language model must read at least one layer")
    known = [each.name for each in dataclasses.fields(SAEConfig)]
    if unknown := [name for name in fields if name not in known]:
        guess = near(unknown[0], known)
        hint = f"perhaps you meant {guess}" if guess else f"known: {', '.join(known)}"
        raise UserError(f"grid: unknown field {unknown[0]}; {hint}")
    saes = build_grid(sae_specs(SAEConfig(**fields), layers=lm.layers, d_in=lm.d_in), seed)
    return {name: sae.to(lm.device) for name, sae in saes.items()}


def check_fits(specs: Sequence[SAESpec]) -> None:
    """Refuse SAEs whose training the memory of this machine cannot hold.

    Raises:
        UserError: says how large they are.
    """
    n_bytes = 4 * _COPIES * sum(2 * spec.d_in * spec.d_sae for spec in specs)
    check_memory(n_bytes, f"sae.expansion_factors: {len(specs)} SAEs of d_sae {max(s.d_sae for s in specs):,}")


def build_grid(specs: Iterable[SAESpec], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, SAE]:
    """Fresh SAEs in the order of `specs`.

    Every SAE draws from a generator of its own, seeded with `seed`. SAEs of one form, d_in and d_sae therefore start
    from the same W_enc and W_dec, whatever else is in the grid: what a comparison shows is never the luck of a draw.

    Raises:
        UserError: see `check_fits`.
        ValueError: two specs have one name.
    """
    specs = list(specs)
    check_fits(specs)
    saes: dict[str, SAE] = {}
    for spec in specs:
        if spec.name in saes:
            raise ValueError(f"two SAEs of the grid have the name {spec.name!r}")
        saes[spec.name] = init_sae(spec, torch.Generator().manual_seed(seed), dtype)
    return saes
