"""One answer on its way: what was asked, and what has been written so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from chatsae.serve.errors import ApiError
from chatsae.serve.sampling import Dice, Sampling
from chatsae.serve.text import Spelling
from chatsae.steering.rows import Row
from chatsae.steering.spec import SteerSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """More text."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer; `acted`: on how many tokens each spec acted."""

    reason: Literal["stop", "length"]
    n_prompt: int
    n_new: int
    acted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """An answer that is not finished."""

    error: ApiError


Event = Piece | Done | Failed


class Answer:
    """What was asked and what is written; only the engine's thread writes.

    Attributes: row (the prompt), specs, sampling, dice, new (token ids), acted (tokens each spec acted on),
    cancelled (nobody listens any more; anyone may set it).
    """

    def __init__(
        self,
        row: Row,
        tokenizer: PreTrainedTokenizerBase,
        sink: Callable[[Event], None],
        *,
        specs: Sequence[SteerSpec] = (),
        sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008 - never changed
        max_new_tokens: int = 64,
        stops: Sequence[str] = (),
    ) -> None:
        self.row, self.specs, self.sampling = row, tuple(specs), sampling
        self.dice = Dice(sampling)
        self.new: list[int] = []
        self.acted = [0] * len(self.specs)
        self.cancelled = self.over = False
        self.alone: Any = None
        """The steering of this row by itself, kept by the batch."""
        self._sink, self._limit = sink, max_new_tokens
        self._spelling = Spelling(tokenizer, stops)

    def take(self, token: int, ends: frozenset[int]) -> None:
        """One more token; tells whoever listens."""
        self.new.append(token)
        text = self._spelling.add(token)
        stopped = self._spelling.stopped or token in ends
        self.over = stopped or len(self.new) >= self._limit
        if self.over:
            text += self._spelling.end()
            stopped = stopped or self._spelling.stopped
        if text:
            self._sink(Piece(text))
        if self.over:
            self._sink(Done("stop" if stopped else "length", len(self.row), len(self.new), tuple(self.acted)))

    def fail(self, error: ApiError) -> None:
        """End it with an error."""
        if not self.over:
            self.over = True
            self._sink(Failed(error))
