"""Rows of every common shape -> dialogues, or the reason why not."""

import itertools
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.batch import Dialogue, Message
from chatsae.data.normalise import Reject, normalise
from shared_data import shared_data

ASKED = (Message("user", "Why?"), Message("assistant", "Because."))
PROMPTED = (Message("system", "Be brief."), *ASKED)


def turns(row: Any) -> Any:
    found = normalise(row, source="s", id="1")
    return found.messages if isinstance(found, Dialogue) else found


def openai(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


USER, ASSISTANT = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}


@pytest.mark.parametrize(
    "row",
    [
        openai(("user", "Why?"), ("assistant", "Because.")),
        openai(("User ", "Why?"), ("MODEL", "Because.")),
        openai(("system", " "), ("user", "Why?"), ("assistant", "Because.")),
        openai(("user", [{"type": "text", "text": "Why?"}]), ("assistant", [{"type": "text", "value": "Because."}])),
        {"conversations": [USER, ASSISTANT]},
        {"conversation": [{"role": "user", "content": "Why?", "toxic": False}, ASSISTANT], "messages": None},
        {"conversations": [USER], "chosen": ASSISTANT, "rejected": {"from": "gpt", "value": "No."}},
        {"conversations": [USER], "chosen": "Because.", "rejected": "No."},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, USER]},
        {"prompt": "Why?", "chosen": [USER, ASSISTANT], "rejected": []},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"question": "Why?", "answer": "Because."},
        {"system_prompt": "", "question": "Why?", "response": "Because."},
    ],
)
def test_each_shape_gives_the_same_dialogue(row):
    assert turns(row) == ASKED


@pytest.mark.parametrize(
    "row",
    [
        openai(("system", "Be brief."), ("user", "Why?"), ("assistant", "Because.")),
        {"system": "Be brief.", "conversations": [USER, ASSISTANT]},
        {"system_prompt": "Be brief.", "question": "Why?", "response": "Because."},
    ],
)
def test_a_system_prompt_is_the_first_turn(row):
    assert turns(row) == PROMPTED


def test_alpaca_input_and_history():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]}
    assert [(m.role, m.content) for m in turns(row)] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]


def test_content_is_kept_to_the_character():
    content = "\n  two  spaces \u00a0 and a tab\t"
    assert turns(openai(("user", content), ("assistant", "x\n")))[0].content == content


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no turn"),
        ({"messages": None}, "no turn"),
        (openai(("user", "Why?")), "no assistant turn"),
        (openai(("assistant", "Hello")), "no user turn"),
        (openai(("user", "Why?"), ("assistant", "")), "empty content"),
        (openai(("user", None), ("assistant", "Because.")), "empty content"),
        (openai(("user", "Why?"), ("user", "Why?"), ("assistant", "Because.")), "same role twice in a row"),
        (openai(("user", "Why?"), ("system", "Be."), ("assistant", "No.")), "system turn that is not the first"),
        (openai(("system", "Be."), ("system", "Be."), ("user", "Why?")), "system turn that is not the first"),
        (openai(("critic", "Why?"), ("assistant", "Because.")), "unknown role"),
        (openai((None, "Why?"), ("assistant", "Because.")), "no role"),
        (openai(("user", "Why?"), ("tool", "{}"), ("assistant", "Because.")), "tool turn"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "tool turn"),
        (openai(("user", [{"type": "image_url"}]), ("assistant", "A cat.")), "content part that is not text"),
        (openai(("user", "half \ud800"), ("assistant", "Because.")), "content is not valid Unicode"),
        ({**openai(("user", "Why?"), ("assistant", "Because.")), "images": ["1.jpg"]}, "image"),
        ({"prompt": "Why?", "completion": None}, "empty content"),
    ],
)
def test_unusable_content_is_a_reason(row, reason):
    found = turns(row)
    assert isinstance(found, Reject)
    assert (found.reason, found.wrong_field) == (reason, False)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([1], "expected an object with fields, got list"),
        ({"a": 1, "b": 2}, "no chat field (a, b)"),
        ({"messages": "Hi"}, "field 'messages' expected a list, got str"),
        ({"messages": ["Hi"]}, "field 'messages[0]' expected an object, got str"),
        ({"messages": [{"content": "Hi"}]}, "field 'messages[0].role' is missing (found: content)"),
        ({"messages": [{"role": "user", "body": "Hi"}]}, "field 'messages[0].content' is missing (found: role, body)"),
        ({"messages": [{"role": 1, "content": "Hi"}]}, "field 'messages[0].role' expected text, got int"),
        (openai(("user", 3)), "field 'messages[0].content' expected text, got int"),
        (openai(("user", [3])), "field 'messages[0].content[0]' expected text or an object, got int"),
        (openai(("user", [{"type": "text"}])), "field 'messages[0].content[0].text' expected text, got NoneType"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "field 'history[0]' expected a question and an answer"),
        ({"instruction": "a", "output": "b", "history": "c"}, "field 'history' expected a list, got str"),
    ],
)
def test_wrong_fields_are_named(row, says):
    found = turns(row)
    assert isinstance(found, Reject)
    assert found.wrong_field
    assert found.reason.startswith(says)


def test_an_unknown_role_is_told_apart_from_its_count():
    assert turns(openai(("critic", "Why?"))) == Reject("unknown role", detail="'critic'")


_words = ["messages", "conversations", "role", "from", "content", "value", "user", "human", "gpt", "system", "text"]
_words += ["prompt", "completion", "chosen", "instruction", "output", "history", "input", "type"]
_leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(_words)
_json = st.recursive(
    _leaf,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_words), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(_json)
def test_any_row_is_a_sound_dialogue_or_a_reject(row):
    found = normalise(row, source="s", id="1")
    if isinstance(found, Reject):
        assert found.reason
        return
    roles = [message.role for message in found.messages]
    body = roles[1:] if roles[0] == "system" else roles
    assert {"user", "assistant"} == set(body)
    assert all(a != b for a, b in itertools.pairwise(body))
    assert all(message.content.strip() for message in found.messages)


REAL = {
    "alpaca": {"ok": 50},
    "content_parts_tools": {"content part that is not text": 50},
    "openai_kto": {"ok": 50},
    "openai_multimodal": {"image": 6},
    "prompt_completion": {"ok": 20},
    "question_answer": {"ok": 50},
    "sharegpt_dpo": {"ok": 50},
    "sharegpt_tools": {"ok": 24, "tool turn": 26},
}


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_rows(name):
    counts = Counter()
    lines = shared_data("raw_shapes", f"{name}.jsonl").read_bytes().splitlines()
    for number, line in enumerate(lines):
        row = json.loads(line)
        found = normalise(row, source=name, id=str(number))
        assert isinstance(found, Dialogue) or not found.wrong_field, found
        counts["ok" if isinstance(found, Dialogue) else found.reason] += 1
        if isinstance(found, Dialogue) and name == "alpaca":
            assert found.messages[-1].content == row["output"]
            assert found.messages[0].content.startswith(row["instruction"])
    assert counts == REAL[name]
