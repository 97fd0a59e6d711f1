"""The judge without a model: planted deviations get the rubric's scores, chance gets nothing, patterns get names."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_tokenizer import chat_tokenizer
from chatsae.batch import Dialogue, Kind, Message, Role, TokenBatch
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.features.patterns.background import Background, random_contexts
from chatsae.features.patterns.families import Pattern, patterns_of
from chatsae.features.patterns.judge import PatternJudge, log10_tail
from chatsae.features.records import Context, Feature
from chatsae.features.text import TokenText

_WORDS = [
    a + b for a in ("sky", "sun", "moon", "rain", "wind") for b in ("light", "fall", "rise", "storm", "set", "glow")
]


def dialogues(n: int = 130, seed: int = 0) -> TokenBatch:
    rng = np.random.default_rng(seed)

    def text() -> str:
        words = [str(rng.choice(_WORDS)) for _ in range(int(rng.integers(6, 14)))]
        if rng.random() < 0.3:
            words[int(rng.integers(len(words)))] = str(int(rng.integers(10, 99)))
        return " ".join(words) + "."

    chats = [
        Dialogue(f"d{i}", "made", tuple(Message(("user", "assistant")[k % 2], text()) for k in range(4)))
        for i in range(n)
    ]
    return TokenBatch.concat(list(render(chats, chat_tokenizer())))


@pytest.fixture(scope="module")
def everything() -> list[Context]:
    """A context at every token of the split."""
    return random_contexts(dialogues(), TokenText(chat_tokenizer()), n=10**9)


@pytest.fixture(scope="module")
def judge(everything: list[Context]) -> PatternJudge:
    rng = np.random.default_rng(1)
    return PatternJudge(Background.of([everything[i] for i in rng.choice(len(everything), 20_000, replace=False)]))


def _feature(contexts: Sequence[Context], **facts: object) -> Feature:
    return Feature(
        7,
        **{"density": 0.0, "max_act": 1.0, "sampled": (), "promoted": (), "suppressed": ()} | facts,
        contexts=tuple(contexts),
    )


def _drawn(everything: Sequence[Context], n: int, seed: int, holds: object = None) -> list[Context]:
    """`n` random contexts, of different dialogues, whose token has a pattern, or any."""
    rng = np.random.default_rng(seed)
    found: dict[int, Context] = {}
    if n == 0:
        return []
    for i in rng.permutation(len(everything)):
        context = everything[i]
        if context.index not in found and (holds is None or holds(context)):
            found[context.index] = context
        if len(found) == n:
            return list(found.values())
    raise AssertionError("too few contexts")


def _is(context: Context, role: Role, kind: Kind) -> bool:
    return (context.role[context.peak], context.kind[context.peak]) == (role, kind)


def _is_end(context: Context) -> bool:
    return context.tokens[context.peak] == "<|im_end|>" and context.role[context.peak] == Role.ASSISTANT


def _not_end(context: Context) -> bool:
    return context.kind[context.peak] == Kind.CONTENT


@pytest.mark.parametrize(("n", "deviating", "score"), [(20, 0, 5), (20, 1, 4), (20, 2, 4), (20, 3, 3), (20, 5, 3)])
def test_planted_deviations_get_the_rubrics_score(
    judge: PatternJudge, everything: list[Context], n: int, deviating: int, score: int
) -> None:
    for seed in range(5):
        contexts = _drawn(everything, n - deviating, seed, _is_end) + _drawn(everything, deviating, seed, _not_end)
        order = np.random.default_rng(seed).permutation(n)
        [verdict] = judge.verdicts([_feature([contexts[i] for i in order])], n_contexts=n)
        assert (verdict.score, verdict.n_contexts, verdict.feature) == (score, n, 7)
        assert verdict.explanation == "end of an assistant turn"
        assert verdict.deviating == tuple(np.flatnonzero(order >= n - deviating).tolist())


def test_the_papers_five_contexts(judge: PatternJudge, everything: list[Context]) -> None:
    for deviating, score in ((0, 5), (1, 4), (2, 4), (4, 1)):
        contexts = _drawn(everything, 5 - deviating, 3, _is_end) + _drawn(everything, deviating, 0, _not_end)
        [verdict] = judge.verdicts([_feature(contexts)], n_contexts=5)
        assert verdict.score == score


def test_random_tokens_hardly_ever_score_above_two(judge: PatternJudge, everything: list[Context]) -> None:
    rng = np.random.default_rng(5)
    for n in (5, 20):
        nulls = [_feature([everything[i] for i in rng.choice(len(everything), n)]) for _ in range(1000)]
        scores = [v.score for v in judge.verdicts(nulls, n_contexts=n)]
        assert sum(score is None or score > 2 for score in scores) <= 10


@pytest.mark.parametrize(
    ("holds", "name"),
    [
        (_is_end, "end of an assistant turn"),
        (lambda c: c.tokens[c.peak] == "<|im_end|>", "end of any turn"),
        (lambda c: c.start + c.peak == 0, "first token of the dialogue"),
        (lambda c: _is(c, Role.ASSISTANT, Kind.CONTENT) and c.kind[c.peak - 1] != Kind.CONTENT,
         "first content token of an assistant turn"),
        (lambda c: c.tokens[c.peak].strip().isdigit(), "digits"),
        (lambda c: _is(c, Role.USER, Kind.CONTROL), "control token that opens a user turn"),
    ],
)  # fmt: skip
def test_planted_features_get_the_right_name(
    judge: PatternJudge, everything: list[Context], holds: object, name: str
) -> None:
    found = judge.findings(_feature(_drawn(everything, 20, 2, holds)), 20)
    assert (found[0].pattern.name, found[0].matches) == (name, 20)


def test_a_word_is_found_whatever_its_case_and_space(judge: PatternJudge) -> None:
    def around(token: str, i: int) -> Context:
        tokens = (f"a{i}", f"b{i}", token, f"c{i}")
        user, content = (int(Role.USER),) * 4, (int(Kind.CONTENT),) * 4
        acts = (0.0, 0.0, 1.0, 0.0)
        return Context(7, f"d{i}", 1.0, None, 5, 2, (0,) * 4, tokens, acts, user, content, (1,) * 4, (False,) * 4)

    forms = [" json", "json", " JSON", "Json"]
    [verdict] = judge.verdicts([_feature([around(forms[i % 4], i) for i in range(20)])], n_contexts=20)
    assert (verdict.score, verdict.explanation) == (5, "word `json`")
    stems = [" parser", " parsing", " parsed", " parses", "parse-"]
    [verdict] = judge.verdicts([_feature([around(stems[i % 5], i) for i in range(20)])], n_contexts=20)
    assert (verdict.score, verdict.explanation) == (5, "token that starts with `pars`")
    both = [around(" json", i) for i in range(10)] + [around(" tuple", i) for i in range(10, 20)]
    [verdict] = judge.verdicts([_feature(both)], n_contexts=20)
    assert verdict.score == 2  # all of them are in the second turn
    assert verdict.details["union"]["matches"] == 20
    assert len(verdict.details["union"]["patterns"]) == 2


def test_promoted_tokens_are_a_pattern(judge: PatternJudge, everything: list[Context]) -> None:
    def before_end(context: Context) -> bool:
        behind = context.peak + 1
        return behind < len(context) and context.tokens[behind] == "<|im_start|>" and context.start > 0

    feature = _feature(_drawn(everything, 20, 0, before_end), promoted=(("<|im_start|>", 3.0), ("zzz", 1.0)))
    names = {f.pattern.name for f in judge.findings(feature, 20)}
    assert "token before one that the feature promotes" in names


def test_a_role_is_a_theme_unless_the_feature_fires_on_most_of_its_tokens(
    judge: PatternJudge, everything: list[Context]
) -> None:
    def assistant(context: Context) -> bool:
        return context.role[context.peak] == Role.ASSISTANT and context.kind[context.peak] == Kind.CONTENT

    contexts = _drawn(everything, 20, 4, assistant)
    sampled = tuple(_drawn(everything, 20, 6, assistant))
    rate = judge.background.rate(Pattern("role", "an assistant"))
    for density, score in ((0.01, 2), (0.9 * rate, 5)):
        [verdict] = judge.verdicts([_feature(contexts, sampled=sampled, density=density)], n_contexts=20)
        assert (verdict.score, verdict.explanation) == (score, "token of an assistant turn")
        assert verdict.details["recall"] == 1
        assert verdict.details["precision"] == pytest.approx(density / rate)


def test_too_few_contexts_are_no_score(judge: PatternJudge, everything: list[Context]) -> None:
    [verdict] = judge.verdicts([_feature(everything[:4])], n_contexts=20)
    assert (verdict.score, verdict.reason) == (None, "4 contexts, at least 5 are needed")


def test_detection_is_what_counting_gives(judge: PatternJudge, everything: list[Context]) -> None:
    # a feature on half of the ends of turns, and on as many other tokens
    ends = [i for i, c in enumerate(everything) if c.tokens[c.peak] == "<|im_end|>"]
    rng = np.random.default_rng(0)
    active = set(rng.permutation(ends)[: len(ends) // 2].tolist())
    others = [i for i in range(len(everything)) if i not in set(ends)]
    active |= set(rng.permutation(others)[: len(active)].tolist())
    sample = tuple(everything[i] for i in rng.permutation(sorted(active))[:400])
    whole = PatternJudge(Background.of(everything[::2]))
    feature = _feature(
        _drawn(everything, 20, 0, lambda c: c.tokens[c.peak] == "<|im_end|>"),
        sampled=sample,
        density=len(active) / len(everything),
    )
    best = whole.findings(feature, 20)[0]
    hits = sum(i in active for i in ends)
    assert best.pattern == Pattern("end of turn", "any")
    assert best.recall == pytest.approx(hits / len(active), abs=0.07)
    assert best.precision == pytest.approx(hits / len(ends), abs=0.08)
    exact = (hits / len(active) + 1 - (len(ends) - hits) / (len(everything) - len(active))) / 2
    assert best.detection == pytest.approx(exact, abs=0.04)


@given(st.integers(1, 20), st.integers(0, 20), st.floats(1e-6, 0.999))
def test_the_tail_is_that_of_the_binomial(n: int, m: int, p: float) -> None:
    m = min(m, n)
    exact = math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(m, n + 1))
    assert 10 ** log10_tail(n, m, p) == pytest.approx(min(exact, 1), rel=1e-9)


def test_rates_are_counted_token_by_token(everything: list[Context]) -> None:
    some = everything[:500]
    background = Background.of(some)
    for pattern in (Pattern("token", "<|im_end|>"), Pattern("role", "a user"), Pattern("after", "assistant\n")):
        assert background.rate(pattern) == (sum(pattern in patterns_of(c) for c in some) + 1) / 501
    promoted = frozenset({"<|im_start|>", "\n"})
    n = sum(c.peak + 1 < len(c) and c.tokens[c.peak + 1] in promoted for c in some)
    assert background.rate(Pattern("predicts", ""), promoted) == (n + 1) / 501
    with pytest.raises(UserError, match="at least one token"):
        Background.of([])


def test_random_contexts_are_windows_of_the_split() -> None:
    tokens = dialogues(12)
    contexts = random_contexts(tokens, TokenText(chat_tokenizer()), n=100, window=16, seed=3)
    assert contexts == random_contexts(tokens, TokenText(chat_tokenizer()), n=100, window=16, seed=3)
    assert len({(c.index, c.start + c.peak) for c in contexts}) == 100
    bounds = tokens.cu_seqlens.tolist()
    for c in contexts:
        first = bounds[c.index] + c.start
        assert c.input_ids == tuple(tokens.input_ids[first : first + len(c)].tolist())
        assert c.role == tuple(tokens.role[first : first + len(c)].tolist())
        assert first + len(c) <= bounds[c.index + 1]
        assert len(c) == 16
        assert c.peak == min(12, c.start + c.peak) or first + len(c) == bounds[c.index + 1]
    assert replace(contexts[0], index=0).turn[-1] >= -1
