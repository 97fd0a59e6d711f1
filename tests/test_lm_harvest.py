"""Harvested activations are those of each sequence alone, whatever the batching."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chatsae.batch import ActivationBatch, TokenBatch
from chatsae.buffer import mix
from chatsae.errors import UserError
from chatsae.lm.harvest import (
    ISOLATION_TOLERANCE,
    Harvest,
    bare_tokens,
    forward,
    isolation_error,
    plan,
    relative_error,
)
from chatsae.lm.load import LanguageModel
from tiny_models import DECODERS, VOCAB, random_tokens, tiny_model

LENGTHS = [12, 1, 40, 7, 7, 100, 3, 25, 64, 2, 18, 90, 33, 5]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2"), [0, 2])


def alone(lm: LanguageModel, tokens: TokenBatch) -> dict[str, Tensor]:
    """Each sequence by itself, through the library's own forward of the whole model."""
    full = lm.with_head()
    found: list[Tensor] = []
    out: dict[str, Tensor] = {}
    handles = [full.blocks[layer].register_forward_hook(lambda m, a, o: found.append(o)) for layer in lm.layers]
    with torch.inference_mode():
        for i, name in enumerate(tokens.names):
            found.clear()
            full.model(input_ids=tokens.select([i]).input_ids[None], use_cache=False)
            out[name] = torch.stack([x if isinstance(x, Tensor) else x[0] for x in found])[:, 0]
    for handle in handles:
        handle.remove()
    return out


def by_name(batches: list[ActivationBatch]) -> dict[str, Tensor]:
    out = {}
    for batch in batches:
        bounds = batch.tokens.cu_seqlens.tolist()
        for i, name in enumerate(batch.tokens.names):
            out[name] = batch.acts[:, bounds[i] : bounds[i + 1]]
    return out


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@pytest.mark.parametrize("family", DECODERS)
def test_equals_the_forward_of_one_dialogue_at_a_time(tmp_path: Path, family: str) -> None:
    lm = LanguageModel(tiny_model(tmp_path, family), [1, 3])
    tokens = random_tokens(LENGTHS)
    harvested = by_name(list(lm.harvest(iter([tokens]), token_budget=300)))
    expected = alone(lm, tokens)
    assert harvested.keys() == expected.keys()
    for name, acts in expected.items():
        assert harvested[name].shape == acts.shape
        assert worst(harvested[name], acts) < 1e-5
    assert isolation_error(lm) < 1e-5


def test_the_dialogues_beside_it_change_nothing(lm: LanguageModel) -> None:
    tokens, others = random_tokens([9, 30, 17]), random_tokens([9, 30, 17], seed=1)
    mixed = bare_tokens([tokens.select([0]).input_ids, others.select([1]).input_ids, others.select([2]).input_ids])
    assert torch.equal(forward(lm, tokens)[:, :9], forward(lm, mixed)[:, :9])
    assert not torch.allclose(forward(lm, tokens)[:, 9:], forward(lm, mixed)[:, 9:])


def test_a_packed_row_without_isolation_is_caught(lm: LanguageModel) -> None:
    tokens = random_tokens([3, 1, 40, 17])
    row = tokens.input_ids[None]
    positions = torch.cat([torch.arange(n) for n in tokens.lengths.tolist()])[None]
    full = lm.with_head()
    packed: dict[bool, Tensor] = {}
    for cache in (True, False):
        with torch.inference_mode():
            states = full.model(input_ids=row, position_ids=positions, use_cache=cache, output_hidden_states=True)
        packed[cache] = states.hidden_states[3][0]
    expected = torch.cat(list(alone(lm, tokens).values()), dim=1)[1]
    assert relative_error(packed[True], expected) > 100 * ISOLATION_TOLERANCE[torch.float32]
    # the same comparison passes where the library does keep the dialogues apart
    assert relative_error(packed[False], expected) < ISOLATION_TOLERANCE[torch.float32]


def test_isolation_error_sees_a_leak(lm: LanguageModel) -> None:
    assert isolation_error(lm) < 1e-5
    # a norm over the whole batch lets every token see every other, as a wrong attention would
    handle = lm.blocks[0].register_forward_pre_hook(lambda m, args: (args[0] - args[0].mean(dim=(0, 1)), *args[1:]))
    try:
        assert isolation_error(lm) > ISOLATION_TOLERANCE[torch.float32]
    finally:
        handle.remove()


def test_bfloat16_is_isolated_too(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_model(tmp_path, "qwen2"), [2], dtype="bfloat16")
    assert forward(lm, random_tokens([5, 9])).dtype == torch.bfloat16
    assert isolation_error(lm) < ISOLATION_TOLERANCE[torch.bfloat16]


def test_tokens_and_activations_go_together(lm: LanguageModel) -> None:
    tokens = random_tokens(LENGTHS)
    batches = list(Harvest(lm, [tokens.select(range(6)), tokens.select(range(6, 14))], token_budget=100, pool=5))
    for batch in batches:
        assert batch.acts.shape == (2, len(batch.tokens.input_ids), 32)
        assert torch.equal(batch.acts, forward(lm, batch.tokens))
    seen = by_name([ActivationBatch(b.tokens.input_ids[None, :, None].float(), b.tokens) for b in batches])
    # names repeat between the two sources, so compare the sequences themselves
    given = Counter(tuple(row.tolist()) for row in tokens.input_ids.split(tokens.lengths.tolist()))
    got = Counter(tuple(row.tolist()) for b in batches for row in b.tokens.input_ids.split(b.tokens.lengths.tolist()))
    assert got == given
    assert len(seen) == 14


def test_the_budget_changes_the_grouping_but_no_activation(lm: LanguageModel) -> None:
    tokens = random_tokens(LENGTHS)
    runs = [list(Harvest(lm, [tokens], token_budget=b, seed=3)) for b in (1, 120, 100_000)]
    assert [len(r) for r in runs] == [14, len(plan(LENGTHS, token_budget=120)), 1]
    expected = by_name(runs[0])
    for run in runs[1:]:
        got = by_name(run)
        assert got.keys() == expected.keys()
        assert max(worst(got[name], expected[name]) for name in got) < 1e-5


def test_budget_and_seed_fix_every_bit(lm: LanguageModel) -> None:
    def run(seed: int) -> list[ActivationBatch]:
        return list(Harvest(lm, [random_tokens(LENGTHS)], token_budget=120, pool=8, seed=seed))

    first, same, other = run(0), run(0), run(1)
    assert [b.tokens.names for b in first] == [b.tokens.names for b in same]
    assert all(torch.equal(a.acts, b.acts) for a, b in zip(first, same, strict=True))
    assert [b.tokens.names for b in first] != [b.tokens.names for b in other]
    assert [len(b.tokens.input_ids) for b in first] != sorted(len(b.tokens.input_ids) for b in first)


@pytest.mark.parametrize("skip", [0, 1, 4, 7, 50])
def test_a_skipped_part_is_not_computed_and_the_rest_is_the_same(lm: LanguageModel, skip: int) -> None:
    tokens = random_tokens(LENGTHS)
    source = [tokens.select([i]) for i in range(14)]
    whole = list(Harvest(lm, source, token_budget=120, pool=5))
    assert len(whole) == 7
    forwards: list[None] = []
    handle = lm.blocks[0].register_forward_hook(lambda m, a, o: forwards.append(None))
    rest = Harvest(lm, source, token_budget=120, pool=5, skip=skip)
    assert rest.state_dict() == {"batches": skip}
    served = list(rest)
    handle.remove()
    assert len(forwards) == len(served) == max(0, len(whole) - skip)
    assert rest.state_dict() == {"batches": skip + len(served)}
    for a, b in zip(served, whole[skip:], strict=True):
        assert a.tokens.names == b.tokens.names
        assert torch.equal(a.acts, b.acts)


def test_resumes_through_the_buffer(lm: LanguageModel) -> None:
    source = [random_tokens(LENGTHS, seed=s) for s in range(3)]
    whole = list(mix(Harvest(lm, source, token_budget=120, pool=5), capacity=200, batch_size=16))
    mixer = mix(Harvest(lm, source, token_budget=120, pool=5), capacity=200, batch_size=16)
    served = [next(mixer) for _ in range(17)]
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in mixer.state_dict().items()}
    harvest = Harvest(lm, source, token_budget=120, pool=5, skip=int(state["harvest_batches"]))
    resumed = mix(harvest, capacity=200, batch_size=16)
    resumed.load_state_dict(state)
    served += list(resumed)
    assert sum(b.shape[1] for b in served) == 3 * sum(LENGTHS)
    assert all(torch.equal(a, b) for a, b in zip(served, whole, strict=True))


def test_activations_can_be_trained_on(lm: LanguageModel) -> None:
    acts = forward(lm, random_tokens([4]))
    assert not acts.is_inference()
    weight = torch.ones(32, requires_grad=True)
    (acts * weight).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, acts.sum(dim=(0, 1)))


@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    budget=st.integers(1, 200),
    split=st.none() | st.integers(1, 60),
)
def test_a_plan_holds_every_sequence_once_within_the_budget(lengths: list[int], budget: int, split: int | None) -> None:
    batches = plan(lengths, token_budget=budget, split=split)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest, shortest = max(lengths[i] for i in batch), min(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
        assert split is None or longest <= split or shortest > split


def test_a_sorted_pool_pads_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(4096, generator=generator) + 5).exp().long().clamp(1, 4000).tolist()
    padded = sum(len(b) * max(lengths[i] for i in b) for b in plan(lengths, token_budget=4096))
    assert sum(lengths) / padded > 0.98


def test_longrope_keeps_lengths_on_each_side_of_its_threshold_apart(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_model(tmp_path, "phi3-longrope"), [2])
    assert lm.rope_split == 64
    tokens = random_tokens([70, 40, 64, 65, 3])
    expected = alone(lm, tokens)
    # a single call with both sides in it, in the order given
    parts = forward(lm, tokens).split(tokens.lengths.tolist(), dim=1)
    for name, part in zip(tokens.names, parts, strict=True):
        assert worst(part, expected[name]) < 1e-5
    assert all(
        (b.tokens.lengths <= 64).all() or (b.tokens.lengths > 64).all() for b in Harvest(lm, [tokens], token_budget=999)
    )
    lm.rope_split = None  # without the split the short ones get the frequencies of the long
    assert worst(forward(lm, tokens).split(tokens.lengths.tolist(), dim=1)[1], expected["1"]) > 0.01


def test_dynamic_rope_is_used_within_its_range_only(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_model(tmp_path, "llama-dynamic"), [2])
    tokens = random_tokens([256, 10])
    assert worst(forward(lm, tokens)[:, 256:], alone(lm, tokens)["1"]) < 1e-5
    with pytest.raises(UserError, match=r"'1' has 257 tokens, the context of .* is 256"):
        forward(lm, random_tokens([10, 257]))


def test_an_empty_stream_yields_nothing(lm: LanguageModel) -> None:
    assert list(Harvest(lm, [])) == []
    assert list(Harvest(lm, [bare_tokens([])])) == []


def test_bad_sequences_are_named(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="dialogue '1' has no tokens"):
        next(Harvest(lm, [random_tokens([4, 0, 3])]))
    with pytest.raises(UserError, match=r"dialogue '2' holds token id 300, the vocabulary of .* is 0..299"):
        forward(lm, bare_tokens([torch.arange(4), torch.arange(299), torch.tensor([1, VOCAB])]).select([0, 2]))
    with pytest.raises(UserError, match=r"dialogue '0' holds token id -1"):
        forward(lm, bare_tokens([torch.tensor([1, -1])]))
    with pytest.raises(UserError, match=r"dialogue '1' has 300 tokens, the context of .* is 256"):
        next(Harvest(lm, [random_tokens([5, 300])], token_budget=1000))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_layer_and_dialogue(lm: LanguageModel, value: float) -> None:
    def spoil(module: object, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[1, 2:4, 5] = value
        return output

    handle = lm.blocks[2].register_forward_hook(spoil)
    try:
        with pytest.raises(UserError, match=r"layer 2, dialogue '1': NaN or infinite activations at 2 of 6 tokens"):
            forward(lm, random_tokens([5, 6, 7]))
    finally:
        handle.remove()
    handle = lm.blocks[0].register_forward_hook(spoil)
    try:
        with pytest.raises(UserError, match="layer 0, dialogue '1'"):
            forward(lm, random_tokens([5, 6, 7]))
    finally:
        handle.remove()


def test_wrong_options_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"harvest.token_budget: 0"):
        Harvest(lm, [], token_budget=0)
    with pytest.raises(UserError, match=r"harvest.pool: 0"):
        Harvest(lm, [], pool=0)
    with pytest.raises(UserError, match="no layers to read"):
        Harvest(LanguageModel(lm.name), [])
