"""Which tokens of a forward a spec acts on, by their absolute position in their row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatsae.batch import Kind, Role
from chatsae.steering.rows import Row
from chatsae.steering.spec import KINDS, ROLES, SteerSpec


@dataclass(frozen=True, slots=True)
class Known:
    """What is known about the rows of a batch before it runs, right-padded to the longest.

    offset: columns of padding on the left of each. length: tokens that are labelled. n_prompt: of them, the prompt's.
    """

    role: Int[Tensor, "B T"]
    kind: Int[Tensor, "B T"]
    length: Int[Tensor, " B"]
    n_prompt: Int[Tensor, " B"]
    offset: Int[Tensor, " B"]

    @staticmethod
    def of(rows: Sequence[Row], offsets: Sequence[int]) -> "Known":
        """From rows and the padding before each."""
        pad = torch.nn.utils.rnn.pad_sequence
        return Known(
            role=pad([row.role.long() for row in rows], batch_first=True),
            kind=pad([row.kind.long() for row in rows], batch_first=True),
            length=torch.tensor([len(row) for row in rows]),
            n_prompt=torch.tensor([row.n_prompt for row in rows]),
            offset=torch.tensor(list(offsets)),
        )

    def spread(self, n: int) -> "Known":
        """Every row `n` times in place of once, as beams are."""
        if n == 1:
            return self
        names = ("role", "kind", "length", "n_prompt", "offset")
        return Known(**{name: getattr(self, name).repeat_interleave(n, dim=0) for name in names})


class Special(NamedTuple):
    """Ids of special tokens, and those of them that end a turn."""

    control: frozenset[int]
    closing: frozenset[int]


@dataclass(frozen=True, slots=True)
class Seen:
    """Tokens of one forward: absolute position (below 0: padding), and whether there is a token at all."""

    position: Int[Tensor, "B T"]
    real: Bool[Tensor, "B T"]
    input_ids: Int[Tensor, "B T"] | None


def needs_labels(spec: SteerSpec) -> bool:
    """Whether where it acts depends on what tokens are."""
    return bool(spec.where.roles or spec.where.kinds)


def needs_prompt(spec: SteerSpec) -> bool:
    """Whether where it acts depends on where the prompt ends."""
    counted = any(p < 0 for p in (*spec.where.positions, *spec.where.exclude))
    return needs_labels(spec) or counted or spec.where.phase != "both" or spec.schedule != "const"


def acting(
    spec: SteerSpec, seen: Seen, known: Known, special: Special
) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
    """The tokens it acts on, and the factor that its schedule gives each."""
    where, position = spec.where, seen.position
    answered = position - known.n_prompt[:, None]  # 0 at the first generated token
    generated = answered >= 0
    mask = seen.real.clone()
    if where.phase != "both":
        mask &= generated if where.phase == "generated" else ~generated
    if where.roles:
        role = _labels(known.role, position, known, torch.full_like(position, int(Role.ASSISTANT)))
        mask &= torch.isin(role, torch.tensor([int(ROLES[name]) for name in where.roles]))
    if where.kinds:
        kind = _labels(known.kind, position, known, _kinds_by_id(seen, special))
        mask &= torch.isin(kind, torch.tensor([int(KINDS[name]) for name in where.kinds]))
    if where.positions:
        mask &= _among(position, where.positions, known)
    if where.exclude:
        mask &= ~_among(position, where.exclude, known)
    factor = torch.ones(position.shape)
    if spec.schedule == "first_n":
        mask &= answered < spec.schedule_tokens
    elif spec.schedule == "decay":
        factor = 0.5 ** (answered.clamp(min=0) / spec.schedule_tokens)
    return mask, factor


def _labels(
    table: Int[Tensor, "B L"], position: Int[Tensor, "B T"], known: Known, else_: Int[Tensor, "B T"]
) -> Int[Tensor, "B T"]:
    at = position.clamp(0, max(table.shape[1] - 1, 0))
    return torch.where(position < known.length[:, None], table.gather(1, at), else_)


def _kinds_by_id(seen: Seen, special: Special) -> Int[Tensor, "B T"]:
    assert seen.input_ids is not None
    ids = seen.input_ids
    kind = torch.full_like(ids, int(Kind.CONTENT))
    kind[torch.isin(ids, torch.tensor(sorted(special.control), dtype=ids.dtype))] = int(Kind.CONTROL)
    kind[torch.isin(ids, torch.tensor(sorted(special.closing), dtype=ids.dtype))] = int(Kind.END_OF_TURN)
    return kind


def _among(position: Int[Tensor, "B T"], wanted: Sequence[int], known: Known) -> Bool[Tensor, "B T"]:
    found = torch.isin(position, torch.tensor([p for p in wanted if p >= 0], dtype=position.dtype))
    for p in wanted:
        if p < 0:
            found |= position == known.n_prompt[:, None] + p
    return found
