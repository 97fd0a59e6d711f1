"""The groups of tokens that figures are broken down by. Letters in shapes: G groups, K sums; else `chatsae.batch`."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatsae.batch import PARTS, Kind, Role, TokenBatch
from chatsae.lm.norms import SINK_RATIO

WHOLE, SPECIAL = "all", "special"

STEPS = 64
"""Steps per octave of the grid on which norms are counted, so that the median need not be known before the end."""

_KINDS = ("content", "first", "control", "role_name", "template_text", "end_of_turn", "first_assistant")
_STARTS = (0, 1, 8, 64, 512)  # of the position buckets
_TURNS = (0, 1, 2, 3, 4, 5, 9)  # likewise of turns
_BEFORE = (Role.NONE, Role.SYSTEM, Role.DEFAULT_SYSTEM)

PARTITIONS: Mapping[str, Sequence[str]] = {
    "role": ("none", "system", "default_system", "user", "assistant", "tool"),
    "kind": _KINDS,
    "position": ("0", "1-7", "8-63", "64-511", "512+"),
    "turn": ("before", "1", "2", "3", "4", "5-8", "9+"),
    "prefix": ("outside", "inside"),
    "part": PARTS,
}
"""Ways to part all tokens, and the names of the parts, in the order of their codes.

kind: that of `chatsae.batch.Kind`, but the first content token of each assistant turn is a kind of its own.
turn: runs of tokens of one role, counted from the first message that is not a system turn; `before` is what precedes.
prefix: the prefix that is the same in every dialogue of the template. part: see `chatsae.batch.PARTS`.
"""

VARIANTS = ("mse_st", "mse_st_template", "mse_st_no_first", "mse_st_no_prefix")
"""Choices of special tokens: by id, as the paper; by template position; of these without position 0; of these without
the constant prefix and position 0."""

NAMES: tuple[tuple[str, str], ...] = (
    (WHOLE, ""),
    *((SPECIAL, variant) for variant in VARIANTS),
    *((partition, part) for partition, parts in PARTITIONS.items() for part in parts),
)
"""Every group whose tokens are known as they stream by; (partition, part)."""


def membership(tokens: TokenBatch, special_ids: Sequence[int]) -> Float[Tensor, "N G"]:
    """1 where a token belongs to a group of `NAMES`, else 0, as float64."""
    by_id = torch.isin(tokens.input_ids, torch.tensor(special_ids, dtype=torch.int64))
    first = tokens.position == 0
    template = tokens.special
    chosen = [torch.ones_like(first), by_id, template, template & ~first, template & ~first & ~tokens.prefix]
    codes = {
        "role": tokens.role.long(),
        "kind": _kind(tokens),
        "position": _bucket(tokens.position, _STARTS),
        "turn": _bucket(turns(tokens), _TURNS),
        "prefix": tokens.prefix.long(),
        "part": tokens.part,
    }
    columns = [torch.stack(chosen, dim=1)]
    columns += [torch.nn.functional.one_hot(codes[p], len(parts)).bool() for p, parts in PARTITIONS.items()]
    return torch.cat(columns, dim=1).double()


def turns(tokens: TokenBatch) -> Int[Tensor, " N"]:
    """The turn each token is in, 1 for the first message that is no system turn, 0 before it.

    A turn ends where the role changes; tokens that belong to no role stay in the turn before them.
    """
    return tokens.begun(_begins(tokens, tokens.role.long()))


def norm_bins(norm: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Where norms lie on a grid of `STEPS` per octave; a norm of 0 lies in the lowest bin there is."""
    return (norm.double().clamp_min(2.0**-64).log2() * STEPS).floor().long()


def first_sink_bin(median_bin: int) -> int:
    """The lowest bin of norm sinks: `SINK_RATIO` times the median, to within the width of a bin (1 %)."""
    return median_bin + round(STEPS * math.log2(SINK_RATIO))


def _begins(tokens: TokenBatch, role: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Where a turn of another role than the one before begins, system turns and tokens of no role apart."""
    index = torch.arange(len(role))
    known = torch.where(role == int(Role.NONE), -1, index).cummax(0).values  # last token that has a role
    before = torch.cat([torch.tensor([-1]), known[:-1]]) if len(role) else known
    start = tokens.cu_seqlens[:-1].long()[tokens.sequence]
    changed = (before < start) | (role[before.clamp_min(0)] != role)
    return changed & ~torch.isin(role, torch.tensor([int(r) for r in _BEFORE]))


def _kind(tokens: TokenBatch) -> Int[Tensor, " N"]:
    """Kinds, with the first content token of each assistant turn as the last one."""
    kind, role = tokens.kind.long(), tokens.role.long()
    answer = (kind == int(Kind.CONTENT)) & (role == int(Role.ASSISTANT))
    before = torch.cat([torch.zeros(1, dtype=torch.bool), answer[:-1]]) if len(kind) else answer
    before = before & (tokens.position > 0)
    return torch.where(answer & ~before, len(_KINDS) - 1, kind)


def _bucket(values: Int[Tensor, " N"], starts: Sequence[int]) -> Int[Tensor, " N"]:
    return torch.bucketize(values.long(), torch.tensor(starts[1:]), right=True)
