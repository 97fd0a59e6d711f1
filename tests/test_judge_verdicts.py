"""A judge's thoughts and drafts are never taken for its verdict: marks of thought, answers that were cut off, parts."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatsae.features.judge.answers import Rating, active, grade, intruder, rating
from chatsae.features.judge.asking import Asker, Unreadable
from chatsae.features.judge.cache import Cache, Replay
from chatsae.features.judge.client import Answer, Request
from chatsae.features.judge.local import LocalHF
from chatsae.features.judge.openai import OpenAICompat
from chatsae.features.judge.rubric import RubricJudge
from chatsae.features.judge.tasks import Tasks
from chatsae.features.verdict import Verdict
from chatsae.lm.load import demo_model_path
from chatsae.steersweep.grading import grades
from judge_server import Reply, Served, feature, said, serve
from test_judge_tasks import SILENT, sampled
from test_steering_sweep import SWEEP

DRAFT = '{"explanation": "d", "deviating": [], "score": 1}'
FINAL = '{"explanation": "f", "deviating": [2], "score": 4}'
EXAMPLE = '{"explanation": "...", "deviating": [1, 2], "score": 3}'
MARKS = [
    ("<think>", "</think>"),
    ("<THINK>", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<Thoughts>", "</Thoughts>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<antThinking>", "</antThinking>"),
    ("<think budget='9'>", "</think >"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysis", "assistantfinal"),
]
PARSERS: list[tuple[Callable[[Answer], Any], str, str, Any]] = [
    (lambda answer: rating(answer, 5), DRAFT, FINAL, Rating(4, "f", (2,))),
    (lambda answer: active(answer, 5), '{"active": [1, 2]}', '{"active": [3]}', {3}),
    (lambda answer: intruder(answer, 5), '{"intruder": 1}', '{"intruder": 5}', 5),
    (lambda answer: grade(answer, 2), '{"rating": 1}', '{"rating": 2}', 2),
]
EACH = pytest.mark.parametrize(
    ("parse", "draft", "final", "expected"), PARSERS, ids=["rating", "active", "intruder", "grade"]
)


@EACH
@pytest.mark.parametrize(("opening", "closing_mark"), MARKS)
def test_a_draft_among_thoughts_is_no_verdict(parse, draft, final, expected, opening, closing_mark):
    for begin in (opening, ""):  # templates that open the thought themselves leave the mark out
        assert parse(Answer(f"{begin}Say {draft}, or not.{closing_mark}\n{final}")) == expected
        assert (
            parse(Answer(f"{begin}Say {draft}{closing_mark}\n{final}\nThat is beca", finish_reason="length"))
            == expected
        )
        for unfinished in (f"{begin}Say {draft}{closing_mark}", f"{begin}{draft}{closing_mark}\nIt may be"):
            with pytest.raises(Unreadable):
                parse(Answer(unfinished))
        with pytest.raises(Unreadable, match="cut off before a verdict"):
            parse(Answer(f"{begin}Say {draft}, or not", finish_reason="length"))
    if opening != "analysis":
        with pytest.raises(Unreadable):
            parse(Answer(f"{opening}Say {draft}, or not"))


@EACH
@pytest.mark.parametrize("reason", ["length", "LENGTH", "max_tokens", "content_filter", "abort"])
def test_an_answer_that_was_cut_off_has_a_verdict_only_where_it_begins_with_it(parse, draft, final, expected, reason):
    for begin in ("", "\n```json\n", "<answer>", "<|message|>"):
        assert parse(Answer(f"{begin}{final}", finish_reason=reason)) == expected
        assert (
            parse(Answer(f"{begin}{final}\n```\nI first thought of {draft}, since", finish_reason=reason)) == expected
        )
    for text in (f"The form is {draft}", f"Okay, {draft} or {final}", final[:-1], "", "Score: 4"):
        with pytest.raises(Unreadable, match="cut off before a verdict"):
            parse(Answer(text, finish_reason=reason))
    assert parse(Answer(f"First {draft}, then {final}", finish_reason="stop")) == expected


def test_a_score_after_thoughts_needs_no_object():
    assert rating(Answer(f"draft {DRAFT}\n</think>\nScore: 4"), 5) == Rating(4, "Score: 4", ())
    assert rating(Answer("score: 1 or 2?\n</think>\nScore: 4"), 5).score == 4


def test_the_example_of_the_form_is_no_verdict():
    for answer in (Answer(EXAMPLE), Answer(f"Like {EXAMPLE}?"), Answer(EXAMPLE, finish_reason="length")):
        with pytest.raises(Unreadable, match="the example of the form"):
            rating(answer, 5)


@pytest.mark.parametrize("mark", [mark for pair in MARKS[:-1] for mark in pair])
def test_a_mark_that_an_explanation_quotes_is_no_mark(mark):
    quoted = json.dumps({"explanation": f"fires on {mark} alone", "deviating": [], "score": 5})
    expected = Rating(5, " ".join(f"fires on {mark} alone".split()), ())
    assert rating(Answer(quoted), 5) == expected
    assert rating(Answer(f"<think>{DRAFT}</think>{quoted}\nfor"), 5) == expected
    assert rating(Answer(f"{quoted} It is", finish_reason="length"), 5) == expected
    again = json.dumps({"explanation": "</think> tokens", "score": 1})
    assert rating(Answer(f"Maybe {again}? </think> {FINAL}"), 5).score == 4


@given(
    st.lists(
        st.sampled_from(["{", "}", '"', "<think>", "</think>", "[THINK]", DRAFT, EXAMPLE, "score: 2 ", "\\", "a"])
    ),
    st.sampled_from(["</think>", "[/THINK]", "◁/think▷"]),
)
def test_whatever_is_thought_the_verdict_is_the_same(pieces, mark):
    thought = "".join(pieces)
    assert rating(Answer(f"{thought}\n{mark}\n{FINAL}"), 5) == Rating(4, "f", (2,))


def test_a_long_answer_is_read_in_time():
    assert rating(Answer("{" * 100_000 + "</think>" + FINAL), 5).score == 4
    assert rating(Answer("<think>" * 20_000 + "</think>" + FINAL), 5).score == 4
    assert rating(Answer(FINAL + "x" * 100_000, finish_reason="length"), 5).score == 4


# behind a server, in a record, from a model on this machine


def judging(served: Served, cache: Cache | None = None) -> Asker:
    client = OpenAICompat(served.url, "tiny", concurrency=3)
    served.clients.append(client)
    return Asker(client, cache, concurrency=3)


def cut(text: str, reason: str | None = "length", tokens: int = 256) -> Reply:
    choice = {"finish_reason": reason, "message": {"content": text}}
    return Reply({"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": tokens}})


@pytest.mark.parametrize("reason", ["length", "stop", None])
def test_thoughts_that_never_end_are_unreadable_and_counted(reason):
    features = [sampled(i) for i in range(3)]
    silent = dict.fromkeys(range(3), SILENT)
    told = [Verdict(i, "x", 6, 0, 4.0, explanation="digits") for i in range(3)]
    drafts = f'The form is {EXAMPLE} or {DRAFT} or {{"active": [1]}} or {{"intruder": 1}} or {{"rating": 1}}, so'
    with serve(lambda body, n: cut(drafts, reason)) as served:
        asker = judging(served)
        found = list(RubricJudge(asker, "tiny").verdicts(features, n_contexts=5))
        tasks = Tasks(asker)
        without = [tasks.detection(features, told, silent), tasks.intruder(features, 6, silent)]
        of_answers = grades(asker, SWEEP, "the letter Z", {"max_tokens": 256})
    why = "unreadable: cut off before a verdict"
    assert [(v.score, v.explanation, v.reason) for v in found] == [(None, "", why)] * 3
    assert [facts["without_score"] for facts in without] == [{why: 3}] * 2
    assert all(set(own["reasons"].values()) == {why} for own in of_answers)
    distinct = len({json.dumps(body["messages"]) for body in served.bodies}) // 2
    assert distinct == asker.usage.reasked == asker.usage.unreadable == asker.usage.cut > 9


def test_content_in_parts_is_read_without_its_thoughts():
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]}
    contents = [
        [thinking, {"type": "text", "text": FINAL}],
        [{"type": "reasoning", "text": DRAFT}, {"text": FINAL[:9]}, FINAL[9:]],
        [{"type": "text", "text": f"{DRAFT}</think>"}, {"type": "output_text", "text": FINAL}],
    ]
    for content in contents:
        with serve(lambda body, n, content=content: said(content)) as served:
            (found,) = RubricJudge(judging(served), "tiny").verdicts([feature(0)], n_contexts=5)
        assert (found.score, len(served.bodies)) == (4, 1)
    for nothing in ([thinking], []):
        with serve(lambda body, n, content=nothing: said(content)) as served:
            (found,) = RubricJudge(judging(served), "tiny").verdicts([feature(0)], n_contexts=5)
        assert (found.reason, len(served.bodies)) == ("unreadable: no JSON object with a score", 2)


def test_an_answer_that_was_kept_is_read_anew(tmp_path: Path):
    path = tmp_path / "cache.sqlite"
    texts = {"feature0": f"{EXAMPLE} is the form", "feature1": f"is it {DRAFT}", "feature2": f"{DRAFT}</think>{FINAL}"}
    with serve(lambda body, n: said("")) as served, closing(Cache(path)) as cache:
        judge = RubricJudge(judging(served, cache), "tiny")
        for i, request in enumerate(judge.requests([feature(i) for i in range(3)], n_contexts=5)):
            cache.put("tiny", request, Answer(texts[f"feature{i}"], None, "stop" if i == 2 else "length", 100, 256 - i))
    with closing(Replay(path)) as replay:
        asker = Asker(replay)
        found = list(RubricJudge(asker, "tiny").verdicts([feature(i) for i in range(3)], n_contexts=5))
    assert [v.score for v in found] == [None, None, 4.0]
    assert found[1].reason == "unreadable: cut off before a verdict"
    assert (asker.usage.unreadable, asker.usage.cut) == (2, 2)


def test_a_model_on_this_machine_says_that_it_was_cut_off():
    local = LocalHF(demo_model_path())
    ask = ({"role": "user", "content": "Who are you?"},)
    assert local.complete(Request(ask, {"max_tokens": 3})).cut
    whole = local.complete(Request(ask, {"max_tokens": 30}))
    assert (whole.cut, whole.finish_reason) == (False, "stop")
