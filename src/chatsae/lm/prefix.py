"""The prefix that a chat template puts before every dialogue, computed once and read from a cache from then on."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from chatsae.batch import TokenBatch
from chatsae.lm.tap import Decoder, cache_argument, read_residuals

LEAST_SHARE = 0.1
"""Share of a batch's tokens from which on a cached prefix pays: measured gains follow the tokens saved down to about
here, below it the mask that a cache needs costs as much (docs/log.md)."""
_KEPT = 4  # prefixes


class PrefixCache:
    """The keys, values and activations of the prefixes met last, for one model."""

    def __init__(self, lm: Decoder, *, least_share: float = LEAST_SHARE) -> None:
        self._lm, self._least_share = lm, least_share
        self._known: dict[tuple[int, ...], tuple[Cache, Float[Tensor, "L P D"]]] = {}

    def lengths(self, tokens: TokenBatch) -> Int[Tensor, " B"]:
        """Tokens of the template's prefix that each sequence begins with; 0 where they are too few to pay.

        At least one token comes after it.
        """
        marked = torch.zeros(len(tokens.input_ids) + 1, dtype=torch.int64)
        torch.cumsum(tokens.prefix, dim=0, out=marked[1:])
        found = torch.minimum(marked[tokens.cu_seqlens.long()].diff(), tokens.lengths - 1)
        return torch.where(found >= self._least_share * tokens.lengths, found, 0)

    def common(self, tokens: TokenBatch) -> int:
        """Tokens of the prefix that all sequences of a batch begin with."""
        length = int(self.lengths(tokens).min()) if len(tokens) > 1 else 0
        heads = tokens.input_ids[tokens.cu_seqlens[:-1, None] + torch.arange(length)]
        return length if bool((heads == heads[0]).all()) else 0

    def residuals(self, tokens: TokenBatch, length: int) -> list[Float[Tensor, "B T D"]]:
        """The residual stream of right-padded sequences, the first `length` tokens of which are the same in all."""
        ids = tokens.padded()
        cache, head = self._prefix(ids[0, :length])
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(ids))
        with _past(self._lm.decoder, cache):
            tails = read_residuals(self._lm, ids[:, length:])
        return [torch.cat([h.expand(len(ids), -1, -1), t], dim=1) for h, t in zip(head, tails, strict=True)]

    def _prefix(self, ids: Int[Tensor, " P"]) -> tuple[Cache, Float[Tensor, "L P D"]]:
        key = tuple(ids.tolist())
        if key not in self._known:
            cache = DynamicCache(config=getattr(self._lm.decoder, "config", None))
            with _past(self._lm.decoder, cache):
                acts = torch.cat(read_residuals(self._lm, ids[None]))
            self._known[key] = cache, acts
            while len(self._known) > _KEPT:
                del self._known[next(iter(self._known))]
        return self._known[key]


@contextmanager
def _past(decoder: nn.Module, cache: Cache) -> Iterator[None]:
    """Let the next forward go on where the cache ends, and leave its keys and values there."""

    def with_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | cache_argument(module, cache)

    handle = decoder.register_forward_pre_hook(with_cache, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
