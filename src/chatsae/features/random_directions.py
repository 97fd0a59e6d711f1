"""Random directions of the residual stream as features: what a judge makes of directions that nobody chose.

A direction is a random unit vector with a threshold, active by how far a token's projection exceeds it. The thresholds
are such that the directions fire as often as the features of an SAE. As an SAE (W_enc the directions, b_enc minus the
thresholds) they go through the same pass, and get contexts as features do.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from chatsae import console
from chatsae.batch import TokenBatch
from chatsae.errors import UserError
from chatsae.features.collect import Reading, check, harvest, tokens_digest
from chatsae.features.firings import ELEMENTS, digest
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE, normalize_rows_

DIRECTIONS = 64
"""Random directions beside each SAE."""

RANDOM = "~random"
"""Behind the name of an SAE: the random directions beside it."""

FIT_TOKENS = (16_384, 65_536)
"""Fewest and most tokens on which thresholds are fitted; between them a quarter of all."""

_EQUAL = 1e-4  # projections that differ by less, relatively, are taken for equal: a constant prefix, rounded


def saved_directions(path: Path, sae: SAE, tokens_sha256: str, n: int) -> SAE | None:
    """The random directions in a directory, if they are `n` or more beside this SAE, fitted on these dialogues."""
    if not (path / "cfg.json").is_file():
        return None
    try:
        found = SAE.load(path)
    except UserError as error:
        console.warn(f"{error}; random directions are drawn anew")
        return None
    same = {"of": digest(sae), "tokens_sha256": tokens_sha256}
    return found if found.metadata.get("beside") == same and found.spec.d_sae >= n else None


def random_directions(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    tokens: TokenBatch,
    *,
    reading: Reading,
    n: int = DIRECTIONS,
    seed: int = 0,
    tally: Counter[str] | None = None,
) -> dict[str, SAE]:
    """`n` random unit directions beside each SAE, as an SAE named SAE~random; those of a layer are the same.

    The thresholds of SAE i's directions are fitted on random dialogues of `tokens` (`FIT_TOKENS`): the directions get
    the densities that stand there at n evenly spaced ranks of the features that fire at all, in random order.

    Raises:
        UserError: an SAE is not of this model, or the model cannot take a dialogue.
    """
    check(saes, lm)
    some = fit_sample(tokens, seed)
    counts = {name: torch.zeros(sae.spec.d_sae, dtype=torch.int64) for name, sae in saes.items()}
    units = {layer: _units(n, lm.d_in, seed) for layer in {sae.spec.layer for sae in saes.values()}}
    found: dict[int, list[Float[Tensor, "N n"]]] = {layer: [] for layer in units}
    with console.progress("random directions", len(some)) as advance:
        for batch, acts, _, _ in harvest(lm, some, reading, tally=tally):
            for layer, unit in units.items():
                x = acts[lm.layers.index(layer)]
                found[layer].append((x.float() @ unit.T.to(x.device)).cpu())
            for name, sae in saes.items():
                counts[name] += firing_counts(sae, acts[lm.layers.index(sae.spec.layer)])
            advance(len(batch))
    projections = {layer: torch.cat(parts).numpy() for layer, parts in found.items()}
    made = {}
    for name, sae in saes.items():
        own, wanted = projections[sae.spec.layer], spread_counts(counts[name].numpy(), n, seed)
        thresholds = [threshold(own[:, i], count) for i, count in enumerate(wanted.tolist())]
        made[name] = _as_sae(sae, units[sae.spec.layer], thresholds)
        made[name].metadata = {
            "beside": {"of": digest(sae), "tokens_sha256": tokens_digest(tokens)},
            "seed": seed,
            "fit_tokens": len(own),
        }
    return made


def fit_sample(tokens: TokenBatch, seed: int) -> TokenBatch:
    """Random dialogues with as many tokens as thresholds are fitted on, in order."""
    least, most = FIT_TOKENS
    wanted = min(max(least, len(tokens.input_ids) // 4), most)
    order = np.random.default_rng(seed).permutation(len(tokens))
    total = np.cumsum(np.diff(tokens.cu_seqlens.numpy().astype(np.int64))[order])
    return tokens.select(sorted(order[: np.searchsorted(total, wanted) + 1].tolist()))


@torch.no_grad()
def firing_counts(sae: SAE, x: Float[Tensor, "N D"]) -> Int[Tensor, " F"]:
    """Tokens on which each feature is active."""
    rows = max(1, ELEMENTS // sae.spec.d_sae)
    parts = [(sae.encode(part.to(sae.W_enc.device)) > 0).sum(0) for part in x.split(rows)]
    return torch.stack(parts).sum(0).cpu()


def spread_counts(counts: Int[np.ndarray, " F"], n: int, seed: int = 0) -> Int[np.ndarray, " n"]:
    """The counts at `n` evenly spaced ranks of those above zero, in random order; ones where there is none."""
    live = np.sort(counts[counts > 0])
    if not len(live):
        return np.ones(n, np.int64)
    ranks = ((np.arange(n) + 0.5) / n * len(live)).astype(np.int64)
    return live[np.random.default_rng([seed, 1]).permutation(ranks)]


def threshold(values: Float[np.ndarray, " N"], count: int) -> float:
    """What `count` of the values exceed; more, where equal ones would lie on both sides.

    The tokens of a prefix that every dialogue begins with have equal projections: all of them are active, or none.
    """
    falling = np.sort(values.astype(np.float64))[::-1]
    edge = falling[min(count, len(falling)) - 1]
    above = int((falling >= edge - _EQUAL * abs(edge)).sum())
    last = falling[above - 1]
    return float((last + falling[above]) / 2 if above < len(falling) else last - max(_EQUAL * abs(last), 1e-9))


def _units(n: int, d_in: int, seed: int) -> Float[Tensor, "n D"]:
    units = torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))
    normalize_rows_(units)
    return units


@torch.no_grad()
def _as_sae(sae: SAE, units: Float[Tensor, "n D"], thresholds: list[float]) -> SAE:
    spec = replace(sae.spec, name=f"{sae.spec.name}{RANDOM}", architecture="standard", form="v6", d_sae=len(units))
    spec = replace(spec, coefficient=0.0, apply_b_dec_to_input=False)
    made = SAE.create(spec, device=sae.W_enc.device)
    made.W_enc.copy_(units.T)
    made.W_dec.copy_(units)
    made.b_enc.copy_(-torch.tensor(thresholds))
    return made
