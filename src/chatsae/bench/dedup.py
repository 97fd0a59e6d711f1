"""`chatsae bench dedup`: the greedy n-gram deduplication beside the naive algorithm and other libraries."""

import base64
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool

from chatsae import console
from chatsae.batch import Dialogue
from chatsae.bench.result import BenchResult, Claim
from chatsae.bench.samples import N, Samples, write_base
from chatsae.console import Column
from chatsae.data.reading import Reading, samples
from chatsae.data.sources import resolve
from chatsae.data.stream import RowStream
from chatsae.errors import UserError

DEFAULT_SIZE = 20_000
FASTER = 5.0  # times the samples per CPU second of the reference; this and the next two: docs/data.md
BYTES_PER_NGRAM = 25
FIXED_MB = 300
LARGE = 10_000_000  # kept n-grams; with fewer, Python, torch and numba alone take more than FIXED_MB
WORKING = 10  # times the text of a batch: the working memory that `Greedy` says it needs
# Narrowing reads the table 2^20 slots at a time, two such chunks at once: 14 MB by tracemalloc. malloc keeps as much.
NARROWING_MB = 28

REFERENCES = ("sets", "hash sets")  # the first that ran through is the reference
EXACT = (*REFERENCES, "numpy", "numba", "bit maps", "duckdb")
_BIT_MAP_BYTES = (8, 12, 19)  # of memory_gb per kept n-gram; before narrowing half of it is used, and 10.4 are needed
_PEERS = ("duckdb", "datatrove")
_NEEDS = {"numba": "numba", "bit maps": "numba", "duckdb": "duckdb", "datatrove": "datatrove"}
_ENGINES = (*EXACT, "datatrove")
_COLUMNS = (
    Column("engine"),
    Column("samples"),
    Column("kept"),
    Column("cpu_s", "CPU s"),
    Column("samples_per_cpu_s", "samples / CPU s", best="max"),
    Column("warm_up_s", "warm-up s"),
    Column("start_mb", "MB at start"),
    Column("peak_mb", "MB at peak"),
    Column("kept_ngrams", "kept n-grams"),
    Column("bytes_per_kept_ngram", "bytes / n-gram", best="min"),
    Column("digest", "kept set"),
)
Keep: TypeAlias = Bool[np.ndarray, " S"]


def bench_dedup(sources: Sequence[str], size: int = 0) -> BenchResult:
    """Every engine on `size` samples (0: 20,000) made of the dialogues of the sources, each in its own process.

    Raises:
        UserError: size is negative, a source cannot be read, or an engine of ours fails.
    """
    if size < 0:
        raise UserError(f"size: expected a number of samples, or 0 for {DEFAULT_SIZE:,}, got {size}")
    count = size or DEFAULT_SIZE
    base = base_dialogues(sources, count)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "base.jsonl"
        write_base(base, path)
        rows, keeps = _all_engines(path, count)
    reference = next((e for e in REFERENCES if e in keeps and len(keeps[e]) == count), None)
    if reference is None:
        raise UserError(f"size: no Python set of {count:,} samples fits into the memory that a reference may take")
    _compare(rows, keeps, reference)
    conditions = _conditions(sources, base, count) | {"reference": reference}
    return BenchResult("dedup", _COLUMNS, conditions, list(rows.values()), claims_of(rows, keeps, reference))


def base_dialogues(sources: Sequence[str], most: int) -> list[Dialogue]:
    """The dialogues of all splits of the sources, in listed order; at most so many."""
    stream = RowStream(resolve(sources, "dialogues"), order="listed", seed=0)
    found = samples(stream, "dialogues", [Reading() for _ in stream.sources])
    return [sample.item for sample in islice(found, most) if isinstance(sample.item, Dialogue)]


def measure(engine: str, base: Path, count: int, memory_gb: float | None = None) -> tuple[dict[str, Any], Keep]:
    """The row of one engine, run in a process of its own, and which samples it keeps.

    Raises:
        UserError: the process failed.
    """
    command = [sys.executable, "-m", "chatsae.bench.engines", str(base), engine, str(count)]
    command += [] if memory_gb is None else [str(memory_gb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()[-1]
        raise UserError(f"bench dedup: engine {engine}: {last}")
    row = json.loads(done.stdout.splitlines()[-1])
    packed = np.frombuffer(base64.b64decode(row.pop("keep")), np.uint8)
    keep = np.unpackbits(packed, count=row["samples"]).astype(np.bool_)
    row["digest"] = hashlib.sha256(packed.tobytes()).hexdigest()[:12]
    return row, keep


def measure_bit_maps(base: Path, count: int, kept_ngrams: int) -> tuple[dict[str, Any], Keep]:
    """The same of numba with the least memory_gb that suffices, of those that make it narrow.

    Raises:
        UserError: the process failed.
    """
    for each in _BIT_MAP_BYTES[:-1]:
        with suppress(UserError):
            return measure("bit maps", base, count, each * kept_ngrams / 1e9)
    return measure("bit maps", base, count, _BIT_MAP_BYTES[-1] * kept_ngrams / 1e9)


def _all_engines(base: Path, count: int) -> tuple[dict[str, dict[str, Any]], dict[str, Keep]]:
    """The rows of all engines, those that could not run among them, and the decisions of those that did."""
    rows: dict[str, dict[str, Any]] = {}
    keeps: dict[str, Keep] = {}
    for engine in _ENGINES:
        needed = _NEEDS.get(engine)
        if needed is not None and find_spec(needed) is None:
            how = "-r bench/requirements.txt" if engine in _PEERS else "'chatsae[fast]'"
            rows[engine] = {"engine": engine, "note": f"skipped: pip install {how}"}
            console.say(f"{engine}: {rows[engine]['note']}")
            continue
        try:
            if engine == "bit maps":
                rows[engine], keeps[engine] = measure_bit_maps(base, count, rows["numba"]["kept_ngrams"])
            else:
                rows[engine], keeps[engine] = measure(engine, base, count)
        except UserError as error:
            if engine not in _PEERS:
                raise
            rows[engine] = {"engine": engine, "note": f"failed: {error}"}
        console.say(f"{engine}: {rows[engine].get('cpu_s', '-')} CPU s, {rows[engine].get('peak_mb', '-')} MB")
    return rows, keeps


def _compare(rows: Mapping[str, dict[str, Any]], keeps: Mapping[str, Keep], reference: str) -> None:
    """Adds to each row what follows from the reference: wrong decisions, and the n-grams that are kept."""
    for engine, keep in keeps.items():
        row, right = rows[engine], keeps[reference][: len(keep)]
        row["wrongly_dropped"] = int((right & ~keep).sum())
        row["wrongly_kept"] = int((keep & ~right).sum())
        wrong = row["wrongly_dropped"] + row["wrongly_kept"]
        if not wrong and len(keep) == len(keeps[reference]):
            row.setdefault("kept_ngrams", rows[reference]["kept_ngrams"])
        if row.get("kept_ngrams"):
            row["bytes_per_kept_ngram"] = round(1e6 * (row["peak_mb"] - row["start_mb"]) / row["kept_ngrams"], 1)
        if wrong:
            found = f"drops {row['wrongly_dropped']:,} that the rule keeps, keeps {row['wrongly_kept']:,} that it drops"
            row["note"] = "; ".join(filter(None, [row.get("note"), found]))


def claims_of(rows: Mapping[str, Mapping[str, Any]], keeps: Mapping[str, Keep], reference: str) -> list[Claim]:
    """What docs/data.md says of the deduplication, judged by these rows."""
    exact = [rows[engine] for engine in EXACT if engine in keeps]
    same = sum(not row["wrongly_dropped"] and not row["wrongly_kept"] for row in exact)
    claims = [Claim.at_least(f"exact engines that keep what `{reference}` keeps", same, len(exact))]
    if "numba" not in keeps:
        return claims
    numba, bit_maps = rows["numba"], rows["bit maps"]
    times = numba["samples_per_cpu_s"] / rows[reference]["samples_per_cpu_s"]
    claims.append(Claim.at_least(f"numba: samples per CPU second, over those of `{reference}`", times, FASTER))
    bound = BYTES_PER_NGRAM * numba["kept_ngrams"] / 1e6 + FIXED_MB
    own = numba["peak_mb"] - numba["start_mb"]
    claims.append(Claim.at_most("numba: MB of the peak above the start", own, bound))
    if numba["kept_ngrams"] >= LARGE:
        claims.append(Claim.at_most("numba: MB of the peak, everything loaded included", numba["peak_mb"], bound))
    bound = 1000 * bit_maps["memory_gb"] + WORKING * bit_maps["largest_batch_mb"] + NARROWING_MB
    own = bit_maps["peak_mb"] - bit_maps["start_mb"]
    claims.append(Claim.at_most("bit maps: MB of the peak above the start (memory_gb, working)", own, bound))
    claims.append(Claim.at_least("bit maps: times that memory_gb was used up", bit_maps["narrowed"], 1))
    return claims


def _conditions(sources: Sequence[str], base: Sequence[Dialogue], count: int) -> dict[str, Any]:
    packages = [name for name in ("numba", "duckdb", "datatrove") if find_spec(name)]
    return {
        "sources": list(sources),
        "dialogues": len(base),
        "samples": count,
        "ngram": N,
        "ngrams": Samples(base, count).windows(),
        "seconds": "CPU seconds of a process, without making the samples and without the warm-up",
        "versions": {name: metadata.version(name) for name in packages},
    }
