"""Local copies of the paper's six corpora, in their own columns and file types, through `prepare` and `read`."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatsae.batch import SPLITS
from chatsae.config import DataConfig
from chatsae.data.reading import read, read_text
from chatsae.data.sources import PRESETS
from chatsae.data.store.prepare import prepare
from chatsae.errors import UserError
from chatsae.lm.checkpoint import load_tokenizer

N = 60
TURN = {"language": "English", "redacted": False, "toxic": False, "timestamp": None, "country": "X", "header": {"a": 1}}


def qa(name: str, i: int) -> tuple[str, str]:
    return f"{name}: question {i}?", f"Answer {i} of {name}."


def wildchat(i: int) -> dict:
    q, a = qa("wildchat", i)
    turns = [{"content": c, "role": r, "turn_identifier": i, **TURN} for r, c in (("user", q), ("assistant", a))]
    row = {"conversation_hash": "same", "model": "gpt", "turn": 1, "language": "English", "toxic": False}
    return {**row, "openai_moderation": [{"flagged": False}], "conversation": turns, "state": None, "hashed_ip": "x"}


def infinity(i: int) -> dict:
    q, a = qa("infinity", i)
    turns = [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    return {"id": 7, "conversations": turns, "label": {"a": ["b"]}, "langdetect": "en", "source": "code"}


def tulu(i: int) -> dict:
    q, a = qa("tulu", i)
    system = [{"role": "system", "content": "Be brief."}] if i % 2 else []
    turns = [*system, {"role": "user", "content": q}, {"role": "assistant", "content": a}]
    return {"id": "same", "messages": turns, "source": "ai2"}


def orca(i: int) -> dict:
    q, a = qa("orca", i)
    return {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "split": "rag"}


def lmsys(i: int) -> dict:
    q, a = qa("lmsys", i)
    turns = [{"content": q, "role": "user"}, {"content": a, "role": "assistant"}]
    row = {"conversation_id": "c", "model": "vicuna", "turn": 1, "language": "English", "redacted": True}
    return {**row, "conversation": turns, "openai_moderation": [{"flagged": False, "categories": {"hate": False}}]}


def pile(i: int) -> dict:
    return {"text": f"Document {i} of the pile. " * 5, "meta": {"pile_set_name": "StackExchange"}}


CHATS = {
    "wildchat": (wildchat, "parquet"),
    "infinity": (infinity, "jsonl"),
    "tulu": (tulu, "parquet"),
    "orca": (orca, "parquet"),
    "lmsys": (lmsys, "parquet"),
}


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, str]:
    for name, (make, kind) in CHATS.items():
        (tmp_path / name).mkdir()
        rows = [make(i) for i in range(N)]
        if kind == "parquet":
            half = [pa.Table.from_pylist(part) for part in (rows[: N // 2], rows[N // 2 :])]
            for index, table in enumerate(half):
                pq.write_table(table, tmp_path / name / f"train-{index:05}-of-00002.parquet")
        else:
            (tmp_path / name / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pile").mkdir()
    data = "".join(json.dumps(pile(i)) + "\n" for i in range(N)).encode()
    with pa.CompressedOutputStream(str(tmp_path / "pile" / "00.jsonl.zst"), "zstd") as file:
        file.write(data)
    return {name: str(tmp_path / name) for name in (*CHATS, "pile")}


def test_local_copies_of_all_six_prepare_together(copies, tmp_path):
    sources = tuple(copies[name] for name in CHATS)
    config = DataConfig(sources=sources, text_sources=(copies["pile"],), workers=1)
    tokenizer = load_tokenizer("demo")
    manifest = prepare(config, tokenizer, tmp_path / "out", seed=1, max_tokens=0)
    counts = manifest.facts["counts"]
    for source in (*counts["dialogues"], *counts["documents"]):
        assert (source["rows"], source["rejected"], source["dropped"]) == (N, {}, 0)
    ids = [i for p in (tmp_path / "out").glob("*.parquet") for i in pq.read_table(p).column("id").to_pylist()]
    assert len(ids) == len(set(ids))  # whatever ids the rows themselves have
    held = {split: manifest.facts["splits"][split]["sequences"] for split in SPLITS}
    assert sum(held.values()) == 5 * N


def test_every_copy_gives_its_own_words(copies):
    for name in CHATS:
        for dialogue in read(copies[name]):
            assert dialogue.messages[-2].content.startswith(f"{name}: question ")
            assert [m.role for m in dialogue.messages][-2:] == ["user", "assistant"]
    assert all(document.text.startswith("Document ") for document in read_text(copies["pile"]))


def test_the_presets_are_the_six_corpora_and_say_what_to_do_without_the_hub():
    assert {preset.hub_id.partition("/")[0] for preset in PRESETS.values()} == {
        "allenai", "BAAI", "mlabonne", "lmsys", "monology"
    }  # fmt: skip
    for name in PRESETS:
        reader = read_text if name == "pile" else read
        with pytest.raises(
            UserError, match="Hub cannot be reached; connect, or give the path of a local copy"
        ) as error:
            reader(name)
        assert "\n" not in str(error.value)
