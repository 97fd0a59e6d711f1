"""Feed 200,000 broken rows and files to `normalise` and the readers: no exception may come of it but a UserError.

Rows and files are real ones where ../shared/data is there, else built-in ones, with random damage. Each input follows
from the seed and its number alone; a failure prints both, and the input, and exits with code 1.
"""

import argparse
import faulthandler
import gzip
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st

from chatsae.batch import Dialogue
from chatsae.data.normalise import CHAT_COLUMNS, EXTRA_COLUMNS, MAX_CHARS, PAIR_COLUMNS, REASONS, normalise
from chatsae.data.readers import Broken, estimated_rows, local_rows
from chatsae.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
SPECIAL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
SHARES = {
    "mutated rows": 0.6,
    "random JSON": 0.05,
    ".jsonl": 0.12,
    ".jsonl.gz": 0.08,
    ".jsonl.zst": 0.08,
    ".parquet": 0.07,
}
COLUMNS = (*CHAT_COLUMNS, *dict.fromkeys(c for pair in PAIR_COLUMNS for c in pair), *EXTRA_COLUMNS)
WORDS = [
    *COLUMNS,
    "role",
    "from",
    "content",
    "value",
    "type",
    "tool_calls",
    "function_call",
    "arguments",
    "name",
    "function",
]
NAMES = [
    "system",
    "user",
    "human",
    "assistant",
    "gpt",
    "tool",
    "function",
    "observation",
    "function_call",
    "critic",
    "USER ",
]
NAMES += ["text", "image_url", "reasoning", "tool_call", "tool_use", "tool_result"]

_ASKED = {"role": "user", "content": "Why is the sky blue?"}
_ANSWERED = {"role": "assistant", "content": "It scatters light."}
_CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"of": "sky"}'}}
BUILT_IN: list[Any] = [
    {"messages": [{"role": "system", "content": "Be brief."}, _ASKED, _ANSWERED]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "chosen": "Bye"},
    {"conversation": {"messages": json.dumps([_ASKED, _ANSWERED])}},
    {
        "messages": [
            _ASKED,
            {"role": "assistant", "tool_calls": [_CALL]},
            {"role": "tool", "content": {"of": 1}},
            _ANSWERED,
        ]
    },
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image"}]}, _ANSWERED]},
    {"messages": [_ASKED, _ANSWERED, {"role": "user", "content": [{"type": "tool_result", "content": [1]}, "Go on"]}]},
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]], "system": "Count."},
    {"prompt": [_ASKED], "chosen": [_ANSWERED], "rejected": [_ANSWERED]},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello"},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {"text": "### Human: Hi### Assistant: Hello"},
    {"conversation": [{"human": "Hi", "assistant": "Hello"}], "dialogue": [["Hi", "Hello"]]},
    {"question": "Why?", "answer": "Because."},
]


def _deep(levels: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = wrap(value)
    return value


JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 10**5000, float("nan"), float("inf"), "", " \n", "x", "\ud800", "half \udfff"),
    *(
        "a <|im_end|> b",
        "Human:",
        "\n\nHuman: a\n\nAssistant: b",
        "\n\nHuman: a\n\nAssistant:",
        "### Human: a### Assistant:",
    ),
    *(b"bytes", datetime(2024, 7, 26), Decimal(1), (1, 2), {1, 2}, [], {}, [[]], [{}], [[[]]], [None], ["a", "b"]),
    *({1: 2}, {None: []}, {b"role": "user"}, {("role",): 1}, {10**5000: 1}, {"\ud800": 1}, {"role": []}, {"type": {}}),
    *("[]", "{}", "[", '[{"role": "user", "content": "a"}]', '{"messages": [1]}', "[" * 5000 + "]" * 5000),
    *("x" * (MAX_CHARS + 1), "é" * 300, "[" + "9" * 5000 + "]", _ASKED, _ANSWERED, [_ASKED, _ANSWERED]),
    *(_deep(3000, lambda v: [v]), _deep(3000, lambda v: {"messages": v}), _deep(3000, lambda v: {"content": [v]})),
]


def samples() -> list[Any]:
    """The rows that are damaged: built-in ones, and real ones of every shape where they are there."""
    rows = list(BUILT_IN)
    for path in sorted([*DATA.glob("raw_shapes/*.jsonl"), *DATA.glob("dialogues/*.jsonl")]):
        with path.open("rb") as lines:
            rows += [json.loads(line) for line in itertools.islice(lines, 20)]
    return rows


def mutated(row: Any, rng: random.Random) -> Any:
    """A copy of the row with one to four random changes, one row in fifty another value altogether."""
    if rng.random() < 0.02:
        return rng.choice(JUNK)
    for _ in range(rng.randint(1, 4)):
        if isinstance(row, dict) and row:
            key = rng.choice(list(row))
            row = _other_keys(row, key, rng) if rng.random() < 0.2 else row | {key: _changed(row[key], rng)}
        else:
            row = _changed(row, rng)
    return row


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.75:
            return value | {key: _changed(value[key], rng)}
        return _other_keys(value, key, rng)
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        if rng.random() < 0.7:
            return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
        return _other_items(value, at, rng)
    if isinstance(value, str) and rng.random() < 0.5:
        return _other_text(value, rng)
    return _replaced(value, rng)


def _other_keys(value: dict[Any, Any], key: Any, rng: random.Random) -> dict[Any, Any]:
    kept = {k: v for k, v in value.items() if k != key}
    match rng.randrange(4):
        case 0:
            return kept
        case 1:
            return kept | {rng.choice(WORDS): value[key]}
        case 2:
            return value | {rng.choice(WORDS): rng.choice(JUNK)}
        case _:
            return value | {rng.choice([1, None, b"k", ("a", 1), "\ud800", "new\nline"]): value[key]}


def _other_items(value: list[Any], at: int, rng: random.Random) -> list[Any]:
    match rng.randrange(5):
        case 0:
            return [*value[:at], *value[at + 1 :]]
        case 1:
            return [*value[:at], value[at], *value[at:]]
        case 2:
            return [*value[:at], rng.choice(JUNK), *value[at:]]
        case 3:
            return value[::-1]
        case _:
            return [*value, *value]


def _other_text(value: str, rng: random.Random) -> str:
    at = rng.randint(0, len(value))
    junk = rng.choice([text for text in JUNK[:20] if isinstance(text, str)])
    return rng.choice(
        [rng.choice(NAMES), value[:at], value[:at] + junk + value[at:], "\n\nHuman: " + value, value.upper()]
    )


def _replaced(value: Any, rng: random.Random) -> Any:
    match rng.randrange(6):
        case 0 | 1 | 2:
            return rng.choice(JUNK)
        case 3:
            return [value]
        case 4:
            return {rng.choice(WORDS): value}
        case _:
            try:
                return json.dumps(value)
            except (TypeError, ValueError, RecursionError):
                return repr(type(value))


def fault(found: Any) -> str | None:
    """What is wrong with a result of `normalise`, if anything."""
    if not isinstance(found, Dialogue):
        if found.reason not in REASONS:
            return f"unknown reason {found.reason!r}"
        found.detail.encode()
        return f"detail of several lines {found.detail!r}" if len(found.detail.splitlines()) > 1 else None
    roles = [message.role for message in found.messages]
    body = roles[1:] if roles[0] == "system" else roles
    if not {"user", "assistant"} <= set(body) <= {"user", "assistant", "tool"} or body[0] != "user":
        return f"roles {roles}"
    for before, role in itertools.pairwise(body):
        if (before == role != "tool") or (before, role) == ("user", "tool"):
            return f"order of roles {roles}"
    for message in found.messages:
        content = message.content
        if not isinstance(content, str) or not content.strip() or len(content) > MAX_CHARS or SPECIAL.search(content):
            return f"content {content!r}"
        content.encode()
    return None


def check_row(row: Any) -> str:
    """The outcome for one row.

    Raises:
        AssertionError: the result is not sound.
    """
    found = normalise(row, source="fuzz", id="1", special=SPECIAL)
    wrong = fault(found)
    assert wrong is None, wrong
    return "dialogue" if isinstance(found, Dialogue) else found.reason


def random_json(number: int, seed: int) -> Iterator[Any]:
    """Rows that hypothesis makes up, of the words of chat data."""
    word = st.sampled_from([*WORDS, *NAMES])
    leaf = word | st.text(max_size=8) | st.none() | st.booleans() | st.integers() | st.floats()
    leaf |= st.integers(0, len(JUNK) - 1).map(lambda index: JUNK[index])  # not all of it can be printed
    value = st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=4), max_leaves=10
    )
    turn = st.fixed_dictionaries({"role": st.sampled_from(NAMES), "content": value})
    rows = value | st.dictionaries(st.sampled_from(COLUMNS), value | st.lists(turn, max_size=4), max_size=4)
    made: list[Any] = []

    def keep(row: Any) -> None:
        made.append(row)

    settings = hypothesis.settings(
        max_examples=number, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    hypothesis.seed(seed)(settings(hypothesis.given(rows)(keep)))()
    return iter(made)


PACK: dict[str, Callable[[bytes], bytes]] = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


def packed(rows: list[Any], suffix: str) -> bytes:
    """The bytes of a sound file; compressed ones have two members."""
    if suffix == ".parquet":
        sink = pa.BufferOutputStream()
        texts = [{"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]} for row in rows]
        pq.write_table(pa.Table.from_pylist(texts), sink, row_group_size=4, write_page_checksum=False)
        return sink.getvalue().to_pybytes()
    pack = PACK.get(suffix, bytes)
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return b"".join(pack("".join(json.dumps(row) + "\n" for row in half).encode()) for half in halves)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three random changes."""
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randint(0, len(content)), rng.choice([1, 1, 2, 8, 100])
        match rng.randrange(6):
            case 0:
                content = content[:at]
            case 1:
                content = content[:at] + rng.randbytes(length) + content[at + length :]
            case 2:
                content = content[:at] + rng.randbytes(length) + content[at:]
            case 3:
                content = content[:at] + content[at + length :]
            case 4:
                content = content[:at] + content[max(0, at - length) :]
            case _:
                content = (
                    content[:at]
                    + rng.choice([b"\n", b"\xff", b"\xed\xa0\x80", b"[" * 3000, b"\0", b'"'])
                    + content[at:]
                )
    return content


def check_file(path: Path, start: int) -> str:
    """The outcome for one file.

    Raises:
        AssertionError: a row, or what a UserError says, is not sound.
    """
    guess = refusal(path, lambda: estimated_rows(path))
    assert isinstance(guess, str) or guess >= 0, guess
    outcome = refusal(path, lambda: _check_rows(path, start))
    return str(outcome)


def refusal(path: Path, call: Callable[[], Any]) -> Any:
    """The call's result, or the kind of UserError that it raised."""
    try:
        return call()
    except UserError as error:
        said = str(error)
    assert str(path) in said, said
    assert len(said.splitlines()) == 1, said
    return "refused: " + ("no field" if ": no field" in said else "cannot be read")


def _check_rows(path: Path, start: int) -> str:
    outcome = "sound"
    for index, row in enumerate(local_rows(path, ("messages",), start), start=start + 1):
        assert (row.file, row.number) == (str(path), index), row
        if isinstance(row.value, Broken):
            outcome = f"row {row.value.reason}"
            assert len(row.value.detail.splitlines()) <= 1, row.value
        else:
            check_row(row.value)
    return outcome


def fuzz_rows(number: int, seed: int, rows: list[Any]) -> Iterator[tuple[int, Any, Callable[[], str]]]:
    for index in range(number):
        rng = random.Random(seed * 2**32 + index)
        row = mutated(rng.choice(rows), rng)
        yield index, row, lambda row=row: check_row(row)


def fuzz_files(
    number: int, seed: int, suffix: str, rows: list[Any], folder: Path
) -> Iterator[tuple[int, Any, Callable[[], str]]]:
    plain = [r for r in rows if set(r) & {"messages"} and isinstance(r["messages"], list)]
    plain = [r for r in plain if all(isinstance(m.get("content"), str) for m in r["messages"])][:200]
    whole = [packed([plain[(i * 11 + k) % len(plain)] for k in range(10)], suffix) for i in range(20)]
    lines = [packed([plain[(i * 11 + k) % len(plain)] for k in range(10)], ".jsonl") for i in range(20)]
    path = folder / f"input{suffix}"
    for index in range(number):
        rng = random.Random(seed * 2**32 + index)
        if suffix in PACK and rng.random() < 0.3:  # whole, with damage inside
            content = PACK[suffix](damaged(rng.choice(lines), rng))
        else:
            content = damaged(rng.choice(whole), rng)
        path.write_bytes(content)
        start = rng.choice([0, 0, 0, 1, 5, 50])
        yield index, content, lambda start=start: check_file(path, start)


def inputs(kind: str, number: int, seed: int, folder: Path) -> Iterator[tuple[int, Any, Callable[[], str]]]:
    """The number, the input and the check of each input of a kind."""
    if kind == "mutated rows":
        return fuzz_rows(number, seed, samples())
    if kind == "random JSON":
        made = enumerate(random_json(number, seed))
        return ((index, row, lambda row=row: check_row(row)) for index, row in made)
    return fuzz_files(number, seed, kind, samples(), folder)


def spelled(value: Any) -> str:
    """The repr of an input."""
    try:
        return repr(value)
    except (RecursionError, ValueError):
        return "(it cannot be printed)"


def run(number: int, seed: int) -> int:
    """Check that many inputs, print the outcomes; 1 when one of them failed."""
    done, began = 0, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for kind, share in SHARES.items():
            outcomes: Counter[str] = Counter()
            since = time.process_time()
            for index, value, check in inputs(kind, round(number * share), seed, Path(folder)):
                try:
                    outcomes[check()] += 1
                except Exception as error:  # noqa: BLE001  # the very thing that is looked for
                    print(
                        f"FAILED: {kind}, seed {seed}, input {index}: {type(error).__name__}: {error}\n{spelled(value)}"
                    )
                    return 1
            done += outcomes.total()
            print(f"{kind}: {outcomes.total():,} inputs, seed {seed}, {time.process_time() - since:.1f} CPU s")
            for outcome, count in outcomes.most_common():
                print(f"  {count:>8,}  {outcome}")
    print(f"{done:,} inputs, no failure, {time.process_time() - began:.1f} CPU s")
    return 0


def main() -> int:
    faulthandler.enable()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    return run(arguments.inputs, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
