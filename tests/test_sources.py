"""Files, directories and hub data sets -> dialogues and documents of a split; what is wrong is named."""

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError

from chatsae.batch import Dialogue, Document, Split
from chatsae.data import pydocs
from chatsae.data.reading import read, read_text, split_of
from chatsae.errors import UserError

SPLITS: tuple[Split, ...] = get_args(Split)


def row(question: str, answer: str = "Yes.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [row(f"Question {i}?") for i in range(300)]


def jsonl(path: Path, rows: list[Any]) -> str:
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def parquet(path: Path, rows: list[Any], row_group_size: int = 7) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)


def everything(*sources: str) -> list[Dialogue]:
    return [dialogue for split in SPLITS for dialogue in read(*sources, split=split)]


def questions(dialogues: list[Dialogue]) -> list[str]:
    return sorted(d.messages[0].content for d in dialogues)


def test_formats_agree_and_name_their_rows(tmp_path):
    sources = [
        jsonl(tmp_path / "a.jsonl", ROWS),
        jsonl(tmp_path / "a.jsonl.gz", ROWS),
        parquet(tmp_path / "a.parquet", [{"other": i, **r} for i, r in enumerate(ROWS)]),
    ]
    expected = sorted(r["messages"][0]["content"] for r in ROWS)
    for source in sources:
        dialogues = everything(source)
        assert questions(dialogues) == expected
        assert {d.source for d in dialogues} == {Path(source).name}
        for d in dialogues:
            file, _, number = d.id.rpartition(":")
            assert file == Path(source).name
            assert ROWS[int(number) - 1]["messages"][0]["content"] == d.messages[0].content
    together = everything(str(tmp_path))
    assert questions(together) == sorted(expected * 3)
    assert len({d.id for d in together}) == len(together)


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n\n" + json.dumps(ROWS[1]).encode())
    assert {d.id for d in everything_present(path)} == {"a.jsonl:1", "a.jsonl:2"}


def everything_present(path: Path) -> list[Dialogue]:
    """All dialogues of a file too small to have one in every split."""
    found = []
    for split in SPLITS:
        try:
            found += list(read(str(path), split=split))
        except UserError as error:
            assert f"nothing falls into the split '{split}'" in str(error)  # noqa: PT017
    return found


def test_splits_follow_the_content_alone(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", ROWS)
    b = jsonl(tmp_path / "b.jsonl", [{"id": "x", **r} for r in reversed(ROWS)])
    by_split = [{d.messages for d in read(a, split=split)} for split in SPLITS]
    assert by_split == [{d.messages for d in read(b, split=split)} for split in SPLITS]
    assert sum(map(len, by_split)) == len(set.union(*by_split)) == len(ROWS)


def test_a_source_too_small_for_a_split_is_no_error_beside_a_larger_one(tmp_path):
    small = jsonl(tmp_path / "a.jsonl", [r for r in ROWS[:9] if split_of_row(r) == "train"])
    large = jsonl(tmp_path / "b.jsonl", ROWS)
    assert {d.source for d in read(small, large, split="eval")} == {"b.jsonl"}
    with pytest.raises(
        UserError, match=r"a\.jsonl: nothing falls into the split 'eval' \(train 0\.8, interpret 0\.1, eval 0\.06"
    ):
        list(read(small, split="eval"))


def test_shares_of_the_splits_and_their_stability():
    counts = Counter(split_of(f"text {i}") for i in range(20_000))
    assert [round(counts[s] / 20_000, 2) for s in SPLITS] == [0.8, 0.06, 0.1, 0.04]
    # fixed for ever: another hash would move held-out dialogues of old runs into training
    assert [i for i in range(100) if split_of(f"text {i}") == "eval"] == [15, 30, 70, 97]


def test_rejected_rows_are_counted(tmp_path):
    bad = [{"messages": []}, row("Why?", ""), row(" "), {"messages": [{"role": "critic", "content": "No."}]}]
    tally = Counter()
    assert list(read(jsonl(tmp_path / "a.jsonl", [*bad, *ROWS]), tally=tally))
    assert tally == {"no turn": 1, "empty content": 2, "unknown role": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b'{"messages": []}\n{"messages": "Hi"}\n',
            "1 × field of the wrong type (such as {path}:2: 'messages' expected a list, got str)",
        ),
        (b'{"title": "Hi"}\n', "row 1: no chat field (found: title; expected one of messages"),
        (b'{"messages": []}\n{"messages": [\n', "1 × not JSON (such as {path}:2: Expecting value"),
        (b"[" * 100_000 + b"\n", "row 1: not JSON (nested too deeply)"),
        (b"[1, 2]\n", "row 1: row is not an object (got list)"),
        (b'{"messages": []}\n{"a": "\xff"}\n', "1 × not UTF-8 (such as {path}:2: invalid start byte at byte 7)"),
        (b"", "holds no dialogue"),
        (
            b'{"messages": []}\n{"messages": [{"role": "critic", "content": "No."}]}\n',
            "holds no dialogue; rejected: 1 × no turn, 1 × unknown role (such as {path}:2: 'critic')",
        ),
    ],
)
def test_bad_files_are_named_with_row_and_field(tmp_path, content, says):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read(str(path)))
    assert str(error.value).startswith(str(path))
    assert says.replace("{path}", str(path)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_row_among_good_ones_is_counted_and_stops_nothing(tmp_path):
    tally = Counter()
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0]).encode() + b"\n"
    path.write_bytes(good + b'"oops"\n{"a": "\xff"}\n{\n' + b'{"messages": 1}\n' + 5 * good)
    assert len(list(read(str(path), split=split_of_row(ROWS[0]), tally=tally))) == 6
    assert tally == {"row is not an object": 1, "not UTF-8": 1, "not JSON": 1, "field of the wrong type": 1}


def split_of_row(one: dict[str, Any]) -> Split:
    return split_of("\x1e".join(f"{m['role']}\x1f{m['content']}" for m in one["messages"]))


def test_truncated_files_are_named(tmp_path):
    packed = Path(jsonl(tmp_path / "a.jsonl.gz", ROWS))
    packed.write_bytes(packed.read_bytes()[:-20])
    table = Path(parquet(tmp_path / "b.parquet", ROWS))
    table.write_bytes(table.read_bytes()[:-20])
    for path, says in ((packed, "cannot be read"), (table, "not valid Parquet")):
        with pytest.raises(UserError, match=says) as error:
            list(read(str(path)))
        assert str(path) in str(error.value)


def test_parquet_without_a_chat_column(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"a": 1, "b": "x"}])
    with pytest.raises(UserError, match=r"a\.parquet: no field messages, .*\(found: a, b\)"):
        list(read(path))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("wildchatt", "perhaps you meant wildchat"),
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("./nowhere", "does not exist"),
        ("pile", "holds plain text"),
    ],
)
def test_unknown_sources_are_refused_before_anything_is_read(source, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        read("pydocs", source)


def test_other_wrong_arguments(tmp_path):
    (tmp_path / "a.txt").write_text("Hi")
    with pytest.raises(UserError, match=r"a\.txt: expected a \.jsonl, \.jsonl\.gz, \.jsonl\.zst or \.parquet file"):
        read(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"holds no \.jsonl"):
        read(str(tmp_path))
    with pytest.raises(UserError, match="no source"):
        read()
    with pytest.raises(UserError, match="'test' is not one of train, eval, interpret, steer"):
        read("pydocs", split="test")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'lmsys' holds dialogues"):
        read_text("lmsys")


def test_documents(tmp_path):
    rows = [{"text": f"Text {i}.", "meta": {}} for i in range(300)] + [{"text": " "}, {"text": None}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    tally = Counter()
    found = [document for split in SPLITS for document in read_text(path, split=split, tally=tally)]
    assert sorted(d.text for d in found) == sorted(r["text"] for r in rows[:300])
    assert tally == {"empty text": 2 * len(SPLITS)}
    with pytest.raises(UserError, match=r"chats\.jsonl, row 1: field missing \('text'; found: messages\)"):
        list(read_text(jsonl(tmp_path / "chats.jsonl", ROWS)))
    with pytest.raises(UserError, match=r"row 1: field of the wrong type .'text' expected text, got int"):
        list(read_text(jsonl(tmp_path / "c.jsonl", [{"text": 1}])))
    tally = Counter()
    surrogate = jsonl(tmp_path / "d.jsonl", [{"text": "half \ud800"}, *rows])
    assert all(isinstance(d, Document) for d in read_text(surrogate, tally=tally))
    assert tally["text is not valid Unicode"] == 1


def test_the_built_in_corpus_is_a_source():
    for split in SPLITS:
        assert next(read("pydocs", split=split, seed=1)) == next(iter(pydocs.dialogues(split, 1)))
        assert next(read_text("pydocs", split=split)) == next(iter(pydocs.documents(split, 0)))


@pytest.mark.parametrize("source", ["tulu-3", "someone/chats", "someone/chats:part"])
def test_the_hub_offline_is_one_clear_line(source, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Hub cannot be reached; connect, or give the path of a local copy") as error:
        list(read(source))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "a/b is gated: accept its terms at"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), "no such data set"),
        (ValueError("Config name is missing.\nPick one of ['x', 'y']"), "write a/b:NAME"),
    ],
)
def test_what_the_hub_says_is_put_plainly(raised, says, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: SimpleNamespace(sha="0" * 40))
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=says) as error:
        list(read("a/b"))
    assert "\n" not in str(error.value)
