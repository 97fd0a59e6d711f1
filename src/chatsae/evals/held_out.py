"""The dialogues that a run is evaluated on, and whether it was trained on any of them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.batch import Dialogue, Split, TokenBatch
from chatsae.data.reading import Reading, Sample, samples
from chatsae.data.render import render
from chatsae.data.sources import Source, resolve
from chatsae.data.store.manifest import Manifest, source_facts
from chatsae.data.store.prepared import Prepared
from chatsae.data.store.splits import split_tokens
from chatsae.data.stream import RowStream
from chatsae.errors import UserError
from chatsae.files import read_object, shared_names
from chatsae.lm.load import LanguageModel
from chatsae.runs import Run

_FIT: Split = "train"
_NAMED = 3  # dialogues that a refusal names


@dataclass(frozen=True)
class HeldOut:
    """Token batches to evaluate on, and what a report says about where they are from."""

    tokens: list[TokenBatch]
    facts: dict[str, Any]


def held_out(
    run: Run,
    lm: LanguageModel,
    limit: int,
    *,
    sources: Sequence[str] = (),
    allow_overlap: bool = False,
    tally: Counter[str] | None = None,
) -> HeldOut:
    """The first `limit` held-out dialogues of the run's own corpora, or those of other `sources`.

    A corpus that the run was trained on, by name or by the digests of its files, gives its held-out part, of any other
    all dialogues are taken; then every one that training may have seen is looked for.

    Raises:
        UserError: the dialogues cannot be read; or some of other `sources` are in the training data, and that is not
            allowed.
    """
    data, max_length = run.config.data, run.config.data.max_length
    sources = tuple(sources) or run.config.eval.sources
    if not sources:
        return HeldOut(list(split_tokens(data, lm.tokenizer, "eval", limit=limit, tally=tally)), {})
    chosen = _chosen(run, sources, limit, tally)
    dialogues = (sample.item for sample in chosen if isinstance(sample.item, Dialogue))
    tokens = list(render(dialogues, lm.tokenizer, max_length=max_length, tally=tally))
    seen: list[Sample] | None = None
    if data.method == "bt-p":
        console.warn(f"{run.path} was trained on text: dialogues of {', '.join(sources)} were not looked for in it")
    else:
        seen = _seen(run, lm, chosen, tokens, allow_overlap)
    if seen:
        told = f"{len(seen):,} of {len(chosen):,} dialogues of {', '.join(sources)} are in the training data"
        if not allow_overlap:
            names = ", ".join(sample.item.id for sample in seen[:_NAMED])
            raise UserError(f"{told} of {run.path} ({names} ...); take them out, or allow it with --allow-overlap")
        console.warn(f"{told}; they are evaluated on all the same")
    return HeldOut(
        tokens, {"sources": ", ".join(shared_names(sources)), "overlap": None if seen is None else len(seen)}
    )


def fit_tokens(run: Run, lm: LanguageModel, n_tokens: int) -> Iterator[TokenBatch]:
    """Dialogues of the training split of a run's chat corpora, as many as have `n_tokens` tokens, each fed whole."""
    left = n_tokens
    for batch in split_tokens(run.config.data, lm.tokenizer, _FIT):
        before = batch.cu_seqlens[:-1]
        yield batch.select(range(int((before < left).sum())))
        left -= len(batch.input_ids)
        if left <= 0:
            return


def _chosen(run: Run, sources: Sequence[str], limit: int, tally: Counter[str] | None) -> list[Sample]:
    """The first dialogues of other corpora; of one that was trained on those that its split holds out."""
    found = resolve(sources, "dialogues", splits=("eval",))
    before = _training_sources(run)
    known = [_same(source, before) for source in found]
    for source, trained in zip(found, known, strict=True):
        if trained:
            console.say(f"{source.name} was trained on: its held-out dialogues are taken")
    readings = [Reading(tally=tally) for _ in found]
    stream = samples(RowStream(found, order=run.config.data.order, seed=0), "dialogues", readings)
    chosen = list(islice((s for s in stream if s.split == "eval" or not known[s.source]), limit))
    if not chosen:
        raise UserError(f"{', '.join(sources)}: no dialogue is held out from training; give larger sources")
    return chosen


def _training_sources(run: Run) -> list[dict[str, Any]]:
    """What the run's manifest says of its corpora; of a run from before there was one, their names."""
    data = run.config.data
    path = run.path / "data.json"
    if data.prepared:
        return Manifest.read(Path(data.prepared)).facts["recipe"]["sources"]
    if data.method != "bt-p" and path.is_file():
        facts = read_object(path, keys={"sources": list})["sources"]
        return [one | {"name": name} for one, name in zip(facts, data.sources, strict=False)]
    return [{"name": name} for name in data.sources]


def _same(source: Source, training: Sequence[dict[str, Any]]) -> bool:
    """Whether a corpus is one of those trained on: by its name, or because all of its files are among theirs."""
    own = source_facts(source)
    files = {file["sha256"] for file in own.get("files", ())}
    theirs = {file["sha256"] for facts in training for file in facts.get("files", ())}
    return source.name in {facts["name"] for facts in training} or (bool(files) and files <= theirs)


def _seen(
    run: Run, lm: LanguageModel, chosen: Sequence[Sample], tokens: Sequence[TokenBatch], allow_overlap: bool
) -> list[Sample] | None:
    """The dialogues that were read for training, word for word; None where that cannot be told, and is allowed.

    Only those that the split rule puts into the training split can have been: the rest needs no look.
    """
    able = [sample for sample in chosen if sample.split == _FIT]
    if not able:
        return []
    try:
        with console.progress("look for them in the training data", None) as advance:
            if run.config.data.prepared:
                return _seen_in_shards(run, lm, able, tokens, advance)
            return _seen_in_sources(run, able, advance)
    except UserError as error:
        if not allow_overlap:
            raise
        console.warn(f"whether the run was trained on these dialogues cannot be told: {error}")
        return None


def _seen_in_sources(run: Run, able: Sequence[Sample], advance: Any) -> list[Sample]:
    """By the digests of their contents, in the first pass over the corpora."""
    data = run.config.data
    revisions = {s["name"]: s["revision"] for s in _training_sources(run) if "revision" in s and s["name"] != "pydocs"}
    found = resolve(data.sources, "dialogues", splits=(_FIT,), seed=run.config.train.seed, revisions=revisions)
    stream = RowStream(found, order=data.order, seed=run.config.train.seed)
    wanted, met = {sample.digest for sample in able}, set[bytes]()
    for sample in samples(stream, "dialogues", [Reading() for _ in found]):
        advance(1)
        if sample.split == _FIT and sample.digest in wanted:
            met.add(sample.digest)
            if met == wanted:
                break
    return [sample for sample in able if sample.digest in met]


def _seen_in_shards(
    run: Run, lm: LanguageModel, able: Sequence[Sample], tokens: Sequence[TokenBatch], advance: Any
) -> list[Sample]:
    """By their tokens, in the shards of the prepared training split."""
    data = run.config.data
    keys = dict(_keys(tokens))
    wanted, met = {keys[sample.item.id] for sample in able if sample.item.id in keys}, set[bytes]()
    for _, key in _keys(Prepared(data.prepared, lm.tokenizer).batches(split=_FIT, max_length=data.max_length)):
        advance(1)
        if key in wanted:
            met.add(key)
            if met == wanted:
                break
    return [sample for sample in able if keys.get(sample.item.id) in met]


def _keys(batches: Iterable[TokenBatch]) -> Iterator[tuple[str, bytes]]:
    """The name of each sequence, and the digest of its tokens."""
    for batch in batches:
        ids = batch.input_ids.numpy()
        for name, (start, stop) in zip(batch.names, pairwise(batch.cu_seqlens.tolist()), strict=True):
            yield name, blake2b(ids[start:stop].tobytes(), digest_size=16).digest()
