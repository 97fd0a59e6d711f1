"""Dialogues and documents -> token batches: fast, bt-f and bt-p."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar, cast, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from chatsae.batch import Dialogue, Document, Kind, TokenBatch
from chatsae.config import Method
from chatsae.data.blocks import Tokens, batch, blocks, cut, pieces
from chatsae.data.labels import Labels, Span
from chatsae.data.template import (
    ChatTemplate,
    Rendered,
    SkippedError,
    TemplateFacts,
    chat_template,
    check_content,
    document_begin,
    encode,
    special_text,
    template_facts,
)
from chatsae.errors import UserError

__all__ = ["TemplateFacts", "Tokenised", "render", "template_facts", "tokenise"]

T = TypeVar("T")

CHARACTERS = 1_000_000
"""Of text that is tokenised together; a single item may have more."""


def render(
    items: Iterable[Dialogue] | Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: Method = "fast",
    max_length: int = 8192,
    block_size: int = 2048,
    tally: Counter[str] | None = None,
    chunk: int = 256,
) -> Iterator[TokenBatch]:
    """Labelled token sequences, `chunk` of them in a batch, streamed.

    fast: each dialogue, rendered with the tokenizer's own chat template, is one sequence, cut at `max_length` or at
    the tokenizer's `model_max_length` (at most the model's context), whichever is less.
    bt-f: rendered dialogues end to end, in blocks of exactly `block_size` tokens; bt-f-isolated: each part of a
    dialogue in such a block is a sequence. bt-p: documents end to end, a beginning-of-text token before each or, where
    the tokenizer has none, an end-of-text token after each, in blocks.
    A dialogue that the template refuses, or that holds a special token in a content, is skipped and counted in
    `tally`, as is all else that is cut or left out.

    Raises:
        UserError: the tokenizer has no chat template (fast, bt-f), a number is not positive, the items are not those
            of the method, or nothing comes out.
    """
    if method not in get_args(Method):
        raise UserError(f"data.method: {method!r} is not one of {', '.join(get_args(Method))}")
    for field, number in (("max_length", max_length), ("block_size", block_size), ("chunk", chunk)):
        if number < 1:
            raise UserError(f"data.{field}: expected a positive number, got {number}")
    counts = Counter[str]() if tally is None else tally
    prefix = () if method == "bt-p" else chat_template(tokenizer).facts.prefix_ids
    whole = _sequences(items, tokenizer, method, counts, chunk)
    sequences = as_sequences(whole, tokenizer, method, max_length, block_size, counts)
    return batches(sequences, prefix, chunk, counts)


def as_sequences(
    whole: Iterator[Tokens],
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    max_length: int,
    block_size: int,
    tally: Counter[str],
) -> Iterator[Tokens]:
    """What the methods differ in: fast cuts each dialogue at `max_length`, bt-f and bt-p join all into blocks.

    bt-f-isolated cuts those blocks where a dialogue ends, so that its tokens see no other dialogue.
    """
    if method == "fast":
        limit = longest(tokenizer, max_length)
        what = f"cut at {limit} tokens" + (", the longest that the model takes" if limit < max_length else "")
        return cut(whole, limit, what, tally)
    return pieces(whole, block_size, tally) if method == "bt-f-isolated" else blocks(whole, block_size, tally)


def longest(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """The length at which a dialogue is cut; `model_max_length` is 1e30 where neither tokenizer nor model says."""
    return min(max_length, tokenizer.model_max_length)


def batches(
    sequences: Iterator[Tokens], prefix: tuple[int, ...], chunk: int, tally: Counter[str]
) -> Iterator[TokenBatch]:
    """The sequences as batches, `chunk` at a time; `prefix` are the ids that begin every dialogue of the template.

    Raises:
        UserError: there is no sequence.
    """
    empty = True
    for group in grouped(sequences, chunk):
        empty = False
        yield batch(group, prefix)
    if empty:
        counted = ", ".join(f"{number} × {reason}" for reason, number in tally.most_common())
        raise UserError("the data gives no token sequence" + (f": {counted}" if counted else ""))


class Tokenised(NamedTuple):
    """The tokens of a dialogue or document; None where it was skipped. `note`: why, or what is odd about it."""

    tokens: Tokens | None
    note: str = ""


def tokenise(items: Sequence[Dialogue | Document], tokenizer: PreTrainedTokenizerBase) -> list[Tokenised]:
    """Each item's labelled tokens, whole: dialogues through the chat template, documents with their separator.

    Raises:
        UserError: there are dialogues among the items and the tokenizer has no chat template.
    """
    if any(isinstance(item, Dialogue) for item in items):
        return _tokenised_dialogues(cast(Sequence[Dialogue], items), tokenizer, chat_template(tokenizer))
    return _tokenised_documents(cast(Sequence[Document], items), tokenizer)


def _tokenised_dialogues(
    items: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> list[Tokenised]:
    rendered: list[Rendered | str] = []
    for item in items:
        try:
            rendered.append(template.render(item))
        except SkippedError as reason:
            rendered.append(str(reason))
    texts = [one.text for one in rendered if not isinstance(one, str)]
    encoded = encode(tokenizer, texts, offsets=tokenizer.is_fast) if texts else {"input_ids": []}
    every_offset = encoded["offset_mapping"] if texts and tokenizer.is_fast else [None] * len(texts)
    pairs = zip(encoded["input_ids"], every_offset, strict=True)
    return [
        Tokenised(None, one) if isinstance(one, str) else _labelled(one, *next(pairs), template) for one in rendered
    ]


def _labelled(one: Rendered, ids: list[int], offsets: list[Span] | None, template: ChatTemplate) -> Tokenised:
    if not ids:
        return Tokenised(None, "no token")
    unlocated = one.spans is None or offsets is None
    note = "kept, but labelled by its headers: the contents could not be located" if unlocated else ""
    return Tokenised(Tokens(one.name, np.array(ids, np.int64), template.label(one, ids, offsets)), note)


def _tokenised_documents(items: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[Tokenised]:
    before, after = _separators(tokenizer)
    special = special_text(tokenizer)
    notes: list[str] = []
    for item in items:
        try:
            check_content(item.text, special)
            notes.append("")
        except SkippedError as reason:
            notes.append(str(reason))
    texts = [item.text for item, note in zip(items, notes, strict=True) if not note]
    every_ids = iter(encode(tokenizer, texts, offsets=False)["input_ids"] if texts else [])
    found = []
    for item, note in zip(items, notes, strict=True):
        if note:
            found.append(Tokenised(None, note))
            continue
        ids = next(every_ids)
        labels = Labels.empty(len(before) + len(ids) + len(after))
        labels.kind[: len(before)] = Kind.CONTROL
        labels.kind[len(before) + len(ids) :] = Kind.CONTROL
        found.append(Tokenised(Tokens(item.id, np.array([*before, *ids, *after], np.int64), labels)))
    return found


def _sequences(
    items: Iterable[Dialogue] | Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    tally: Counter[str],
    chunk: int,
) -> Iterator[Tokens]:
    """Every item that has tokens, whole; what is odd or skipped is counted."""
    wanted, hint = (Document, "use read_text") if method == "bt-p" else (Dialogue, "use bt-p")
    for group in grouped(items, chunk):
        for item in group:
            if not isinstance(item, wanted):
                takes = "documents" if wanted is Document else "dialogues"
                raise UserError(f"data.method: {method} takes {takes}, got a {type(item).__name__} ({hint})")
        for tokens, note in tokenise(group, tokenizer):
            if note:
                tally[note] += 1
            if tokens is not None:
                yield tokens


def _separators(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids before and after each document, as the base models of the family were pretrained."""
    begin = document_begin(tokenizer)
    if begin is not None:
        return [begin], []
    text = "<|endoftext|>"
    token_id = tokenizer.convert_tokens_to_ids(text)
    if isinstance(token_id, int) and tokenizer.convert_ids_to_tokens(token_id) == text:
        return [], [token_id]
    return [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def characters_of(item: object) -> int:
    """The length of a dialogue's or document's text; 0 of anything else."""
    if isinstance(item, Document):
        return len(item.text)
    return sum(len(message.content) for message in item.messages) if isinstance(item, Dialogue) else 0


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of at most `size`, and of not much more text than a million characters."""
    group: list[T] = []
    characters = 0
    for item in items:
        group.append(item)
        characters += characters_of(item)
        if len(group) == size or characters > CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
