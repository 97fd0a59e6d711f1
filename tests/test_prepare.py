"""Prepared data: the bytes follow from the recipe alone, through interruptions, processes and little memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from chatsae.batch import SPLITS, Dialogue, Document, Message, TokenBatch
from chatsae.cli import main
from chatsae.config import DataConfig
from chatsae.data.dedup import dedup_reference, ngrams
from chatsae.data.reading import split_of
from chatsae.data.render import render
from chatsae.data.store import prepare as preparing
from chatsae.data.store import selection, shards
from chatsae.data.store.manifest import Manifest
from chatsae.data.store.prepare import prepare
from chatsae.data.store.prepared import Prepared
from chatsae.errors import UserError
from chatsae.lm.checkpoint import load_tokenizer
from shared_data import shared_data

WORDS = [f"w{i}" for i in range(400)]


def dialogue(i: int) -> dict[str, Any]:
    """Every third one repeats eight words of an earlier one."""
    start = (i * 37) % 300 if i % 3 else ((i // 2) * 37) % 300
    answer = " ".join(WORDS[start : start + 8]) if i % 3 == 0 else " ".join(f"{WORDS[start + k]}-{i}" for k in range(9))
    return {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": answer}]}


ROWS = [dialogue(i) for i in range(400)]


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return sources(tmp_path)


def sources(tmp_path: Path) -> DataConfig:
    bad = [{"messages": []}, {"messages": [{"role": "critic", "content": "No."}]}, dialogue(1), "oops"]
    special = {"messages": [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "Yes."}]}
    a = write(tmp_path / "in" / "a.jsonl", [*ROWS[:250], special, *bad])
    b = write(tmp_path / "in" / "b.jsonl", ROWS[250:])
    texts = write(tmp_path / "in" / "texts.jsonl", [{"text": f"Text {i}. " + " ".join(WORDS[i:])} for i in range(60)])
    return DataConfig(sources=(a, b), text_sources=(texts,), ngram=6, held_out=(10, 12, 8), workers=1)


@pytest.fixture
def small(monkeypatch):
    """Chunks, segments and shards so small that there are several of each; a checkpoint after every chunk."""
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CHUNK", 16)
    monkeypatch.setattr(shards, "SEGMENT_TOKENS", 700)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2500)
    monkeypatch.setattr(preparing, "_CHECKPOINT_SECONDS", 0.0)


def run(config: DataConfig, tokenizer, out: Path, max_tokens: int = 0, **options: Any) -> Manifest:
    return prepare(config, tokenizer, out, seed=5, max_tokens=max_tokens, **options)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def ids(out: Path, split: str) -> list[str]:
    found = sorted(out.glob(f"{split}-*.parquet"))
    return [id for path in found for id in pq.read_table(path).column("id").to_pylist()]


def dialogues(directory: Path) -> dict[str, Dialogue]:
    """Every usable row of the sources, by id."""
    found = {}
    for name in ("a.jsonl", "b.jsonl"):
        for number, line in enumerate((directory / name).read_text().splitlines(), start=1):
            row = json.loads(line)
            if isinstance(row, dict) and row["messages"] and row["messages"][0]["role"] == "user":
                id = f"{name}:{number}"
                found[id] = Dialogue(id, "", tuple(Message(m["role"], m["content"]) for m in row["messages"]))
    return found


def test_what_is_prepared(config, tokenizer, tmp_path, small):
    manifest = run(config, tokenizer, tmp_path / "out")
    facts = manifest.facts
    a, b = facts["counts"]["dialogues"]
    assert a["rejected"] == {
        "no turn": 1,
        "unknown role": 1,
        "row is not an object": 1,
        "special token in the content": 1,
    }
    assert (a["rows"], b["rows"]) == (255, 150)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {(r["reason"], r["row"].rpartition(":")[2]) for r in rejects} >= {
        ("no turn", "252"),
        ("unknown role", "253"),
    }
    kept = {split: ids(tmp_path / "out", split) for split in SPLITS}
    known = dialogues(tmp_path / "in")
    assert [len(kept[name]) for name in ("eval", "interpret", "steer")] == [10, 12, 8]
    for split, members in kept.items():
        assert {split_of("\x1e".join(f"{m.role}\x1f{m.content}" for m in known[i].messages)) for i in members} == {
            split
        }
    grams = {split: set().union(*(ngrams(known[i], 6) for i in members)) for split, members in kept.items()}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not grams[one] & grams[other]
    assert a["dropped"] + b["dropped"] > 50
    assert facts["splits"]["train"]["sequences"] == len(kept["train"]) == sum(s["sequences"]["train"] for s in (a, b))
    assert len(facts["splits"]["train"]["shards"]) > 2
    assert not (tmp_path / "out" / "state").exists()


def test_the_kept_ones_are_those_of_the_reference(config, tokenizer, tmp_path):
    config = replace(config, order="listed", held_out=(400, 400, 400), text_sources=())
    run(config, tokenizer, tmp_path / "out")
    known = [d for i, d in dialogues(tmp_path / "in").items() if "<|im_end|>" not in d.messages[0].content]
    expected = [d.id for d, keep in zip(known, dedup_reference(known, 6), strict=True) if keep]
    kept = [id for split in SPLITS for id in ids(tmp_path / "out", split)]
    assert sorted(kept) == sorted(expected)
    assert len(expected) < len(known) - 50


def test_the_same_bytes_again_and_from_several_processes(config, tokenizer, tmp_path, small, monkeypatch):
    run(config, tokenizer, tmp_path / "one")
    run(config, tokenizer, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.setattr("chatsae.data.store.parallel._ALONE", 2)
    run(replace(config, workers=2), tokenizer, tmp_path / "three")
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_little_memory_changes_nothing(config, tokenizer, tmp_path, small, capfd):
    run(config, tokenizer, tmp_path / "one")
    tight = replace(config, memory_gb=5e-6)
    run(tight, tokenizer, tmp_path / "two")
    assert "reading ahead for those that are shared" in capfd.readouterr().err
    assert files(tmp_path / "one") == files(tmp_path / "two")


class _StopError(Exception):
    pass


@pytest.mark.parametrize(("memory_gb", "max_tokens"), [(0, 0), (5e-6, 0), (0, 6000)])
def test_interrupted_anywhere_the_bytes_are_the_same(
    config, tokenizer, tmp_path, small, monkeypatch, memory_gb, max_tokens
):
    config = replace(config, memory_gb=memory_gb, block_size=1)
    whole = run(config, tokenizer, tmp_path / "whole", max_tokens)
    assert not max_tokens or 6000 < whole.facts["splits"]["train"]["tokens"] < 6100
    real = preparing.Writing.add
    left = 0

    def add(self, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _StopError
        real(self, *args)

    monkeypatch.setattr(preparing.Writing, "add", add)
    for attempt in range(60):
        left = 1 + attempt % 3
        try:
            run(config, tokenizer, tmp_path / "cut", max_tokens)
            break
        except _StopError:
            assert not (tmp_path / "cut" / "manifest.json").exists()
            with pytest.raises(UserError, match="is not prepared to the end"):
                Prepared(tmp_path / "cut", tokenizer)
    assert attempt > (1 if max_tokens else 5)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_stopping_at_a_number_of_tokens_gives_the_beginning_of_the_whole(config, tokenizer, tmp_path, small):
    whole = run(config, tokenizer, tmp_path / "whole")
    config = replace(config, block_size=500)
    part = run(config, tokenizer, tmp_path / "part", max_tokens=1500)
    for split in SPLITS:
        members = ids(tmp_path / "part", split)
        assert members == ids(tmp_path / "whole", split)[: len(members)]
    tokens = part.facts["splits"]["train"]["tokens"]
    assert 2000 <= tokens < 2100 < whole.facts["splits"]["train"]["tokens"]
    assert 2000 <= part.facts["splits"]["text"]["tokens"] < whole.facts["splits"]["text"]["tokens"]
    assert sum(c["rows"] for c in part.facts["counts"]["dialogues"]) < 405


def test_the_digest_of_the_kept_ones_tells_of_the_first_as_of_the_last(config, tokenizer, tmp_path, small):
    config = replace(config, order="listed", held_out=(400, 400, 400), text_sources=())
    digests = [run(config, tokenizer, tmp_path / "0").facts["kept_sha256"]["dialogues"]]
    for out, name, old in (("1", "a.jsonl", "Question 0?"), ("2", "b.jsonl", "Question 398?")):
        path = tmp_path / "in" / name
        text = path.read_text()
        path.write_text(text.replace(old, "Another one?"))
        digests.append(run(config, tokenizer, tmp_path / out).facts["kept_sha256"]["dialogues"])
        path.write_text(text)
    assert len(set(digests)) == 3


def flat(batches) -> TokenBatch:
    return TokenBatch.concat(list(batches))


@pytest.mark.parametrize("method", ["fast", "bt-f", "bt-p"])
def test_every_method_reads_the_same_shards_as_it_would_render(config, tokenizer, tmp_path, small, method):
    run(config, tokenizer, tmp_path / "out")
    prepared = Prepared(tmp_path / "out", tokenizer)
    tally, expected_tally = Counter[str](), Counter[str]()
    found = flat(prepared.batches(method=method, max_length=25, block_size=61, tally=tally))
    if method == "bt-p":
        texts = [json.loads(line)["text"] for line in (tmp_path / "in" / "texts.jsonl").read_text().splitlines()]
        members = ids(tmp_path / "out", "text")
        items: list[Any] = [Document(id, "", texts[int(id.rpartition(":")[2]) - 1]) for id in members]
    else:
        known = dialogues(tmp_path / "in")
        items = [known[id] for id in ids(tmp_path / "out", "train")]
    rendered = render(items, tokenizer, method=method, max_length=25, block_size=61, tally=expected_tally)
    expected = flat(rendered)
    assert found.names == expected.names
    for field in ("input_ids", "cu_seqlens", "position", "role", "kind", "special", "prefix"):
        assert (getattr(found, field) == getattr(expected, field)).all(), field
    assert tally == expected_tally
    assert sum(tally.values()) > 0


def test_a_second_run_does_nothing_and_what_changed_is_told(config, tokenizer, tmp_path, capfd):
    out = tmp_path / "out"
    first = run(config, tokenizer, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix in (".parquet", ".json")}
    assert run(config, tokenizer, out).sha256 == first.sha256
    assert "is prepared already" in capfd.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(UserError, match=r"holds other data.*max_tokens: 0 -> 9; .*dedup\.ngram: 6 -> 7"):
        run(replace(config, ngram=7), tokenizer, out, max_tokens=9)
    lock = preparing.Lock(out, "data directory")
    with pytest.raises(UserError, match="is in use"):
        run(config, tokenizer, out)
    lock.close()
    source = Path(config.sources[1])
    text = source.read_text()
    source.write_text(text.replace("Question 299", "Question 29x"))
    with pytest.raises(UserError, match=r"holds other data.*sources\[1\]\.files\[0\]\.sha256"):
        run(config, tokenizer, out)
    source.write_text(text)
    shard = out / "train-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for act in (lambda: run(config, tokenizer, out), lambda: list(Prepared(out, tokenizer).batches())):
        with pytest.raises(UserError, match=r"train-00000\.parquet is not what was written"):
            act()
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.parquet is missing"):
        list(Prepared(out, tokenizer).batches())


def test_data_for_another_tokenizer_or_template_is_refused(config, tokenizer, tmp_path):
    run(config, tokenizer, tmp_path / "out")
    other = load_tokenizer("demo")
    other.chat_template = other.chat_template + " "
    with pytest.raises(UserError, match="was prepared with another chat template"):
        Prepared(tmp_path / "out", other)
    with pytest.raises(UserError, match="holds nothing for method bt-p, split eval"):
        Prepared(tmp_path / "out", tokenizer).batches(method="bt-p", split="eval")
    with pytest.raises(UserError, match="holds no prepared data"):
        Prepared(tmp_path, tokenizer)
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Prepared(tmp_path / "out", tokenizer)


SCRIPT = """
import sys
from pathlib import Path
from chatsae.cli import main
from chatsae.data.store import prepare, selection, shards
selection.CHUNK, shards.SEGMENT_TOKENS, shards.SHARD_TOKENS = 16, 700, 2500
prepare._CHECKPOINT_SECONDS = 0.0
sys.exit(main(sys.argv[1:]))
"""


def verb(root: Path, out: Path) -> list[str]:
    return ["prepare", str(root / "recipe.yaml"), "--out", str(out), "--data.max-tokens", "0"]


def process(root: Path, out: Path, slow: float = 0.0) -> list[str]:
    pause = f"import time\nadd = prepare.Writing.add\ndef later(*a):\n    time.sleep({slow})\n    add(*a)\n"
    script = SCRIPT.replace("sys.exit", f"{pause}prepare.Writing.add = later\nsys.exit" if slow else "sys.exit")
    return [sys.executable, "-c", script, *verb(root, out)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Sources, a recipe, and in `whole` what a run that nothing stops makes of them."""
    root = tmp_path_factory.mktemp("stopped")
    config = sources(root)
    names = ("sources", "text_sources", "ngram", "held_out", "workers")
    (root / "recipe.yaml").write_text(json.dumps({"data": {name: getattr(config, name) for name in names}}))
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        assert main(verb(root, root / "whole")) == 0
    return root


def test_kill_9_and_ctrl_c_lose_nothing(root, small, capsys):
    cut = root / "cut"
    for stop, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        running = subprocess.Popen(
            process(root, cut, slow=0.05), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        before = len(list((cut / "state").glob("*"))) if cut.exists() else 0
        deadline = time.monotonic() + 600  # a hang, not a slow machine
        while len(list((cut / "state").glob("*"))) < before + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(stop)
        _, said = running.communicate()
        assert running.returncode == code
        assert "Traceback" not in said
        assert not (cut / "manifest.json").exists()
    assert main(verb(root, cut)) == 0
    assert "going on after" in capsys.readouterr().err
    assert files(cut) == files(root / "whole")


def test_a_full_disk_is_told_and_the_same_command_goes_on(root, small):
    out = root / "full"
    full = subprocess.run(
        process(root, out),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )
    assert full.returncode == 2
    assert "cannot be written" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (out / "manifest.json").exists()
    assert main(verb(root, out)) == 0
    assert files(out) == files(root / "whole")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_text(""), "holds no dialogue"),
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_text('{"title": 1}\n'), "no chat field"),
        (lambda path: path.write_bytes(b"\x00\xff"), "row 1: not UTF-8"),
    ],
)
def test_bad_sources_are_named(config, tokenizer, tmp_path, damage, says):
    damage(Path(config.sources[0]))
    with pytest.raises(UserError, match=says) as error:
        run(config, tokenizer, tmp_path / "out")
    assert "a.jsonl" in str(error.value)


def test_a_damaged_state_is_told(config, tokenizer, tmp_path):
    (tmp_path / "out" / "state").mkdir(parents=True)
    (tmp_path / "out" / "state" / "state.json").write_text('{"recipe"')
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        run(config, tokenizer, tmp_path / "out")


def test_real_dialogues_share_no_twenty_words_between_training_and_evaluation(tokenizer, tmp_path):
    source = shared_data("dialogues", "self_instruct_human.jsonl").parent
    names = ("self_instruct_human", "gpteacher_roleplay", "gsm8k")
    sources = tuple(str(source / f"{name}.jsonl") for name in names)
    config = DataConfig(sources=sources, text_sources=(), workers=1)
    manifest = run(config, tokenizer, tmp_path / "out", max_tokens=400_000)
    lines = {path: Path(path).read_text(encoding="utf-8").split("\n") for path in sources}
    rows = {f"{Path(path).name}:{i}": line for path in sources for i, line in enumerate(lines[path], start=1)}
    grams = {}
    for split in ("train", "eval"):
        members = ids(tmp_path / "out", split)
        assert len(members) > 50
        messages = [json.loads(rows[id])["messages"] for id in members]
        whole = [Dialogue("", "", tuple(Message(m["role"], m["content"]) for m in turns)) for turns in messages]
        grams[split] = set().union(*(ngrams(d, 20) for d in whole))
    assert not grams["train"] & grams["eval"]
    assert manifest.facts["splits"]["train"]["tokens"] >= 400_000
    assert os.path.getsize(tmp_path / "out" / "train-00000.parquet") < 2.5 * 400_000
