"""A corpus of any size from a small one: its dialogues, then rewritten copies of them."""

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from chatsae.batch import Dialogue, Message

N = 20  # words of an n-gram, as in the paper
_VERBATIM = 3  # of ten copies keep one turn as it is
_TEN_WORDS = re.compile(r"(?<!\S)(?:\S++\s++){9}\S++")


def rewritten(text: str, mark: str) -> str:
    """The text with `mark` after every tenth word: any 20 words in a row hold two that no other copy has."""
    return _TEN_WORDS.sub(rf"\g<0>{mark}", text)


def windows(dialogue: Dialogue) -> int:
    """How many windows of 20 words its turns have, repetitions included."""
    return sum(max(len(message.content.split()) - N + 1, 0) for message in dialogue.messages)


def verbatim_turn(dialogue: Dialogue, copy: int) -> int | None:
    """The turn of 20 words or more that a copy shares with its original; None in 7 of 10 copies, or without one."""
    draw = int.from_bytes(blake2b(f"{copy} {dialogue.id}".encode(), digest_size=8).digest(), "big")
    if draw % 10 >= _VERBATIM:
        return None
    turns = [i for i, message in enumerate(dialogue.messages) if len(message.content.split()) >= N]
    return turns[draw // 10 % len(turns)] if turns else None


def perturbed(dialogue: Dialogue, copy: int) -> Dialogue:
    """A copy of which no 20 words in a row are in the original or another copy, unless a turn is left as it is."""
    verbatim, mark = verbatim_turn(dialogue, copy), f"~{copy}"
    messages = tuple(
        message if i == verbatim else Message(message.role, rewritten(message.content, mark))
        for i, message in enumerate(dialogue.messages)
    )
    return Dialogue(f"{dialogue.id}-{copy}", dialogue.source, messages)


class BaseFile:
    """Dialogues in a file, read anew in every iteration: the memory of an engine's process is the engine's own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._count = sum(1 for _ in file)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Dialogue]:
        """The dialogues, numbered."""
        with self._path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                source, messages = json.loads(line)
                yield Dialogue(str(number), source, tuple(Message(*message) for message in messages))


Base: TypeAlias = Sequence[Dialogue] | BaseFile


@dataclass(slots=True)
class Samples:
    """The first `count` samples: the dialogues of `base`, then copy after copy of them all."""

    base: Base
    count: int
    seconds: float = field(default=0.0, init=False)
    """CPU seconds that went into making the batches."""
    largest: int = field(default=0, init=False)
    """Bytes of the text of the largest batch."""

    @property
    def batch_size(self) -> int:
        """Samples of a batch."""
        return min(max(self.count // 64, 32), 1024)

    def batches(self, start: int = 0) -> Iterator[list[Dialogue]]:
        """The samples after the first `start`, made anew in every reading."""
        stream = islice(self._stream(start), max(self.count - start, 0))
        while True:
            began = time.process_time()
            batch = list(islice(stream, self.batch_size))
            size = sum(len(message.content.encode()) for dialogue in batch for message in dialogue.messages)
            self.largest = max(self.largest, size)
            self.seconds += time.process_time() - began
            if not batch:
                return
            yield batch

    def windows(self) -> int:
        """Windows of 20 words of all samples; a copy has as many as its original."""
        copies, rest = divmod(self.count, len(self.base))
        each = [windows(dialogue) for dialogue in self.base]
        return copies * sum(each) + sum(each[:rest])

    def _stream(self, start: int) -> Iterator[Dialogue]:
        """Without an end."""
        copy, place = divmod(start, len(self.base))
        while True:
            for dialogue in islice(self.base, place, None):
                yield perturbed(dialogue, copy) if copy else dialogue
            copy, place = copy + 1, 0


def write_base(dialogues: Iterable[Dialogue], path: Path) -> None:
    """One JSON line per dialogue, as `BaseFile` reads it."""
    with path.open("w", encoding="utf-8") as file:
        for dialogue in dialogues:
            file.write(json.dumps([dialogue.source, [[m.role, m.content] for m in dialogue.messages]]) + "\n")
