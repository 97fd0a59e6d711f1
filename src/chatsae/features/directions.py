"""What an SAE's decoder directions say by themselves, and which features fire together."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from chatsae.lm.load import LanguageModel

_ELEMENTS = 2**24  # of a product that are held together: 64 MB

Ranked = tuple[Int[np.ndarray, "M K"], Float[np.ndarray, "M K"]]
"""Indices and values, best first."""


@torch.no_grad()
def logit_lens(lm: LanguageModel, directions: Float[Tensor, "M D"], k: int = 10) -> tuple[Ranked, Ranked] | None:
    """The `k` tokens whose logits each direction raises most, and those it lowers most, with the change per unit.

    The unembedding of the direction itself, of unit norm, as Neuronpedia shows it: neither the scale nor the weights
    of the model's final norm enter. None where the model has no unembedding of its own.
    """
    head = lm.with_head().model.get_output_embeddings()
    if head is None:
        return None
    unembed: Tensor = head.weight[: min(len(lm.tokenizer), len(head.weight))]
    unit = normalize(directions.detach().float(), dim=1).to(unembed.device)
    parts: list[tuple[Tensor, ...]] = []
    for rows in unit.split(max(1, _ELEMENTS // len(unembed))):
        logits = (rows.to(unembed.dtype) @ unembed.T).float()
        best, worst = logits.topk(min(k, len(unembed)), dim=1), logits.topk(min(k, len(unembed)), dim=1, largest=False)
        parts.append((best.indices, best.values, worst.indices, worst.values))
    merged = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    return (merged[0], merged[1]), (merged[2], merged[3])


@torch.no_grad()
def decoder_neighbours(W_dec: Float[Tensor, "F D"], features: np.ndarray, k: int = 8) -> Ranked:
    """The features whose decoder directions have the largest cosine with each of `features`, itself left out."""
    unit = normalize(W_dec.detach().float(), dim=1)
    chosen = torch.from_numpy(features).to(unit.device)
    k = min(k, len(unit) - 1)
    indices, values = [np.empty((0, k), np.int64)], [np.empty((0, k), np.float32)]
    for some in chosen.split(max(1, _ELEMENTS // len(unit))):
        cosine = unit[some] @ unit.T
        cosine[torch.arange(len(some)), some] = -torch.inf
        best = cosine.topk(k, dim=1)
        indices.append(best.indices.cpu().numpy())
        values.append(best.values.cpu().numpy())
    return np.concatenate(indices), np.concatenate(values)


def cofiring(
    bits: np.ndarray, n_tokens: int, features: np.ndarray, k: int = 8, *, least: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The features whose firing correlates most with that of each of `features`, on the tokens that were sampled.

    `bits` [F, T / 8] are those of a keeper, of `n_tokens` tokens. Returns indices, correlations (phi) and the share of
    the feature's tokens on which the neighbour fires too, all [M, k]; index -1 where fewer than `k` fire together with
    it on at least `least` tokens.
    """
    n_features, n = len(bits), max(n_tokens, 1)
    k = min(k, n_features - 1)
    fires = np.bitwise_count(bits).sum(axis=1, dtype=np.int64).astype(np.float64)
    n_own = np.maximum(fires[features], 1)
    index, value, share = (np.full((len(features), k), fill) for fill in (-1, 0.0, 0.0))
    width = max(1, min(_ELEMENTS // max(8 * bits.shape[1], 1), n_features))
    columns = [slice(start, start + width) for start in range(0, n_features, width)]
    step = max(1, _ELEMENTS // (4 * n_features))
    for start in range(0, len(features), step):
        some = features[start : start + step]
        own = _unpacked(bits[some])
        both = torch.cat([own @ _unpacked(bits[c]).T for c in columns], dim=1).double().numpy()
        spread = np.sqrt(np.outer(fires[some] * (n - fires[some]), fires * (n - fires)))
        phi = np.divide(n * both - np.outer(fires[some], fires), spread, out=np.zeros_like(both), where=spread > 0)
        phi[(both < least) | (some[:, None] == np.arange(n_features))] = -np.inf
        best = torch.from_numpy(phi).topk(k, dim=1)
        good = best.values.numpy() > 0
        part = slice(start, start + len(some))
        index[part] = np.where(good, best.indices.numpy(), -1)
        value[part] = np.where(good, best.values.numpy(), 0)
        share[part] = np.where(good, np.take_along_axis(both, best.indices.numpy(), 1), 0) / n_own[part, None]
    return index, value, share


def _unpacked(bits: np.ndarray) -> Float[Tensor, "M T"]:
    return torch.from_numpy(np.unpackbits(bits, axis=1)).float()
