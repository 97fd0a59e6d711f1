"""The text of every token of a dialogue, and the message each token belongs to."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chatsae.batch import Kind, Role, TokenBatch

_BROKEN = "\ufffd"


class TokenText:
    """Token ids as text, one piece per token, which together are the text of the dialogue.

    A character that is spread over several tokens is the text of the last of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        # behind another token, because some tokenizers drop the space before the first one
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
        self._skip = len(self._decode([self._anchor]))

    def one(self, token_id: int) -> str:
        """The text of a token by itself."""
        if token_id not in self._known:
            self._known[token_id] = self._behind([token_id])
        return self._known[token_id]

    def of(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of a dialogue."""
        texts = [self.one(i) for i in ids]
        start = 0
        while start < len(ids):
            if _BROKEN not in texts[start]:
                start += 1
                continue
            stop = start + 1
            while stop < len(ids) and _BROKEN in texts[stop]:
                stop += 1
            texts[start:stop] = self._joined(ids[start:stop])
            start = stop
        return texts

    def _joined(self, ids: Sequence[int]) -> list[str]:
        """Of tokens none of which is text by itself: each piece goes to the token that completes it."""
        texts, start = [""] * len(ids), 0
        for i in range(len(ids)):
            text = self._behind(ids[start : i + 1])
            if _BROKEN not in text or i == len(ids) - 1:
                texts[i], start = text, i + 1
        return texts

    def _behind(self, ids: Sequence[int]) -> str:
        return self._decode([self._anchor, *ids])[self._skip :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def message_index(tokens: TokenBatch) -> Int[Tensor, " N"]:
    """The message each token belongs to, from 0; a header belongs to the message it leads in.

    -1 before the first header and in the system prompt that the template adds by itself. A message is a run of content
    of one role, so that one without content is not counted.
    """
    role, kind = tokens.role.long(), tokens.kind.long()
    index = torch.arange(len(role))
    start = tokens.cu_seqlens[:-1].long()[tokens.sequence]
    owned = (role != int(Role.NONE)) & (role != int(Role.DEFAULT_SYSTEM))
    content = (kind == int(Kind.CONTENT)) & owned
    last = torch.where(content, index, -1).cummax(0).values if len(role) else index  # content at or before
    before = torch.cat([torch.tensor([-1]), last[:-1]]) if len(role) else index  # content before
    known = before >= start
    role_before = torch.where(known, role[before.clamp_min(0)], -1)
    begins = content & ((before != index - 1) | ~known | (role_before != role))
    control = (kind == int(Kind.CONTROL)) | (kind == int(Kind.FIRST))
    opens = ~content & owned & (control | (role_before != role))
    opener = torch.where(opens, index, -1).cummax(0).values if len(role) else index
    header = ~content & (opener >= start) & (opener > last)
    return tokens.begun(begins) - 1 + header.long()
