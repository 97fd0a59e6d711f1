"""The held-out parts of a run's corpora, prepared or streamed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from chatsae import console
from chatsae.batch import Split, TokenBatch, first
from chatsae.config import DataConfig
from chatsae.data.reading import read
from chatsae.data.render import render
from chatsae.data.store.prepared import Prepared


def split_tokens(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    *,
    sources: Sequence[str] = (),
    limit: int | None = None,
    tally: Counter[str] | None = None,
) -> Iterator[TokenBatch]:
    """The first `limit` dialogues of a split of the run's chat corpora, or of other `sources`, each whole and alone.

    Raises:
        UserError: they cannot be read.
    """
    if data.prepared and not sources:
        whole = Prepared(data.prepared, tokenizer).batches(split=split, max_length=data.max_length, tally=tally)
        stream = first(whole, limit)
    else:
        dialogues = islice(read(*(sources or data.sources), split=split, order=data.order, tally=tally), limit)
        stream = render(dialogues, tokenizer, max_length=data.max_length, tally=tally)
    return stream if limit is None else console.tracked("read held-out dialogues", limit, stream, len)
