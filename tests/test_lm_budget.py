"""The token budget is found, and memory that ends costs no dialogue."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatsae.errors import UserError
from chatsae.lm.budget import CPU_BUDGET, choose_budget, grow
from chatsae.lm.forward import Ceiling, Way, forward, plan
from chatsae.lm.harvest import Harvest
from chatsae.lm.load import LanguageModel
from tiny_models import random_tokens, tiny_model

LENGTHS = [12, 1, 40, 7, 7, 100, 3, 25, 64, 2, 18, 90, 33, 5]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2"), [0, 2])


@contextmanager
def memory_for(lm: LanguageModel, tokens: int) -> Iterator[list[int]]:
    """A model that is out of memory with more tokens; collects the sizes of the forwards that were."""
    failed: list[int] = []

    def allocate(module: object, args: tuple[torch.Tensor, ...]) -> None:
        n = args[0].shape[0] * args[0].shape[1]
        if n > tokens:
            failed.append(n)
            raise torch.OutOfMemoryError(f"no memory for {n} tokens")

    handle = lm.blocks[1].register_forward_pre_hook(allocate)
    try:
        yield failed
    finally:
        handle.remove()


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_out_of_memory_loses_no_dialogue_and_keeps_the_batches(lm: LanguageModel, way: Way) -> None:
    tokens = random_tokens(LENGTHS * 4)
    want = list(Harvest(lm, [tokens], way=way, token_budget=700))
    with memory_for(lm, 150) as failed:
        harvest = Harvest(lm, [tokens], way=way, token_budget=700)
        got = list(harvest)
    assert 1 <= len(failed) <= 3  # up to 700, 350, 175: what was learnt holds for the batches that follow
    assert harvest.state_dict() == {"batches": len(want), "token_budget": 700}
    for a, b in zip(got, want, strict=True):
        assert a.tokens.names == b.tokens.names
        assert float(((a.acts - b.acts).norm(dim=-1) / b.acts.norm(dim=-1)).max()) < 1e-5


def test_a_ceiling_that_was_met_is_kept(lm: LanguageModel) -> None:
    tokens, ceiling = random_tokens([50] * 16), Ceiling()
    with memory_for(lm, 150) as failed:
        first = forward(lm, tokens, ceiling=ceiling)
        assert failed == [800, 400, 200]
        assert ceiling.tokens == 100
        second = forward(lm, tokens, ceiling=ceiling)
        assert failed == [800, 400, 200]
    assert torch.equal(first, second)
    assert torch.allclose(first, forward(lm, tokens), atol=1e-4)


def test_a_dialogue_without_memory_even_alone_is_named(lm: LanguageModel) -> None:
    with memory_for(lm, 80), pytest.raises(UserError, match="dialogue '1' of 100 tokens is out of memory even alone"):
        forward(lm, random_tokens([40, 100, 30]))


def test_other_errors_of_the_model_come_through(lm: LanguageModel) -> None:
    def fail(module: object, args: object) -> None:
        raise RuntimeError("a bug")

    handle = lm.blocks[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="a bug"):
            forward(lm, random_tokens([4, 5]))
    finally:
        handle.remove()


def test_a_cpu_has_a_constant_budget(lm: LanguageModel) -> None:
    assert choose_budget(lm) == CPU_BUDGET
    harvest = Harvest(lm, [random_tokens(LENGTHS)], way="padded")
    assert harvest.token_budget == CPU_BUDGET
    assert len(list(harvest)) == len(plan(LENGTHS, token_budget=CPU_BUDGET))


@pytest.mark.parametrize(
    ("per_token", "memory", "expected"),
    [
        (lambda n: 1.0, 10**9, 4096),  # a token costs the same in any batch
        (lambda n: 1 + 50_000 / n, 10**9, 262_144),
        (lambda n: 1 + 50_000 / n, 40_000, 32_768),
        (lambda n: 1 + 4096 / n, 10**9, 65_536),  # 2, 1.5, 1.25, 1.125, 1.0625; then 1.031
        (lambda n: 1.0, 3000, 2048),
        (lambda n: 1.0, 1, 1),
    ],
)
def test_the_budget_grows_while_it_pays_and_fits(per_token: Callable[[int], float], memory: int, expected: int) -> None:
    def seconds(budget: int) -> float | None:
        return budget * per_token(budget) if budget <= memory else None

    assert grow(seconds) == expected


@given(
    memory=st.integers(1, 10**6),
    flat=st.integers(1, 10**6),
    first=st.sampled_from([1, 64, 4096]),
)
def test_a_budget_that_is_found_fits(memory: int, flat: int, first: int) -> None:
    tried: list[int] = []

    def seconds(budget: int) -> float | None:
        tried.append(budget)
        return budget + flat if budget <= memory else None

    budget = grow(seconds, first)
    assert budget <= memory
    assert budget in tried
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize("way", ["padded", "packed", "single"])
@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    budget=st.integers(1, 200),
    split=st.none() | st.integers(1, 60),
    seed=st.none() | st.integers(0, 9),
)
def test_a_plan_holds_every_sequence_once_within_the_budget(
    way: Way, lengths: list[int], budget: int, split: int | None, seed: int | None
) -> None:
    kinds = None if seed is None else [(i * seed) % 3 for i in range(len(lengths))]
    batches = plan(lengths, token_budget=budget, split=split, way=way, kinds=kinds)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest, shortest = max(lengths[i] for i in batch), min(lengths[i] for i in batch)
        cost = sum(lengths[i] for i in batch) if way == "packed" else len(batch) * longest
        assert len(batch) == 1 or (cost <= budget and way != "single")
        assert split is None or longest <= split or shortest > split
        assert kinds is None or len({kinds[i] for i in batch}) == 1
    if way == "packed" and split is None and kinds is None:
        assert [i for batch in batches for i in batch] == list(range(len(lengths)))


def test_a_sorted_pool_pads_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(4096, generator=generator) + 5).exp().long().clamp(1, 4000).tolist()
    padded = sum(len(b) * max(lengths[i] for i in b) for b in plan(lengths, token_budget=4096))
    assert sum(lengths) / padded > 0.98
    packed = plan(lengths, token_budget=4096, way="packed")
    assert len(packed) < 1.25 * sum(lengths) / 4096


def test_models_beyond_their_context_are_refused_before_they_run(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_model(tmp_path, "qwen2", max_position_embeddings=32), [0])
    with pytest.raises(UserError, match=r"33 tokens, the context of .* is 32"):
        forward(lm, random_tokens([33]), "packed")
