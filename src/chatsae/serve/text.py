"""The text of an answer while its tokens come: whole characters, and nothing that a stop string would take back."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class Spelling:
    """Text of tokens as they come; the pieces together are the decoded answer, cut before the first stop string.

    The first one is that which is complete first, so that it does not matter where tokens end.

    Attributes: stopped (a stop string was found; nothing follows).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._from = self._read = 0  # what was said last stands before: some tokenizers drop a leading space
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be said after one more token."""
        self._ids.append(token)
        text = self._decoded(len(self._ids))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # perhaps the first bytes of a character
            return ""
        return self._say(text)

    def end(self) -> str:
        """What was held back, once no token follows."""
        said = self._say(self._decoded(len(self._ids)))
        rest, self._held = self._held, ""
        return said if self.stopped else said + rest

    def _decoded(self, stop: int) -> str:
        return str(self._tokenizer.decode(self._ids[self._from : stop], skip_special_tokens=True))

    def _say(self, text: str) -> str:
        self._held += text[len(self._decoded(self._read)) :]
        self._from, self._read = self._read, len(self._ids)
        if self.stopped:
            return ""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        said, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return said


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that may be the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
