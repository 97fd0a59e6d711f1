"""Prompts as rows of a batch: token ids, what each token is, and where the prompt ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chatsae.batch import Dialogue, Kind, Message, Role, TokenBatch
from chatsae.data.labels import Labels
from chatsae.data.template import Rendered, SkippedError, chat_template, encode, messages_of
from chatsae.errors import UserError


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one row without padding; those from `n_prompt` on are an answer that is given."""

    input_ids: Int[Tensor, " N"]
    role: UInt8[Tensor, " N"]
    kind: UInt8[Tensor, " N"]
    n_prompt: int

    def __len__(self) -> int:
        return len(self.input_ids)


Prompt = str | Sequence[Message | Mapping[str, str]] | Row
"""What a user asks, messages, or a prompt that is rendered already."""


def row_of_ids(ids: Int[Tensor, " N"], tokenizer: PreTrainedTokenizerBase | None) -> Row:
    """A prompt given as token ids, labelled by the headers in it; with no tokenizer, or template, not labelled."""
    ids = ids.cpu().long()
    none = torch.zeros(len(ids), dtype=torch.uint8)
    if tokenizer is None or not tokenizer.chat_template:
        return Row(ids, none, none, len(ids))
    template = chat_template(tokenizer)
    prefix, listed = list(template.facts.prefix_ids), ids.tolist()
    roles = () if listed[: len(prefix)] == prefix else (Role.SYSTEM,)
    return _labelled(listed, template.label(Rendered("", "", roles, None), listed, None))


def row_of_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Row:
    """A prompt as the chat template renders it, up to and with the generation prompt.

    Raises:
        UserError: there is no chat template, or it refuses the messages; a content holds a special token.
    """
    if isinstance(prompt, Row):
        return prompt_of(prompt)
    template = chat_template(tokenizer)
    try:
        rendered = template.render(Dialogue("prompt", "prompt", messages_of(prompt)), prompt=True)
    except SkippedError as reason:
        raise UserError(f"a prompt cannot be rendered: {reason}") from None
    encoded = encode(tokenizer, [rendered.text], offsets=tokenizer.is_fast)
    ids: list[int] = encoded["input_ids"][0]
    offsets = encoded["offset_mapping"][0] if tokenizer.is_fast else None
    return _labelled(ids, template.label(rendered, ids, offsets))


def rows_of_dialogues(tokens: TokenBatch, max_length: int | None = None) -> list[Row]:
    """Rendered dialogues with an answer; the last one, and what follows, is not the prompt. Others are left out."""
    rows = []
    for start, stop in pairwise(tokens.cu_seqlens.tolist()):
        if max_length is not None:
            stop = min(stop, start + max_length)
        role, kind = tokens.role[start:stop], tokens.kind[start:stop]
        answer = (role == Role.ASSISTANT) & (kind == Kind.CONTENT)
        begins = answer & ~torch.cat([torch.zeros(1, dtype=torch.bool), answer[:-1]])
        if bool(begins.any()):
            rows.append(Row(tokens.input_ids[start:stop], role, kind, int(begins.nonzero()[-1])))
    return rows


def spread_rows(rows: Sequence[Row], n: int = 32, *, least: int = 20) -> tuple[list[Row], list[Row]]:
    """`n` rows evenly spread over those whose answer has at least `least` tokens, and the rest of those.

    Short answers are mostly easy to predict, and few prompts with them stand badly for the others (docs/steering.md).
    Where there are fewer than 2 n, the rows with the longest answers are taken.
    """
    able = [row for row in rows if len(row) - row.n_prompt >= least]
    if len(able) < 2 * n:
        longest = sorted(range(len(rows)), key=lambda i: rows[i].n_prompt - len(rows[i]))[: 2 * n]
        able = [rows[i] for i in sorted(longest) if len(rows[i]) > rows[i].n_prompt]
    chosen = {int((i + 0.5) * len(able) / n) for i in range(n)} & set(range(len(able)))
    return [able[i] for i in sorted(chosen)], [row for i, row in enumerate(able) if i not in chosen]


def prompt_of(row: Row) -> Row:
    """The row without its answer."""
    n = row.n_prompt
    return Row(row.input_ids[:n], row.role[:n], row.kind[:n], n)


def left_padded(rows: Sequence[Row], pad_id: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Token ids and attention mask, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row.input_ids
        mask[i, longest - len(row) :] = 1
    return ids, mask


def _labelled(ids: list[int], labels: Labels) -> Row:
    kind = torch.from_numpy(labels.kind.copy())
    kind[:1] = Kind.FIRST  # as in every batch of rendered dialogues
    return Row(torch.tensor(ids, dtype=torch.int64), torch.from_numpy(labels.role.copy()), kind, len(ids))
