"""Judges that are language models: what they are shown, what their answers say, and `chatsae judge` from end to end."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatsae.cli import main
from chatsae.errors import UserError
from chatsae.features.judge import prompts
from chatsae.features.judge.answers import Rating, active, intruder, rating
from chatsae.features.judge.asking import Asker, Unreadable
from chatsae.features.judge.cache import Cache, Replay
from chatsae.features.judge.client import Answer
from chatsae.features.judge.local import LocalHF, LocalJudge
from chatsae.features.judge.openai import OpenAICompat, Retry
from chatsae.features.judge.rubric import RubricJudge, file_name, rubric_request, shuffled
from chatsae.features.judging import read_judgements
from chatsae.features.verdict import Judge
from feature_samples import plain_model, planted_run
from judge_server import Reply, Served, context, feature, rated, said, serve
from tiny_models import tiny_model, tiny_tokenizer

NAME = "L1-1x-standard"
KEY = "sk-test-fedcba9876543210"


def judge_at(served: Served, cache: Cache | None = None, name: str = "tiny", **options) -> RubricJudge:
    client = OpenAICompat(served.url, "tiny", retry=Retry(attempts=3, first=0.01), concurrency=4)
    served.clients.append(client)
    return RubricJudge(Asker(client, cache, concurrency=4), name, **options)


def shown(body: dict) -> list[str]:
    """The examples of a prompt, in the order in which they are shown."""
    return re.findall(r"^Example \d+: (.*)$", body["messages"][-1]["content"], flags=re.MULTILINE)


# prompts


def test_a_context_is_one_line_with_roles_and_the_marked_token():
    one = context("Ask me anything", 1)
    one = replace(one, tokens=("Ask", "\nme", " anything"), role=(3, 3, 4))
    assert prompts.render(one) == "⟨user⟩ Ask⟦⏎me⟧ ⟨assistant⟩  anything"
    assert prompts.render(one, marked=False) == "⟨user⟩ Ask⏎me ⟨assistant⟩  anything"
    assert prompts.render(one, strength=10.0).endswith("(activation 5 of 10)")
    assert prompts.render(replace(one, role=(0, 0, 0))) == "Ask⟦⏎me⟧ anything"


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_text_cannot_look_like_another_example_or_mark(text):
    line = prompts.render(replace(context("a b", 1), tokens=("x", text)))
    assert len(line.splitlines()) == 1
    assert (line.count("⟦"), line.count("⟧"), line.count("⟨"), line.count("⟩")) == (1, 1, 1, 1)


def test_the_prompt_has_the_published_scale_and_every_context():
    request = rubric_request(list(feature(7, 20).contexts), prompts.RUBRIC_FORM, {"temperature": 0.5}, 3)
    system, user = (m["content"] for m in request.messages)
    for line in (
        "5: Clear pattern with no deviating examples",
        "4: Clear pattern with one or two deviating examples",
        "3: Clear overall pattern but quite a few examples not fitting that pattern",
        "2: Broad consistent theme but lacking structure",
        "1: No discernible pattern",
    ):
        assert system.count(line) == 1
    assert [f"Example {i + 1}: ⟨user⟩ feature7⟦ rank{i}⟧ word" for i in range(20)] == user.splitlines()[:20]
    assert request.params == {"seed": 3, "temperature": 0.5}
    assert "activation 10 of 10" not in user
    strong = rubric_request(list(feature(7, 20).contexts), prompts.RUBRIC_FORM, {}, 0, activations=True)
    assert "rank0⟧ word  (activation 10 of 10)" in strong.messages[1]["content"]


def test_the_order_of_contexts_follows_from_seed_repeat_and_feature():
    first = shuffled(feature(3, 20), 20, 0, 0)
    assert sorted(first) == list(range(20))
    assert first == shuffled(feature(3, 20), 20, 0, 0)
    others = [
        shuffled(feature(3, 20), 20, 0, 1),
        shuffled(feature(3, 20), 20, 1, 0),
        shuffled(feature(4, 20), 20, 0, 0),
    ]
    assert all(first != other for other in others)
    assert sorted(shuffled(feature(-3, 20), 5, 0, 0)) == list(range(5))  # a planted feature


# answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"explanation": "digits", "deviating": [2], "score": 4}', Rating(4, "digits", (2,))),
        ('```json\n{"score": "5", "deviating": []}\n```', Rating(5, "", ())),
        ('<think>{"score": 1}</think> {"explanation": "a\\nb", "score": 3.0}', Rating(3, "a b", ())),
        ('Say {x}: {"score": 2, "deviating": [3, 1, 3]} done', Rating(2, "", (1, 3))),
        ("Explanation: years. Score: 4", Rating(4, "Explanation: years. Score: 4", ())),
        ("**Score:** 3.", Rating(3, "**Score:** 3.", ())),
    ],
)
def test_a_rating_is_read(text, expected):
    assert rating(Answer(text), 5) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I would say five",
        '{"score": 0}',
        '{"score": 6}',
        '{"score": 3.5}',
        '{"score": true}',
        '{"score": null}',
        '{"score": 4, "deviating": [6]}',
        '{"score": 4, "deviating": "none"}',
        '{"score": 4, "explanation": ["x"]}',
        "Score: 4 or 5",
        "Score: 10",
        "Score: 3.5",
        "Score: 1-5",
        "score 4, then again score 2",
        '<think>{"score": 5}',
        "[" * 100_000,
        '{"a":' * 50_000,
    ],
)
def test_what_is_no_rating_is_never_a_number(text):
    with pytest.raises(Unreadable):
        rating(Answer(text), 5)


@given(st.text())
def test_any_text_is_a_rating_or_unreadable(text):
    with suppress(Unreadable):
        assert rating(Answer(text), 5).score in range(1, 6)


def test_examples_are_read():
    assert active(Answer('{"active": [1, 3]}'), 3) == {1, 3}
    assert active(Answer('{"active": []}'), 3) == frozenset()
    assert intruder(Answer('It is {"intruder": "2"}'), 5) == 2
    for read, text in ((active, '{"active": [4]}'), (active, "1, 3"), (intruder, '{"intruder": 9}'), (intruder, "2")):
        with pytest.raises(Unreadable):
            read(Answer(text), 3)


# a judge behind a server


def test_a_verdict_names_ranks_not_the_order_shown():
    def script(body, n):
        examples = shown(body)
        wrong = [i for i, line in enumerate(examples, 1) if "rank2" in line or "rank4" in line]
        return rated(4, tuple(wrong), "all but two")

    with serve(script) as served:
        judge = judge_at(served)
        assert isinstance(judge, Judge)
        found = list(judge.verdicts([feature(i) for i in range(6)], n_contexts=5))
        again = next(iter(judge.verdicts([feature(0)], n_contexts=5, repeat=1)))
    assert [v.feature for v in found] == list(range(6))
    assert {v.deviating for v in (*found, again)} == {(2, 4)}
    assert all((v.score, v.explanation, v.n_contexts, v.reason) == (4.0, "all but two", 5, None) for v in found)
    orders = {tuple(shown(body)) for body in served.bodies if "feature0" in body["messages"][1]["content"]}
    assert len(orders) == 2  # another order in the repeat
    assert found[0].details == {"prompt_tokens": 100, "completion_tokens": 10}


def test_failures_are_data_and_counted():
    def script(body, n):
        text = body["messages"][1]["content"]
        if "feature0" in text:
            return said(None, refusal="no")
        return said("well") if "feature1" in text else rated(2)

    with serve(script) as served:
        judge = judge_at(served)
        found = list(judge.verdicts([feature(i) for i in range(3)] + [feature(9, 0)], n_contexts=5))
    assert [v.score for v in found] == [None, None, 2.0, None]
    assert [v.reason for v in found] == [
        "refused: no",
        "unreadable: no JSON object with a score",
        None,
        "no contexts",
    ]
    assert (judge.asker.usage.refused, judge.asker.usage.unreadable) == (1, 1)
    assert len(served.bodies) == 5


def test_a_record_gives_the_same_verdicts_without_a_server(tmp_path):
    features = [feature(i) for i in range(4)]
    with serve(lambda body, n: rated(1 + n % 5, (1,))) as served:
        cache = Cache(tmp_path / "cache.sqlite")
        judge = judge_at(served, cache)
        found = [list(judge.verdicts(features, n_contexts=5, repeat=r)) for r in (0, 1)]
        cache.close()
    replay = Replay(tmp_path / "cache.sqlite")
    judge = RubricJudge(Asker(replay), "tiny")
    assert [list(judge.verdicts(features, n_contexts=5, repeat=r)) for r in (0, 1)] == found
    with pytest.raises(UserError, match="no answer of tiny"):
        list(judge.verdicts([feature(5)], n_contexts=5))
    replay.close()


# a model on this machine


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> LocalHF:
    folder = tmp_path_factory.mktemp("local")
    return LocalHF(tiny_tokenizer(tiny_model(folder, "qwen2", max_position_embeddings=2600)))


def test_the_expected_score_is_that_of_the_whole_models_logits(local):
    request = rubric_request(list(feature(1, 5).contexts), prompts.SCORE_FORM, {}, 0)
    distribution, mass = local.scores(request.messages)
    lm = local._lm
    messages = [dict(m) for m in request.messages]
    text = lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([lm.tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        p = lm.model(ids).logits[0, -1].double().softmax(-1)
    digits = p[[lm.tokenizer.convert_tokens_to_ids(d) for d in "12345"]]  # bytes: a space is a token of its own
    assert mass == pytest.approx(float(digits.sum()), rel=1e-4)
    assert distribution == pytest.approx((digits / digits.sum()).tolist(), rel=1e-4)
    judge = LocalJudge.of(local)
    (verdict,) = judge.verdicts([feature(1, 5)], n_contexts=5)
    assert isinstance(judge, Judge)
    assert sum(verdict.distribution) == pytest.approx(1)
    assert verdict.score == pytest.approx(sum(p * k for k, p in enumerate(verdict.distribution, 1)))
    assert verdict.details["digit_mass"] < 0.5
    (again,) = judge.verdicts([feature(1, 5)], n_contexts=5)
    (other,) = judge.verdicts([feature(1, 5)], n_contexts=5, repeat=1)
    assert again == verdict != other


def test_a_prompt_that_is_too_long_has_no_score_but_a_reason(local):
    long = replace(feature(1, 5), contexts=tuple(replace(c, tokens=("x" * 900,) * 3) for c in feature(1, 5).contexts))
    (verdict,) = LocalJudge.of(local).verdicts([long], n_contexts=5)
    assert verdict.score is None
    assert "longer than the context" in verdict.reason
    (nothing,) = LocalJudge.of(local).verdicts([feature(1, 0)], n_contexts=5)
    assert (nothing.score, nothing.reason) == (None, "no contexts")


def test_a_model_without_a_chat_template_is_no_judge(tmp_path):
    folder = tiny_tokenizer(tiny_model(tmp_path))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        LocalHF(folder)


# chatsae judge


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return plain_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory) -> Path:
    """A run whose features are found."""
    path = planted_run(tmp_path_factory.mktemp("world") / "here", model)
    assert main(["features", str(path)]) == 0
    return path


def openai(run: Path, url: str, *flags: str) -> list[str]:
    known = ["--judge", "openai", "--model", "org/tiny:1", "--base-url", url, "--contexts", "5"]
    return ["judge", str(run), *known, *flags]


def by_content(body: dict, n: int) -> Reply:
    """A score that follows from the prompt."""
    return rated(1 + sum(map(ord, "".join(sorted(shown(body))))) % 5)


def test_the_pattern_judge_runs_from_the_command_line(run, capsys):
    assert main(["judge", str(run), "--contexts", "5", "--repeat", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[NAME]
    assert found == read_judgements(run, NAME)[0]
    assert json.loads((run / "judge" / NAME / "pattern-5.json").read_text()) == found
    scores = {v["feature"]: v["score"] for v in found["verdicts"]}
    assert scores[0] == 5  # <|im_end|>
    assert found["agreement"][0]["exact"]["share"] == 1
    assert [v["score"] for v in found["repeats"][0]] == [v["score"] for v in found["verdicts"]]
    assert main(["judge", str(run), "--contexts", "5", "--features", "2"]) == 0
    assert "pattern, 5 contexts" in capsys.readouterr().out
    assert len(read_judgements(run, NAME)[0]["verdicts"]) == 2


def test_a_server_judges_once_and_a_record_replays_it(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serve(by_content) as served:
        command = openai(run, served.url, "--api-key-env", "JUDGE_KEY", "--repeat", "2")
        assert main([*command, "--dry-run", "--json"]) == 0
        expected = json.loads(capsys.readouterr().out)[NAME]
        assert not served.bodies
        prices = ["--price-in", "2", "--price-out", "10"]
        assert main([*command, *prices, "--json"]) == 0
        captured = capsys.readouterr()
        first = json.loads(captured.out)[NAME]
        assert len(served.bodies) == expected["calls"] > 0
        assert f"{expected['calls']:,} calls (0 answers from the cache)" in captured.err
        assert f"${expected['calls'] * 300e-6:,.4f}" in captured.err
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[NAME] == first
        assert len(served.bodies) == expected["calls"]
        assert main([*command, "--dry-run"]) == 0
        assert re.search(rf"{NAME} │\s+0 │\s+{expected['calls']} ", capsys.readouterr().out)
    assert (run / "judge" / NAME / "org-tiny-1-5.json").exists()
    replay = ["--judge", f"replay:{run / 'judge' / 'cache.sqlite'}", "--contexts", "5", "--repeat", "2", "--json"]
    assert main(["judge", str(run), *replay]) == 0
    again = json.loads(capsys.readouterr().out)[NAME]
    for part in ("verdicts", "repeats"):
        strip = [json.dumps(found[part]).replace("replay-", "") for found in (first, again)]
        assert strip[0] == strip[1]
    assert again["summary"] == first["summary"]
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_a_key_is_in_no_output_whatever_happens(run, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for status in (401, 400):
        with serve(lambda body, n, status=status: Reply({"error": {"message": f"bad {KEY}"}}, status)) as served:
            assert main(openai(run, served.url, "--api-key-env", "JUDGE_KEY", "--seed", str(status))) == 2
        captured = capsys.readouterr()
        assert f"status {status}: bad [redacted]" in captured.err
        assert KEY not in captured.err + captured.out


def test_a_budget_stops_cleanly_and_the_same_command_goes_on(run, capsys):
    with serve(by_content) as served:
        command = openai(run, served.url, "--seed", "7", "--price-in", "1", "--price-out", "1")
        assert main([*command, "--budget", "0.004"]) == 2
        told = capsys.readouterr().err
        assert "the budget of $0.0040 ends here" in told
        stopped = len(served.bodies)
        assert f"{stopped:,} calls (0 answers from the cache)" in told
        assert main([*command, "--budget", "10"]) == 0
        asked = [json.dumps(body, sort_keys=True) for body in served.bodies]
        assert 0 < stopped < len(asked) == len(set(asked))


def test_kill_9_and_the_same_command_asks_only_what_is_missing(run, capsys):
    with serve(by_content) as served:
        command = openai(run, served.url, "--seed", "11", "--concurrency", "1")
        code = (
            "import os, signal\n"
            "from chatsae.features.judge.cache import Cache\n"
            "put, n = Cache.put, []\n"
            "def killed(self, *args):\n"
            "    put(self, *args)\n"
            "    n.append(1)\n"
            "    if len(n) == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
            "Cache.put = killed\n"
            "from chatsae.cli import main\n"
            f"main({command!r})\n"
        )
        killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert len(served.bodies) == 9
        assert main(command) == 0
        asked = [json.dumps(body, sort_keys=True) for body in served.bodies]
        assert 9 < len(asked) == len(set(asked))
    db = sqlite3.connect(run / "judge" / "cache.sqlite")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "oracle"], "--judge oracle is none of pattern, openai, local, replay:FILE"),
        (["--judge", "openai"], "--judge openai needs --model"),
        (["--judge", "local"], "--judge local needs --model"),
        (["--judge", "replay:nothing"], "nothing does not exist"),
        (["--judge", "openai", "--model", "m", "--budget", "1"], "--budget needs --price-in"),
        (["--price-in", "1"], "--price-in and --price-out go together"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--budget", "nan"], "--budget must be at least 0"),
        (["--judge", "openai", "--model", "m", "--params", "[]"], "--params must be a JSON object"),
        (
            ["--judge", "openai", "--model", "m", "--params", '{"api_key": "x"}'],
            "--params holds api_key; a key",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_flag(run, flags, message, capsys):
    assert main(["judge", str(run), *flags]) == 2
    assert message in capsys.readouterr().err


def test_names_of_models_are_names_of_files(tmp_path):
    assert file_name("org/Model-7B:free") == "org-Model-7B-free"
    assert file_name(f"{tmp_path}/tiny-chat/") == "tiny-chat"
    assert file_name("../..") == "model"
