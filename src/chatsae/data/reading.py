"""Rows -> dialogues and documents, each with its split; what is no usable row is counted by its reason."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from chatsae.batch import Dialogue, Document, Split
from chatsae.data.normalise import Reject, normalise
from chatsae.data.readers import Broken, Row
from chatsae.data.sources import Kind, Ready, Source, resolve
from chatsae.data.stream import Order, RowStream
from chatsae.errors import UserError

_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.8), ("interpret", 0.1), ("eval", 0.06), ("steer", 0.04))
_EXAMPLES = 20  # rejected rows that are kept per source and reason
_EXAMPLE_CHARACTERS = 2000


class Sample(NamedTuple):
    """A usable row: the index of its source, its split, and the digest of its content."""

    source: int
    split: Split
    item: Dialogue | Document
    digest: bytes


@dataclass(slots=True)
class Reading:
    """What became of the rows of one source."""

    rows: int = 0
    usable: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    tally: Counter[str] | None = None

    def reject(self, source: Source, row: Row, reject: Reject) -> None:
        """Count a rejected row, and keep it as an example."""
        self.rejected[reject.reason] += 1
        if self.tally is not None:
            self.tally[reject.reason] += 1
        if self.rejected[reject.reason] <= _EXAMPLES:
            where = {"source": source.label, "row": source.row_id(row), "reason": reject.reason}
            self.examples.append(where | {"detail": reject.detail, "value": _shown(row.value)})


def _shown(value: Any) -> str:
    """The beginning of a rejected row, for people."""
    try:
        return json.dumps(value, default=repr)[:_EXAMPLE_CHARACTERS]
    except (ValueError, TypeError, RecursionError):  # keys that are no text, a value inside itself, nested too deeply
        return f"{type(value).__name__} that JSON cannot hold"


def read(
    *sources: str,
    split: Split = "train",
    seed: int = 0,
    order: Order = "listed",
    revisions: Mapping[str, str] | None = None,
    tally: Counter[str] | None = None,
) -> Iterator[Dialogue]:
    """The dialogues of one split of the sources, streamed: one source after another, or mixed (see `RowStream`).

    Sources are those of `resolve`. Rows that are no usable dialogue are counted in `tally` by their reason. The split
    follows from the content alone, so that no dialogue is in two of them; `seed` varies the built-in corpus and the
    mixed order; `revisions` are those of hub data sets, by source.

    Raises:
        UserError: a source is unknown, cannot be reached or read, has fields that are not those of a chat, or holds
            no dialogue of the split.
    """
    found = resolve(sources, "dialogues", splits=(split,), seed=seed, revisions=revisions)
    stream = RowStream(found, order=order, seed=seed)
    return (item for item in one_split(stream, "dialogues", split, tally=tally) if isinstance(item, Dialogue))


def read_text(
    *sources: str,
    split: Split = "train",
    seed: int = 0,
    order: Order = "listed",
    revisions: Mapping[str, str] | None = None,
    tally: Counter[str] | None = None,
) -> Iterator[Document]:
    """The documents of one split of the sources, streamed; rows of a file have a field `text`.

    Arguments and errors are those of `read`.
    """
    found = resolve(sources, "documents", splits=(split,), seed=seed, revisions=revisions)
    stream = RowStream(found, order=order, seed=seed)
    return (item for item in one_split(stream, "documents", split, tally=tally) if isinstance(item, Document))


def one_split(
    stream: RowStream, kind: Kind, split: Split, *, tally: Counter[str] | None = None
) -> Iterator[Dialogue | Document]:
    """The items of one split, in the order of the stream; rejected rows are counted in `tally`.

    Raises:
        UserError: a source holds nothing usable, or nothing of the split is in any of them.
    """
    readings = [Reading(tally=tally) for _ in stream.sources]
    if tally is not None:
        for source in stream.sources:
            tally.update(source.skipped)
    empty = True
    for sample in samples(stream, kind, readings):
        if sample.split == split:
            empty = False
            yield sample.item
    if empty:
        shares = ", ".join(f"{name} {share:g}" for name, share in _SHARES)
        names = ", ".join(source.name for source in stream.sources)
        raise UserError(f"{names}: nothing falls into the split {split!r} ({shares}); give larger sources")


def samples(
    stream: RowStream, kind: Kind, readings: Sequence[Reading], special: re.Pattern[str] | None = None
) -> Iterator[Sample]:
    """The usable rows, in order; every row is counted in the `readings` of its source.

    A row whose content matches `special` is not usable.

    Raises:
        UserError: the first row of a file is none of this kind at all; a source ends without a usable row.
    """
    for index, row in stream:
        reading = readings[index]
        reading.rows += 1
        if isinstance(row.value, Ready):
            item, split = row.value.item, row.value.split
            digest = _digest(item)
        else:
            source = stream.sources[index]
            found = usable(row, kind, source.label, source.row_id(row), special)
            if isinstance(found, Reject):
                if found.wrong_field and row.number == 1:
                    raise UserError(f"{row.file}, row 1: {found.reason}{f' ({found.detail})' if found.detail else ''}")
                reading.reject(source, row, found)
                continue
            item, digest = found, _digest(found)
            split = _split(digest)
        reading.usable += 1
        yield Sample(index, split, item, digest)
    for source, reading in zip(stream.sources, readings, strict=True):
        _check_usable(source, reading, kind)


def split_of(content: str) -> Split:
    """The split a content falls into, by its hash: 0.8 train, 0.1 interpret, 0.06 eval, 0.04 steer."""
    return _split(blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _split(digest: bytes) -> Split:
    left = int.from_bytes(digest, "big") / 2**64
    for split, share in _SHARES:
        left -= share
        if left < 0:
            return split
    return _SHARES[-1][0]


def _digest(item: Dialogue | Document) -> bytes:
    if isinstance(item, Document):
        content = item.text
    else:
        content = "\x1e".join(f"{m.role}\x1f{m.content}" for m in item.messages)
    return blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def usable(
    row: Row, kind: Kind, source: str, id: str, special: re.Pattern[str] | None = None
) -> Dialogue | Document | Reject:
    """What a row holds, or the reason why it is of no use."""
    if isinstance(row.value, Broken):
        return Reject(row.value.reason, row.value.detail, wrong_field=True)
    if kind == "dialogues":
        return normalise(row.value, source=source, id=id, special=special)
    return _document(row.value, source, id, special)


def _document(value: Any, source: str, id: str, special: re.Pattern[str] | None) -> Document | Reject:
    if not isinstance(value, dict):
        return Reject("row is not an object", f"got {type(value).__name__}", wrong_field=True)
    if "text" not in value:
        return Reject("field missing", f"'text'; found: {', '.join(map(str, value)) or 'nothing'}", wrong_field=True)
    text = value["text"]
    if not isinstance(text, str | None):
        return Reject("field of the wrong type", f"'text' expected text, got {type(text).__name__}", wrong_field=True)
    if not text or text.isspace():
        return Reject("empty text")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return Reject("text is not valid Unicode")
    if special is not None and special.search(text):
        return Reject("special token in the content")
    return Document(id=id, source=source, text=text)


def _check_usable(source: Source, reading: Reading, kind: Kind) -> None:
    if reading.usable:
        return
    first = {  # a message names the folder too
        e["reason"]: f"{e['row'].replace(source.label, source.name, 1)}: {e['detail']}"
        for e in reversed(reading.examples)
        if e["detail"]
    }
    reasons = [
        f"{number} × {reason}" + (f" (such as {first[reason]})" if reason in first else "")
        for reason, number in reading.rejected.most_common()
    ]
    raise UserError(f"{source.name} holds no {kind[:-1]}" + (f"; rejected: {', '.join(reasons)}" if reasons else ""))
