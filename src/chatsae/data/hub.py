"""Rows of data sets on the Hugging Face Hub, streamed from one pinned revision."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from chatsae.data.rows import SUFFIXES, Row, one_line
from chatsae.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

_LOCAL = "local"  # the revision of a directory
_TIMEOUT = 10.0  # seconds for the one request that tells whether the hub answers


@dataclass(frozen=True, slots=True)
class HubSet:
    """The train split of a hub data set at one revision (a full commit hash), in `parts` files.

    `rows` is what the hub says, None where it does not.
    """

    id: str
    config: str | None
    revision: str
    parts: int
    rows: int | None

    @property
    def name(self) -> str:
        """As a source is written, without the revision."""
        return self.id if self.config is None else f"{self.id}:{self.config}"


def hub_set(hub_id: str, config: str | None = None, revision: str | None = None) -> HubSet:
    """The data set, pinned to the commit that the revision (by default the newest) stands for.

    A local directory in the form of a hub data set is one, too; its revision is "local".

    Raises:
        UserError: the hub cannot be reached, the set does not exist, is gated, needs a configuration or is broken.
    """
    try:
        commit = _LOCAL if Path(hub_id).is_dir() else _ask_hub(hub_id, revision)
        stream = _stream(hub_id, config, commit)
        train = (stream.info.splits or {}).get("train")
    except _errors() as error:
        raise UserError(_advice(hub_id, error)) from None
    return HubSet(hub_id, config, commit, stream.num_shards, getattr(train, "num_examples", None) or None)


def hub_rows(hub: HubSet, columns: Sequence[str], part: int = 0, start: int = 0) -> Iterator[Row]:
    """The rows of one part after its first `start`; only the named columns where the schema is known.

    Raises:
        UserError: no named column is there, the data cannot be read, or the connection is lost.
    """
    number = start
    try:
        stream = _stream(hub.id, hub.config, hub.revision).shard(hub.parts, part)
        present = stream.column_names
        if present is not None:
            wanted = [name for name in present if name in columns]
            if not wanted:
                raise UserError(f"{hub.name}: no field {', '.join(columns)} (found: {', '.join(present)})")
            stream = stream.select_columns(wanted)
        file = f"{hub.name}/{part}"
        for number, value in enumerate(stream.skip(start), start=start + 1):
            yield Row(file, number, value)
    except _errors() as error:
        if number > start and _is_connection(error):
            raise UserError(
                f"{hub.name}: the connection to the Hugging Face Hub was lost after row {number:,} of part {part}; "
                f"the same command goes on where it stopped"
            ) from None
        raise UserError(_advice(hub.id, error, f"part {part}, after row {number:,}: ")) from None


def _stream(hub_id: str, config: str | None, revision: str) -> "IterableDataset":
    return _loaded(hub_id, config, None) if revision == _LOCAL else _kept(hub_id, config, revision)


def _loaded(hub_id: str, config: str | None, revision: str | None) -> "IterableDataset":
    import datasets

    return datasets.load_dataset(hub_id, config, split="train", streaming=True, revision=revision)


_kept = lru_cache(maxsize=16)(_loaded)  # a pinned revision never changes; listing its files takes seconds


def _ask_hub(hub_id: str, revision: str | None) -> str:
    """The commit, by one request that fails at once, where the streaming reader would retry for half a minute.

    Raises:
        OSError: the data set is not to be had (a ConnectionError when the hub does not answer).
    """
    from huggingface_hub import HfApi, errors

    try:
        return str(HfApi().dataset_info(hub_id, revision=revision, timeout=_TIMEOUT).sha)
    except errors.HfHubHTTPError:
        raise
    except errors.HTTPError as error:
        raise ConnectionError(str(error)) from None


def _errors() -> tuple[type[Exception], ...]:
    """All that the hub's libraries raise for data that cannot be had or read."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    return (OSError, ValueError, EOFError, zlib.error, pa.ArrowException, DatasetsError, HTTPError)


def _is_connection(error: BaseException | None) -> bool:
    from huggingface_hub.errors import HTTPError

    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | HTTPError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _advice(hub_id: str, error: Exception, where: str = "") -> str:
    from huggingface_hub.errors import RevisionNotFoundError

    said = one_line(error)
    page = f"https://huggingface.co/datasets/{hub_id}"
    if isinstance(error, ConnectionError):
        return (
            f"{hub_id}: the Hugging Face Hub cannot be reached; connect, or give the path of a local copy "
            f"({', '.join(SUFFIXES)}) instead"
        )
    if "gated" in said:
        return f"{hub_id} is gated: accept its terms at {page}, then `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub_id} has no such revision; see {page}/commits/main"
    if "exist" in said:
        return f"{hub_id}: no such data set on the Hugging Face Hub, or no access to it (see {page}; `hf auth login`)"
    if "Config name is missing" in said:
        return f"{hub_id} has several configurations: write {hub_id}:NAME. {said}"
    return f"{hub_id} cannot be read: {where}{said}"
