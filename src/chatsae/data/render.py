"""Dialogues and documents -> token batches: fast, bt-f and bt-p."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from chatsae.batch import Dialogue, Document, Kind, TokenBatch
from chatsae.config import Method
from chatsae.data.blocks import Tokens, batch, blocks, cut
from chatsae.data.labels import Labels
from chatsae.data.template import (
    ChatTemplate,
    Rendered,
    SkippedError,
    TemplateFacts,
    chat_template,
    check_content,
    encode,
    special_text,
    template_facts,
)
from chatsae.errors import UserError

__all__ = ["TemplateFacts", "render", "template_facts"]

T = TypeVar("T")

_DOCUMENTS = 16  # tokenised together: one of them can be a book


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
    the tokenizer's `model_max_length`, whichever is less.
    bt-f: rendered dialogues end to end, in blocks of exactly `block_size` tokens. bt-p: documents end to end, a
    beginning-of-text token before each or, where the tokenizer has none, an end-of-text token after each, in blocks.
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
    if method == "bt-p":
        documents = blocks(_documents(items, tokenizer, counts, min(chunk, _DOCUMENTS)), block_size, counts)
        return _batches(documents, (), chunk, counts)
    template = chat_template(tokenizer)
    dialogues = _dialogues(items, tokenizer, template, counts, chunk)
    longest = min(max_length, tokenizer.model_max_length)  # 1e30 where the tokenizer does not say
    sequences = cut(dialogues, longest, counts) if method == "fast" else blocks(dialogues, block_size, counts)
    return _batches(sequences, template.facts.prefix_ids, chunk, counts)


def _batches(
    sequences: Iterator[Tokens], prefix: tuple[int, ...], chunk: int, tally: Counter[str]
) -> Iterator[TokenBatch]:
    empty = True
    for group in _grouped(sequences, chunk):
        empty = False
        yield batch(group, prefix)
    if empty:
        counted = ", ".join(f"{number} × {reason}" for reason, number in tally.most_common())
        raise UserError("the data gives no token sequence" + (f": {counted}" if counted else ""))


def _dialogues(
    items: Iterable[Dialogue] | Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    tally: Counter[str],
    chunk: int,
) -> Iterator[Tokens]:
    """Every dialogue that can be rendered, whole."""
    for group in _grouped(items, chunk):
        rendered: list[Rendered] = []
        for item in group:
            if not isinstance(item, Dialogue):
                raise UserError(f"data.method: fast and bt-f take dialogues, got a {type(item).__name__} (use bt-p)")
            try:
                rendered.append(template.render(item))
            except SkippedError as reason:
                tally[str(reason)] += 1
        if not rendered:
            continue
        encoded = encode(tokenizer, [one.text for one in rendered], offsets=tokenizer.is_fast)
        for index, one in enumerate(rendered):
            ids = encoded["input_ids"][index]
            offsets = encoded["offset_mapping"][index] if tokenizer.is_fast else None
            if one.spans is None or offsets is None:
                tally["kept, but labelled by its headers: the contents could not be located"] += 1
            if ids:
                yield Tokens(one.name, np.array(ids, np.int64), template.label(one, ids, offsets))
            else:
                tally["no token"] += 1


def _documents(
    items: Iterable[Dialogue] | Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    tally: Counter[str],
    chunk: int,
) -> Iterator[Tokens]:
    """Every document with its separator."""
    before, after = _separators(tokenizer)
    special = special_text(tokenizer)
    for group in _grouped(items, chunk):
        kept: list[Document] = []
        for item in group:
            if not isinstance(item, Document):
                raise UserError(f"data.method: bt-p takes documents, got a {type(item).__name__} (use read_text)")
            try:
                check_content(item.text, special)
                kept.append(item)
            except SkippedError as reason:
                tally[str(reason)] += 1
        if not kept:
            continue
        encoded = encode(tokenizer, [document.text for document in kept], offsets=False)
        for document, ids in zip(kept, encoded["input_ids"], strict=True):
            labels = Labels.empty(len(before) + len(ids) + len(after))
            labels.kind[: len(before)] = Kind.CONTROL
            labels.kind[len(before) + len(ids) :] = Kind.CONTROL
            yield Tokens(document.id, np.array([*before, *ids, *after], np.int64), labels)


def _separators(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids before and after each document, as the base models of the family were pretrained."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id], []
    text = "<|endoftext|>"
    token_id = tokenizer.convert_tokens_to_ids(text)
    if isinstance(token_id, int) and tokenizer.convert_ids_to_tokens(token_id) == text:
        return [], [token_id]
    return [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
