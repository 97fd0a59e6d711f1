"""The records that flow through the pipeline: data only, no I/O.

Shape legend, used in every signature of the package:
    B sequences · T tokens of the longest sequence · N tokens, flattened · L layers · D d_in · F d_sae
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from itertools import islice
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from chatsae.errors import UserError

Item = TypeVar("Item")
Split = Literal["train", "eval", "interpret", "steer"]
"""What a dialogue is for: training, or held out for evaluation, interpretation or steering."""

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A chat, in order of its turns."""

    id: str
    source: str
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, as pretraining corpora have it."""

    id: str
    source: str
    text: str


class Role(IntEnum):
    """Whose turn a token belongs to; DEFAULT_SYSTEM is the system prompt that the template adds by itself."""

    NONE = 0
    SYSTEM = 1
    DEFAULT_SYSTEM = 2
    USER = 3
    ASSISTANT = 4
    TOOL = 5


class Kind(IntEnum):
    """What a token is: CONTROL, ROLE_NAME, TEMPLATE_TEXT and END_OF_TURN are written by the chat template."""

    CONTENT = 0
    FIRST = 1
    CONTROL = 2
    ROLE_NAME = 3
    TEMPLATE_TEXT = 4
    END_OF_TURN = 5


PARTS = ("position_0", "constant_prefix", "template", "content")
"""Parts of a dialogue: position 0; else the prefix that is the same in every dialogue; else what the template wrote."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Ragged sequences, flattened. A whole dialogue (fast) or a block (bt-f, bt-p) is one sequence.

    `special` marks the tokens of the paper's MSE_st by template position: control tokens, end-of-turn tokens and the
    role names of user and assistant, where the template wrote them (a beginning-of-text token is not one of them).
    `prefix` marks tokens of the prefix that is the same in every dialogue of the template.
    """

    names: tuple[str, ...]
    input_ids: Int[Tensor, " N"]
    cu_seqlens: Int[Tensor, " B1"]
    position: Int[Tensor, " N"]
    role: UInt8[Tensor, " N"]
    kind: UInt8[Tensor, " N"]
    special: Bool[Tensor, " N"]
    prefix: Bool[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        return self.cu_seqlens.diff()

    @property
    def sequence(self) -> Int[Tensor, " N"]:
        """Index of the sequence each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths.long())

    @property
    def part(self) -> Int[Tensor, " N"]:
        """The index in `PARTS` of each token."""
        written = torch.where(self.kind == int(Kind.CONTENT), 3, 2)
        return torch.where(self.position == 0, 0, torch.where(self.prefix, 1, written))

    def begun(self, begins: Bool[Tensor, " N"]) -> Int[Tensor, " N"]:
        """How many of the tokens marked are there in each token's sequence, up to and with it."""
        count = begins.long().cumsum(0)
        start = self.cu_seqlens[:-1].long()[self.sequence]
        return count - (count - begins.long())[start]

    def select(self, sequences: Sequence[int]) -> "TokenBatch":
        """The given sequences, in the given order."""
        bounds = self.cu_seqlens.tolist()
        rows = [torch.arange(bounds[i], bounds[i + 1]) for i in sequences]
        index = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        per_token = {f: getattr(self, f)[index] for f in _PER_TOKEN}
        return TokenBatch(
            names=tuple(self.names[i] for i in sequences),
            cu_seqlens=_offsets([bounds[i + 1] - bounds[i] for i in sequences]),
            **per_token,
        )

    @staticmethod
    def concat(batches: Sequence["TokenBatch"]) -> "TokenBatch":
        """One batch with all sequences, in order."""
        per_token = {f: torch.cat([getattr(b, f) for b in batches]) for f in _PER_TOKEN}
        return TokenBatch(
            names=tuple(name for b in batches for name in b.names),
            cu_seqlens=_offsets([n for b in batches for n in b.lengths.tolist()]),
            **per_token,
        )

    def padded(self, pad_id: int = 0) -> Int[Tensor, "B T"]:
        """Right-padded token ids, for back ends that want a rectangle."""
        rows = list(torch.split(self.input_ids, self.lengths.tolist()))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)


def head(items: Iterable[Item], limit: int | None) -> Iterator[Item]:
    """The first `limit` items, all without a limit.

    Raises:
        UserError: the limit is negative.
    """
    if limit is not None and limit < 0:
        raise UserError(f"limit must be at least 0, not {limit}")
    return islice(items, limit)


def first(stream: Iterable[TokenBatch], limit: int | None) -> Iterator[TokenBatch]:
    """The first `limit` sequences of a stream of batches, all without a limit; no batch is read that is not needed."""
    left = limit
    for tokens in stream if limit != 0 else ():
        if left is not None and len(tokens) >= left:
            yield tokens.select(range(left))
            return
        yield tokens
        left = None if left is None else left - len(tokens)


_PER_TOKEN = tuple(f.name for f in fields(TokenBatch) if f.name not in ("names", "cu_seqlens"))


def _offsets(lengths: Sequence[int]) -> Int[Tensor, " B1"]:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


@dataclass(frozen=True, slots=True)
class ActivationBatch:
    """The residual stream after each tapped layer, for every token of a batch."""

    acts: Float[Tensor, "L N D"]
    tokens: TokenBatch
