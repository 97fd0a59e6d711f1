"""The residual stream of a batch of sequences, each as if it went through the model alone."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chatsae.batch import TokenBatch
from chatsae.config import Way
from chatsae.errors import UserError
from chatsae.lm.packed import packed_row
from chatsae.lm.prefix import PrefixCache
from chatsae.lm.tap import Decoder, read_residuals

__all__ = ["Way", "forward", "plan", "unchecked"]


def plan(
    lengths: Sequence[int],
    *,
    token_budget: int,
    split: int | None = None,
    way: Way = "padded",
    kinds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Indices of sequences that share a forward: at most `token_budget` tokens, padding counted.

    Padded batches take the shortest first, packed ones the order given. A sequence longer than the budget goes alone.
    No batch holds lengths on both sides of `split`, or sequences of two `kinds`.
    """
    if way == "single":
        return [[i] for i in range(len(lengths))]
    apart = [(split is not None and n > split, kinds[i] if kinds else 0) for i, n in enumerate(lengths)]
    batches: list[list[int]] = []
    cost = 0
    for i in sorted(range(len(lengths)), key=lambda i: (apart[i], lengths[i] if way == "padded" else 0)):
        if batches:
            cost = cost + lengths[i] if way == "packed" else (len(batches[-1]) + 1) * lengths[i]
        if not batches or apart[i] != apart[batches[-1][0]] or cost > token_budget:
            batches.append([])
            cost = lengths[i]
        batches[-1].append(i)
    return batches


class Ceiling:
    """The most tokens, padding counted, that a forward has been found to have memory for; None: not yet met."""

    def __init__(self) -> None:
        self.tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """A sequence some of whose activations are NaN or infinite, in the first layer of those read where they are."""

    index: int
    name: str
    layer: int
    tokens: int
    length: int

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, dialogue {self.name!r}: NaN or infinite activations at "
            f"{self.tokens} of {self.length} tokens"
        )


def forward(
    lm: Decoder, tokens: TokenBatch, way: Way = "padded", *, ceiling: Ceiling | None = None
) -> Float[Tensor, "L N D"]:
    """The residual stream after each of `lm.layers`, for the tokens of a batch in their order; dtype of the model.

    One forward, or several: where the rotary scheme asks for it, or memory. What is out of memory is split in two
    and tried again, and `ceiling` is lowered for the batches to come.

    Raises:
        UserError: a sequence is empty, longer than the context, holds an unknown token id, or is out of memory even
            alone; or an activation is not finite.
        PackingRefused: the way is packed, and the model cannot be read so.
    """
    acts = unchecked(lm, tokens, way, ceiling=ceiling)
    for broken in broken_sequences(lm.layers, acts, tokens):
        raise UserError(f"{broken}; try model.dtype float32")
    return acts


def unchecked(
    lm: Decoder,
    tokens: TokenBatch,
    way: Way,
    *,
    ceiling: Ceiling | None = None,
    prefix: PrefixCache | None = None,
) -> Float[Tensor, "L N D"]:
    """See `forward`, but activations that are not finite pass; padded batches take what they can from `prefix`."""
    check_tokens(lm, tokens)
    ceiling = Ceiling() if ceiling is None else ceiling
    lengths = tokens.lengths.tolist()
    todo = plan(lengths, token_budget=ceiling.tokens or sys.maxsize, split=lm.rope_split, way=way)
    done: list[tuple[list[int], Tensor]] = []
    while todo:
        group = sorted(todo.pop())
        part = _attempt(lm, tokens if len(group) == len(tokens) else tokens.select(group), way, prefix)
        if part is not None:
            done.append((group, part))
            continue
        if len(group) == 1:
            raise UserError(
                f"dialogue {tokens.names[group[0]]!r} of {lengths[group[0]]} tokens is out of memory even alone; "
                "lower data.max_length or data.block_size"
            )
        ceiling.tokens = _half([lengths[i] for i in group], way)
        todo = [part for whole in [*todo, group] for part in _replanned(whole, lengths, ceiling.tokens, way)]
    if not done:
        return torch.empty(len(lm.layers), 0, lm.d_in, device=lm.device)
    return done[0][1] if len(done) == 1 else _joined(done, tokens)


def _half(lengths: list[int], way: Way) -> int:
    """Half the tokens of a forward of several sequences, padding counted, but enough for the longest."""
    return max((sum(lengths) if way == "packed" else len(lengths) * max(lengths)) // 2, max(lengths))


def _replanned(group: list[int], lengths: list[int], token_budget: int, way: Way) -> list[list[int]]:
    """A group of a plan in parts that are within a smaller budget."""
    parts = plan([lengths[i] for i in group], token_budget=token_budget, way=way)
    return [[group[j] for j in part] for part in parts]


def _joined(parts: list[tuple[list[int], Tensor]], tokens: TokenBatch) -> Float[Tensor, "L N D"]:
    """The activations of groups of sequences, back in the order of the batch."""
    sequence, first = tokens.sequence, parts[0][1]
    acts = first.new_empty(first.shape[0], len(sequence), first.shape[2])
    for group, part in parts:
        acts[:, torch.isin(sequence, torch.tensor(group)).to(acts.device)] = part
    return acts


def _attempt(lm: Decoder, tokens: TokenBatch, way: Way, prefix: PrefixCache | None) -> Float[Tensor, "L N D"] | None:
    """One forward; None when it is out of memory."""
    try:
        return _forward(lm, tokens, way, prefix)
    except torch.OutOfMemoryError:
        pass  # the traceback holds the tensors of the forward until here
    if lm.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _forward(lm: Decoder, tokens: TokenBatch, way: Way, prefix: PrefixCache | None) -> Float[Tensor, "L N D"]:
    with torch.inference_mode():
        residuals = _residuals(lm, tokens, way, prefix)
    n_rows, longest, _ = residuals[0].shape
    real = torch.arange(longest) < (tokens.lengths[:, None] if n_rows == len(tokens) else longest)
    rows = _to(residuals[0].device, real.flatten().nonzero().squeeze(1))
    # Allocated outside inference mode: an ordinary tensor, which autograd takes as input.
    acts = torch.empty(len(lm.layers), len(rows), lm.d_in, dtype=residuals[0].dtype, device=residuals[0].device)
    with torch.inference_mode():
        for out, residual in zip(acts, residuals, strict=True):
            torch.index_select(residual.flatten(0, 1), 0, rows, out=out)
    return acts


def _residuals(lm: Decoder, tokens: TokenBatch, way: Way, prefix: PrefixCache | None) -> list[Float[Tensor, "B T D"]]:
    """Of padded rows, or of one row that holds all sequences."""
    if way == "packed":
        with packed_row(lm, tokens.lengths.tolist()):
            return read_residuals(lm, _to(lm.device, tokens.input_ids[None]))
    if way == "padded" and prefix is not None and (length := prefix.common(tokens)):
        return prefix.residuals(tokens, length)
    return read_residuals(lm, _to(lm.device, tokens.padded()))


def _to(device: torch.device, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """On the device; a GPU copies from pinned memory while the CPU goes on."""
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)


def check_block(lm: Decoder, block_size: int) -> None:
    """Refuse blocks that are longer than the model's context.

    Raises:
        UserError: they are.
    """
    if lm.max_positions is not None and block_size > lm.max_positions:
        raise UserError(f"data.block_size is {block_size}, the context of {lm.name} is {lm.max_positions}")


def check_tokens(lm: Decoder, tokens: TokenBatch) -> None:
    """Refuse what the model would read wrongly or not at all.

    Raises:
        UserError: names the first sequence that is empty, too long, or holds a token id outside the vocabulary.
    """
    lengths = tokens.lengths
    if bool((lengths == 0).any()):
        raise UserError(f"dialogue {tokens.names[int((lengths == 0).int().argmax())]!r} has no tokens")
    limit = lm.max_positions
    if limit is not None and bool((lengths > limit).any()):
        longest = int(lengths.argmax())
        raise UserError(
            f"dialogue {tokens.names[longest]!r} has {int(lengths[longest])} tokens, the context of {lm.name} is "
            f"{limit}; lower data.max_length or data.block_size"
        )
    outside = (tokens.input_ids < 0) | (tokens.input_ids >= lm.vocab_size)
    if bool(outside.any()):
        at = int(outside.int().argmax())
        raise UserError(
            f"dialogue {tokens.names[int(tokens.sequence[at])]!r} holds token id {int(tokens.input_ids[at])}, the "
            f"vocabulary of {lm.name} is 0..{lm.vocab_size - 1}; is the tokenizer that of the model?"
        )


def broken_sequences(layers: Sequence[int], acts: Float[Tensor, "L N D"], tokens: TokenBatch) -> list[Broken]:
    """The sequences with an activation of one of these layers that is not finite, in their order."""
    if bool(torch.stack([torch.isfinite(a).all() for a in acts]).all()):
        return []
    broken = torch.stack([~torch.isfinite(a).all(dim=-1) for a in acts]).cpu()
    found = []
    for i, (start, stop) in enumerate(pairwise(tokens.cu_seqlens.tolist())):
        counts = broken[:, start:stop].sum(dim=1)
        if counts.any():
            first = int((counts > 0).int().argmax())
            found.append(Broken(i, tokens.names[i], layers[first], int(counts[first]), stop - start))
    return found


def bare_tokens(rows: Sequence[Tensor]) -> TokenBatch:
    """Sequences of token ids without roles or kinds, named by their index."""
    lengths = torch.tensor([0, *map(len, rows)])
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *rows])
    zeros = torch.zeros(len(ids), dtype=torch.uint8)
    return TokenBatch(
        names=tuple(map(str, range(len(rows)))),
        input_ids=ids,
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        position=torch.cat([torch.arange(n) for n in lengths.tolist()]),
        role=zeros,
        kind=zeros,
        special=zeros.bool(),
        prefix=zeros.bool(),
    )
