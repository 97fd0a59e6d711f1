"""Detection and intruders: what is shown, what is right, and windows on which a feature is silent."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatsae.cli import main
from chatsae.features.collect import Reading
from chatsae.features.judge.asking import Asker
from chatsae.features.judge.client import Answer, Request
from chatsae.features.judge.local import LocalHF
from chatsae.features.judge.openai import OpenAICompat
from chatsae.features.judge.tasks import (
    POOL,
    Tasks,
    balanced_accuracy,
    detection_trial,
    fires_in,
    intruder_trial,
    silent_windows,
)
from chatsae.features.patterns.background import random_contexts
from chatsae.features.records import Feature
from chatsae.features.text import TokenText
from chatsae.features.verdict import Verdict
from chatsae.lm.load import LanguageModel
from feature_samples import FIRST, RARE, START, TOKEN, plain_model, planted, planted_run, rendered
from judge_server import Reply, Served, context, rated, said, serve
from test_judge import shown

NAME = "L1-1x-standard"


def sampled(index: int, n: int = 12) -> Feature:
    """A feature that is active on digits: 6 contexts that are its strongest, and `n` others."""
    top = tuple(context(f"digit {i} top{index}", 1, dialogue=f"t{i}") for i in range(6))
    other = tuple(context(f"digit {i} more{index}", 1, dialogue=f"s{i}") for i in range(n))
    seen = (context("digit 9 seen", 1, dialogue="t1"),)
    return Feature(index, 0.01, 5.0, top, (*other, *seen), (), ())


SILENT = [context(f"word{i} without", 0, dialogue=f"q{i}") for i in range(9)]


def test_a_detection_trial_has_as_many_windows_with_as_without():
    trial = detection_trial(sampled(3), SILENT, 6, 0)
    texts = ["".join(c.tokens) for c in trial.contexts]
    assert len(texts) == len(set(texts)) == 10
    assert {i for i, text in enumerate(texts, 1) if "digit" in text} == trial.wanted
    assert len(trial.wanted) == 5
    assert not any("seen" in text or "top" in text for text in texts)  # dialogues that were explained
    assert trial == detection_trial(sampled(3), SILENT, 6, 0)
    assert trial != detection_trial(sampled(3), SILENT, 6, 1)
    assert len(detection_trial(sampled(3, 2), SILENT, 6, 0).contexts) == 4
    assert detection_trial(sampled(3, 0), SILENT, 6, 0) is None
    assert detection_trial(sampled(3), [], 6, 0) is None


def test_an_intruder_is_one_of_five_and_may_stand_anywhere():
    places = set()
    for index in range(40):
        trial = intruder_trial(sampled(index), SILENT, 6, 0)
        (place,) = trial.wanted
        places.add(place)
        assert ["without" in "".join(c.tokens) for c in trial.contexts] == [i == place for i in range(1, 6)]
    assert places == {1, 2, 3, 4, 5}
    assert intruder_trial(sampled(0), SILENT, 3, 0) is None
    assert intruder_trial(sampled(0), [], 6, 0) is None


@given(st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n)), st.integers(1, n - 1))))
def test_balanced_accuracy_is_that_of_its_definition(case):
    n, named, k = case
    wanted = frozenset(range(1, k + 1))
    truth = np.array([i in wanted for i in range(1, n + 1)])
    guess = np.array([i in named for i in range(1, n + 1)])
    expected = (guess[truth].mean() + (~guess)[~truth].mean()) / 2
    assert balanced_accuracy(frozenset(named), wanted, n) == pytest.approx(expected)


def answering(body: dict, n: int) -> Reply:
    """What a judge would say that knows digits."""
    lines = [line.replace("⟦", "").replace("⟧", "") for line in shown(body)]
    digit = [i for i, line in enumerate(lines, 1) if "digit" in line]
    if '"active"' in body["messages"][1]["content"]:
        assert body["messages"][1]["content"].startswith("Explanation: digits\n")
        return said(json.dumps({"active": digit}))
    return said(json.dumps({"intruder": next(i for i in range(1, 6) if i not in digit)}))


def tasks(served: Served) -> Tasks:
    client = OpenAICompat(served.url, "tiny")
    served.clients.append(client)
    return Tasks(Asker(client, concurrency=3))


def test_a_judge_that_knows_is_always_right_and_one_that_guesses_is_not():
    features = [sampled(i) for i in range(8)]
    verdicts = [Verdict(i, "x", 6, 0, 4.0, explanation="digits") for i in range(8)]
    silent = dict.fromkeys(range(8), SILENT)
    with serve(answering) as served:
        asked = tasks(served)
        told = asked.detection(features, verdicts, silent)
        found = asked.intruder(features, 6, silent)
        planned = list(asked.requests(["detection", "intruder"], features, 6, silent))
    assert (told["n"], told["mean"], told["interval"], told["without_score"]) == (8, 1.0, [1.0, 1.0], {})
    assert found["right"]["share"] == 1
    assert found["chance"] == pytest.approx(0.2)
    assert len(planned) == len(served.bodies) == 16
    assert all("⟦" not in line for body in served.bodies[:8] for line in shown(body))  # no mark tells the window
    with serve(lambda body, n: said('{"active": []}')) as served:
        assert tasks(served).detection(features, verdicts, silent)["mean"] == 0.5


def test_what_has_no_score_is_counted_by_reason():
    features = [sampled(0), sampled(1), sampled(2, 0), sampled(3)]
    verdicts = [Verdict(i, "x", 6, 0, 4.0, explanation="digits") for i in range(4)]
    verdicts[1] = replace(verdicts[1], explanation="")
    silent = dict.fromkeys(range(4), SILENT)
    with serve(lambda body, n: said("well")) as served:
        told = tasks(served).detection(features, verdicts, silent)
        found = tasks(served).intruder(features, 6, {**silent, 0: []})
    unreadable = "unreadable: no JSON object with a"
    assert told["without_score"] == {
        f"{unreadable} list of active examples": 2,
        "no explanation": 1,
        "too few windows": 1,
    }
    assert (told["n"], told["mean"], told["interval"]) == (0, None, None)
    assert found["without_score"] == {"too few windows": 1, f"{unreadable}n intruder": 3}
    assert [row["score"] for row in found["scores"]] == [None] * 4
    assert found["right"]["of"] == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return plain_model(tmp_path_factory.mktemp("model"))


def test_silent_windows_are_those_without_the_token(model):
    lm = LanguageModel(model, [1], head=True)
    tokens, sae = rendered(lm, 30), planted(LanguageModel(model, [1], head=True))
    windows = random_contexts(tokens, TokenText(lm.tokenizer), n=60, window=16)
    order = [RARE, START, FIRST, TOKEN]
    fires = fires_in(sae, lm, tokens, Reading.of(lm), order, windows)
    assert fires.any(axis=0).all()
    assert not fires.all(axis=0).any()
    for window, (rare, start, first, end) in zip(windows, fires.tolist(), strict=True):
        assert rare == ("Z" in window.tokens)
        assert start == ("<|im_start|>" in window.tokens)
        assert end == ("<|im_end|>" in window.tokens)
        assert first == (window.start == 0)
    features = [Feature(i, 0.1, 1.0, (), (), (), ()) for i in order]
    silent = silent_windows(sae, lm, tokens, Reading.of(lm), features, windows)
    assert len(windows) <= POOL
    for column, index in enumerate(order):
        assert silent[index] == [w for w, row in zip(windows, fires.tolist(), strict=True) if not row[column]]


def test_tasks_run_from_the_command_line(model, tmp_path, capsys):
    run = planted_run(tmp_path / "here", model)

    def script(body: dict, n: int) -> Reply:
        form = body["messages"][1]["content"]
        if '"active"' in form:
            return said('{"active": [1]}')
        return said('{"intruder": 2}') if '"intruder"' in form else rated(3)

    with serve(script) as served:
        command = ["judge", str(run), "--judge", "openai", "--model", "tiny", "--base-url", served.url]
        command += ["--contexts", "5", "--also", "detection", "intruder"]
        assert main([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)[NAME]
        assert {row["feature"] for row in found["detection"]["scores"]} == {v["feature"] for v in found["verdicts"]}
        assert 0 < found["intruder"]["right"]["of"] <= len(found["verdicts"])
        n = len(served.bodies)
        assert main(command) == 0
        assert "balanced accuracy" in capsys.readouterr().out
        assert len(served.bodies) == n
    assert main(["judge", str(run), "--also", "intruder"]) == 2
    assert "--also needs a language model" in capsys.readouterr().err
    command = ["judge", str(run), "--judge", "local", "--model", str(model), "--contexts", "5", "--json"]
    assert main([*command, "--also", "detection"]) == 0
    local = json.loads(capsys.readouterr().out)[NAME]
    assert all("longer than the context" in v["reason"] for v in local["verdicts"])  # of 256 tokens
    assert local["summary"]["n"] == 0
    assert local["detection"]["without_score"] == {"no explanation": len(local["verdicts"])}


def test_a_local_model_explains_where_detection_needs_it(model, tmp_path, capsys, monkeypatch):
    class Told(LocalHF):
        """Says what it is told; its scores are the model's own."""

        def complete(self, request: Request) -> Answer:
            form = request.messages[-1]["content"]
            return Answer('{"active": [1, 2]}' if '"active"' in form else '{"explanation": "ends", "score": 4}')

    monkeypatch.setattr("chatsae.features.judge.command.LocalHF", Told)
    run = planted_run(tmp_path / "here", model)
    command = ["judge", str(run), "--judge", "local", "--model", str(model), "--contexts", "5", "--features", "3"]
    assert main([*command, "--controls", "0", "--also", "detection", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[NAME]
    assert [v["explanation"] for v in found["verdicts"]] == [""] * 3
    assert set(found["detection"]["explanations"].values()) == {"ends"}
    rows = found["detection"]["scores"]
    assert found["detection"]["n"] == sum(row["score"] is not None for row in rows) > 0
    assert all(row["reason"] in (None, "too few windows") for row in rows)
