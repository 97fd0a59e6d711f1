"""Training batches: packed blocks of pages for phase 1, whole padded dialogues for phase 2."""

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chatsae.batch import Dialogue
from chatsae.data import pydocs
from tinychat.tokenizer import MAX_LENGTH, rendered

IGNORED = -100  # a label that costs nothing
Batch = tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]  # token ids; labels, shifted: what follows each token


def pages(tokenizer: PreTrainedTokenizerBase, split: pydocs.Split, seed: int, block: int) -> Int[Tensor, "B T"]:
    """The pages of one seed, each closed by <|endoftext|>, concatenated and cut into blocks; a rest is left out."""
    texts = [d.text for d in pydocs.documents(split, seed)]
    closed = [
        [*ids, tokenizer.pad_token_id] for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    stream = torch.tensor([i for ids in closed for i in ids])
    return stream[: len(stream) // block * block].view(-1, block)


def page_batches(tokenizer: PreTrainedTokenizerBase, seed: int, block: int, rows: int) -> Iterator[Batch]:
    """Endless batches of `rows` blocks of the train split, in a random order within each seed of the corpus."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in count():
        blocks = pages(tokenizer, "train", seed + epoch, block)
        for rows_of_batch in torch.randperm(len(blocks), generator=generator).split(rows):
            yield page_batch(blocks[rows_of_batch])


def page_batch(blocks: Int[Tensor, "B T"]) -> Batch:
    """Every token is a label but the first of a block."""
    labels = torch.full_like(blocks, IGNORED)
    labels[:, :-1] = blocks[:, 1:]
    return blocks, labels


def encoded(tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue]) -> list[list[int]]:
    """Each dialogue as the template renders it, cut at the model's length."""
    chats = list(rendered(dialogues))
    ids = tokenizer.apply_chat_template(chats, return_dict=False, truncation=True, max_length=MAX_LENGTH)
    return cast(list[list[int]], ids)


def dialogue_batches(tokenizer: PreTrainedTokenizerBase, seed: int, budget: int) -> Iterator[Batch]:
    """Endless batches of whole dialogues of the train split, at most `budget` padded tokens each, in a random order."""
    rng = random.Random(seed)
    for epoch in count():
        ids = encoded(tokenizer, list(pydocs.dialogues("train", seed + epoch)))
        for start in range(0, len(ids), 1024):
            yield from shuffled(list(bucketed(tokenizer, ids[start : start + 1024], budget)), rng)


def shuffled(batches: list[Batch], rng: random.Random) -> list[Batch]:
    rng.shuffle(batches)
    return batches


def bucketed(tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]], budget: int) -> Iterator[Batch]:
    """Sequences of similar length together, right-padded; the loss is on the assistant's turns."""
    row: list[list[int]] = []
    for sequence in sorted(ids, key=len):
        if row and (len(row) + 1) * len(sequence) > budget:
            yield dialogue_batch(tokenizer, row)
            row = []
        row.append(sequence)
    if row:
        yield dialogue_batch(tokenizer, row)


def dialogue_batch(tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> Batch:
    """Right-padded rows; labels are the tokens of the assistant's answers and the <|im_end|> that closes each."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(r) for r in rows], batch_first=True, padding_value=tokenizer.pad_token_id
    )
    labels = torch.full_like(ids, IGNORED)
    start, end, assistant = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "assistant"))
    for i, row in enumerate(rows):
        answering = False
        for j in range(len(row) - 1):
            if row[j] == end:
                answering = False
            elif j >= 2 and row[j - 2] == start and row[j - 1] == assistant:
                answering = True  # the line break after the role name: the answer begins behind it
            if answering:
                labels[i, j] = row[j + 1]
    return ids, labels
