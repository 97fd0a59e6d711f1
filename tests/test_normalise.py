"""Rows of every common shape -> dialogues, or the reason why not."""

import datetime
import itertools
import json
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.batch import Dialogue, Message
from chatsae.data.normalise import REASONS, Reject, normalise
from shared_data import shared_data

ASKED = (Message("user", "Why?"), Message("assistant", "Because."))
PROMPTED = (Message("system", "Be brief."), *ASKED)


def turns(row: Any, **options: Any) -> Any:
    found = normalise(row, source="s", id="1", **options)
    return found.messages if isinstance(found, Dialogue) else found


def pairs(row: Any) -> list[tuple[str, str]]:
    found = turns(row)
    assert not isinstance(found, Reject), found
    return [(m.role, m.content) for m in found]


def reason(row: Any) -> str:
    found = turns(row)
    assert isinstance(found, Reject), found
    return found.reason


def openai(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


WHY, BECAUSE = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
USER, ASSISTANT = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}
HH = "\n\nHuman: Why?\n\nAssistant: Because."


@pytest.mark.parametrize(
    "row",
    [
        openai(("user", "Why?"), ("assistant", "Because.")),
        openai(("User ", "Why?"), ("MODEL", "Because.")),
        openai(("system", " "), ("user", "Why?"), ("assistant", "Because.")),
        openai(("user", [{"type": "text", "text": "Why?"}]), ("assistant", [{"type": "text", "value": "Because."}])),
        openai(("user", ["Why?"]), ("assistant", {"type": "output_text", "text": "Because."})),
        openai(("user", [{"text": "Why?", "type": None}]), ("assistant", "Because.")),
        {"messages": [{**WHY, "from": None, "value": None, "tool_calls": None}, {**ASSISTANT, "role": None}]},
        {"messages": [], "conversations": [USER, ASSISTANT]},
        {"conversations": [USER, ASSISTANT]},
        {"conversation": [{"role": "user", "content": "Why?", "toxic": False}, ASSISTANT], "messages": None},
        [WHY, BECAUSE],
        json.dumps([WHY, BECAUSE]),
        # nested, and JSON in a string
        {"conversation": {"messages": [WHY, BECAUSE]}},
        {"conversation": {"conversations": {"messages": [WHY, BECAUSE]}}},
        {"data": {"messages": [WHY, BECAUSE]}, "id": "1"},
        {"messages": [[WHY, BECAUSE]]},
        {"messages": json.dumps([WHY, BECAUSE])},
        {"conversation": f" {json.dumps({'messages': [WHY, BECAUSE]})}\n"},
        {"text": json.dumps([WHY, BECAUSE])},
        {"dialogue": {"messages": json.dumps([WHY, BECAUSE])}},
        # exchanges
        {"conversation": [{"human": "Why?", "assistant": "Because."}]},
        {"conversation": [{"system": "", "input": "Why?", "output": "Because."}]},
        {"conversation": [["Why?", "Because."]]},
        # preference pairs
        {"conversations": [USER], "chosen": ASSISTANT, "rejected": {"from": "gpt", "value": "No."}},
        {"conversations": [USER], "chosen": "Because.", "rejected": "No."},
        {"conversations": [USER], "chosen": [ASSISTANT], "rejected": []},
        {"messages": [WHY], "chosen": [WHY, BECAUSE]},
        {"messages": [WHY, BECAUSE], "prompt": "Why?", "chosen": [WHY, {"role": "assistant", "content": "No."}]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, USER]},
        {"chosen": json.dumps([WHY, BECAUSE]), "rejected": "[]"},
        {"prompt": "Why?", "chosen": [USER, ASSISTANT], "rejected": []},
        {"prompt": "Why?", "chosen": [ASSISTANT], "rejected": []},
        {"prompt": "Why?", "chosen": ASSISTANT, "rejected": ASSISTANT},
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"question": "Why?", "chosen": "Because.", "rejected": "No.", "system": ""},
        {"prompt": [WHY], "chosen": [BECAUSE], "rejected": []},
        {"prompt": json.dumps([WHY]), "chosen": json.dumps([BECAUSE]), "rejected": "[]"},
        # texts in which human and assistant alternate
        {"chosen": HH, "rejected": HH},
        {"text": HH},
        {"conversation": HH.lstrip()},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "Because.", "rejected": "No."},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "completion": "Because."},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": HH, "rejected": HH},
        {"text": "### Human: Why?### Assistant: Because."},
        # one question, one answer
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": "Why?", "completion": "Because.", "label": False},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": USER, "completion": "Because."},
        {"prompt": None, "completion": None, "question": "Why?", "answer": "Because."},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"instruction": "Why?", "context": "", "response": "Because."},
        {"question": "Why?", "answer": "Because."},
        {"system_prompt": "", "question": "Why?", "response": "Because."},
        {"query": "Why?", "response": "Because."},
        {"input": "Why?", "output": "Because."},
    ],
)
def test_each_shape_gives_the_same_dialogue(row):
    before = repr(row)
    assert turns(row) == ASKED
    assert repr(row) == before


@pytest.mark.parametrize(
    "row",
    [
        openai(("system", "Be brief."), ("user", "Why?"), ("assistant", "Because.")),
        openai(("developer", "Be brief."), ("user", "Why?"), ("assistant", "Because.")),
        {"system": "Be brief.", "conversations": [USER, ASSISTANT]},
        {"system_prompt": "Be brief.", "question": "Why?", "response": "Because."},
        {"conversation": [{"system": "Be brief.", "input": "Why?", "output": "Because."}]},
    ],
)
def test_a_system_prompt_is_the_first_turn(row):
    assert turns(row) == PROMPTED


def test_alpaca_input_and_history():
    history = [["Hi", "Hello"], {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": history}
    assert pairs(row) == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "A"),
        ("assistant", "B"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]
    dolly = {"instruction": "Add.", "context": "1 2", "response": "3", "category": "x"}
    assert pairs(dolly) == [("user", "Add.\n\n1 2"), ("assistant", "3")]


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [["user", "Why?"], ["assistant", "Because."]]},
        {"conversations": [["human", "Why?"], ["gpt", "Because."]]},
        {"messages": [("User", "Why?"), ("Assistant", "Because.")]},
        {"messages": [[["user", "Why?"], ["assistant", "Because."]]]},
        {"messages": json.dumps([["user", "Why?"], ["assistant", "Because."]])},
    ],
)
def test_pairs_of_role_and_text_are_turns(row):
    assert pairs(row) == [("user", "Why?"), ("assistant", "Because.")]


def test_pairs_of_role_and_text_in_a_history_are_turns():
    row = {"query": "And?", "response": "No.", "history": [["user", "Why?"], ["assistant", "Because."]]}
    assert pairs(row)[:2] == [("user", "Why?"), ("assistant", "Because.")]


def test_pairs_that_begin_with_a_role_are_no_questions():
    assert reason({"messages": [["user", "Why?"]]}) == "no assistant turn"
    assert reason({"messages": [["user", "Why?"], ["narrator", "It rains."]]}) == "unknown role"
    assert reason({"messages": [["user", "Why?"], "Because."]}) == "field of the wrong type"
    assert pairs({"messages": [["Why?", "Because."], ["user", "A role."]]})[2:] == [
        ("user", "user"),
        ("assistant", "A role."),
    ]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": "How deep?", "context": "The lake.", "answer": "Ten."}, "How deep?\n\nThe lake."),
        ({"query": "How deep?", "context": "The lake.", "response": "Ten."}, "How deep?\n\nThe lake."),
        ({"prompt": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2"),
        ({"question": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2"),
        ({"input": "How deep?", "context": "The lake.", "output": "Ten."}, "How deep?\n\nThe lake."),
        ({"instruction": "Add.", "input": "1", "context": "2", "output": "3"}, "Add.\n\n1\n\n2"),
        ({"prompt": "The lake. How deep?", "context": "The lake.", "response": "Ten."}, "The lake. How deep?"),
    ],
)
def test_what_a_question_is_about_stands_in_it(row, asked):
    assert pairs(row)[0] == ("user", asked)


def test_a_question_with_choices_beside_it_is_no_dialogue():
    for column in ("choices", "options"):
        assert reason({"question": "Which?", column: ["a", "b"], "answer": "B"}) == "question with choices beside it"
    assert reason({"question": "Why?", "context": {"title": ["x"]}, "answer": "B"}) == "field of the wrong type"


def test_content_is_kept_to_the_character():
    content = "\n  two  spaces \u00a0 and a tab\t"
    assert turns(openai(("user", content), ("assistant", "x\n")))[0].content == content
    row = {"text": f"\n\nHuman: {content}\n\nAssistant:  x\n"}
    assert pairs(row) == [("user", content), ("assistant", " x\n")]
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": ""}, {"type": "text", "text": "b\n"}]
    assert pairs(openai(("user", parts), ("assistant", "x")))[0] == ("user", " a \nb\n")


@pytest.mark.parametrize("text", [HH, json.dumps([WHY, BECAUSE]), json.dumps(BECAUSE), "Human: and Assistant: in turn"])
@pytest.mark.parametrize("columns", [("prompt", "completion"), ("instruction", "output"), ("question", "answer")])
def test_an_answer_that_looks_like_a_chat_is_an_answer(text, columns):
    asked, answer = columns
    assert pairs({asked: "Write a chat.", answer: text}) == [("user", "Write a chat."), ("assistant", text)]


def test_human_assistant_texts_of_several_turns():
    text = "\n\nHuman: a\n\nb\nHuman: c\n\nAssistant: d\n\nHuman: e\n\nAssistant: f"
    expected = [("user", "a\n\nb\nHuman: c"), ("assistant", "d"), ("user", "e"), ("assistant", "f")]
    assert pairs({"chosen": text, "rejected": ""}) == expected
    assert turns({"text": "\n\nHuman: a\n\nAssistant:"}) == Reject("empty content", "'text'")
    assert turns({"text": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}).reason == "same role twice in a row"


CALLED = '{"name": "add", "arguments": {"of": [1, 2]}}'
CALLS = [{"id": "7", "type": "function", "function": {"name": "add", "arguments": '{"of": [1, 2]}'}}]


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                WHY,
                {"role": "assistant", "content": None, "tool_calls": CALLS},
                {"role": "tool", "content": "3"},
            ]
        },
        {
            "messages": [
                WHY,
                {"role": "assistant", "tool_calls": json.dumps(CALLS)[1:-1]},
                {"role": "tool", "content": 3},
            ]
        },
        {
            "messages": [
                WHY,
                {"role": "assistant", "function_call": CALLS[0]["function"]},
                {"role": "function", "content": 3},
            ]
        },
        {"conversations": [USER, {"from": "function_call", "value": CALLED}, {"from": "observation", "value": "3"}]},
        openai(
            ("user", "Why?"),
            ("assistant", [{"type": "reasoning", "value": "Hm."}, {"type": "tool_call", "value": CALLED}]),
            ("ipython", [{"type": "tool_response", "value": "3"}]),
        ),
        openai(
            ("user", "Why?"),
            ("assistant", [{"type": "tool_use", "id": "7", "name": "add", "input": {"of": [1, 2]}}]),
            ("user", [{"type": "tool_result", "tool_use_id": "7", "content": [{"type": "text", "text": "3"}]}]),
        ),
    ],
)
def test_tool_turns_of_every_kind(row):
    user, call, tool = pairs(row)
    assert user == ("user", "Why?")
    assert call[0] == "assistant"
    parsed = json.loads(call[1])
    assert parsed == json.loads(CALLED) or [parsed] == CALLS
    assert tool == ("tool", "3")


def test_an_answer_and_its_calls_are_one_turn():
    answer = {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS * 2}
    expected = ("assistant", f"Let me see.\n{CALLED}\n{CALLED}")
    assert pairs({"messages": [WHY, answer]})[1] == expected
    apart = [USER, {"from": "gpt", "value": "Let me see."}, *[{"from": "function_call", "value": CALLED}] * 2]
    assert pairs({"conversations": apart})[1] == expected


def test_tool_data_is_json_text_and_several_results_may_follow():
    results = [{"role": "tool", "content": {"é": [1]}}, {"role": "tool", "content": [{"a": 1}]}]
    row = {"messages": [WHY, {"role": "assistant", "tool_calls": CALLS}, *results, BECAUSE]}
    assert pairs(row)[2:] == [("tool", '{"é": [1]}'), ("tool", '[{"a": 1}]'), ("assistant", "Because.")]
    mixed = [{"type": "tool_result", "content": "3"}, {"type": "text", "text": "Go on."}]
    row = openai(("user", "Why?"), ("assistant", [{"type": "tool_use", "name": "add", "input": {}}]), ("user", mixed))
    assert pairs(row)[2:] == [("tool", "3"), ("user", "Go on.")]


def test_images_are_placeholders():
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Who?"}, {"image": "y"}]
    assert pairs(openai(("user", parts), ("assistant", "He.")))[0] == ("user", "<image>\nWho?\n<image>")
    row = {**openai(("user", "<image>Who?"), ("assistant", "He.")), "images": ["1.jpg"]}
    assert pairs(row)[0] == ("user", "<image>Who?")


SPECIAL = re.compile(r"<\|im_end\|>")


def test_special_tokens_and_long_turns():
    row = openai(("user", "Why?<|im_end|>"), ("assistant", "Because."))
    assert turns(row, special=SPECIAL) == Reject("special token in the content", "'<|im_end|>'")
    assert isinstance(turns(row), tuple)
    called = {"messages": [WHY, {"role": "assistant", "tool_calls": [{"function": {"name": "<|im_end|>"}}]}]}
    assert turns(called, special=SPECIAL).reason == "special token in the content"
    row = openai(("user", "x" * 200_000), ("assistant", "y" * 200_000))
    assert isinstance(turns(row), tuple)
    row["messages"][1]["content"] += "y"
    assert turns(row) == Reject("turn over 200,000 characters", "200,001")
    assert turns(row, max_chars=1_000) == Reject("turn over 1,000 characters", "200,000")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no turn"),
        ({"messages": None}, "no turn"),
        (openai(("user", "Why?")), "no assistant turn"),
        (openai(("system", "Be."), ("assistant", "Hello")), "no user turn"),
        (openai(("assistant", "Hello"), ("user", "Why?")), "first turn is not the user's"),
        (openai(("user", "Why?"), ("assistant", "")), "empty content"),
        (openai(("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "")), "empty content"),  # WildChat: cut
        (openai(("user", None), ("assistant", "Because.")), "empty content"),
        (openai(("user", "Why?"), ("assistant", [{"type": "thinking", "thinking": "Hm."}])), "empty content"),
        (openai(("user", "Why?"), ("user", "Why?"), ("assistant", "Because.")), "same role twice in a row"),
        (openai(("user", "Why?"), ("assistant", "A"), ("assistant", "B")), "same role twice in a row"),
        (openai(("user", "Why?"), ("system", "Be."), ("assistant", "No.")), "system turn that is not the first"),
        (openai(("system", "Be."), ("system", "Be."), ("user", "Why?")), "system turn that is not the first"),
        (openai(("critic", "Why?"), ("assistant", "Because.")), "unknown role"),
        (openai((None, "Why?"), ("assistant", "Because.")), "no role"),
        (
            openai(("user", "Why?"), ("tool", "{}"), ("assistant", "Because.")),
            "tool turn that follows no assistant turn",
        ),
        (openai(("tool", "{}"), ("user", "Why?"), ("assistant", "Because.")), "first turn is not the user's"),
        ({"messages": [{**WHY, "tool_calls": CALLS}, BECAUSE]}, "tool call or result in another's turn"),
        (openai(("user", "A"), ("assistant", [{"type": "tool_result"}])), "tool call or result in another's turn"),
        (openai(("user", [{"type": "audio"}]), ("assistant", "A cat.")), "content part of unknown type"),
        (openai(("user", "half \ud800"), ("assistant", "Because.")), "content is not valid Unicode"),
        (openai(("user", "A"), ("assistant", "B"), ("tool", {"a": b"x"})), "tool call or result that JSON cannot hold"),
        ({"prompt": "Why?", "completion": None}, "empty content"),
    ],
)
def test_unusable_content_is_a_reason(row, reason):
    found = turns(row)
    assert isinstance(found, Reject)
    assert (found.reason, found.wrong_field) == (reason, False)
    assert reason in REASONS


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ([1], "row is not an object", "got list"),
        ("oops", "row is not an object", "got str"),
        ({"a": 1, "b": 2}, "no chat field", "found: a, b; expected one of messages, "),
        ({}, "no chat field", "found: nothing; expected one of"),
        ({"text": "Once upon a time."}, "no chat field", "found: text; expected"),
        ({"chosen": "Yes.", "rejected": "No."}, "no chat field", "found: chosen, rejected; expected"),
        ({"messages": "Hi"}, "field of the wrong type", "'messages' expected a list, got str"),
        ({"messages": ["Hi"]}, "field of the wrong type", "'messages[0]' expected an object, got str"),
        ({"messages": [{"content": "Hi"}]}, "field missing", "'messages[0].role' (found: content)"),
        ({"messages": [{"role": "user", "body": "Hi"}]}, "field missing", "'messages[0].content' (found: body, role)"),
        (
            {"messages": [{"role": 1, "content": "Hi"}]},
            "field of the wrong type",
            "'messages[0].role' expected text, got int",
        ),
        (openai(("user", 3)), "field of the wrong type", "'messages[0].content' expected text, got int"),
        (
            openai(("user", [3])),
            "field of the wrong type",
            "'messages[0].content[0]' expected text or an object, got int",
        ),
        (
            openai(("user", [{"type": "text"}])),
            "field of the wrong type",
            "'messages[0].content[0].text' expected text, got N",
        ),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            "field of the wrong type",
            "'history[0]' expected a question",
        ),
        (
            {"instruction": "a", "output": "b", "history": "c"},
            "field of the wrong type",
            "'history' expected a list, got str",
        ),
        (
            {"instruction": "a", "input": [1], "output": "b"},
            "field of the wrong type",
            "'input' expected text, got list",
        ),
        (
            {b"messages": [], 10**5000: 1, "new\nline\ud800": 2},
            "no chat field",
            "found: bytes, int, new line?; expected",
        ),
    ],
)
def test_wrong_fields_are_named(row, reason, detail):
    found = turns(row)
    assert isinstance(found, Reject)
    assert found.wrong_field
    assert (found.reason, found.detail[: len(detail)]) == (reason, detail)
    assert reason in REASONS


def test_an_unknown_role_is_told_apart_from_its_count():
    assert turns(openai(("critic", "Why?"))) == Reject("unknown role", detail="'critic'")


def nested(levels: int, wrap: Any) -> Any:
    value = "x"
    for _ in range(levels):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        nested(5000, lambda v: [v]),
        nested(5000, lambda v: {"messages": v}),
        nested(5000, lambda v: {"role": "user", "content": [v]}),
        "[" * 100_000 + "]" * 100_000,
        "[" + "9" * 5000 + "]",
        10**5000,
        float("nan"),
        b"bytes",
        datetime.datetime(2024, 7, 26),
        {None: 1, (1, 2): 2},
        {"role": [], "content": {"type": []}},
    ],
    ids=range(11),
)
def test_nothing_raises(value):
    rows = [
        value,
        {"messages": value},
        {"messages": [value]},
        {"prompt": value, "completion": value},
        {"system": value},
    ]
    rows += [{"messages": [WHY, {"role": "assistant", "tool_calls": value}]}, {"text": value}, {"chosen": value}]
    rows += [openai(("user", "A"), ("assistant", [value])), openai(("user", "A"), ("assistant", "B"), ("tool", value))]
    for row in rows:
        found = normalise(row, source="s", id="1")
        assert isinstance(found, Dialogue) or found.reason in REASONS


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
        assert found.reason in REASONS
        return
    roles = [message.role for message in found.messages]
    body = roles[1:] if roles[0] == "system" else roles
    assert {"user", "assistant"} <= set(body) <= {"user", "assistant", "tool"}
    assert body[0] == "user"
    assert all(a != b or a == "tool" for a, b in itertools.pairwise(body))
    assert all(message.content.strip() for message in found.messages)


REAL = {  # accepted wholly, but for news summaries that end in a literal <|endoftext|>
    "alpaca": {"ok": 50},
    "content_parts_tools": {"ok": 50},
    "openai_kto": {"ok": 50},
    "openai_multimodal": {"ok": 6},
    "prompt_completion": {"special token in the content": 20},
    "question_answer": {"ok": 50},
    "sharegpt_dpo": {"ok": 50},
    "sharegpt_tools": {"ok": 50},
}
ENDOFTEXT = re.compile(re.escape("<|endoftext|>"))


def real_rows(name: str) -> list[Any]:
    return [json.loads(line) for line in shared_data("raw_shapes", f"{name}.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_rows(name):
    counts = Counter()
    for number, row in enumerate(real_rows(name)):
        found = normalise(row, source=name, id=str(number), special=ENDOFTEXT)
        counts["ok" if isinstance(found, Dialogue) else found.reason] += 1
        if isinstance(found, Dialogue) and name == "alpaca":
            assert found.messages[-1].content == row["output"]
            assert found.messages[0].content.startswith(row["instruction"])
    assert counts == REAL[name]


def test_real_tool_turns_keep_every_call_and_result():
    for row in real_rows("sharegpt_tools"):
        said = [(t["from"], t["value"]) for t in row["conversations"]]
        named = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
        assert pairs(row) == [(named[role], text) for role, text in said]
    for row in real_rows("content_parts_tools"):
        for turn, (role, content) in zip(row["messages"], pairs(row), strict=True):
            shown = [part["value"] for part in turn["content"] if part["type"] != "reasoning"]
            assert (role, content) == (turn["role"], "\n".join(shown))


def test_real_images_and_answers():
    for row in real_rows("openai_multimodal"):
        assert sum(content.count("<image>") for _, content in pairs(row)) == len(row["images"])
    for row in real_rows("sharegpt_dpo"):
        assert pairs(row)[-1] == ("assistant", row["chosen"]["value"])
