"""One deduplication engine in a process of its own: python -m chatsae.bench.engines BASE ENGINE SAMPLES [MEMORY_GB].

Prints one JSON line. BASE is a file of `samples.write_base`.
"""

import base64
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from chatsae.bench.samples import Base, BaseFile, N, Samples
from chatsae.data.dedup import Greedy, MemoryFullError, ngrams
from chatsae.data.hashing import ngram_hashes
from chatsae.data.hashset import hash_set

_MOST_BYTES = 8e9  # of the process of a Python set; then it stops
_DUCKDB_MEMORY = "1GB"
_BLOOM_HASHES = 5
_BLOOM_BITS = 2**28  # the largest power of two that datatrove's assertions allow


@dataclass(frozen=True, slots=True)
class Outcome:
    """Decisions on the first samples, and the facts that only the engine knows."""

    keep: bytearray
    """1 for a sample that is kept, 0 for one that is not."""
    facts: dict[str, Any]


Run = Callable[[Samples], Outcome]


def sets(samples: Samples, key: Callable[[tuple[str, ...]], Hashable] | None = None) -> Outcome:
    """The paper's description taken literally: a Python set of word tuples, or of a `key` of each."""
    seen: set[Hashable] = set()
    keep = bytearray()
    for batch in samples.batches():
        if (resident_bytes() or 0) > _MOST_BYTES:
            note = f"stopped after {len(keep):,} samples at {_MOST_BYTES / 1e9:g} GB"
            return Outcome(keep, {"kept_ngrams": len(seen), "note": note})
        for dialogue in batch:
            found = ngrams(dialogue, N)
            keys = found if key is None else {key(ngram) for ngram in found}
            keep.append(seen.isdisjoint(keys))
            if keep[-1]:
                seen |= keys
    return Outcome(keep, {"kept_ngrams": len(seen)})


def _prepare_greedy(base: Base, memory_gb: float | None, engine: str) -> Run:
    """Loads what it compiles, on one dialogue."""
    warm, first = Greedy(N, engine=engine), list(islice(base, 1))
    warm.keep(first)
    warm.narrow([first], map_bytes=64)
    warm.keep(first)
    return partial(_greedy, greedy=Greedy(N, engine=engine, memory_gb=memory_gb))


def _greedy(samples: Samples, greedy: Greedy) -> Outcome:
    keep = bytearray()
    facts: dict[str, Any] = {}
    for batch in samples.batches():
        try:
            keep += bytes(greedy.keep(batch))
        except MemoryFullError:
            facts = {"narrowed": 1, "note": f"narrowed after {len(keep):,} samples"}
            greedy.narrow(samples.batches(len(keep)))
            keep += bytes(greedy.keep(batch))
    if not facts:
        facts = {"kept_ngrams": len(greedy), "narrowed": 0}
    return Outcome(keep, facts | {"remembered": len(greedy), "table_bytes": greedy.nbytes})


def _prepare_duckdb(base: Base, memory_gb: float | None) -> Run:
    duckdb, pyarrow = import_module("duckdb"), import_module("pyarrow")
    ngram_hashes(list(islice(base, 1)), N)
    version = f"duckdb {duckdb.__version__}, memory_limit {_DUCKDB_MEMORY}"
    return partial(_by_sql, connect=duckdb.connect, table=pyarrow.table, note=version)


def _by_sql(samples: Samples, connect: Any, table: Any, note: str) -> Outcome:
    """Hashes into a table on disk; SQL finds those of two or more samples; the greedy rule runs on them alone."""
    first = 0
    with tempfile.TemporaryDirectory() as scratch:
        config = {"memory_limit": _DUCKDB_MEMORY, "threads": 1, "temp_directory": f"{scratch}/spill"}
        with connect(f"{scratch}/ngrams.db", config=config) as database:
            database.execute("CREATE TABLE ngrams (sample UINTEGER, hash UBIGINT)")
            for batch in samples.batches():
                hashes = ngram_hashes(batch, N)
                numbers = np.arange(first, first + len(batch), dtype=np.uint32)
                rows = {"sample": np.repeat(numbers, np.diff(hashes.bounds)), "hash": hashes.values}
                database.register("arrived", table(rows))
                database.execute("INSERT INTO ngrams FROM arrived")
                first += len(batch)
            shared = database.execute(
                "SELECT sample, hash FROM ngrams WHERE hash IN"
                " (SELECT hash FROM ngrams GROUP BY hash HAVING min(sample) <> max(sample)) ORDER BY sample"
            ).fetchnumpy()
    bounds = np.searchsorted(np.asarray(shared["sample"]), np.arange(samples.count + 1))
    keep, _ = hash_set().greedy(np.array(shared["hash"], np.uint64), bounds)
    return Outcome(bytearray(keep.tobytes()), {"note": note})


def _prepare_datatrove(base: Base, memory_gb: float | None) -> Run:
    module = import_module("datatrove.pipeline.dedup.bloom_filter")
    words: Any = import_module("datatrove.utils.word_tokenizers").WordTokenizer

    class Words(words):  # the words of the rule; the tokenizers of datatrove need further packages
        word_tokenize = staticmethod(str.split)
        sent_tokenize = span_tokenize = None

    return partial(_by_bloom, module=module, words=Words())


def _by_bloom(samples: Samples, module: Any, words: Any) -> Outcome:
    """The filter that comes nearest to the rule: one shared 20-gram drops a text.

    Its bit indices are `hash & m_bytes`: only with m_bytes = 2^k - 1 are they spread, over 2^k of the 8 m_bytes bits.
    """
    bits = min(2 ** math.ceil(math.log2(10 * samples.windows() + 64)), _BLOOM_BITS)
    off = dict.fromkeys(("lowercase", "norm_whitespace", "remove_punctuation", "norm_unicode_diacritics"), False)
    config = module.BloomFilterConfig(
        m_bytes=bits - 1,
        k=_BLOOM_HASHES,
        duplicate_threshold=0.0,
        n_grams=N,
        norm_config=module.TextNormConfig(**off, norm_numbers=False),
        hash_config=module.HashConfig(precision=32, hash_fc="sha1"),  # its xxhash fails on str from xxhash 4 on
    )
    keep = bytearray()
    with tempfile.TemporaryDirectory() as scratch:
        bloom = module.SingleBloomFilter(scratch, config, language=words)
        for batch in samples.batches():
            texts = ("\n".join(message.content for message in dialogue.messages) for dialogue in batch)
            keep += bytes(bloom.step(module.Document(text=text, id="")) for text in texts)
    note = f"approximate: 32-bit sha1, m_bytes {bits - 1:,}, k {_BLOOM_HASHES}, n-grams across turns"
    return Outcome(keep, {"note": note})


def _prepare_sets(base: Base, memory_gb: float | None, key: Callable[..., Hashable] | None) -> Run:
    return partial(sets, key=key)


ENGINES: dict[str, Callable[[Base, float | None], Run]] = {
    "sets": partial(_prepare_sets, key=None),
    "hash sets": partial(_prepare_sets, key=hash),
    "numpy": partial(_prepare_greedy, engine="numpy"),
    "numba": partial(_prepare_greedy, engine="numba"),
    "bit maps": partial(_prepare_greedy, engine="numba"),
    "duckdb": _prepare_duckdb,
    "datatrove": _prepare_datatrove,
}


def measured(base: Base, engine: str, count: int, memory_gb: float | None = None) -> dict[str, Any]:
    """Runs one engine in this process; what is loaded or compiled first is `warm_up_s`, and not in `cpu_s`."""
    samples = Samples(base, count)
    began = time.process_time()
    run = ENGINES[engine](base, memory_gb)
    warm = time.process_time() - began
    _forget_peak()
    start = resident_bytes() or peak_bytes()
    began = time.process_time()
    outcome = run(samples)
    seconds = time.process_time() - began - samples.seconds
    done = len(outcome.keep)
    return {
        "engine": engine,
        "samples": done,
        "kept": sum(outcome.keep),
        "cpu_s": round(seconds, 4),
        "samples_per_cpu_s": round(done / seconds),
        "warm_up_s": round(warm, 3),
        "start_mb": round(start / 1e6, 1),
        "peak_mb": round(peak_bytes() / 1e6, 1),
        "largest_batch_mb": round(samples.largest / 1e6, 3),
        "memory_gb": memory_gb,
        **outcome.facts,
        "keep": base64.b64encode(np.packbits(np.frombuffer(outcome.keep, np.bool_)).tobytes()).decode(),
    }


def resident_bytes() -> int | None:
    """Memory of this process now; None where the system does not say."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most memory this process has had, since `_forget_peak` where the system can."""
    peak = _status("VmHWM")  # not ru_maxrss, which on Linux begins with that of the parent
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # then the peak may be one of the warm-up


def main(argv: list[str]) -> None:
    base, engine, count = BaseFile(Path(argv[0])), argv[1], int(argv[2])
    memory_gb = float(argv[3]) if len(argv) > 3 else None
    sys.stdout.write(json.dumps(measured(base, engine, count, memory_gb)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
