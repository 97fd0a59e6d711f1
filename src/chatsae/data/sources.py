"""Where dialogues and documents come from: the built-in corpus, presets, hub data sets, local files."""

import difflib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Literal

from chatsae.batch import SPLITS, Dialogue, Document, Split
from chatsae.data import pydocs
from chatsae.data.normalise import CHAT_COLUMNS, EXTRA_COLUMNS, PAIR_COLUMNS
from chatsae.data.readers import SUFFIXES, HubSet, Row, estimated_rows, hub_rows, hub_set, local_files, local_rows
from chatsae.errors import UserError
from chatsae.files import shared_names

Kind = Literal["dialogues", "documents"]

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "dialogues": tuple(dict.fromkeys((*CHAT_COLUMNS, *(c for pair in PAIR_COLUMNS for c in pair), *EXTRA_COLUMNS))),
    "documents": ("text",),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """A corpus of the paper on the Hugging Face Hub; `rows` as its card says."""

    hub_id: str
    config: str | None
    columns: tuple[str, ...]
    rows: int


PRESETS: dict[str, Preset] = {
    "wildchat": Preset("allenai/WildChat-1M", None, ("conversation",), 837_989),
    "wildchat-full": Preset("allenai/WildChat-1M-Full", None, ("conversation",), 1_039_785),
    "infinity-instruct": Preset("BAAI/Infinity-Instruct", "7M", ("conversations",), 7_449_106),
    "tulu-3": Preset("allenai/tulu-3-sft-mixture", None, ("messages",), 939_343),
    "orca-agentinstruct": Preset("mlabonne/orca-agentinstruct-1M-v1-cleaned", None, ("messages",), 1_046_410),
    "lmsys": Preset("lmsys/lmsys-chat-1m", None, ("conversation",), 1_000_000),
    "pile": Preset("monology/pile-uncopyrighted", None, ("text",), 177_000_000),
}


@dataclass(frozen=True, slots=True)
class Ready:
    """The value of a row of the built-in corpus, which is a dialogue or document already, of a known split."""

    split: Split
    item: Dialogue | Document


@dataclass(frozen=True, slots=True)
class FilePart:
    """One local file."""

    path: Path
    columns: tuple[str, ...]

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows after the first `start`."""
        return local_rows(self.path, self.columns, start)


@dataclass(frozen=True, slots=True)
class HubPart:
    """One file of a hub data set."""

    hub: HubSet
    index: int
    columns: tuple[str, ...]

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows after the first `start`."""
        return hub_rows(self.hub, self.columns, self.index, start)


@dataclass(frozen=True, slots=True)
class PydocsPart:
    """The built-in corpus: some splits of it, in one wording per seed; `endless` goes on with the next seeds."""

    kind: Kind
    splits: tuple[Split, ...]
    seed: int
    endless: bool

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The items after the first `start`."""
        seeds = count(self.seed) if self.endless else (self.seed,)
        ready = (one for seed in seeds for one in self._one_wording(seed))
        return (Row("pydocs", number, one) for number, one in islice(enumerate(ready, start=1), start, None))

    def _one_wording(self, seed: int) -> Iterator[Ready]:
        """The splits side by side: wherever the stream stops, none of them is missing."""
        of = pydocs.dialogues if self.kind == "dialogues" else pydocs.documents
        items = {split: iter(of(split, seed)) for split in self.splits}
        rng = random.Random(f"pydocs/{seed}")
        while items:
            split = rng.choices(list(items), [pydocs.SHARES[split] for split in items])[0]
            item = next(items[split], None)
            if item is None:
                del items[split]
            else:
                yield Ready(split, item)


Part = FilePart | HubPart | PydocsPart


@dataclass(frozen=True, slots=True)
class Source:
    """A corpus that was found: its parts, its rows as far as they are known, and its revision on the hub.

    `name` is what it is asked for by, `label` what is written of it (`shared_names`).
    """

    name: str
    label: str
    parts: tuple[Part, ...]
    rows: int | None
    revision: str | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Files of a directory that are not read, by the reason."""

    @property
    def files(self) -> list[Path]:
        """The local files it consists of."""
        return [part.path for part in self.parts if isinstance(part, FilePart)]

    def row_id(self, row: Row) -> str:
        """What a row's dialogue is called: file and row, the file without folders where the label is."""
        if self.label == self.name:
            return f"{row.file}:{row.number}"
        return f"{self.label}{row.file.removeprefix(str(Path(self.name).expanduser()))}:{row.number}"


def resolve(
    names: Sequence[str],
    kind: Kind,
    *,
    splits: Sequence[Split] = SPLITS,
    seed: int = 0,
    endless: bool = False,
    revisions: Mapping[str, str] | None = None,
) -> tuple[Source, ...]:
    """The sources of the given names.

    A name is "pydocs", a preset, a hub id (`owner/name`, `owner/name:config`, `owner/name@revision`), a .jsonl,
    .jsonl.gz, .jsonl.zst or .parquet file, or a directory of them. A hub data set is read at one revision: the one of
    its name, the one in `revisions`, or the newest. `splits`, `seed` and `endless` concern the built-in corpus.

    Raises:
        UserError: a name is unknown, given twice, or not of this kind; a hub data set cannot be reached.
    """
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if not names:
        raise UserError("no source is given; name at least one (pydocs is built in)")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"source {name!r} is given twice")
    labels = zip(names, shared_names(names), strict=True)
    finders = [_finder(name, label, kind, tuple(splits), seed, endless, revisions or {}) for name, label in labels]
    return tuple(find() for find in finders)  # a misspelt name is told before the hub is asked for another


def _finder(
    name: str,
    label: str,
    kind: Kind,
    splits: tuple[Split, ...],
    seed: int,
    endless: bool,
    revisions: Mapping[str, str],
) -> Callable[[], Source]:
    columns = COLUMNS[kind]
    path = Path(name).expanduser()
    if name == "pydocs":
        return lambda: Source(name, label, (PydocsPart(kind, splits, seed, endless),), None)
    if preset := PRESETS.get(name):
        if (preset.columns == COLUMNS["documents"]) != (kind == "documents"):
            holds = "plain text (data.text_sources)" if kind == "dialogues" else "dialogues (data.sources)"
            raise UserError(f"source {name!r} holds {holds}")
        return lambda: _hub(name, preset.hub_id, preset.config, revisions.get(name), preset.columns, preset.rows)
    if path.exists() or path.is_symlink() or name.endswith(SUFFIXES) or name.startswith(("/", "./", "../", "~")):
        skipped: Counter[str] = Counter()
        files = local_files(path, skipped)
        parts = tuple(FilePart(f, columns) for f in files)
        return lambda: Source(name, label, parts, sum(map(estimated_rows, files)), skipped=+skipped)
    if hub := _HUB_ID.fullmatch(name):
        revision = hub["revision"] or revisions.get(name)
        return lambda: _hub(name, hub["id"], hub["config"], revision, columns, None)
    near = difflib.get_close_matches(name, ["pydocs", *PRESETS], n=1)
    hint = f"; perhaps you meant {near[0]}" if near else ""
    raise UserError(
        f"source {name!r} is neither a file nor a hub id (owner/name) nor one of pydocs, {', '.join(PRESETS)}{hint}"
    )


def _hub(
    name: str, hub_id: str, config: str | None, revision: str | None, columns: tuple[str, ...], rows: int | None
) -> Source:
    hub = hub_set(hub_id, config, revision)
    parts = tuple(HubPart(hub, index, columns) for index in range(hub.parts))
    return Source(name, name, parts, hub.rows or rows, hub.revision)
