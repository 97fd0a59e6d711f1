"""What each token of a rendered dialogue is, read off where the contents lie and what the template writes between.

A template writes a header before each content and mostly a closing token after it: `<|im_start|>user\\n` and
`<|im_end|>`. The tokens between two contents are a gap: the end of one turn, then the header of the next. Gaps repeat
from dialogue to dialogue, so each is worked out once and remembered.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from chatsae.batch import Kind, Role

_NAME = re.compile(r" ?([A-Za-z_]{1,20})\s*")
_GAPS_REMEMBERED = 4096

Span = tuple[int, int]
"""First token, and one past the last."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Per-token labels of one sequence, or of a stretch of it."""

    role: np.ndarray
    kind: np.ndarray
    special: np.ndarray

    @staticmethod
    def empty(length: int) -> "Labels":
        """Role NONE, kind CONTENT, not special."""
        return Labels(np.zeros(length, np.uint8), np.zeros(length, np.uint8), np.zeros(length, bool))

    def put(self, start: int, stop: int, other: "Labels") -> None:
        """Write the labels of a stretch."""
        self.role[start:stop], self.kind[start:stop], self.special[start:stop] = other.role, other.kind, other.special


@dataclass(frozen=True, slots=True)
class _Piece:
    """Template tokens up to and with a closing token, or after the last one."""

    start: int
    header: int  # its first control token; stop when it has none
    name: Span  # the role's name in the header; (header, header) when it has none
    word: str
    stop: int
    closed: bool


@dataclass(frozen=True, slots=True)
class Grammar:
    """A tokenizer's special tokens, and what its template makes of them.

    `text` decodes one id; `control` are the ids of special tokens; `closing` those of them that end a turn; `names`
    the words the template writes for roles.
    """

    text: Callable[[int], str]
    control: frozenset[int]
    bos: int | None
    closing: frozenset[int] = frozenset()
    names: Mapping[str, Role] = field(default_factory=dict)
    _gaps: dict[tuple[tuple[int, ...], Role | None, Role | None], Labels] = field(default_factory=dict, init=False)

    def label(self, ids: Sequence[int], contents: Sequence[Span], roles: Sequence[Role]) -> Labels:
        """Labels of a dialogue whose contents, one per turn and in order, are at the given spans."""
        labels = Labels.empty(len(ids))
        end, before = 0, None
        for (start, stop), role in zip(contents, roles, strict=True):
            labels.put(end, start, self._gap(tuple(ids[end:start]), before, role))
            labels.role[start:stop] = role
            end, before = stop, role
        labels.put(end, len(ids), self._gap(tuple(ids[end:]), before, None))
        return labels

    def label_by_headers(self, ids: Sequence[int], *, own_system: bool) -> Labels:
        """Labels where the contents could not be located: what follows a known header is that role's content.

        `own_system`: the dialogue brings a system turn, so that one in the text is not the template's default.
        """
        labels = Labels.empty(len(ids))
        previous = Role.NONE
        for piece in self._pieces(ids):
            role = self.names.get(piece.word, Role.NONE)
            if role == Role.SYSTEM and not own_system:
                role = Role.DEFAULT_SYSTEM
            labels.role[piece.start : piece.header] = previous
            labels.role[piece.header : piece.stop] = role
            labels.kind[piece.start : piece.header] = Kind.TEMPLATE_TEXT
            content = Kind.TEMPLATE_TEXT if role == Role.DEFAULT_SYSTEM else Kind.CONTENT
            labels.kind[piece.header : piece.stop] = content
            self._mark(labels, ids, piece)
            previous = role
        return labels

    def header_name(self, gap: Sequence[int]) -> str:
        """The role's name in the header at the end of a gap; empty when there is none."""
        *_, piece = self._pieces(gap)
        return piece.word

    def first_control(self, gap: Sequence[int]) -> int | None:
        """The first special token of a gap, a beginning-of-text token apart."""
        return next((i for i in gap if self._opens(i)), None)

    def _gap(self, ids: tuple[int, ...], before: Role | None, after: Role | None) -> Labels:
        key = (ids, before, after)
        if (known := self._gaps.get(key)) is not None:
            return known
        if len(self._gaps) >= _GAPS_REMEMBERED:
            self._gaps.clear()
        labels = self._gaps[key] = self._work_out(ids, before, after)
        return labels

    def _work_out(self, ids: tuple[int, ...], before: Role | None, after: Role | None) -> Labels:
        labels = Labels.empty(len(ids))
        labels.kind[:] = Kind.TEMPLATE_TEXT
        previous = before
        for piece in self._pieces(ids):
            if not piece.closed:
                owner = after if after is not None else previous
            elif piece.header == piece.stop - 1 and previous is not None:
                owner = previous  # nothing but the end of the turn before
            else:
                owner = Role.DEFAULT_SYSTEM if before is None else Role.NONE  # a turn of the template's own
            owner = Role.NONE if owner is None else owner
            # text before the header ends the turn before; without a header it leads in the next content
            leading = previous if previous is not None and piece.header < piece.stop else owner
            labels.role[piece.start : piece.header] = leading
            labels.role[piece.header : piece.stop] = owner
            self._mark(labels, ids, piece)
            previous = owner
        return labels

    def _mark(self, labels: Labels, ids: Sequence[int], piece: _Piece) -> None:
        """Kind and special of the control tokens and the role's name in a piece."""
        for p in range(piece.start, piece.stop):
            if ids[p] in self.control:
                labels.kind[p] = Kind.END_OF_TURN if ids[p] in self.closing else Kind.CONTROL
                labels.special[p] = ids[p] != self.bos
            if ids[p] == self.bos:
                labels.role[p] = Role.NONE
        start, stop = piece.name
        labels.kind[start:stop] = Kind.ROLE_NAME
        labels.special[start:stop] = self.names.get(piece.word) in (Role.USER, Role.ASSISTANT)

    def _pieces(self, ids: Sequence[int]) -> Iterator[_Piece]:
        start = 0
        for p, token in enumerate(ids):
            if token in self.closing:
                yield self._piece(ids, start, p + 1, closed=True)
                start = p + 1
        yield self._piece(ids, start, len(ids), closed=False)

    def _piece(self, ids: Sequence[int], start: int, stop: int, *, closed: bool) -> _Piece:
        header = next((p for p in range(start, stop) if self._opens(ids[p])), stop)
        after = header
        while after < stop and ids[after] in self.control:
            after += 1
        name, word = self._name(ids, after, stop)
        return _Piece(start, header, name, word, stop, closed)

    def _opens(self, token: int) -> bool:
        return token in self.control and token != self.bos

    def _name(self, ids: Sequence[int], start: int, stop: int) -> tuple[Span, str]:
        """The one word between the header's first special tokens and the next one, or the end of the line."""
        line, p = "", start
        while p < stop and ids[p] not in self.control and "\n" not in line and len(line) < 40:
            line += self.text(ids[p])
            p += 1
        match = _NAME.fullmatch(line)
        if match is None:
            return (start, start), ""
        while not self.text(ids[p - 1]).strip():
            p -= 1
        return (start, p), match[1]
