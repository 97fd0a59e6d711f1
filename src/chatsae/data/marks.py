"""Where the contents of a dialogue lie in what a template makes of it: marked, rendered, and found again.

The marks are private-use characters. They stand around the whole content; where the template trims it, around its
core; where it cuts parts out (thoughts, say), around every word of it.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from chatsae.batch import Message

CharacterSpan = tuple[int, int, int]
"""Where a content begins, where its first character that is no white space stands, and where it ends."""

_OPEN, _CLOSE, _MARKERS = 0xF0000, 0x100000, 0xFFFE  # two private-use planes: a pair of characters for each turn
_MARKER = re.compile(f"[{chr(_OPEN)}-{chr(_OPEN + _MARKERS - 1)}{chr(_CLOSE)}-{chr(_CLOSE + _MARKERS - 1)}]")
_PIECE = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]|◁[^◁▷\s]{1,40}▷|\s+|[^\s<\[◁]+|.")
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]|◁[^◁▷\s]{1,40}▷")

Render = Callable[[Sequence[Message]], str | None]
"""The text of messages; None where the template raises."""


class LeftOutError(Exception):
    """The template leaves a turn out."""


def locate(messages: Sequence[Message], plain: str, render: Render) -> tuple[CharacterSpan, ...] | None:
    """Spans of the contents in `plain`, what the template makes of the messages.

    None where a content is rewritten so that no marks survive, or the text is another one with them.

    Raises:
        LeftOutError: there is a turn of which the template writes nothing.
    """
    if len(messages) > _MARKERS:
        return None
    missing: set[int] | None = None
    for marked, strict in _variants(messages):
        text = render(marked)
        if text is None:
            return None
        if _MARKER.sub("", text) != plain:
            continue
        places = _places(text, plain, messages)
        found = _bounds(places) if strict else _survivors(places, plain, messages)
        if found is not None:
            return tuple((a, b - len(plain[a:b].lstrip()), b) for a, b in found)
        none = {i for i in range(len(messages)) if not places[i]}
        missing = none if missing is None else missing & none
    if missing:
        raise LeftOutError
    return None


def _variants(messages: Sequence[Message]) -> Iterator[tuple[list[Message], bool]]:
    """The marked messages, and whether every mark has to survive."""
    whole = [_around(i, message, core=False) for i, message in enumerate(messages)]
    cores = [_around(i, message, core=True) for i, message in enumerate(messages)]
    yield whole, True
    if cores != whole:
        yield cores, True
    for ends in (False, True):
        yield [_worded(i, message, ends=ends) for i, message in enumerate(messages)], False


def _pair(index: int, text: str = "") -> str:
    return f"{chr(_OPEN + index)}{text}{chr(_CLOSE + index)}"


def _around(index: int, message: Message, *, core: bool) -> Message:
    content = message.content
    inner = content.strip() if core else content
    lead = content.index(inner)
    return Message(message.role, content[:lead] + _pair(index, inner) + content[lead + len(inner) :])


def _worded(index: int, message: Message, *, ends: bool) -> Message:
    pieces = [_pair(index, piece) if _is_word(piece) else piece for piece in _PIECE.findall(message.content)]
    end = _pair(index) if ends else ""
    return Message(message.role, end + "".join(pieces) + end)


def _is_word(piece: str) -> bool:
    return not piece.isspace() and not _TAG.fullmatch(piece)


def _places(marked: str, plain: str, messages: Sequence[Message]) -> list[list[tuple[int, int, bool]]]:
    """Of each turn its marks in their order: the number among all marks, the place in `plain`, whether it opens."""
    found: list[list[tuple[int, int, bool]]] = [[] for _ in messages]
    for number, mark in enumerate(_MARKER.finditer(marked)):
        opens = ord(mark[0]) < _CLOSE
        turn = ord(mark[0]) - (_OPEN if opens else _CLOSE)
        if turn < len(found):
            found[turn].append((number, mark.start() - number, opens))
    return found


def _bounds(places: Sequence[Sequence[tuple[int, int, bool]]]) -> list[tuple[int, int]] | None:
    """What stands between the two marks of each turn; None where one is gone, stands twice or in another order."""
    for i, mine in enumerate(places):
        if [(number, opens) for number, _, opens in mine] != [(2 * i, True), (2 * i + 1, False)]:
            return None
    return [(mine[0][1], mine[1][1]) for mine in places]


def _survivors(
    places: Sequence[Sequence[tuple[int, int, bool]]], plain: str, messages: Sequence[Message]
) -> list[tuple[int, int]] | None:
    """From the first word of each turn that is still there to the last one; None where they are not in order."""
    numbers = [number for mine in places for number, _, _ in mine]
    if numbers != sorted(numbers):
        return None
    spans: list[tuple[int, int]] = []
    for i, (mine, message) in enumerate(zip(places, messages, strict=True)):
        if not mine or [opens for *_, opens in mine] != [True, False] * (len(mine) // 2):
            return None
        words = [plain[a:b] for (_, a, _), (_, b, _) in zip(mine[::2], mine[1::2], strict=True)]
        pieces = _PIECE.findall(message.content)
        matched = _matched([word for word in words if word], pieces)
        if matched is None:
            return None
        start, stop = mine[0][1], mine[-1][1]
        if matched:
            before = spans[-1][1] if spans else 0
            after = min([place for later in places[i + 1 :] for _, place, _ in later[:1]], default=len(plain))
            start -= _edge(plain[before:start][::-1], [piece[::-1] for piece in pieces[: matched[0]][::-1]])
            stop += _edge(plain[stop:after], pieces[matched[-1] + 1 :])
        spans.append((start, stop))
    return spans


def _matched(words: Sequence[str], pieces: Sequence[str]) -> list[int] | None:
    """Which pieces these words are, the last possible ones; None where they are not among them in this order."""
    found: list[int] = []
    at = len(pieces)
    for word in reversed(words):
        at = next((p for p in range(at - 1, -1, -1) if pieces[p] == word), -1)
        if at < 0:
            return None
        found.append(at)
    return found[::-1]


def _edge(text: str, pieces: Sequence[str]) -> int:
    """How much of a text are the tags, with white space between, that come next in the content."""
    length = kept = 0
    for piece in pieces:
        if not text.startswith(piece, length):
            break
        length += len(piece)
        if not piece.isspace():
            kept = length
    return kept
