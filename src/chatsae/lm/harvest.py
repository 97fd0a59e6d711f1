"""Activations of many sequences, each as if it went through the model alone, from few forwards."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.batch import ActivationBatch, TokenBatch
from chatsae.errors import UserError
from chatsae.lm.tap import Decoder, read_residuals

ISOLATION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2}
"""Largest `isolation_error` that rounding explains, by dtype of the model."""


class Harvest(Iterator[ActivationBatch]):
    """The activations of a stream of sequences, `token_budget` padded tokens per forward.

    `pool` sequences at a time are sorted by length, cut into batches and shuffled (`seed`), so that little is padding.
    Each activation equals that of its sequence alone. A forward that is skipped (`skip`, a count that `state_dict`
    gave) is planned but not computed; what follows is the same to the bit.

    Raises:
        UserError: on the first sequence that is empty, longer than the context, or holds an unknown token id; or when
            an activation is not finite.
    """

    def __init__(
        self,
        lm: Decoder,
        tokens: Iterable[TokenBatch],
        *,
        token_budget: int = 4096,
        pool: int = 4096,
        seed: int = 0,
        skip: int = 0,
    ) -> None:
        for name, value in (("token_budget", token_budget), ("pool", pool)):
            if value < 1:
                raise UserError(f"harvest.{name}: {value} given, at least 1 needed")
        if not lm.layers:
            raise UserError(f"{lm.name}: no layers to read; name them when the model is loaded")
        self._lm = lm
        self._batches = skip
        self.seconds = 0.0  # spent in the model
        self._stream = islice(self._planned(tokens, token_budget, pool, seed), skip, None)

    def __next__(self) -> ActivationBatch:
        tokens = next(self._stream)
        start = time.perf_counter()
        batch = ActivationBatch(acts=forward(self._lm, tokens), tokens=tokens)
        self.seconds += time.perf_counter() - start
        self._batches += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Batches served so far, those skipped included; `skip` takes it."""
        return {"batches": self._batches}

    def _planned(self, tokens: Iterable[TokenBatch], budget: int, pool: int, seed: int) -> Iterator[TokenBatch]:
        generator = torch.Generator().manual_seed(seed)
        for pooled in _pools(tokens, pool):
            batches = plan(pooled.lengths.tolist(), token_budget=budget, split=self._lm.rope_split)
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield pooled.select(batches[i])


def plan(lengths: Sequence[int], *, token_budget: int, split: int | None = None) -> list[list[int]]:
    """Indices of sequences that share a forward: shortest first, at most `token_budget` tokens with padding.

    A sequence longer than the budget goes alone. No batch holds lengths on both sides of `split`.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        crosses = split is not None and bool(current) and lengths[current[0]] <= split < lengths[i]
        if current and (crosses or (len(current) + 1) * lengths[i] > token_budget):
            batches.append(current)
            current = []
        current.append(i)
    return [*batches, current] if current else batches


def forward(lm: Decoder, tokens: TokenBatch) -> Float[Tensor, "L N D"]:
    """The residual stream after each of `lm.layers`, for the tokens of a batch in their order; dtype of the model.

    All sequences go through in one right-padded forward, in two where the model's rotary scheme asks for it.

    Raises:
        UserError: see `Harvest`.
    """
    check_tokens(lm, tokens)
    groups = plan(tokens.lengths.tolist(), token_budget=sys.maxsize, split=lm.rope_split)
    if len(groups) < 2:
        acts = _forward(lm, tokens)
    else:
        sequence = tokens.sequence
        parts = [_forward(lm, tokens.select(sorted(group))) for group in groups]
        acts = parts[0].new_empty(len(lm.layers), len(sequence), lm.d_in)
        for group, part in zip(groups, parts, strict=True):
            acts[:, torch.isin(sequence, torch.tensor(group)).to(acts.device)] = part
    _check_finite(lm, acts, tokens)
    return acts


def _forward(lm: Decoder, tokens: TokenBatch) -> Float[Tensor, "L N D"]:
    lengths = tokens.lengths
    padded = tokens.padded()
    real = torch.arange(padded.shape[1]) < lengths[:, None]
    rows = real.flatten().nonzero().squeeze(1).to(lm.device)
    with torch.inference_mode():
        residuals = read_residuals(lm, padded)
    # Allocated outside inference mode: an ordinary tensor, which autograd takes as input.
    acts = torch.empty(len(lm.layers), len(rows), lm.d_in, dtype=residuals[0].dtype, device=residuals[0].device)
    with torch.inference_mode():
        for out, residual in zip(acts, residuals, strict=True):
            torch.index_select(residual.flatten(0, 1), 0, rows, out=out)
    return acts


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


def _check_finite(lm: Decoder, acts: Float[Tensor, "L N D"], tokens: TokenBatch) -> None:
    finite = torch.stack([torch.isfinite(a).all() for a in acts])
    if bool(finite.all()):
        return
    i = int(finite.int().argmin())
    broken = (~torch.isfinite(acts[i]).all(dim=-1)).cpu()
    sequence = tokens.sequence
    first = int(sequence[int(broken.int().argmax())])
    raise UserError(
        f"layer {lm.layers[i]}, dialogue {tokens.names[first]!r}: NaN or infinite activations at "
        f"{int(broken[sequence == first].sum())} of {int(tokens.lengths[first])} tokens; try model.dtype float32"
    )


def relative_error(a: Float[Tensor, "N D"], b: Float[Tensor, "N D"]) -> float:
    """|a - b| / |b| per row, its 90 % quantile: one token may flip between experts of an MoE by rounding alone."""
    error = (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(error.quantile(0.9))


def isolation_error(lm: Decoder, lengths: Sequence[int] = (3, 1, 40, 17), seed: int = 0) -> float:
    """How far a few random sequences in one forward are from the same sequences one at a time; worst layer.

    It is rounding (`ISOLATION_TOLERANCE`) when sequences do not see each other. In the model's dtype, on its device.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = lm.max_positions or sys.maxsize
    rows = [torch.randint(lm.vocab_size, (min(n, limit),), generator=generator) for n in lengths]
    tokens = bare_tokens(rows)
    together = forward(lm, tokens)
    alone = torch.cat([forward(lm, tokens.select([i])) for i in range(len(rows))], dim=1)
    return max(relative_error(a, b) for a, b in zip(together, alone, strict=True))


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


def _pools(tokens: Iterable[TokenBatch], size: int) -> Iterator[TokenBatch]:
    """The same sequences in the same order, `size` at a time; the last pool may be smaller."""
    held: list[TokenBatch] = []
    n_held = 0
    for batch in tokens:
        held.append(batch)
        n_held += len(batch)
        if n_held >= size:
            merged = TokenBatch.concat(held)
            whole = n_held - n_held % size
            for start in range(0, whole, size):
                yield merged.select(range(start, start + size))
            held, n_held = [merged.select(range(whole, n_held))], n_held - whole
    if n_held:
        yield TokenBatch.concat(held)
