"""Files and hub data sets -> rows; what is broken is counted row by row, what is cut short is told."""

import gzip
import importlib.util
import io
import itertools
import json
import os
import pickle
import random
import tracemalloc
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.data import hub, readers
from chatsae.data.readers import (
    SUFFIXES,
    Broken,
    HubSet,
    Row,
    estimated_rows,
    hub_rows,
    hub_set,
    local_files,
    local_rows,
)
from chatsae.data.reading import read
from chatsae.errors import UserError

ROWS: list[Any] = [{"text": f"Line {i}: {'é' * (i % 7)}", "n": i} for i in range(60)]
TEXTS = [{"text": row["text"]} for row in ROWS]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def packed(rows: list[Any], suffix: str, members: int = 3) -> bytes:
    """The bytes of a file, in several members or row groups."""
    if suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=-(-len(rows) // members))
        return sink.getvalue()
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    size = -(-len(rows) // members)
    return b"".join(pack(jsonl(rows[i : i + size])) for i in range(0, len(rows), size))


def written(folder: Path, suffix: str, rows: list[Any] = ROWS) -> Path:
    path = folder / f"a{suffix}"
    path.write_bytes(packed(rows, suffix))
    return path


def values(path: Path, start: int = 0) -> list[Any]:
    return [row.value for row in local_rows(path, ("text", "n"), start)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows_and_takes_them_up_anywhere(suffix, tmp_path):
    path = written(tmp_path, suffix)
    rows = list(local_rows(path, ("text", "n")))
    assert rows == [Row(str(path), number, value) for number, value in enumerate(ROWS, start=1)]
    for start in (1, 19, 20, 21, 40, 59, 60, 61):
        assert list(local_rows(path, ("text", "n"), start)) == rows[start:]
    assert estimated_rows(path) == len(ROWS)


def test_parquet_gives_only_the_named_columns(tmp_path):
    path = written(tmp_path, ".parquet")
    assert [row.value for row in local_rows(path, ("text", "other"))] == TEXTS
    with pytest.raises(UserError, match=r"a\.parquet: no field messages \(found: text, n\)"):
        list(local_rows(path, ("messages",)))


def test_what_is_passed_over_is_not_parsed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"oops\n\xff\n" + jsonl(ROWS[:1]))
    assert [row.number for row in local_rows(path, (), 2)] == [3]
    assert values(path, 2) == ROWS[:1]
    table = bytearray(packed(ROWS, ".parquet"))
    group = pq.read_metadata(io.BytesIO(table)).row_group(0).column(0)
    begin = group.dictionary_page_offset or group.data_page_offset
    table[begin : begin + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    broken = tmp_path / "a.parquet"
    broken.write_bytes(table)
    assert values(broken, 20) == ROWS[20:]
    with pytest.raises(UserError, match="not valid Parquet"):
        values(broken, 19)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_files(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(b"")
    assert values(path) == []
    assert estimated_rows(path) == 0


def test_blank_lines_are_no_rows_and_byte_order_marks_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n \r\n\xef\xbb\xbf{}\r\n\n[]")
    assert list(local_rows(path, ())) == [Row(str(path), 1, {}), Row(str(path), 2, [])]
    assert [row.number for row in local_rows(path, (), 1)] == [2]
    assert estimated_rows(path) == 2


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        (b'{"a": "\xff"}', Broken("not UTF-8", "invalid start byte at byte 7")),
        (b'{"a": "\xed\xa0\x80"}', Broken("not UTF-8", "invalid continuation byte at byte 7")),
        ("Hé".encode("utf-16"), Broken("not UTF-8", "invalid start byte at byte 0")),
        (b'{"a": 1', Broken("not JSON", "Expecting ',' delimiter at character 8")),
        (b"[" * 100_000, Broken("not JSON", "nested too deeply")),
        (
            b"{'a': 1}",
            Broken("not JSON", "Expecting property name enclosed in double quotes at character 1"),
        ),
    ],
)
def test_a_broken_line_is_one_broken_row(line, broken, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n{}\n")
    assert values(path) == [{}, broken, {}]


def test_an_integer_too_long_for_python_is_a_broken_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"[" + b"9" * 5000 + b"]\n{}\n")
    found = values(path)
    assert (found[0].reason, found[1]) == ("not JSON", {})


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_over_the_limit_is_never_held_as_a_whole(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    opened = {".jsonl": Path.open, ".jsonl.gz": gzip.open, ".jsonl.zst": zstandard.open}[suffix]
    with opened(path, "wb") as file:
        file.write(b"{}\n")
        for _ in range(150):
            file.write(b" " * (1 << 20))
        file.write(b"\n[]\n")
    tracemalloc.start()
    try:
        assert values(path) == [{}, Broken("line over 32 MiB", ""), []]
        assert tracemalloc.get_traced_memory()[1] < 3 * readers.MAX_LINE
    finally:
        tracemalloc.stop()


def test_the_longest_line_is_one_byte_shorter_than_the_first_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 8)
    path = tmp_path / "a.jsonl"
    for end in (b"\n", b""):
        path.write_bytes(b'"123456"\n"1234567"\n"' + b"1" * 100 + b'"\n"123456"' + end)
        assert [isinstance(value, Broken) for value in values(path)] == [False, True, True, False]


CUT = {suffix: packed(ROWS, suffix) for suffix in (".jsonl.gz", ".jsonl.zst", ".parquet")}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(CUT)), st.floats(0, 1), st.sampled_from([0, 5, 25]))
def test_a_file_cut_short_anywhere_is_told_unless_it_is_sound(tmp_path_factory, suffix, share, start):
    content = CUT[suffix]
    path = tmp_path_factory.getbasetemp() / f"cut{suffix}"
    path.write_bytes(content[: int(share * len(content))])
    found: list[Row] = []
    try:
        found += local_rows(path, ("text", "n"), start)
        complete = True
    except UserError as error:
        complete, said = False, str(error)
    if complete:  # cut between two members
        assert len(found) + start in ((0, 20, 40, 60) if suffix != ".parquet" else (60,)) or not found
    else:
        assert said.startswith(f"{path} cannot be read beyond row ")
        assert said.endswith("; put a whole copy of the file in its place, or leave it out")
        assert "\n" not in said
    assert [row.value for row in found] == ROWS[start : start + len(found)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_rows_before_the_cut_are_given_and_their_number_is_said(suffix, tmp_path):
    rows = [{"text": random.Random(i).randbytes(2000).hex()} for i in range(2000)]
    path = written(tmp_path, suffix, rows)
    content = bytearray(path.read_bytes())
    if suffix == ".parquet":
        column = pq.read_metadata(path).row_group(2).column(0)
        content[column.data_page_offset : column.data_page_offset + 100] = b"\xff" * 100
    else:
        del content[-20:]
    path.write_bytes(content)
    found, said = until_error(local_rows(path, ("text",)))
    assert [row.value for row in found] == rows[: len(found)]
    assert len(found) >= 1300
    assert said.startswith(f"{path} cannot be read beyond row {len(found):,}: ")


def until_error(rows: Iterator[Row]) -> tuple[list[Row], str]:
    """The rows before a UserError, and what it says."""
    found: list[Row] = []
    with pytest.raises(UserError) as error:
        deque(map(found.append, rows), maxlen=0)
    return found, str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_what_is_not_compressed_is_told(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(jsonl(ROWS))
    for call in (values, estimated_rows):
        with pytest.raises(UserError, match="cannot be read beyond row 0: cut short or damaged"):
            call(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_gone_is_told(suffix, tmp_path):
    for call in (values, estimated_rows):
        with pytest.raises(UserError, match="cannot be read: No such file or directory"):
            call(tmp_path / f"a{suffix}")


def test_broken_values_of_parquet_are_single_rows(tmp_path):
    text = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).cast(pa.binary()).view(pa.string())
    times = pa.array([0, 0, 2**62], pa.timestamp("us"))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": text, "n": times}), path)
    good, bad, late = local_rows(path, ("text", "n"))
    assert good.value["text"] == "good"
    assert bad.value.reason == "not UTF-8"
    assert late.value.reason == "value out of range"
    assert [row.number for row in (good, bad, late)] == [1, 2, 3]


def test_parquet_of_large_rows_is_decoded_in_small_batches(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    rows = [{"text": "x" * 1000, "n": i} for i in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50, use_dictionary=False, compression="none")
    monkeypatch.setattr(readers, "_BATCH_BYTES", 5000)
    sizes: list[int] = []
    decode = readers._values
    monkeypatch.setattr(readers, "_values", lambda batch: sizes.append(batch.num_rows) or decode(batch))
    assert values(path) == rows
    assert max(sizes) == 4  # of about a thousand bytes each
    sizes.clear()
    assert list(local_rows(path, ("n",)))[-1].value == {"n": 49}
    assert sizes == [50]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_a_long_file_are_estimated_within_a_tenth(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_SAMPLE", 1 << 16)
    monkeypatch.setattr(readers, "_PACKED_SAMPLE", 1 << 20)
    rng = random.Random(0)
    words = [rng.randbytes(3).hex() for _ in range(2000)]
    rows = [{"text": " ".join(rng.choices(words, k=rng.randint(20, 80)))} for _ in range(20_000)]
    path = written(tmp_path, suffix, rows)
    assert abs(estimated_rows(path) / len(rows) - 1) < (0 if suffix == ".parquet" else 0.1) + 1e-9


def test_local_files(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/x.jsonl.zst", "a.parquet", "a.json", "c.jsonl.gz", "README.md"):
        (tmp_path / name).write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in local_files(tmp_path)] == [
        "a.parquet",
        "b/x.jsonl.zst",
        "c.jsonl.gz",
    ]
    with pytest.raises(UserError, match=r"a\.json: expected a \.jsonl, \.jsonl\.gz, \.jsonl\.zst or \.parquet file"):
        local_files(tmp_path / "a.json")


def test_hidden_files_are_counted_and_links_to_nothing_named(tmp_path):
    folder = tmp_path / "data"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a.jsonl", "../elsewhere/b.jsonl"):
        (folder / name).write_bytes(b"{}")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "c.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")
    skipped = Counter()
    assert local_files(folder, skipped) == [folder / "a.jsonl", folder / "c.jsonl"]
    assert skipped == {"hidden file": 2, "linked directory": 1}
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    for path in (folder, folder / "gone.jsonl"):
        with pytest.raises(UserError, match=r"gone\.jsonl is a link to .*nowhere\.jsonl, which does not exist"):
            local_files(path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl is not a regular file"):
        local_files(tmp_path / "pipe.jsonl")


def test_hidden_files_of_a_source_are_in_the_tally(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [row | {"messages": [m | {"content": f"{m['content']}{i}"} for m in row["messages"]]} for i in range(40)]
    for name in ("a.jsonl", "._a.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tally = Counter()
    assert 20 < len(list(read(str(tmp_path), tally=tally))) <= 40
    assert tally == {"hidden file": 1}


# the hub


@pytest.fixture
def folder(tmp_path) -> str:
    """A data set of two files, as the hub has them."""
    for part, rows in enumerate((ROWS[:25], ROWS[25:])):
        (tmp_path / f"train-{part}.jsonl").write_bytes(jsonl(rows))
    return str(tmp_path)


def test_a_directory_is_a_data_set_in_parts(folder):
    found = hub_set(folder)
    assert (found.id, found.config, found.revision, found.parts, found.rows) == (folder, None, "local", 2, None)
    assert pickle.loads(pickle.dumps(found)) == found
    parts = [list(hub_rows(found, ("text",), part)) for part in range(2)]
    assert [row.value for part in parts for row in part] == TEXTS
    assert [row.number for row in parts[1]] == list(range(1, 36))
    assert {row.file for row in parts[1]} == {f"{folder}/1"}
    for part, start in itertools.product(range(2), (0, 1, 24, 25, 34, 35)):
        assert list(hub_rows(found, ("text",), part, start)) == parts[part][start:]


def test_parquet_of_a_data_set(tmp_path):
    written(tmp_path, ".parquet")
    found = hub_set(str(tmp_path))
    assert [row.value for row in hub_rows(found, ("text",), 0, 21)] == TEXTS[21:]


def test_what_a_data_set_lacks_is_named(folder):
    with pytest.raises(UserError, match=r"no field messages \(found: text, n\)"):
        list(hub_rows(hub_set(folder), ("messages",)))
    with pytest.raises(UserError, match="cannot be read: BuilderConfig 'nope' not found"):
        hub_set(folder, "nope")


def test_a_damaged_part_is_named(folder):
    found = hub_set(folder)
    (Path(folder) / "train-1.jsonl").write_bytes(b"{")
    with pytest.raises(UserError, match="cannot be read: part 1, after row 0: ") as error:
        list(hub_rows(found, ("text",), 1))
    assert "\n" not in str(error.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def online(monkeypatch) -> list[dict[str, Any]]:
    """A hub that has one data set, and what was asked of it."""
    asked: list[dict[str, Any]] = []

    def load(hub_id: str, config: str | None, **options: Any) -> datasets.IterableDataset:
        asked.append({"id": hub_id, "config": config, **options})
        return datasets.IterableDataset.from_generator(broken_rows, gen_kwargs={"count": [30]})

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    monkeypatch.setattr(datasets, "load_dataset", load)
    hub._kept.cache_clear()
    return asked


def broken_rows(count: list[int]) -> Any:
    """Some rows, then the end of the connection."""
    for index in range(count[0]):
        yield {"text": f"Row {index}"}
    raise ConnectionError("Server Disconnected")


def test_the_revision_is_pinned_and_the_files_are_listed_once(online):
    found = hub_set("someone/chats", "part", "main")
    assert found == HubSet("someone/chats", "part", COMMIT, 1, None)
    for start in (0, 5):
        row = next(hub_rows(found, ("text",), 0, start))
        assert row == Row("someone/chats:part/0", start + 1, {"text": f"Row {start}"})
    expected = {"id": "someone/chats", "config": "part", "split": "train", "streaming": True, "revision": COMMIT}
    assert online == [expected]


def test_a_lost_connection_says_how_to_go_on(online):
    found, said = until_error(hub_rows(hub_set("someone/chats"), ("text",), 0, 3))
    assert [row.number for row in found] == list(range(4, 31))
    assert "connection to the Hugging Face Hub was lost after row 30 of part 0" in said
    assert "the same command goes on where it stopped" in said


def test_an_unknown_revision_is_told(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        answer: Any = SimpleNamespace(headers={}, request=None)
        raise RevisionNotFoundError("404 Revision Not Found", response=answer)

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(UserError, match="someone/chats has no such revision"):
        hub_set("someone/chats", None, "nope")


# damage of every kind


def fuzz_tool() -> Any:
    path = Path(__file__).parents[1] / "tools" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_damaged_rows_and_files_raise_nothing(capsys):
    assert fuzz_tool().run(2000, seed=int(1e9)) == 0
    assert "2,000 inputs, no failure" in capsys.readouterr().out


def test_the_fuzzer_finds_an_exception_and_an_unsound_dialogue(monkeypatch, capsys):
    tool = fuzz_tool()
    sound = tool.normalise

    def careless(row: Any, **options: Any) -> Any:
        return sound(row, **{**options, "special": None})

    monkeypatch.setattr(tool, "normalise", careless)
    assert tool.run(2000, seed=0) == 1
    assert "FAILED: mutated rows, seed 0, input " in capsys.readouterr().out
    monkeypatch.setattr(tool, "normalise", lambda row, **_: sound(row["messages"], source="s", id="1"))
    assert tool.run(2000, seed=0) == 1
