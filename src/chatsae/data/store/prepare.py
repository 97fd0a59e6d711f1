"""Sources -> normalised, deduplicated, split, tokenised shards with a manifest; an interrupted run goes on."""

import json
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from chatsae import console
from chatsae.batch import Dialogue, Document
from chatsae.config import DataConfig
from chatsae.data.render import longest, template_facts
from chatsae.data.sources import Kind, Source, resolve
from chatsae.data.store.manifest import MANIFEST, Manifest, changes, recipe_of
from chatsae.data.store.parallel import tokenised
from chatsae.data.store.selection import Chunk, Selection
from chatsae.data.store.shards import Shard, check_file
from chatsae.data.store.writing import Writing, resume_of, scratch_files, write_hashes
from chatsae.data.template import special_text
from chatsae.errors import UserError
from chatsae.files import Lock, read_json, read_object, with_checksum, write_json, write_text

Engine = Literal["local", "spark"]

REJECTS = "rejects.jsonl"
_STATE = "state.json"
_SHARED, _SHARED_OF = "shared.parquet", "shared.json"
_CHECKPOINT_SECONDS = 60.0


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    seed: int,
    max_tokens: int,
    engine: Engine = "local",
) -> Manifest:
    """Prepare the dialogues of `config.sources` and the documents of `config.text_sources` in a directory.

    Rows are normalised, deduplicated (dialogues), split, and tokenised until every method has `max_tokens` training
    tokens (0: all there are). Stopping early gives the beginning of what the whole would give. The bytes follow from
    the sources, the tokenizer and the recipe in the manifest alone. Directories that are prepared already are checked
    and left as they are; interrupted ones go on.

    Raises:
        UserError: a source cannot be read, the directory holds other data, is damaged, full, or in use.
        KeyboardInterrupt: after Ctrl-C; everything up to there is kept.
    """
    try:
        (out / "state").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    lock = Lock(out, "data directory")
    try:
        before = _before(out)
        recipe, sources = _recipe(config, tokenizer, before.get("recipe", {}), seed=seed, max_tokens=max_tokens)
        differences = changes(before["recipe"], recipe) if before else []
        if differences:
            raise UserError(
                f"{out} holds other data; choose another --out, or delete it. Differences: {'; '.join(differences)}"
            )
        if (out / MANIFEST).exists():
            return _unchanged(out)
        preparation = _Preparation(out, recipe, before)
        for kind, found in sources.items():
            if found:
                preparation.side(kind, found, config, tokenizer, seed=seed, engine=engine)
        return preparation.finish()
    finally:
        lock.close()


def _before(out: Path) -> dict[str, Any]:
    """The manifest, or the state of an interrupted run; empty where there is neither."""
    if (out / MANIFEST).exists():
        return Manifest.read(out).facts
    path = out / "state" / _STATE
    if not path.exists():
        return {}
    return read_object(path, f"delete {out} and prepare the data again", {"recipe": dict})


def _recipe(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, before: dict[str, Any], *, seed: int, max_tokens: int
) -> tuple[dict[str, Any], dict[Kind, tuple[Source, ...]]]:
    known = [*before.get("sources", []), *before.get("text_sources", [])]
    revisions = {source["name"]: source["revision"] for source in known if "revision" in source}
    find = partial(resolve, seed=seed, endless=max_tokens > 0, revisions=revisions)
    dialogues = find(config.sources, "dialogues") if config.sources else ()
    documents = find(config.text_sources, "documents", splits=("train",)) if config.text_sources else ()
    if not dialogues and not documents:
        raise UserError("data.sources and data.text_sources are empty; there is nothing to prepare")
    for source in {source.name: source for source in (*dialogues, *documents)}.values():
        for reason, n in source.skipped.items():
            console.say(f"{source.name}: {n:,} × {reason} left out")
    recipe = recipe_of(config, dialogues, documents, tokenizer, seed=seed, max_tokens=max_tokens)
    return recipe, {"dialogues": dialogues, "documents": documents}


def _unchanged(out: Path) -> Manifest:
    """The manifest, after a look at every shard."""
    manifest = Manifest.read(out)
    for split in manifest.facts["splits"].values():
        for shard in split["shards"]:
            check_file(out, Shard(**shard))
    shutil.rmtree(out / "state", ignore_errors=True)
    console.say(f"{out} is prepared already: sources, recipe and shards are unchanged")
    return manifest


class _Preparation:
    """The directory while it is written: the state of both kinds, and the files that it names."""

    def __init__(self, out: Path, recipe: dict[str, Any], before: dict[str, Any]) -> None:
        self._out, self._scratch, self._recipe = out, out / "state", recipe
        self._sides: dict[str, Any] = dict(before.get("sides", {}))

    def side(
        self,
        kind: Kind,
        sources: Sequence[Source],
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        engine: Engine,
    ) -> None:
        """Prepare one kind to its end, or go on with it."""
        state = self._sides.get(kind)
        if state is not None and state["done"]:
            return
        special = special_text(tokenizer)
        shared = self._shared(sources, config, special, engine, state) if kind == "dialogues" and config.ngram else None
        resume = None if state is None else resume_of(self._scratch, state)
        selection = Selection(sources, kind, config, seed=seed, special=special, shared=shared, resume=resume)
        prefix = template_facts(tokenizer).prefix_ids if kind == "dialogues" else ()
        stop = self._recipe["stops"]
        if stop is not None:  # a dialogue counts as far as a training reads it
            stop = {**stop, "max_length": longest(tokenizer, stop["max_length"])}
        writing = Writing(self._out, kind, sources, prefix, stop, state)
        if state is not None:
            console.say(f"{kind}: going on after {selection.n_rows:,} rows")
        total = sum(source.rows or 0 for source in sources) or None if stop is None else stop["tokens"]
        chunks = tokenised(selection, _items, tokenizer, workers=config.workers)
        with (
            closing(chunks),
            console.stop_requested("this chunk") as interrupt,
            console.progress(f"prepare {kind}", total) as advance,
        ):
            done, saved = 0, time.monotonic()
            while not writing.enough and (found := next(chunks, None)) is not None:
                chunk, results = found
                writing.add(chunk, results)
                before, done = done, chunk.n_rows if stop is None else min(writing.counted, stop["tokens"])
                advance(done - before, writing.note())
                if interrupt.is_set() or time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self._save(kind, writing.state_dict() | {"shared": shared is not None})
                    saved = time.monotonic()
                if interrupt.is_set():
                    raise KeyboardInterrupt
        self._save(kind, writing.close())

    def finish(self) -> Manifest:
        """Write the rejected examples and the manifest, which makes the data whole."""
        examples = [example for side in self._sides.values() for example in side["examples"]]
        write_text(self._out / REJECTS, "".join(json.dumps(example) + "\n" for example in examples))
        facts = {
            "recipe": self._recipe,
            "kept_sha256": {kind: side["kept_sha256"] for kind, side in self._sides.items()},
            "counts": {kind: side["sources"] for kind, side in self._sides.items()},
            "splits": {name: split for side in self._sides.values() for name, split in side["splits"].items()},
        }
        write_json(self._out / MANIFEST, facts)
        shutil.rmtree(self._scratch)
        return Manifest.read(self._out)

    def _save(self, kind: Kind, state: dict[str, Any]) -> None:
        """Make a state the one to go on from, then free what only earlier ones needed."""
        self._sides[kind] = state
        write_json(self._scratch / _STATE, with_checksum({"recipe": self._recipe, "sides": self._sides}))
        needed = {_STATE, _SHARED, _SHARED_OF}.union(*map(scratch_files, self._sides.values()))
        for path in self._scratch.iterdir():
            if path.name not in needed and path.is_file():
                path.unlink()

    def _shared(
        self,
        sources: Sequence[Source],
        config: DataConfig,
        special: re.Pattern[str],
        engine: Engine,
        state: dict[str, Any] | None,
    ) -> np.ndarray | None:
        """The hashes of more than one sample, found by the engine when the preparation began."""
        path, of = self._scratch / _SHARED, self._scratch / _SHARED_OF
        if state is None and engine == "spark":
            from chatsae.data.spark import shared_hashes

            if not of.exists() or read_json(of, "delete it") != self._recipe:
                write_hashes(path, shared_hashes(sources, config, special))
                write_json(of, self._recipe)
        elif state is None or not state["shared"]:
            return None
        return pq.read_table(path).column("hash").to_numpy()


def _items(chunk: Chunk) -> list[Dialogue | Document]:
    return [sample.item for sample in chunk.samples]
