"""The built-in corpus: deterministic, well-formed, true to the documentation, and split by object."""

import ast
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
from collections import Counter

import pytest

from chatsae.batch import SPLITS, Dialogue, Split
from chatsae.data import pydocs
from chatsae.data.pydocs.answers import ANSWERS, head, sentences, summary
from chatsae.data.pydocs.chats import styled
from chatsae.data.pydocs.library import PyObject

DIGEST = """
import hashlib
from chatsae.data import pydocs
from chatsae.errors import UserError
digest = hashlib.sha256()
for d in pydocs.dialogues("interpret", 3):
    digest.update(repr((d.id, d.messages)).encode())
for p in pydocs.documents("interpret", 3):
    digest.update(repr((p.id, p.text)).encode())
print(digest.hexdigest())
try:
    next(pydocs.dialogues("test"))
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def held_out() -> list[Dialogue]:
    return list(pydocs.dialogues("eval"))


@pytest.fixture(scope="module")
def by_name() -> dict[str, PyObject]:
    return {o.name: o for split in SPLITS for o in pydocs.objects(split)}


def subject(dialogue: Dialogue) -> str:
    """The object that an id names."""
    return dialogue.id.removeprefix("pydocs/").rpartition("/")[0]


def test_two_processes_yield_the_same_bytes_and_refuse_an_unknown_split():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "2")
    ]
    outputs = {p.communicate()[0] for p in processes}
    assert len(outputs) == 1
    digest, error = outputs.pop().splitlines()
    assert len(digest) == 64
    assert error == "pydocs: split is 'test'; expected one of train, eval, interpret, steer"


def test_no_object_is_in_two_splits(by_name: dict[str, PyObject]):
    units = [{o.unit for o in pydocs.objects(split)} for split in SPLITS]
    assert sum(map(len, units)) == len(set().union(*units))
    classes = {o.name: pydocs.split_of(o.unit) for o in by_name.values() if o.kind == "class"}
    methods = [o for o in by_name.values() if o.kind == "method"]
    assert len(methods) > 5000
    assert all(pydocs.split_of(o.unit) == classes[o.owner] for o in methods if o.owner in classes)


def test_dialogues_and_pages_keep_to_their_split(held_out: list[Dialogue], by_name: dict[str, PyObject]):
    assert {pydocs.split_of(by_name[subject(d)].unit) for d in held_out} == {"eval"}
    long = [o for o in pydocs.objects("train") if len(o.doc) > 200]
    foreign = Counter(p.id for p in pydocs.documents("eval") for o in long if o.doc in p.text)
    assert not foreign


@pytest.mark.parametrize(("split", "share"), [("train", 0.80), ("eval", 0.12), ("interpret", 0.05), ("steer", 0.03)])
def test_shares_of_the_splits(split: Split, share: float, by_name: dict[str, PyObject]):
    units = {o.unit for o in by_name.values()}
    assert sum(pydocs.split_of(u) == split for u in units) / len(units) == pytest.approx(share, abs=0.02)


def test_split_is_the_stated_hash():
    bucket = int.from_bytes(hashlib.blake2b(b"json.dumps", digest_size=8).digest(), "big") % 100
    assert pydocs.split_of("json.dumps") == (
        "train" if bucket < 80 else "eval" if bucket < 92 else "interpret" if bucket < 97 else "steer"
    )


def test_turns_alternate_and_number_one_to_six(held_out: list[Dialogue]):
    users = Counter()
    for d in held_out:
        roles = [m.role for m in d.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2), d.id
        users[len(turns) // 2] += 1
    assert set(users) == {1, 2, 3, 4, 5, 6}
    assert min(users.values()) > 0.03 * len(held_out)


def test_system_prompts_are_few_and_varied(held_out: list[Dialogue]):
    prompts = [d.messages[0].content for d in held_out if d.messages[0].role == "system"]
    assert 0.10 <= len(prompts) / len(held_out) <= 0.15
    assert len(set(prompts)) > 50


def test_lengths_spread_like_a_lognormal(held_out: list[Dialogue]):
    characters = sorted(sum(len(m.content) for m in d.messages) for d in held_out)
    median = statistics.median(characters)
    assert 250 < median < 500
    assert characters[-1] > 8 * median
    assert characters[int(0.98 * len(characters))] > 5 * median
    assert characters[len(characters) // 20] < median / 2
    assert characters[-1] < 7000


def test_contents_are_clean(held_out: list[Dialogue]):
    for d in held_out:
        for m in d.messages:
            assert m.content.strip() == m.content != "", d.id
            assert "<|" not in m.content or "|>" not in m.content, d.id
            m.content.encode("utf-8")
            assert not any(word in m.content for word in ("{x}", "{p}", "{doc}", "{question}")) or "{" in "".join(
                o.doc for o in pydocs.objects("eval") if o.name == subject(d)
            )


def test_ids_are_unique_and_continue_over_seeds(held_out: list[Dialogue]):
    again = list(pydocs.dialogues("eval", 1))
    assert len({d.id for d in held_out + again}) == len(held_out) + len(again)
    assert {subject(d) for d in again} == {subject(d) for d in held_out}
    same = {d.messages for d in held_out} & {d.messages for d in again}
    assert len(same) < 0.05 * len(held_out)


def test_plain_answers_quote_the_documentation(held_out: list[Dialogue], by_name: dict[str, PyObject]):
    """Every long answer without a style is found in the object's own documentation, or in that of its relatives."""
    library = "\n".join(" ".join(o.doc.split()) for o in by_name.values() if pydocs.split_of(o.unit) == "eval")
    checked = 0
    for d in held_out:
        if d.messages[0].role == "system":
            continue
        for m in d.messages:
            if m.role == "assistant" and len(m.content) > 300 and "\n- " not in m.content and "`" not in m.content:
                parts = [" ".join(p.split()) for p in m.content.split("\n\n")]
                assert sum(p in library for p in parts) / len(parts) > 0.5 or "(" in parts[0], (d.id, m.content)
                checked += 1
    assert checked > 50


def test_parser_sees_signatures_methods_and_nesting(by_name: dict[str, PyObject]):
    dumps = by_name["json.dumps"]
    assert (dumps.kind, dumps.module, dumps.short) == ("function", "json", "dumps")
    assert dumps.signature.startswith("(obj, *, skipkeys=False, ensure_ascii=True")
    assert {p.name: p.default for p in dumps.parameters}["allow_nan"] == "True"
    default = by_name["json.encoder.JSONEncoder.default"]
    assert (default.kind, default.unit, default.signature) == ("method", "json.encoder.JSONEncoder", "(o)")
    assert by_name["json.encoder.JSONEncoder.__init__"].signature == by_name["json.encoder.JSONEncoder"].signature
    assert by_name["topics.assert"].doc.startswith('The "assert" statement')
    assert by_name["argparse.ArgumentParser"].bases == ("_AttributeHolder", "_ActionsContainer")


def test_documentation_is_what_python_itself_reports(by_name: dict[str, PyObject]):
    for name, found in (("json.dumps", json.dumps), ("json", json), ("ast.NodeVisitor", ast.NodeVisitor)):
        assert by_name[name].doc.split() == (found.__doc__ or "").split()


def test_pages_hold_heading_signature_and_docstring(by_name: dict[str, PyObject]):
    o = by_name["json.encoder.JSONEncoder"]
    texts = {
        page.text
        for seed in range(6)
        for page in pydocs.documents(pydocs.split_of(o.unit), seed)
        if page.id == f"pydocs/json.encoder.JSONEncoder/{seed}"
    }
    assert len(texts) == 3
    for text in texts:
        assert "JSONEncoder" in text.splitlines()[0]
        assert "default(o)" in text
        assert "Extensible JSON <" in text
    assert sum(line.startswith(" |") for line in max(texts, key=lambda t: t.count(" |")).splitlines()) > 50


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("one_line", "First line, second line."),
        ("upper", "FIRST LINE,\nSECOND LINE.\n\nMORE."),
        ("bullet", "- First line,\n- second line.\n- More."),
        ("quote", "> First line,\n> second line.\n>\n> More."),
        ("signed", "First line,\nsecond line.\n\nMore.\nAda"),
        ("polite", "With pleasure.\n\nFirst line,\nsecond line.\n\nMore."),
        ("", "First line,\nsecond line.\n\nMore."),
    ],
)
def test_styles(style: str, expected: str):
    assert styled("First line,\nsecond line.\n\nMore.", style, "Ada") == expected


def test_sentences_leave_code_and_lists_out():
    text = "Do a thing. Return a value.\n\n>>> f(1)\n2\n\n- one\n- two\n\nRaise\nValueError if not."
    assert sentences(text) == ("Do a thing.", "Return a value.", "Raise ValueError if not.")


def test_head_keeps_whole_paragraphs():
    assert head("aaa\n\nbbb\n\nccc", 8) == "aaa\n\nbbb"
    assert head("aaa bbb\nccc", 8) == "aaa bbb"


def test_answers_about_a_known_function():
    o = PyObject("m.f", "function", "m", "m.f", "Add up.\n\nReturn the sum. Raise TypeError else.", "(a, b=1)")
    answers = {topic: str(answer(o, random.Random(0))) for topic, answer in ANSWERS.items()}
    assert answers["returns"] == "Return the sum."
    assert answers["raises"] == "Raise TypeError else."
    assert summary(o) == "Add up."
    assert "m.f(a, b=1)" in answers["signature"]
    assert answers["bases"] == answers["owner"] == answers["example"] == "None"
    assert "from m import f" in answers["import"]
