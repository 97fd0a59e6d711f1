"""A random sample of an evaluation's tokens, and the GSNR of SAEs on it."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.batch import TokenBatch
from chatsae.sae.base import SAE
from chatsae.sae.gsnr import Gsnr, GsnrSums

TOKENS = 8192
"""Tokens of an evaluation on which GSNR is measured; each takes about as long as four that are only reconstructed."""

PARTS = 8
"""Stretches of dialogues whose common gradient is the signal (`chatsae.sae.gsnr.GsnrSums.across`)."""


class TokenSample:
    """Activations of n tokens drawn at random from all dialogues, by layer; the order of the batches is no matter."""

    def __init__(self, dialogues: TokenBatch, n: int) -> None:
        total = len(dialogues.input_ids)
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n]
        wanted = torch.zeros(total, dtype=torch.bool)
        wanted[drawn] = True
        self._wanted = wanted.split(dialogues.lengths.tolist())
        self._rows: dict[int, dict[int, Tensor]] = {}

    def add(self, layer: int, chosen: Sequence[int], x: Float[Tensor, "N D"]) -> None:
        """Keep the sampled tokens of the dialogues `chosen`, whose activations are x."""
        parts = [self._wanted[i] for i in chosen]
        rows = x[torch.cat(parts).to(x.device)].cpu().split([int(part.sum()) for part in parts])
        self._rows.setdefault(layer, {}).update(zip(chosen, rows, strict=True))

    def acts(self, layer: int) -> Float[Tensor, "N D"]:
        """The sampled activations of a layer, dialogue by dialogue."""
        return torch.cat([rows for _, rows in sorted(self._rows[layer].items())])

    def gsnr(self, sae: SAE) -> Gsnr:
        """GSNR of the training loss per token, at the full sparsity coefficient."""
        rows = self._rows[sae.spec.layer]
        parts = min(PARTS, len(rows))
        edges = [round(i * len(rows) / parts) for i in range(parts + 1)]
        return GsnrSums.across(_summed(sae, [rows[i] for i in range(*edge)]) for edge in pairwise(edges))


def _summed(sae: SAE, rows: Sequence[Tensor]) -> GsnrSums:
    sums = GsnrSums(sae)
    sums.add(torch.cat(list(rows)))
    return sums


def gsnr_figures(found: Gsnr) -> dict[str, Any]:
    """The figure `gsnr` of a report's row, with the reasons for what it lacks."""
    if found.value is None:
        return {"gsnr": None, "reasons": {"gsnr": found.reason}}
    values: dict[str, Any] = {name: value for name, value in asdict(found).items() if name != "reason"}
    lacking = {
        f"gsnr/by_parameter/{parameter}/{name}": "no entry of its gradient varies"
        for parameter, own in values["by_parameter"].items()
        for name, value in own.items()
        if value is None
    }
    return {"gsnr": values, "reasons": lacking}
