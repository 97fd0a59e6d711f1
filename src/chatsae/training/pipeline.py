"""From a configuration to the stream of activations that its SAEs train on."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from chatsae.batch import TokenBatch
from chatsae.buffer import Mixer, mix
from chatsae.buffer.ahead import Ahead
from chatsae.buffer.ring import ring_device
from chatsae.config import DataConfig, HarvestConfig, RunConfig
from chatsae.data.dedup import dedup
from chatsae.data.reading import read, read_text
from chatsae.data.render import render
from chatsae.data.sources import resolve
from chatsae.data.store.manifest import recipe_of
from chatsae.data.store.prepared import Prepared
from chatsae.errors import UserError
from chatsae.files import check_memory, shared_name
from chatsae.lm.budget import choose_budget
from chatsae.lm.harvest import Harvest
from chatsae.lm.load import LanguageModel
from chatsae.lm.norms import LayerNorms
from chatsae.lm.probe import choose_way
from chatsae.training.inputs import SAMPLE, Inputs
from chatsae.training.overlap import overlaps
from chatsae.training.schedule import buffer_capacity, steps_of


def token_batches(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    facts: dict[str, Any] | None = None,
    tally: Counter[str] | None = None,
) -> Iterator[TokenBatch]:
    """The training sequences of a method, pass after pass over its sources or its prepared data.

    Every pass over sources has another seed, which reorders them and rewords the built-in corpus. `facts`: those of
    `data_facts`, whose hub revisions are read. What is dropped is counted in `tally`.

    Raises:
        UserError: a source cannot be read, or gives no sequence.
    """
    for epoch in range(data.epochs) if data.epochs else count():
        yield from _one_pass(data, tokenizer, seed + epoch, _revisions(facts), tally)


def _one_pass(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    revisions: dict[str, str],
    tally: Counter[str] | None,
) -> Iterator[TokenBatch]:
    if data.prepared:
        sizes = {"max_length": data.max_length, "block_size": data.block_size}
        return Prepared(data.prepared, tokenizer).batches(method=data.method, tally=tally, **sizes)
    if data.method == "bt-p":
        stream = read_text(*data.text_sources, seed=seed, order=data.order, revisions=revisions, tally=tally)
    else:
        stream = read(*data.sources, seed=seed, order=data.order, revisions=revisions, tally=tally)
        if data.ngram:
            memory_gb = data.memory_gb or None
            stream = dedup(stream, ngram=data.ngram, roles=data.ngram_roles, memory_gb=memory_gb, tally=tally)
    return render(
        stream,
        tokenizer,
        method=data.method,
        max_length=data.max_length,
        block_size=data.block_size,
        tally=tally,
    )


def data_facts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the training sequences follow from: the digest of the prepared data's manifest, or what one would say of
    the sources. `before`: the facts of the same run when it began, which name its hub revisions.

    Raises:
        UserError: there is no such prepared data, or a source cannot be found.
    """
    if data.prepared:
        sha256 = Prepared(data.prepared, tokenizer).manifest.sha256
        return {"prepared": shared_name(data.prepared), "manifest_sha256": sha256}
    names = data.text_sources if data.method == "bt-p" else data.sources
    kind = "documents" if data.method == "bt-p" else "dialogues"
    found = resolve(names, kind, splits=("train",), seed=seed, revisions=_revisions(before))
    return recipe_of(data, found, (), tokenizer, seed=seed, max_tokens=0)


def _revisions(facts: dict[str, Any] | None) -> dict[str, str]:
    sources = (facts or {}).get("sources", [])
    return {source["name"]: source["revision"] for source in sources if "revision" in source}


def harvest_facts(config: HarvestConfig, lm: LanguageModel) -> dict[str, Any]:
    """How the model is read on this machine: way, token budget, prefix; and how exact that is, measured.

    Raises:
        UserError: the way that is asked for is not exact for this model.
    """
    isolation = choose_way(lm, config.way)
    prefix = isolation.prefix and lm.device.type == "cpu" if config.prefix == "auto" else config.prefix == "on"
    if prefix and not isolation.prefix:
        raise UserError(f"harvest.prefix: {lm.name}: {isolation.refused['prefix']}; set it to auto")
    budget = config.token_budget or choose_budget(lm, isolation.way)
    return asdict(isolation) | {"token_budget": budget, "prefix": prefix}


def activations(
    config: RunConfig,
    lm: LanguageModel,
    *,
    skip: int = 0,
    capacity: int | None = None,
    counted: dict[str, int] | None = None,
    facts: dict[str, Any] | None = None,
    how: dict[str, Any] | None = None,
    norms: Sequence[LayerNorms] | None = None,
    on_measured: Callable[[list[LayerNorms]], object] = lambda _: None,
    tally: Counter[str] | None = None,
) -> Mixer:
    """The mixed activations of a run; `skip` forwards of an interrupted run are passed over without computing them.

    `counted` is what the interrupted run had dropped by then; where it is not known, the data are counted again.

    `capacity` is that of the buffer, by default `buffer_capacity`.

    `facts` are those of `data_facts`, `how` those of `harvest_facts`, `norms` those of an interrupted run, all found
    anew by default (`on_measured`: see `Inputs`). Close it in the end, or let it go: it may hold a thread.

    Raises:
        UserError: see `token_batches`, `Harvest` and `Mixer`.
    """
    ring_device(config.buffer.device, lm.device, 0)  # what cannot be is refused at once
    capacity = buffer_capacity(config) if capacity is None else capacity
    if config.buffer.device == "cpu" or lm.device.type == "cpu":
        n_bytes = len(lm.layers) * capacity * lm.d_in * lm.dtype.itemsize
        check_memory(n_bytes, f"buffer.capacity: {capacity:,} activations")
    overlap = overlaps(config, lm)
    counts: Counter[str] | None = Counter() if overlap else tally
    tokens = token_batches(config.data, lm.tokenizer, seed=config.train.seed, facts=facts, tally=counts)
    how = harvest_facts(config.harvest, lm) if how is None else how
    harvest = Harvest(
        lm,
        tokens,
        way=how["way"],
        token_budget=how["token_budget"],
        prefix=how["prefix"],
        pool=config.harvest.pool,
        seed=config.train.seed,
        skip=skip,
        counted=counted,
        on_nan=config.harvest.on_nan,
        tally=counts,
    )
    inputs = Inputs(
        Ahead(harvest, device=lm.device, counts=counts, tally=tally) if overlap else harvest,
        lm.layers,
        policy=config.train.sinks,
        normalize=config.sae.normalize == "scale",
        known=norms,
        sample=min(SAMPLE, capacity),  # the buffer reads as many before the first step
        on_measured=on_measured,
        tally=tally,
    )
    return mix(
        inputs,
        capacity=capacity,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        needed=steps_of(config.train).total * config.train.batch_size,
        place=config.buffer.device,
        device=lm.device,
    )
