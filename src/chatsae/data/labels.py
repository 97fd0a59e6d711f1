"""What each token of a rendered dialogue is, read off where the contents lie and what the template writes between.

A template writes a header before each content and mostly a closing token after it: `<|im_start|>user\\n` and
`<|im_end|>`. The tokens between two contents are a gap: the end of one turn, then the header of the next. Gaps repeat
from dialogue to dialogue, so each is worked out once and remembered.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile

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


Sign = tuple[tuple[int, ...], str]
"""How a header is told from others: its special tokens, and the role's name after them (empty: it has none)."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A tokenizer's special tokens, and what its template makes of them.

    `text` decodes one id; `control` are the ids of special tokens; `closing` those of them that end a turn. `begin` is
    the tokenizer's beginning-of-text token; `bos` is the same, but None where the template also opens or closes turns
    with it. `names`: the words the template writes for roles; `headers`: what it writes before a turn, by role;
    `signs`: the role of each header, and what can follow its name.
    """

    text: Callable[[int], str]
    control: frozenset[int]
    begin: int | None
    bos: int | None
    closing: frozenset[int] = frozenset()
    names: Mapping[str, Role] = field(default_factory=dict)
    headers: Mapping[Role, tuple[int, ...]] = field(default_factory=dict)
    signs: Mapping[Sign, tuple[Role, tuple[tuple[int, ...], ...]]] = field(default_factory=dict)
    _gaps: dict[tuple[tuple[int, ...], Role | None, Role | None], Labels] = field(default_factory=dict, init=False)

    def label(
        self, ids: Sequence[int], contents: Sequence[Span], roles: Sequence[Role], *, answer: Role | None = None
    ) -> Labels:
        """Labels of a dialogue whose contents, one per turn and in order, are at the given spans.

        `answer`: whose header ends a prompt; None where the dialogue is whole.
        """
        labels = Labels.empty(len(ids))
        end, before = 0, None
        for (start, stop), role in zip(contents, roles, strict=True):
            labels.put(end, start, self._gap(tuple(ids[end:start]), before, role))
            labels.role[start:stop] = role
            end, before = stop, role
        labels.put(end, len(ids), self._gap(tuple(ids[end:]), before, answer))
        return labels

    def label_by_headers(self, ids: Sequence[int], *, own_system: bool) -> Labels:
        """Labels where the contents could not be located: what follows a known header is that role's content.

        `own_system`: the dialogue brings a system turn, so that one in the text is not the template's default.
        """
        labels = Labels.empty(len(ids))
        skipped = self._beginning(ids)
        labels.kind[:skipped] = Kind.CONTROL
        previous = Role.NONE
        for piece, role, text in self._turns(ids, skipped):
            if role == Role.SYSTEM and not own_system:
                role = Role.DEFAULT_SYSTEM
            labels.role[piece.start : piece.header] = previous
            labels.role[piece.header : piece.stop] = role
            labels.kind[piece.start : text] = Kind.TEMPLATE_TEXT
            content = Kind.TEMPLATE_TEXT if role == Role.DEFAULT_SYSTEM else Kind.CONTENT
            labels.kind[text : piece.stop] = content
            self._mark(labels, ids, piece)
            previous = role
        return labels

    def sign(self, gap: Sequence[int]) -> tuple[Sign, tuple[int, ...], tuple[int, ...]]:
        """The header at the end of a gap: its sign, all of its tokens, and those after its role's name."""
        *_, piece = self._pieces(gap)
        start, stop = piece.name
        return (tuple(gap[piece.header : start]), piece.word), tuple(gap[piece.header :]), tuple(gap[stop:])

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
        skipped = self._beginning(ids) if before is None else 0
        labels.kind[:skipped] = Kind.CONTROL
        previous = before
        own = self._own_text(ids, skipped, after) if before is None else 0
        if own:
            labels.role[skipped:own] = previous = Role.DEFAULT_SYSTEM
            self._mark(labels, ids, self._piece(ids, skipped, own, closed=False))
        for piece in self._pieces(ids, own or skipped):
            if not piece.closed:
                owner = after if after is not None else previous
            elif piece.header == piece.stop - 1 and previous is not None:
                owner = previous  # nothing but the end of the turn before
            else:
                owner = Role.DEFAULT_SYSTEM if before is None else Role.NONE  # a turn of the template's own
            owner = Role.NONE if owner is None else owner
            # text before the header ends the turn before; without a header it leads in the next content
            lead = piece.header if piece.header < piece.stop else self._blank_until(ids, piece)
            labels.role[piece.start : piece.stop] = owner
            if previous is not None:
                labels.role[piece.start : lead] = previous
            self._mark(labels, ids, piece)
            previous = owner
        return labels

    def _blank_until(self, ids: Sequence[int], piece: _Piece) -> int:
        """Where the white space after a closing token ends."""
        if piece.start == 0 or ids[piece.start - 1] not in self.closing:
            return piece.start
        blank = takewhile(lambda p: not self.text(ids[p]).strip(), range(piece.start, piece.stop))
        return piece.start + sum(1 for _ in blank)

    def _own_text(self, ids: tuple[int, ...], start: int, after: Role | None) -> int:
        """Where a text of the template's own ends, which no token closes before the first header; 0: there is none."""
        header = self.headers.get(Role.NONE if after is None else after, ())
        stop = len(ids) - len(header)
        if not header or ids[stop:] != header or any(i in self.closing for i in ids[start:stop]):
            return 0
        return stop if any(i not in self.control and self.text(i).strip() for i in ids[start:stop]) else 0

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

    def _beginning(self, ids: Sequence[int]) -> int:
        """1 where a dialogue begins with a beginning-of-text token that elsewhere closes turns; else 0."""
        return int(len(ids) > 0 and ids[0] == self.begin and ids[0] in self.closing)

    def _pieces(self, ids: Sequence[int], start: int = 0) -> Iterator[_Piece]:
        for p in range(start, len(ids)):
            if ids[p] in self.closing:
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

    def _turns(self, ids: Sequence[int], start: int) -> Iterator[tuple[_Piece, Role, int]]:
        """Pieces that end at a closing token or before a known header; each with its role and where its text begins."""
        known = {p: found for p in range(start, len(ids)) if (found := self._header(ids, p)) is not None}
        edges = {p + 1 for p in range(start, len(ids)) if ids[p] in self.closing} | set(known)
        bounds = sorted({start, *edges, len(ids)})
        for begin, stop in pairwise(bounds):
            piece = self._piece(ids, begin, stop, closed=ids[stop - 1] in self.closing)
            if begin in known:
                sign, name, text = known[begin]
                yield replace(piece, name=name, word=sign[1]), self.signs[sign][0], min(text, stop)
            else:
                role = self.names.get(piece.word, Role.NONE)
                yield piece, role, piece.header

    def _header(self, ids: Sequence[int], start: int) -> tuple[Sign, Span, int] | None:
        """The known header that begins here: its sign, the place of its role's name, and where it ends."""
        stop = start
        while stop < len(ids) and self._opens(ids[stop]):
            stop += 1
        for end in range(stop, start, -1):
            name, word = self._name(ids, end, len(ids))
            for sign, place in (((tuple(ids[start:end]), ""), (end, end)), ((tuple(ids[start:end]), word), name)):
                if sign in self.signs:
                    rest = max(self._follows(ids, place[1], tail) for tail in self.signs[sign][1])
                    return sign, place, place[1] + rest
        return None

    def _follows(self, ids: Sequence[int], start: int, tail: Sequence[int]) -> int:
        """How many tokens from `start` on are those of a header's end; white space may have joined the content's."""
        n = 0
        while n < len(tail) and start + n < len(ids) and ids[start + n] == tail[n]:
            n += 1
        if n < len(tail) and start + n < len(ids):
            n += not (self.text(tail[n]) + self.text(ids[start + n])).strip()
        return n

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
