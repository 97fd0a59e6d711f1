"""What the readers give: rows with their place."""

from dataclasses import dataclass
from typing import Any, NamedTuple

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""How the names of the files end that can be read."""


class Row(NamedTuple):
    """One row, its file (or part of a hub data set) and its number there, counted from 1."""

    file: str
    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Broken:
    """The value of a row that cannot be read; `detail` tells more, in one line."""

    reason: str
    detail: str


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
