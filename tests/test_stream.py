"""The order of rows: every row once, repeatable, a sample of the whole at every point, and resumable at any."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.data.sources import Ready, Source, resolve
from chatsae.data.stream import Order, RowStream
from chatsae.errors import UserError

SIZES = {"a": (40, 7), "b": (3,), "c": tuple([5] * 12)}
ORDERS: tuple[Order, ...] = ("mixed", "listed")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Source, ...]:
    """Three directories: of two files, of one, and of more than are open at once."""
    root = tmp_path_factory.mktemp("sources")
    for name, sizes in SIZES.items():
        (root / name).mkdir()
        for index, size in enumerate(sizes):
            rows = [json.dumps({"messages": [], "n": f"{name}{index}:{i}"}) + "\n" for i in range(size)]
            (root / name / f"{index:02}.jsonl").write_text("".join(rows))
    return resolve([str(root / name) for name in SIZES], "dialogues")


def names(stream) -> list[str]:
    return [found.row.value["n"] for found in stream]


ALL = [f"{name}{i}:{row}" for name, sizes in SIZES.items() for i, size in enumerate(sizes) for row in range(size)]


def test_listed_is_the_order_of_sources_files_and_rows(sources):
    assert names(RowStream(sources, order="listed", seed=3)) == ALL


def test_mixed_has_every_row_once_and_depends_on_the_seed_alone(sources):
    one, again, other = (names(RowStream(sources, order="mixed", seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert sorted(one) == sorted(other) == sorted(ALL)
    for name in ("a0", "a1", "b0", "c4"):  # rows of a file stay in order, so that a resume can skip them
        of_file = [row for row in one if row.startswith(f"{name}:")]
        assert of_file == sorted(of_file, key=lambda row: int(row.partition(":")[2]))


def test_the_beginning_of_a_mixed_stream_is_a_sample_of_all_sources(sources):
    counts = Counter[str]()
    for seed in range(200):
        counts.update(row[0] for row in names(islice(RowStream(sources, order="mixed", seed=seed), 30)))
    for name, sizes in SIZES.items():
        assert counts[name] / counts.total() == pytest.approx(sum(sizes) / len(ALL), rel=0.15)


@settings(max_examples=60, deadline=None)
@given(order=st.sampled_from(ORDERS), stops=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 3))
def test_a_stream_goes_on_at_any_row(sources, order, stops, seed):
    whole = names(RowStream(sources, order=order, seed=seed))
    stream, found = RowStream(sources, order=order, seed=seed), []
    for stop in stops:
        found += names(islice(stream, stop))
        state = json.loads(json.dumps(stream.state_dict()))
        stream = RowStream(sources, order=order, seed=seed, state=state)
    assert found + names(stream) == whole


def test_the_built_in_corpus_has_its_splits_side_by_side_and_never_ends():
    (source,) = resolve(["pydocs"], "dialogues", endless=True)
    values = [found.row.value for found in islice(RowStream([source], order="mixed", seed=0), 500)]
    assert all(isinstance(value, Ready) for value in values)
    splits = Counter(value.split for value in values)
    assert splits["train"] > 300
    assert min(splits[name] for name in ("eval", "interpret", "steer")) > 3
    state = RowStream([source], order="mixed", seed=0).state_dict()
    state["lanes"][0] |= {"waiting": [], "open": [[0, 499]]}
    assert next(RowStream([source], order="mixed", seed=0, state=state)).row.value == values[-1]


def test_a_source_that_is_given_twice_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="source 'pydocs' is given twice"):
        resolve(["pydocs", "pydocs"], "dialogues")
