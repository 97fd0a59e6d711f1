"""Attention leakage: how much of what the tokens of a block attend to belongs to a stranger's dialogue."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from chatsae.batch import TokenBatch
from chatsae.errors import UserError
from chatsae.lm.forward import check_block
from chatsae.lm.tap import FORWARD_ERRORS, Decoder, cache_argument, cache_of

_WEIGHTS = 2**28  # bytes of the attention weights of one layer at a time


@dataclass(frozen=True, slots=True)
class LayerLeakage:
    """Shares of the attention mass of one layer, all heads together.

    foreign: on tokens of other dialogues, of the mass of all tokens.
    foreign_exposed: the same, of the tokens that have another dialogue before them in their block.
    foreign_first: on the first token of the block where it belongs to another dialogue: what an attention sink takes,
        a part of `foreign`.
    """

    foreign: float
    foreign_exposed: float | None
    foreign_first: float


@dataclass(frozen=True, slots=True)
class Leakage:
    """Leakage per layer whose attention gives weights; `layers` is None with a `reason`.

    uniform: the share that is foreign of the tokens each token could see in its block, on average: what attention
        that does not look at its keys would spend, where no window limits it.
    exposed: share of the tokens that have another dialogue before them in their block.
    """

    layers: dict[int, LayerLeakage] | None
    uniform: float | None
    exposed: float | None
    n_tokens: int
    n_blocks: int
    block_size: int
    reason: str | None = None


def leakage(
    lm: Decoder,
    dialogues: Iterable[TokenBatch],
    *,
    block_size: int = 2048,
    limit: int | None = None,
    max_bytes: int = _WEIGHTS,
) -> Leakage:
    """The share of attention mass that the tokens of bt-f blocks spend on foreign dialogues, per layer that `lm` has.

    Args:
        dialogues: whole dialogues, each one sequence (method fast), in the order in which blocks join them; the tokens
            after the last whole block are left out.
        block_size: tokens per block.
        limit: blocks to read; by default all.
        max_bytes: memory for the attention weights of one layer: a block is read in pieces, with a cache, where it
            needs more. Not counted: the copies that the model itself makes, about two.

    Attention is computed by the model's own eager implementation while this runs, and by its former one afterwards.

    Raises:
        UserError: there is no whole block, or a block is longer than the context.
    """
    if block_size < 1:
        raise UserError(f"data.block_size: expected a positive number, got {block_size}")
    check_block(lm, block_size)
    sums = _Sums(len(lm.blocks), block_size)
    reason = None
    for ids, owner in _blocks(dialogues, block_size):
        if sums.n_blocks == limit:
            break
        sums.begin(owner.to(lm.device))
        try:
            with _eager(lm), _watched(lm, sums.add), torch.inference_mode():
                _read(lm, ids[None].to(lm.device), max_bytes)
        except FORWARD_ERRORS as error:
            reason = f"attention weights cannot be read: {(str(error) or repr(error)).splitlines()[0]}"
            break
        if not sums.seen:
            reason = "the model's attention gives no weights"
            break
    if not sums.n_blocks:
        raise UserError(f"data.block_size: the dialogues fill no block of {block_size} tokens")
    return sums.result(reason)


class _Sums:
    """Attention mass per layer, in float64."""

    def __init__(self, n_layers: int, block_size: int) -> None:
        self.block_size, self.n_blocks = block_size, 0
        self.seen: set[int] = set()
        self._mass = torch.zeros(n_layers, 4, dtype=torch.float64)  # all, foreign, foreign first token, all of exposed
        self._uniform = self._exposed = 0.0

    def begin(self, owner: Int[Tensor, " T"]) -> None:
        """A block, by the dialogue of each of its tokens."""
        self._owner, self._done = owner, {}
        self.n_blocks += 1
        self._is_exposed = owner != owner[0]
        start = torch.searchsorted(owner, owner)  # owners rise, so this is where the token's own dialogue begins
        reach = torch.arange(1, len(owner) + 1, device=owner.device)
        self._uniform += float((start.double() / reach).sum())
        self._exposed += float(self._is_exposed.sum())

    def add(self, layer: int, weights: Float[Tensor, "1 H Q K"]) -> None:
        """The weights of the next Q queries of a layer on the last K tokens up to the last of these queries."""
        by_key = weights[0].sum(0, dtype=torch.float32)
        first = self._done.get(layer, 0)
        stop = first + by_key.shape[0]
        self._done[layer] = stop
        low = stop - by_key.shape[1]  # a windowed layer keeps no older keys
        query, key = self._owner[first:stop, None], self._owner[max(low, 0) : stop]
        by_key = by_key[:, -len(key) :]
        foreign = by_key * (query != key)
        rows = by_key.sum(1, dtype=torch.float64)
        to_first = foreign[:, 0].sum(dtype=torch.float64) if low <= 0 else rows.new_zeros(())
        exposed = rows[self._is_exposed[first:stop]].sum()
        found = torch.stack([rows.sum(), foreign.sum(dtype=torch.float64), to_first, exposed])
        self._mass[layer] += found.cpu()
        self.seen.add(layer)

    def result(self, reason: str | None) -> Leakage:
        n_tokens = self.n_blocks * self.block_size
        layers = None
        if reason is None and not bool(self._mass.isfinite().all()):
            reason = "the attention weights are not finite"
        if reason is None:
            layers = {}
            for layer in sorted(self.seen):
                all_, foreign, first, exposed = self._mass[layer].tolist()
                layers[layer] = LayerLeakage(foreign / all_, foreign / exposed if exposed else None, first / all_)
        return Leakage(
            layers=layers,
            uniform=self._uniform / n_tokens,
            exposed=self._exposed / n_tokens,
            n_tokens=n_tokens,
            n_blocks=self.n_blocks,
            block_size=self.block_size,
            reason=reason,
        )


def _blocks(dialogues: Iterable[TokenBatch], size: int) -> Iterator[tuple[Int[Tensor, " T"], Int[Tensor, " T"]]]:
    """Token ids of whole blocks, and the number of the dialogue of each token."""
    ids, owner, n_dialogues = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 0
    for tokens in dialogues:
        ids = torch.cat([ids, tokens.input_ids])
        owner = torch.cat([owner, tokens.sequence + n_dialogues])
        n_dialogues += len(tokens)
        whole = len(ids) - len(ids) % size
        for start in range(0, whole, size):
            yield ids[start : start + size], owner[start : start + size]
        ids, owner = ids[whole:], owner[whole:]


def _read(lm: Decoder, ids: Int[Tensor, "1 T"], max_bytes: int) -> None:
    """One block through the decoder, in pieces whose attention weights fit in memory."""
    config = next(c for m in lm.decoder.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig))
    heads = getattr(config.get_text_config(decoder=True), "num_attention_heads", None) or 1
    size = max(1, max_bytes // (4 * heads * ids.shape[1]))
    if size >= ids.shape[1]:
        lm.decoder(input_ids=ids, use_cache=False)
        return
    cache: Any = None
    for piece in ids.split(size, dim=1):
        output = lm.decoder(input_ids=piece, **cache_argument(lm.decoder, cache), use_cache=True)
        cache = cache_of(output)
        if cache is None:
            raise ValueError("it keeps no cache of keys, so that a block must be read whole; raise max_bytes")


@contextmanager
def _eager(lm: Decoder) -> Iterator[None]:
    """The model's own eager attention, the only one that gives its weights."""
    configs = {id(c): c for m in lm.decoder.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = {"": "eager"}  # this configuration alone, not its sub-configurations
        yield
    finally:
        for config, name in before:
            config._attn_implementation = {"": name}


@contextmanager
def _watched(lm: Decoder, add: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand over the attention weights of each block, once per run of the block, and keep none."""

    def innermost(layer: int, taken: list[bool]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not taken and isinstance(weights, Tensor) and weights.ndim == 4 and weights.is_floating_point():
                taken.append(True)
                add(layer, weights)

        return hook

    handles = []
    for layer, block in enumerate(lm.blocks):
        taken: list[bool] = []
        handles.append(block.register_forward_pre_hook(lambda *_, taken=taken: taken.clear()))
        handles += [m.register_forward_hook(innermost(layer, taken)) for m in block.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
