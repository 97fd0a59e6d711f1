"""The client against a real server on loopback: errors, pauses, crowds, refusals; and the key, which goes nowhere."""

import email.utils
import json
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from chatsae.errors import UserError
from chatsae.features.judge.asking import Asker, BudgetError, Prices, Unreadable, estimate
from chatsae.features.judge.cache import Cache, Replay
from chatsae.features.judge.client import Answer, Request
from chatsae.features.judge.gate import ClosedError, Gate
from chatsae.features.judge.openai import OpenAICompat, Retry, retry_after
from judge_server import Reply, Served, rated, said, serve

KEY = "sk-test-0123456789abcdef"
QUICK = Retry(attempts=4, first=0.01, longest=0.02)


def asked(text: str = "hello", repeat: int = 0) -> Request:
    return Request(({"role": "user", "content": text},), {"temperature": 0.1, "max_tokens": 20}, repeat)


def client(served: Served, **options) -> OpenAICompat:
    made = OpenAICompat(served.url, "tiny", **{"retry": QUICK, **options})
    served.clients.append(made)
    return made


def test_an_answer_comes_back_with_its_tokens(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    with serve(lambda body, n: said("fine")) as served:
        answer = client(served, api_key_env="JUDGE_KEY", headers={"X-Team": "judges"}).complete(asked())
    assert answer == Answer("fine", None, "stop", 100, 10)
    (body,), (headers,) = served.bodies, served.headers
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.1,
        "max_tokens": 20,
    }
    assert (headers["Authorization"], headers["X-Team"]) == (f"Bearer {KEY}", "judges")


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_what_may_pass_is_asked_again(status):
    with serve(lambda body, n: said("fine") if n else Reply({"error": {"message": "later"}}, status)) as served:
        assert client(served).complete(asked()).text == "fine"
    assert len(served.bodies) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_does_not_pass_fails_at_once_with_the_servers_text(status, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    error = {"error": {"message": f"the key {KEY} is not\nvalid " + "." * 470 + KEY}}
    with serve(lambda body, n: Reply(error, status)) as served, pytest.raises(UserError) as raised:
        client(served, api_key_env="JUDGE_KEY").complete(asked())
    assert f"status {status}: the key [redacted] is not valid" in str(raised.value)
    assert "sk-" not in str(raised.value)
    assert len(served.bodies) == 1


def test_retry_after_is_honoured_in_seconds_and_as_a_date():
    with serve(lambda body, n: said("fine") if n else Reply({}, 429, {"Retry-After": "0.4"})) as served:
        assert client(served).complete(asked()).text == "fine"
    assert served.times[1] - served.times[0] >= 0.4
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
    date = email.utils.format_datetime(soon, usegmt=True)
    with serve(lambda body, n: said("fine") if n else Reply({}, 503, {"Retry-After": date})) as served:
        assert client(served).complete(asked()).text == "fine"
    assert datetime.now(UTC) >= soon
    reply = Reply({"error": "daily limit"}, 429, {"Retry-After": "86400"})
    message = r"asks to wait 86,400 s \(daily limit\)"
    with serve(lambda body, n: reply) as served, pytest.raises(UserError, match=message):
        client(served).complete(asked())


def test_a_retry_after_that_says_nothing_is_no_pause():
    now = datetime(2025, 1, 1, tzinfo=UTC)
    assert retry_after("7", now) == 7
    assert retry_after("Wed, 01 Jan 2025 00:01:00 GMT", now) == 60
    assert retry_after("Wed, 01 Jan 2025 00:01:00 -0000", now) == 60
    assert retry_after("Tue, 31 Dec 2024 00:00:00 GMT", now) == 0
    assert retry_after("-3", now) == 0
    for nothing in (None, "soon", "inf", "nan", ""):
        assert retry_after(nothing, now) in (None, 0)


@pytest.mark.parametrize(
    "broken", [b"{not json", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}', b"\xff\xfe"]
)
def test_a_broken_answer_is_asked_again_and_then_given_up(broken):
    with serve(lambda body, n: rated(4) if n else Reply(broken)) as served:
        assert json.loads(client(served).complete(asked()).text)["score"] == 4
    with serve(lambda body, n: Reply(broken)) as served, pytest.raises(UserError, match="no answer in 4 attempts"):
        client(served).complete(asked())
    assert len(served.bodies) == 4


def test_a_slow_server_and_none_at_all_are_errors_in_time():
    given_up = threading.Event()

    def script(body, n):
        if n == 0:
            given_up.wait(600)
            return Reply({})
        given_up.set()
        return said("fine")

    with serve(script) as served:
        assert client(served, timeout=2.0).complete(asked()).text == "fine"
    assert given_up.is_set()
    gone = OpenAICompat(served.url, "tiny", retry=QUICK)
    with pytest.raises(UserError, match="ConnectError"):
        gone.complete(asked())
    gone.close()


def test_back_off_grows_with_jitter():
    pauses = [[Retry().pause(i) for _ in range(50)] for i in range(8)]
    for i, drawn in enumerate(pauses):
        whole = min(60, 2**i)
        assert whole / 2 <= min(drawn) < max(drawn) <= whole


def test_a_crowd_is_bounded_grows_and_shrinks():
    def script(body, n):
        return Reply({}, 429) if n == 60 else Reply(said("x").body, seconds=0.01)

    with serve(script) as served:
        one = client(served, concurrency=4)
        asker = Asker(one, concurrency=4)
        found = list(asker.each(lambda i: asker.ask(asked(str(i))).text, range(100)))
    assert found == ["x"] * 100
    assert 1 < served.highest <= one.gate.highest == 4
    gate = Gate(8)
    turns = []
    for _ in range(40):
        gate.leave(gate.enter())
    assert gate.limit == 8
    turns = [gate.enter() for _ in range(8)]
    for entered in turns:  # refused together: once
        gate.leave(entered, overloaded=True)
    assert gate.limit == 4
    gate.leave(gate.enter(), overloaded=True, pause=0.2)
    assert gate.limit == 2
    start = time.monotonic()
    gate.leave(gate.enter())
    assert time.monotonic() - start >= 0.19
    gate.close()
    with pytest.raises(ClosedError):
        gate.enter()
    with pytest.raises(ClosedError):
        gate.sleep(100.0)


def test_one_error_ends_all_at_once():
    def script(body, n):
        wrong = body["messages"][0]["content"] == "3"
        return Reply({"error": {"message": "no such model"}}, 404) if wrong else Reply({}, 500)

    with serve(script) as served:
        asker = Asker(client(served, concurrency=4, retry=Retry(first=7200.0, longest=7200.0)), concurrency=4)
        start = time.monotonic()
        with pytest.raises(UserError, match="no such model"):
            list(asker.each(lambda i: asker.ask(asked(str(i))), range(4)))  # the first three wait for an hour at least
        assert time.monotonic() - start < 1000


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (said(None, refusal="I cannot help with that"), "I cannot help with that"),
        (Reply({"error": {"message": "filtered", "code": "content_filter"}}, 400), "content filter"),
        (Reply({"choices": [{"finish_reason": "content_filter", "message": {"content": ""}}]}), "content filter"),
    ],
)
def test_a_refusal_is_an_answer(reply, reason):
    with serve(lambda body, n: reply) as served:
        answer = client(served).complete(asked())
    assert reason in answer.refusal


def test_addresses_and_keys_that_cannot_be_are_refused(monkeypatch):
    for url in ("ftp://x/v1", "nothing", "http://", "http://[", ""):
        with pytest.raises(UserError, match="base-url"):
            OpenAICompat(url, "m")
    with pytest.raises(UserError, match="password") as raised:
        OpenAICompat("https://user:secret@host/v1", "m")
    assert "secret" not in str(raised.value)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="JUDGE_KEY is not set"):
        OpenAICompat("http://host/v1", "m", api_key_env="JUDGE_KEY")
    with pytest.raises(UserError, match="takes the name of an environment variable") as raised:
        OpenAICompat("http://host/v1", "m", api_key_env=KEY)
    assert KEY not in str(raised.value)
    monkeypatch.setenv("JUDGE_KEY", "sk-é")
    with pytest.raises(UserError, match="characters that no key has") as raised:
        OpenAICompat("http://host/v1", "m", api_key_env="JUDGE_KEY")
    assert "sk-" not in str(raised.value)


def test_the_key_of_a_request_is_all_it_depends_on():
    base = asked()
    assert base.key("m") == Request(
        ({"content": "hello", "role": "user"},), {"max_tokens": 20, "temperature": 0.1}
    ).key("m")
    others = [asked("hallo"), asked(repeat=1), Request(base.messages, {"temperature": 0.2, "max_tokens": 20})]
    keys = [base.key("m"), base.key("n"), *(each.key("m") for each in others)]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_a_cache_is_only_added_to_and_read_back(tmp_path):
    cache = Cache(tmp_path / "deep" / "cache.sqlite")
    first = Answer("one ⟦é⟧", None, "stop", 5, None)
    cache.put("m", asked(), first)
    cache.put("m", asked(), Answer("other"))
    assert cache.get(asked().key("m")) == first
    assert cache.get(asked().key("n")) is None
    for statement in ("UPDATE answers SET answer = ''", "DELETE FROM answers"):
        with pytest.raises(Exception, match="answers are kept"):
            cache._db.execute(statement)
    assert len(cache) == 1
    cache.close()
    replay = Replay(tmp_path / "deep" / "cache.sqlite")
    assert (replay.model, replay.complete(asked())) == ("m", first)
    with pytest.raises(UserError, match="no answer of m to one of these requests"):
        replay.complete(asked("new"))
    replay.close()


def test_records_that_are_none_are_named(tmp_path):
    with pytest.raises(UserError, match="nothing does not exist"):
        Replay(tmp_path / "nothing")
    (tmp_path / "text").write_text("no database, but a text that is long enough to be one of its headers" * 9)
    with pytest.raises(UserError, match="text cannot be read as recorded answers"):
        Replay(tmp_path / "text")
    with pytest.raises(UserError, match="text cannot be read as recorded answers"):
        Cache(tmp_path / "text")
    cache = Cache(tmp_path / "c")
    for model in ("a", "b"):
        cache.put(model, asked(), Answer(model))
    cache.close()
    with pytest.raises(UserError, match=r"answers of 2 models \(a, b\); name one"):
        Replay(tmp_path / "c")
    with pytest.raises(UserError, match="no answers of 'x'; it has those of a, b"):
        Replay(tmp_path / "c", "x")
    replay = Replay(tmp_path / "c", "b")
    assert replay.complete(asked()).text == "b"
    replay.close()


def test_what_was_asked_is_not_asked_again(tmp_path):
    with serve(lambda body, n: said(body["messages"][0]["content"])) as served:
        for expected in (3, 3):
            cache = Cache(tmp_path / "cache.sqlite")
            asker = Asker(client(served), cache, prices=Prices(2.0, 10.0), concurrency=3)
            assert list(asker.each(asker.ask, [asked(str(i)) for i in range(3)])) == [
                Answer(t, None, "stop", 100, 10) for t in "012"
            ]
            assert len(served.bodies) == expected
            cache.close()
    usage = asker.usage
    assert (usage.calls, usage.cached, usage.cost) == (0, 3, 0)


def test_a_budget_ends_before_it_is_passed(tmp_path):
    prices = Prices(2.0, 10.0)  # 100 tokens in, 10 out: 0.0003 dollars
    with serve(lambda body, n: said("x")) as served:
        cache = Cache(tmp_path / "cache.sqlite")
        asker = Asker(client(served), cache, prices=prices, budget=0.0031, concurrency=4)
        done = []
        with pytest.raises(BudgetError, match=r"\$0.0031 ends here: \$0.00\d+ spent on \d+ calls"):
            done.extend(asker.each(lambda i: asker.ask(asked(str(i))), range(100)))
        assert 5 <= len(served.bodies) == len(cache) == asker.usage.calls <= 10
        assert asker.usage.cost == pytest.approx(0.0003 * asker.usage.calls)
        assert asker.usage.cost <= 0.0031
        again = Asker(client(served), cache, prices=prices, budget=1.0)
        for i in range(12):
            again.ask(asked(str(i)))
        assert len(served.bodies) == 12
        cache.close()
    with pytest.raises(UserError, match="--budget needs --price-in"):
        Asker(client(served), budget=1.0)


def test_an_estimate_counts_what_is_known_once(tmp_path):
    cache = Cache(tmp_path / "c")
    cache.put("m", asked("a"), Answer("x"))
    found = estimate([asked("a"), asked("b" * 300), asked("b" * 300)], "m", cache, Prices(1.0, 2.0))
    assert (found.calls, found.cached, found.prompt_tokens, found.completion_tokens) == (1, 2, 104, 20)
    assert found.cost == pytest.approx((104 + 40) / 1e6)
    cache.close()


def test_what_cannot_be_read_is_asked_once_more_strictly():
    def parse(answer: Answer) -> int:
        if not answer.text.isdigit():
            raise Unreadable("no number")
        return int(answer.text)

    replies = {"good": ["7"], "late": ["well", "8"], "never": ["well", "hm"], "refused": [None, None]}
    seen: Counter[str] = Counter()

    def script(body, n):
        name = body["messages"][-1]["content"].split()[0]
        seen[name] += 1
        text = replies[name][seen[name] - 1]
        return said(text) if text else said(None, refusal="no")

    with serve(script) as served:
        asker = Asker(client(served))
        found = {name: asker.read(asked(name), parse, "A NUMBER!")[:2] for name in replies}
    assert found == {
        "good": (7, None),
        "late": (8, None),
        "never": (None, "unreadable: no number"),
        "refused": (None, "refused: no"),
    }
    assert seen == {"good": 1, "late": 2, "never": 2, "refused": 2}
    assert sum(body["messages"][-1]["content"].endswith("\n\nA NUMBER!") for body in served.bodies) == 3
    assert (asker.usage.reasked, asker.usage.refused, asker.usage.unreadable) == (3, 1, 1)


def test_no_key_in_a_cache_or_an_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serve(lambda body, n: said(f"you sent {KEY}")) as served:
        cache = Cache(tmp_path / "cache.sqlite")
        asker = Asker(client(served, api_key_env="JUDGE_KEY"), cache)
        assert asker.ask(asked()).text == "you sent [redacted]"
        cache.close()
    for path in Path(tmp_path).rglob("*"):
        assert KEY.encode() not in path.read_bytes()
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_no_part_of_a_key_in_what_is_odd_about_an_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    odd = {"choices": [{"finish_reason": f"by {KEY}", "message": {"content": "yes"}}]}
    odd["usage"] = {"prompt_tokens": f"{KEY}", "completion_tokens": True}
    with serve(lambda body, n: Reply(odd)) as served:
        cache = Cache(tmp_path / "cache.sqlite")
        asker = Asker(client(served, api_key_env="JUDGE_KEY"), cache, prices=Prices(1.0, 1.0))
        assert asker.ask(asked()) == Answer("yes", None, "by [redacted]", None, None)
        cache.close()
        assert asker.usage.estimated == 1
    assert KEY.encode() not in (tmp_path / "cache.sqlite").read_bytes()
    broken = Reply(b"x" * 195 + KEY.encode())  # the text is cut inside the key
    with serve(lambda body, n: broken) as served, pytest.raises(UserError) as raised:
        client(served, api_key_env="JUDGE_KEY").complete(asked())
    assert "no chat completion" in str(raised.value)
    assert KEY[:5] not in str(raised.value)
