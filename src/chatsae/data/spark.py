"""Which n-grams more than one sample has, found by a Spark cluster: what makes the greedy pass small.

One shuffle: every part of every source is read where an executor is, each distinct hash of a sample becomes a pair
(hash, sample), and the pairs meet by hash. Nothing else leaves the executors than the hashes of two or more samples.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from chatsae import console
from chatsae.batch import Dialogue
from chatsae.config import DataConfig
from chatsae.data.hashing import ngram_hashes
from chatsae.data.reading import usable
from chatsae.data.sources import Part, PydocsPart, Source
from chatsae.errors import UserError

_BATCH = 512  # dialogues hashed together
_ROW_BITS = 40  # of a sample's number: the rest is the number of its part

_PAIRS = pa.schema([("hash", pa.int64()), ("sample", pa.int64())])
_HASHES = pa.schema([("hash", pa.int64())])


def shared_hashes(sources: Sequence[Source], config: DataConfig, special: re.Pattern[str]) -> np.ndarray:
    """The uint64 hashes of the n-grams that two or more usable rows of the sources have.

    Runs on the Spark that the environment names (`spark-submit`, `SPARK_REMOTE`; else on this machine); the executors
    need this package and the sources' paths.

    Raises:
        UserError: Spark is not installed or cannot start, a source never ends, or one cannot be read.
    """
    parts = [(source.name, part) for source in sources for part in source.parts]
    if any(isinstance(part, PydocsPart) and part.endless for _, part in parts):
        raise UserError("source 'pydocs' never ends when data.max_tokens is set, and --engine spark reads all there is")
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError:
        raise UserError("--engine spark needs Spark: pip install 'chatsae[spark]', and Java 17 or newer") from None
    console.say(f"spark: looking for shared n-grams in {len(parts)} files")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # where this package is installed, on executors too
    try:
        session = SparkSession.builder.appName("chatsae prepare").getOrCreate()
        session.sparkContext.setLogLevel("FATAL")  # what fails is told below, in one line
        hash_part = partial(_hash_parts, parts=parts, ngram=config.ngram, roles=config.ngram_roles, special=special)
        tasks = session.range(0, len(parts), numPartitions=len(parts))
        pairs = tasks.mapInArrow(hash_part, "hash long, sample long")
        shared = pairs.repartition("hash").mapInArrow(_shared, "hash long").toArrow()
    except PySparkException as error:
        raise UserError(_advice(error)) from None
    return shared.column("hash").to_numpy().view(np.uint64)


def _hash_parts(
    batches: Iterator[pa.RecordBatch],
    *,
    parts: Sequence[tuple[str, Part]],
    ngram: int,
    roles: Sequence[str],
    special: re.Pattern[str],
) -> Iterator[pa.RecordBatch]:
    """The pairs (hash, sample) of the parts with the given numbers."""
    for index in (index for batch in batches for index in batch.column("id").to_pylist()):
        name, part = parts[index]
        found = ((row.number, _dialogue(row, name, special)) for row in part.rows())
        usable_rows = ((number, dialogue) for number, dialogue in found if dialogue is not None)
        while group := list(islice(usable_rows, _BATCH)):
            hashes = ngram_hashes([dialogue for _, dialogue in group], ngram, roles)
            for (number, _), start, stop in zip(group, hashes.bounds[:-1], hashes.bounds[1:], strict=True):
                distinct = np.unique(hashes.values[start:stop])
                sample = np.full(len(distinct), (index << _ROW_BITS) | number, np.int64)
                yield pa.RecordBatch.from_arrays([pa.array(distinct.view(np.int64)), pa.array(sample)], schema=_PAIRS)


def _dialogue(row: Any, name: str, special: re.Pattern[str]) -> Dialogue | None:
    item = getattr(row.value, "item", None) or usable(row, "dialogues", name, "", special)
    return item if isinstance(item, Dialogue) else None


def _shared(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Of the pairs of one partition, which has all those of its hashes, the hashes with two or more samples."""
    columns = [batch.column("hash").to_numpy() for batch in batches]
    hashes, counts = np.unique(np.concatenate([np.empty(0, np.int64), *columns]), return_counts=True)
    yield pa.RecordBatch.from_arrays([pa.array(hashes[counts > 1])], schema=_HASHES)


def _advice(error: Exception) -> str:
    said = str(error)
    ours = re.search(r"chatsae\.errors\.UserError: (.+)", said)
    if ours:
        return ours[1]
    raised = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception)): (.+)$", said, re.MULTILINE)
    first = ": ".join(raised[-1]) if raised else (said.strip().splitlines() or [type(error).__name__])[0]
    hint = "; Spark needs Java 17 or newer (JAVA_HOME)" if "JAVA" in said.upper() else ""
    return f"spark: {first}{hint}"
