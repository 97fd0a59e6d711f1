"""Token sequences and their labels: cutting, joining into blocks, and batching."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chatsae.batch import Kind, TokenBatch
from chatsae.data.labels import Labels


@dataclass(frozen=True, slots=True)
class Tokens:
    """The labelled tokens of one dialogue, document or block."""

    name: str
    ids: np.ndarray
    labels: Labels

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int, name: str | None = None) -> "Tokens":
        """A stretch of the tokens."""
        cut = slice(start, stop)
        labels = Labels(self.labels.role[cut], self.labels.kind[cut], self.labels.special[cut])
        return Tokens(self.name if name is None else name, self.ids[cut], labels)


def cut(sequences: Iterable[Tokens], max_length: int, what: str, tally: Counter[str]) -> Iterator[Tokens]:
    """Every sequence, of a longer one its first `max_length` tokens; how many were cut is counted as `what`."""
    for tokens in sequences:
        if len(tokens) > max_length:
            tally[what] += 1
        yield tokens.part(0, max_length)


def blocks(sequences: Iterable[Tokens], size: int, tally: Counter[str]) -> Iterator[Tokens]:
    """The sequences end to end, in pieces of exactly `size` tokens; the tokens of a last, shorter piece are counted."""
    held: list[Tokens] = []
    length, number = 0, 0
    for tokens in sequences:
        held.append(tokens)
        length += len(tokens)
        if length < size:
            continue
        joined = _joined(held)
        whole = length - length % size
        for start in range(0, whole, size):
            yield joined.part(start, start + size, f"block {number}")
            number += 1
        held, length = [joined.part(whole, length)], length - whole
    if length:
        tally["tokens after the last whole block"] += length


def pieces(sequences: Iterable[Tokens], size: int, tally: Counter[str]) -> Iterator[Tokens]:
    """The blocks of `blocks`, cut again where one sequence ends and the next begins: every piece a sequence."""
    held: list[Tokens] = []
    length, number = 0, 0
    for tokens in sequences:
        start = 0
        while start < len(tokens):
            stop = min(len(tokens), start + size - length)
            held.append(tokens.part(start, stop, f"block {number}.{len(held)}"))
            length, start = length + stop - start, stop
            if length == size:
                yield from held
                held, length, number = [], 0, number + 1
    if length:
        tally["tokens after the last whole block"] += length


def batch(sequences: Sequence[Tokens], prefix: Sequence[int]) -> TokenBatch:
    """The sequences as one batch; `prefix` are the token ids that begin every dialogue of the template."""
    joined = _joined(sequences)
    lengths = np.array([len(tokens) for tokens in sequences])
    bounds = np.concatenate([[0], lengths.cumsum()])
    kind = joined.labels.kind.copy()
    kind[bounds[:-1]] = Kind.FIRST
    return TokenBatch(
        names=tuple(tokens.name for tokens in sequences),
        input_ids=torch.from_numpy(joined.ids),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        position=torch.from_numpy((np.arange(len(joined)) - np.repeat(bounds[:-1], lengths)).astype(np.int32)),
        role=torch.from_numpy(joined.labels.role),
        kind=torch.from_numpy(kind),
        special=torch.from_numpy(joined.labels.special),
        prefix=torch.from_numpy(np.concatenate([in_prefix(tokens.ids, prefix) for tokens in sequences])),
    )


def in_prefix(ids: np.ndarray, prefix: Sequence[int]) -> np.ndarray:
    inside = np.zeros(len(ids), bool)
    start = ids[: len(prefix)]
    inside[: len(start)] = np.logical_and.accumulate(start == np.array(prefix[: len(start)], np.int64))
    return inside


def _joined(sequences: Sequence[Tokens]) -> Tokens:
    labels = Labels(
        *(np.concatenate([getattr(t.labels, field) for t in sequences]) for field in ("role", "kind", "special"))
    )
    return Tokens(sequences[0].name, np.concatenate([t.ids for t in sequences]), labels)
