"""Answers that share forwards are the answers they get alone; text comes in whole characters; nothing odd passes."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatsae.lm.load import LanguageModel
from chatsae.serve import rows as rows_module
from chatsae.serve.answer import Answer, Done, Event, Failed, Piece
from chatsae.serve.engine import Engine
from chatsae.serve.errors import ApiError, as_json
from chatsae.serve.probe import measure_margin
from chatsae.serve.requests import chat_request, features_request, parse
from chatsae.serve.rows import Rows
from chatsae.serve.sampling import Dice, Sampling, choose, greedy
from chatsae.serve.text import Spelling
from chatsae.steering.generate import generate
from chatsae.steering.rows import row_of_prompt
from chatsae.steering.spec import SteerSpec, Where
from serve_process import PATIENCE, wait_until
from tiny_models import tiny_model, tiny_tokenizer

LAYER = 3
PROMPTS = ["What is a list?", "Hi", "Who are you, and what do you know about reading files?", "What does os.path do?"]


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    """In float64, so that what differs by rounding differs by 1e-12."""
    lm = LanguageModel("demo", [LAYER], head=True)
    lm.model.double()
    lm.dtype = torch.float64
    return lm


def vector(lm: LanguageModel, seed: int = 0) -> torch.Tensor:
    return torch.randn(lm.d_in, generator=torch.Generator().manual_seed(seed))


def specs_of(lm: LanguageModel) -> list[list[SteerSpec]]:
    """Steering for each of the prompts."""
    return [
        [SteerSpec(vector=vector(lm), layer=LAYER, strength=30.0)],
        [],
        [
            SteerSpec(vector=vector(lm, 1), layer=LAYER, op="ablate", where=Where(phase="prompt", kinds=("content",))),
            SteerSpec(vector=vector(lm, 2), layer=2, strength=20.0, schedule="decay", schedule_tokens=3),
        ],
        [
            SteerSpec(
                vector=vector(lm, 3), layer=LAYER, strength=25.0, where=Where(phase="generated", positions=(40, 41))
            )
        ],
    ]


def answers_of(
    lm: LanguageModel, samplings: Sequence[Sampling] | None = None, n: int = 9
) -> tuple[list[Answer], list[list[Event]]]:
    events: list[list[Event]] = [[] for _ in PROMPTS]
    found = []
    for i, (prompt, specs) in enumerate(zip(PROMPTS, specs_of(lm), strict=True)):
        sampling = Sampling(temperature=0.0) if samplings is None else samplings[i]
        options: dict[str, Any] = {"specs": specs, "sampling": sampling, "max_new_tokens": n + i}
        found.append(Answer(row_of_prompt(prompt, lm.tokenizer), lm.tokenizer, events[i].append, **options))
    return found, events


def run(rows: Rows, waiting: Sequence[Answer], ends: frozenset[int], every: int = 2) -> None:
    """Answer all; one more joins every few steps, so that they come and go at different times."""

    def take(tokens: list[tuple[Answer, int]]) -> None:
        for answer, token in tokens:
            if token >= 0:
                answer.take(token, ends)

    waiting, step = list(waiting), 0
    while waiting or rows.answers:
        take(rows.step())
        if waiting and step % every == 0:
            take(rows.join([waiting.pop(0)]))
        rows.leave()
        step += 1


@pytest.mark.parametrize("kind", ["cache", "anew", "alone"])
def test_answers_that_come_and_go_are_those_of_each_alone(
    demo: LanguageModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Rows of a plain cache are moved; of another they are read anew; or each token is read alone: all the same."""
    if kind == "anew":
        monkeypatch.setattr(rows_module, "_plain", lambda cache: False)
    answers, events = answers_of(demo)
    ends = demo.stop_ids
    rows = Rows(demo, None if kind == "alone" else 0.0)
    run(rows, answers, ends)
    assert rows.alone == (rows.tokens if kind == "alone" else 0)
    for i, (answer, specs) in enumerate(zip(answers, specs_of(demo), strict=True)):
        expected = generate(demo, [PROMPTS[i]], [specs], max_new_tokens=9 + i, use_cache=False, test=False)
        (completion,) = expected.completions
        assert tuple(answer.new) == completion.token_ids
        assert "".join(e.text for e in events[i] if isinstance(e, Piece)) == completion.text
        counted = generate(demo, [PROMPTS[i]], [specs], max_new_tokens=9 + i, test=False).acted
        done = events[i][-1]
        assert done == Done(completion.finish_reason, completion.n_prompt, len(answer.new), counted)
    plain = generate(demo, PROMPTS[:1], max_new_tokens=9).completions[0]
    assert plain.token_ids != tuple(answers[0].new)


@pytest.mark.parametrize("family", ["mistral", "phi3-longrope"])
def test_other_caches_and_positions_give_the_same(tmp_path: Path, family: str) -> None:
    """A window over the last 16 tokens; and positions that depend on the longest row, so that rows stay alone."""
    lm = LanguageModel(tiny_tokenizer(tiny_model(tmp_path, family)), [1], head=True)
    margin, why = measure_margin(lm)
    assert margin == (1e-3 if family == "mistral" else None), why
    waiting = [
        Answer(
            row_of_prompt("hello " * n, lm.tokenizer), lm.tokenizer, lambda event: None, specs=specs, max_new_tokens=8
        )
        for n, specs in zip((1, 4, 2), ([SteerSpec(vector=vector(lm), layer=1, strength=2.0)], [], []), strict=True)
    ]
    engine = Engine(lm, margin)
    engine.start()
    engine.call(lambda: [engine.submit(answer) for answer in waiting[:2]]).result(PATIENCE)
    wait_until(lambda: len(waiting[0].new) > 2)
    engine.submit(waiting[2])
    engine.drain(PATIENCE)
    engine.join()
    assert not engine.rows.alone or margin is None
    for n, answer in zip((1, 4, 2), waiting, strict=True):
        (found,) = generate(
            lm, ["hello " * n], [answer.specs], max_new_tokens=8, use_cache=False, test=False
        ).completions
        assert tuple(answer.new) == found.token_ids


def test_padding_leaves_with_the_row_that_needed_it(demo: LanguageModel) -> None:
    answers, _ = answers_of(demo)
    rows = Rows(demo, 0.0)
    rows.join(answers)
    part = rows._part
    assert part is not None
    longest = max(len(answer.row) for answer in answers)
    assert part.ids.shape == (4, longest + 1)
    answers[2].over = True
    rows.leave()
    part = rows._part
    assert part is not None
    shorter = max(len(answer.row) for answer in answers if not answer.over)
    assert part.ids.shape == (3, shorter + 1)
    assert part.cache.layers[0].keys.shape[2] == shorter < longest


SAMPLED = [
    Sampling(temperature=0.8, seed=1),
    Sampling(temperature=1.0, top_p=0.9, seed=2),
    Sampling(temperature=0.0),
    Sampling(temperature=1.3, top_p=0.7, seed=3),
]


class Shaken:
    """Logits of forwards that rows share are moved by up to `size`, as rounding would, only more."""

    def __init__(self, lm: LanguageModel, size: float) -> None:
        self.lm, self.size, self.generator = lm, size, torch.Generator().manual_seed(7)

    def __enter__(self) -> None:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
            if kwargs["use_cache"]:
                noise = torch.rand(out.logits.shape, generator=self.generator, dtype=torch.float64)
                out.logits = out.logits + self.size * (2 * noise - 1)
            return out

        self.handle = self.lm.model.register_forward_hook(hook, with_kwargs=True)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def test_what_sharing_changes_changes_no_answer(demo: LanguageModel) -> None:
    def texts(margin: float | None, size: float) -> tuple[list[list[int]], Rows]:
        answers, _ = answers_of(demo, SAMPLED, n=14)
        rows = Rows(demo, margin)
        with Shaken(demo, size):
            run(rows, answers, demo.stop_ids)
        return [answer.new for answer in answers], rows

    alone, _ = texts(None, 0.0)
    shaken, rows = texts(0.8, 0.4)
    assert shaken == alone
    assert 0 < rows.alone < rows.tokens
    assert 0.3 < rows.worst <= 0.4
    assert rows.margin == 0.8
    assert texts(0.0, 0.4)[0] != alone  # that much does change them where nobody looks
    _, rows = texts(0.1, 0.4)
    assert rows.margin is not None  # a margin that is too small is raised
    assert rows.margin > 0.8


# --- sampling ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.sampled_from([1e-3, 0.05, 0.4]),
    st.sampled_from([12, 12, 12, 2000]),  # the last one more than are sorted at first
)
@settings(max_examples=150, deadline=None)
def test_a_safe_token_stays_when_all_logits_move(
    seed: int, temperature: float, top_p: float, margin: float, size: int
) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    logits = (3 if size == 12 else 1) * torch.randn(size, generator=generator).double()
    noise = Dice(sampling).throw(size)
    token, safe = choose(logits, sampling, noise, margin)
    assert token == slow(logits, sampling, noise)
    for _ in range(5):
        moved = logits + margin / 2 * (2 * torch.rand(size, generator=generator) - 1)
        assert not safe or slow(moved, sampling, noise) == token
    if temperature == 0:
        assert greedy(logits[None], margin) == [(token, safe)]


def slow(logits: torch.Tensor, sampling: Sampling, noise: torch.Tensor | None) -> int:
    """The token by the definition."""
    values = logits.tolist()
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if noise is None:
        return order[0]
    probability = (logits / sampling.temperature).softmax(0).tolist()
    nucleus, total = [], 0.0
    for i in order:
        if total < sampling.top_p or sampling.top_p >= 1 or not nucleus:
            nucleus.append(i)
        total += probability[i]
    return max(nucleus, key=lambda i: values[i] + sampling.temperature * float(noise[i]))


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0]), 1500
    for sampling in (Sampling(temperature=0.7, seed=4), Sampling(temperature=1.0, top_p=0.8, seed=5)):
        dice = Dice(sampling)
        drawn = torch.tensor([choose(logits, sampling, dice.throw(4))[0] for _ in range(n)]).bincount(minlength=4) / n
        p = (logits / sampling.temperature).softmax(0)
        if sampling.top_p < 1:  # 0.64 + 0.24 are the first to reach 0.8
            p = torch.where(torch.arange(4) < 2, p, 0.0)
        p /= p.sum()
        assert (drawn - p).abs().max() < 4 * (0.25 / n) ** 0.5
    assert Dice(SAMPLED[0]).throw(9).tolist() == Dice(SAMPLED[0]).throw(9).tolist()  # type: ignore[union-attr]


# --- text -------------------------------------------------------------------------------------------------------------


@given(
    st.one_of(st.lists(st.integers(0, 4095), max_size=40), st.text(max_size=12)),
    st.lists(st.text("abte n", min_size=1, max_size=4), max_size=2),
)
@example(" a ", ["a", " a "])
@example("naïve 日本語 👩‍🔬 ende", ["nde"])
@settings(max_examples=120, deadline=None)
def test_pieces_are_the_text_up_to_the_first_stop(
    demo: LanguageModel, given: list[int] | str, stops: list[str]
) -> None:
    tokenizer = demo.tokenizer
    ids = tokenizer(given, add_special_tokens=False)["input_ids"] if isinstance(given, str) else given
    whole = str(tokenizer.decode(ids, skip_special_tokens=True))
    found = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    _, cut = min(found, default=(0, len(whole)))  # before the stop string that is complete first
    spelling, pieces = Spelling(tokenizer, stops), []
    for token in ids:
        pieces.append(spelling.add(token))
        assert whole[:cut].startswith("".join(pieces))  # nothing is said that is taken back
        if spelling.stopped:
            break
    else:
        pieces.append(spelling.end())
    assert "".join(pieces) == whole[:cut]
    assert spelling.stopped == bool(found)


# --- requests ---------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
NAMES = ["model", "messages", "temperature", "top_p", "stop", "seed", "max_tokens", "stream", "stream_options", "n"]
NAMES += ["steering", "logit_bias", "text", "sae", "k", "raw", "user", "tools", "response_format"]


def refusal(read: Callable[[dict[str, Any], str], object], body: bytes) -> ApiError | None:
    try:
        read(parse(body), "m")
    except ApiError as error:
        return error
    return None


@given(st.dictionaries(st.sampled_from(NAMES), VALUES), st.binary(max_size=20))
@settings(max_examples=80, deadline=None)
def test_any_request_is_taken_or_refused(fields: dict[str, Any], junk: bytes) -> None:
    good: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    for data in (good | fields, fields, {"model": "m", "text": "x"} | fields):
        for read in (chat_request, features_request):
            error = refusal(read, json.dumps(data).encode())
            if error is not None:
                assert error.status in (400, 404)
                assert json.loads(as_json(error.facts()))["error"]["message"]
    with pytest.raises(ApiError):
        chat_request(parse(junk), "m")


# --- engine -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(demo: LanguageModel) -> Iterator[Engine]:
    engine = Engine(demo, 1e-9, most=3)
    engine.start()
    yield engine
    engine.drain(0.0)
    engine.join()


def test_more_than_fit_wait_and_get_the_same(demo: LanguageModel, engine: Engine) -> None:
    answers, events = answers_of(demo)
    for answer in answers:
        engine.submit(answer)
    wait_until(lambda: all(answer.over for answer in answers))
    for i, specs in enumerate(specs_of(demo)):
        (completion,) = generate(demo, [PROMPTS[i]], [specs], max_new_tokens=9 + i, test=False).completions
        assert tuple(answers[i].new) == completion.token_ids
        assert isinstance(events[i][-1], Done)


def test_a_client_that_goes_away_frees_its_row(demo: LanguageModel, engine: Engine) -> None:
    endless, said = copy.copy(row_of_prompt("Hi", demo.tokenizer)), []
    answers = [Answer(endless, demo.tokenizer, said.append, max_new_tokens=100_000) for _ in range(3)]
    engine._ends = frozenset()  # nothing but leaving ends them
    for answer in answers:
        engine.submit(answer)
    wait_until(lambda: all(len(answer.new) > 2 for answer in answers))
    assert engine.counts() == {"running": 3, "waiting": 0}
    last = Answer(endless, demo.tokenizer, said.append, max_new_tokens=3)
    engine.submit(last)
    answers[1].cancelled = True
    wait_until(lambda: last.over)
    answers[0].cancelled = answers[2].cancelled = True
    wait_until(lambda: engine.counts() == {"running": 0, "waiting": 0})


def test_what_breaks_ends_its_answers_and_nothing_else(
    demo: LanguageModel, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(module: Any, args: Any, out: Any) -> None:
        raise RuntimeError("a kernel is broken")

    answers, events = answers_of(demo)
    handle = demo.model.register_forward_hook(broken)
    engine.submit(answers[0])
    wait_until(lambda: answers[0].over)
    handle.remove()
    (event,) = events[0]
    assert isinstance(event, Failed)
    assert event.error.status == 500
    assert "kernel" not in event.error.message
    assert "a kernel is broken" in capsys.readouterr().err
    huge = SteerSpec(vector=vector(demo), layer=LAYER, strength=1e300)
    failed: list[Event] = []
    engine.submit(Answer(answers[1].row, demo.tokenizer, failed.append, specs=[huge]))
    engine.submit(answers[1])
    wait_until(lambda: answers[1].over and bool(failed))
    assert isinstance(failed[0], Failed)
    assert failed[0].error.code == "not_finite"
    (completion,) = generate(demo, PROMPTS[1:2], max_new_tokens=10, test=False).completions
    assert tuple(answers[1].new) == completion.token_ids
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(PATIENCE)
    assert engine.call(lambda: 7).result(PATIENCE) == 7


def test_one_that_cannot_be_read_does_not_take_others_with_it(demo: LanguageModel, engine: Engine) -> None:
    def broken(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if bool((kwargs["input_ids"] == poison).any()):
            raise RuntimeError("this token is poison")

    answers, events = answers_of(demo)
    poison = int(answers[3].row.input_ids[-8])  # in one prompt alone
    assert not any(poison in answer.row.input_ids for answer in answers[:3])
    handle = demo.model.register_forward_pre_hook(broken, with_kwargs=True)
    try:
        engine.call(lambda: [engine.submit(answer) for answer in (answers[1], answers[3], answers[2])]).result(PATIENCE)
        wait_until(lambda: all(answer.over for answer in answers[1:]))
    finally:
        handle.remove()
    assert isinstance(events[3][-1], Failed)
    for i in (1, 2):
        (completion,) = generate(demo, [PROMPTS[i]], [specs_of(demo)[i]], max_new_tokens=9 + i, test=False).completions
        assert tuple(answers[i].new) == completion.token_ids


def test_an_engine_that_stops_ends_what_is_left(demo: LanguageModel) -> None:
    engine = Engine(demo, 1e-9)
    engine._ends = frozenset()
    engine.start()
    said: list[Event] = []
    answer = Answer(row_of_prompt("Hi", demo.tokenizer), demo.tokenizer, said.append, max_new_tokens=100_000)
    engine.submit(answer)
    wait_until(lambda: len(answer.new) > 2)
    engine.drain(0.0)
    engine.join()
    assert isinstance(said[-1], Failed)
    assert said[-1].error.code == "server_shutdown"
    late: list[Event] = []
    engine.submit(Answer(answer.row, demo.tokenizer, late.append))
    assert isinstance(late[0], Failed)
    with pytest.raises(ApiError, match="stopping"):
        engine.call(lambda: 7).result(PATIENCE)


def test_the_margin_is_measured(demo: LanguageModel) -> None:
    assert measure_margin(demo)[0] == 1e-9
    margin, why = measure_margin(LanguageModel("demo", [LAYER], head=True))
    assert margin == 1e-3
    assert "up to" in why

    def leaking(module: Any, args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        x = x + 0.1 * x.mean(0, keepdim=True)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = demo.blocks[2].register_forward_hook(leaking)
    try:
        margin, why = measure_margin(demo)
    finally:
        handle.remove()
    assert margin is None
    assert "change each other's logits" in why
