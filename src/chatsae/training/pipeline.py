"""From a configuration to the stream of activations that its SAEs train on."""

from collections import Counter
from collections.abc import Iterator
from itertools import count

from transformers import PreTrainedTokenizerBase

from chatsae.batch import TokenBatch
from chatsae.buffer import Mixer, mix
from chatsae.config import DataConfig, RunConfig
from chatsae.data.dedup import dedup
from chatsae.data.render import render
from chatsae.data.sources import read, read_text
from chatsae.lm.harvest import Harvest
from chatsae.lm.load import LanguageModel


def token_batches(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, tally: Counter[str] | None = None
) -> Iterator[TokenBatch]:
    """The training sequences of a method, pass after pass over its sources.

    Every pass has another seed, which reorders and rewords the built-in corpus. What is dropped is counted in `tally`.

    Raises:
        UserError: a source cannot be read, or gives no sequence.
    """
    for epoch in range(data.epochs) if data.epochs else count():
        yield from _one_pass(data, tokenizer, seed + epoch, tally)


def _one_pass(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, tally: Counter[str] | None
) -> Iterator[TokenBatch]:
    if data.method == "bt-p":
        stream = read_text(*data.text_sources, split="train", seed=seed, tally=tally)
    else:
        stream = read(*data.sources, split="train", seed=seed, tally=tally)
        if data.ngram:
            stream = dedup(stream, ngram=data.ngram, tally=tally)
    return render(
        stream,
        tokenizer,
        method=data.method,
        max_length=data.max_length,
        block_size=data.block_size,
        tally=tally,
    )


def activations(config: RunConfig, lm: LanguageModel, *, skip: int = 0, tally: Counter[str] | None = None) -> Mixer:
    """The mixed activations of a run; `skip` forwards of an interrupted run are passed over without computing them."""
    tokens = token_batches(config.data, lm.tokenizer, seed=config.train.seed, tally=tally)
    harvest = Harvest(
        lm,
        tokens,
        token_budget=config.harvest.token_budget,
        pool=config.harvest.pool,
        seed=config.train.seed,
        skip=skip,
    )
    return mix(harvest, capacity=config.buffer.capacity, batch_size=config.train.batch_size, seed=config.train.seed)
