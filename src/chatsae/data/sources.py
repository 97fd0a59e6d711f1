"""Where dialogues and documents come from: the built-in corpus, presets, hub data sets, local files."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TypeVar, get_args

from chatsae.batch import Dialogue, Document
from chatsae.data import pydocs
from chatsae.data.normalise import CHAT_COLUMNS, EXTRA_COLUMNS, PAIR_COLUMNS, Reject, normalise
from chatsae.data.pydocs import Split
from chatsae.data.readers import SUFFIXES, Row, hub_rows, local_files, local_rows
from chatsae.errors import UserError

T = TypeVar("T")

_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.9), ("eval", 0.06), ("interpret", 0.04))
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_CHAT = tuple(dict.fromkeys((*CHAT_COLUMNS, *(c for pair in PAIR_COLUMNS for c in pair), *EXTRA_COLUMNS)))
_TEXT = ("text",)


@dataclass(frozen=True, slots=True)
class Preset:
    """A corpus of the paper on the Hugging Face Hub."""

    hub_id: str
    config: str | None
    columns: tuple[str, ...]


PRESETS: dict[str, Preset] = {
    "wildchat": Preset("allenai/WildChat-1M", None, ("conversation",)),
    "wildchat-full": Preset("allenai/WildChat-1M-Full", None, ("conversation",)),
    "infinity-instruct": Preset("BAAI/Infinity-Instruct", "7M", ("conversations",)),
    "tulu-3": Preset("allenai/tulu-3-sft-mixture", None, ("messages",)),
    "orca-agentinstruct": Preset("mlabonne/orca-agentinstruct-1M-v1-cleaned", None, ("messages",)),
    "lmsys": Preset("lmsys/lmsys-chat-1m", None, ("conversation",)),
    "pile": Preset("monology/pile-uncopyrighted", None, _TEXT),
}


def read(*sources: str, split: Split = "train", seed: int = 0, tally: Counter[str] | None = None) -> Iterator[Dialogue]:
    """The dialogues of one split of the sources, in order, streamed.

    A source is "pydocs", a preset, a hub id (`owner/name` or `owner/name:config`), a .jsonl, .jsonl.gz or .parquet
    file, or a directory of them. Rows that are no usable dialogue are counted in `tally` by their reason. The split
    follows from the content alone, so that no dialogue is in two of them; `seed` varies the built-in corpus.

    Raises:
        UserError: a source is unknown, cannot be reached or read, has fields that are not those of a chat, or holds
            no dialogue of the split.
    """
    resolved = _resolve(sources, split, _CHAT)
    dialogues = chain.from_iterable(_dialogues(source, split, seed, tally) for source in resolved)
    return _not_empty(dialogues, sources, split)


def read_text(
    *sources: str, split: Split = "train", seed: int = 0, tally: Counter[str] | None = None
) -> Iterator[Document]:
    """The documents of one split of the sources, in order, streamed; rows of a file have a field `text`.

    Sources, split, seed, tally and errors are those of `read`.
    """
    resolved = _resolve(sources, split, _TEXT)
    documents = chain.from_iterable(_documents(source, split, seed, tally) for source in resolved)
    return _not_empty(documents, sources, split)


def split_of(content: str) -> Split:
    """The split a content falls into, by its hash: 0.9 train, 0.06 eval, 0.04 interpret."""
    digest = blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    left = int.from_bytes(digest, "big") / 2**64
    for split, share in _SHARES:
        left -= share
        if left < 0:
            return split
    return _SHARES[-1][0]


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    rows: Callable[[], Iterator[Row]] | None  # None: the built-in corpus


def _resolve(sources: Sequence[str], split: str, columns: Sequence[str]) -> list[_Source]:
    if split not in get_args(Split):
        raise UserError(f"split: {split!r} is not one of {', '.join(get_args(Split))}")
    if not sources:
        raise UserError("no source is given; name at least one (pydocs is built in)")
    return [_Source(source, _rows_of(source, columns)) for source in sources]


def _rows_of(source: str, columns: Sequence[str]) -> Callable[[], Iterator[Row]] | None:
    path = Path(source).expanduser()
    if source == "pydocs":
        return None
    if preset := PRESETS.get(source):
        if not set(preset.columns) <= set(columns):
            kind = "plain text (data.text_sources)" if preset.columns == _TEXT else "dialogues (data.sources)"
            raise UserError(f"source {source!r} holds {kind}")
        return lambda: hub_rows(preset.hub_id, preset.config, preset.columns)
    if path.exists() or source.endswith(SUFFIXES) or source.startswith(("/", "./", "../", "~")):
        files = local_files(path)
        return lambda: chain.from_iterable(local_rows(file, columns) for file in files)
    if hub := _HUB_ID.fullmatch(source):
        return lambda: hub_rows(hub[1], hub[2], columns)
    near = difflib.get_close_matches(source, ["pydocs", *PRESETS], n=1)
    hint = f"; perhaps you meant {near[0]}" if near else ""
    raise UserError(
        f"source {source!r} is neither a file nor a hub id (owner/name) nor one of pydocs, {', '.join(PRESETS)}{hint}"
    )


def _dialogues(source: _Source, split: Split, seed: int, tally: Counter[str] | None) -> Iterator[Dialogue]:
    if source.rows is None:
        yield from pydocs.dialogues(split, seed)
        return
    count = _Count(source.name, "dialogue", tally)
    for row in source.rows():
        found = normalise(row.value, source=source.name, id=f"{row.file}:{row.number}")
        if isinstance(found, Reject):
            if found.wrong_field:
                raise UserError(f"{row.file}, row {row.number}: {found.reason}")
            count.reject(found.reason, found.detail)
        elif count.accept(split, "\x1e".join(f"{m.role}\x1f{m.content}" for m in found.messages)):
            yield found
    count.check()


def _documents(source: _Source, split: Split, seed: int, tally: Counter[str] | None) -> Iterator[Document]:
    if source.rows is None:
        yield from pydocs.documents(split, seed)
        return
    count = _Count(source.name, "document", tally)
    for row in source.rows():
        where = f"{row.file}, row {row.number}"
        if not isinstance(row.value, dict):
            raise UserError(f"{where}: expected an object with fields, got {type(row.value).__name__}")
        if "text" not in row.value:
            raise UserError(f"{where}: field 'text' is missing (found: {', '.join(row.value) or 'nothing'})")
        text = row.value["text"]
        if not isinstance(text, str | None):
            raise UserError(f"{where}: field 'text' expected text, got {type(text).__name__}")
        if not text or text.isspace():
            count.reject("empty text")
        elif not _encodable(text):
            count.reject("text is not valid Unicode")
        elif count.accept(split, text):
            yield Document(id=f"{row.file}:{row.number}", source=source.name, text=text)
    count.check()


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


class _Count:
    """What became of the rows of one source."""

    def __init__(self, source: str, noun: str, tally: Counter[str] | None) -> None:
        self.source, self.noun, self.tally = source, noun, tally
        self.usable = 0
        self.reasons: Counter[str] = Counter()
        self.first_detail: dict[str, str] = {}

    def accept(self, split: Split, content: str) -> bool:
        self.usable += 1
        return split_of(content) == split

    def reject(self, reason: str, detail: str = "") -> None:
        self.reasons[reason] += 1
        self.first_detail.setdefault(reason, detail)
        if self.tally is not None:
            self.tally[reason] += 1

    def check(self) -> None:
        """Raises UserError when no row was usable, in whatever split."""
        if self.usable:
            return
        reasons = [
            f"{number} × {reason}" + (f" (such as {self.first_detail[reason]})" if self.first_detail[reason] else "")
            for reason, number in self.reasons.most_common()
        ]
        raise UserError(
            f"{self.source} holds no {self.noun}" + (f"; rejected: {', '.join(reasons)}" if reasons else "")
        )


def _not_empty(items: Iterator[T], sources: Sequence[str], split: Split) -> Iterator[T]:
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        shares = ", ".join(f"{name} {share:g}" for name, share in _SHARES)
        raise UserError(f"{', '.join(sources)}: nothing falls into the split {split!r} ({shares}); give larger sources")
