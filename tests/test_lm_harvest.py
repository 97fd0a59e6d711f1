"""Harvested activations are those of each sequence alone, whatever the batching."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chatsae.batch import ActivationBatch, TokenBatch
from chatsae.buffer import mix
from chatsae.errors import UserError
from chatsae.lm.forward import Way, bare_tokens, forward, plan
from chatsae.lm.harvest import Harvest, ahead
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


def test_the_dialogues_beside_it_change_nothing(lm: LanguageModel) -> None:
    tokens, others = random_tokens([9, 30, 17]), random_tokens([9, 30, 17], seed=1)
    mixed = bare_tokens([tokens.select([0]).input_ids, others.select([1]).input_ids, others.select([2]).input_ids])
    assert torch.equal(forward(lm, tokens)[:, :9], forward(lm, mixed)[:, :9])
    assert not torch.allclose(forward(lm, tokens)[:, 9:], forward(lm, mixed)[:, 9:])


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
    runs = [list(Harvest(lm, [tokens], way="padded", token_budget=b, seed=3)) for b in (1, 120, 100_000)]
    assert [len(r) for r in runs] == [14, len(plan(LENGTHS, token_budget=120)), 1]
    expected = by_name(runs[0])
    for run in runs[1:]:
        got = by_name(run)
        assert got.keys() == expected.keys()
        assert max(worst(got[name], expected[name]) for name in got) < 1e-5


def test_budget_and_seed_fix_every_bit(lm: LanguageModel) -> None:
    def run(seed: int) -> list[ActivationBatch]:
        return list(Harvest(lm, [random_tokens(LENGTHS)], way="packed", token_budget=120, pool=8, seed=seed))

    first, same, other = run(0), run(0), run(1)
    assert [b.tokens.names for b in first] == [b.tokens.names for b in same]
    assert all(torch.equal(a.acts, b.acts) for a, b in zip(first, same, strict=True))
    assert [b.tokens.names for b in first] != [b.tokens.names for b in other]
    assert [len(b.tokens.input_ids) for b in first] != sorted(len(b.tokens.input_ids) for b in first)


@pytest.mark.parametrize("skip", [0, 1, 4, 7, 50])
def test_a_skipped_part_is_not_computed_and_the_rest_is_the_same(lm: LanguageModel, skip: int) -> None:
    tokens = random_tokens(LENGTHS)
    source = [tokens.select([i]) for i in range(14)]
    whole = list(Harvest(lm, source, way="padded", token_budget=120, pool=5))
    assert len(whole) == 7
    forwards: list[None] = []
    handle = lm.blocks[0].register_forward_hook(lambda m, a, o: forwards.append(None))
    rest = Harvest(lm, source, way="padded", token_budget=120, pool=5, skip=skip)
    assert rest.state_dict() == {"batches": skip, "token_budget": 120}
    served = list(rest)
    handle.remove()
    assert len(forwards) == len(served) == max(0, len(whole) - skip)
    assert rest.state_dict() == {"batches": skip + len(served), "token_budget": 120}
    for a, b in zip(served, whole[skip:], strict=True):
        assert a.tokens.names == b.tokens.names
        assert torch.equal(a.acts, b.acts)


def test_resumes_through_the_buffer(lm: LanguageModel) -> None:
    source = [random_tokens(LENGTHS, seed=s) for s in range(3)]
    whole = list(mix(Harvest(lm, source, way="padded", token_budget=120, pool=5), capacity=200, batch_size=16))
    mixer = mix(Harvest(lm, source, way="padded", token_budget=120, pool=5), capacity=200, batch_size=16)
    served = [next(mixer) for _ in range(17)]
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in mixer.state_dict().items()}
    harvest = Harvest(lm, source, way="padded", token_budget=120, pool=5, skip=int(state["harvest_batches"]))
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


@contextmanager
def spoiled(lm: LanguageModel, value: float, layer: int, *tokens: int) -> Iterator[None]:
    """A model whose block puts out `value` for the given token ids."""
    ids: list[Tensor] = []

    def remember(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        ids[:] = [kwargs["input_ids"]]

    def spoil(module: object, args: object, output: Tensor) -> Tensor:
        return torch.where(torch.isin(ids[0], torch.tensor(tokens))[..., None], value, output)

    handles = [
        lm.decoder.register_forward_pre_hook(remember, with_kwargs=True),
        lm.blocks[layer].register_forward_hook(spoil),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


BROKEN = [torch.arange(5), torch.tensor([9, 8, 100, 101, 7, 6]), torch.arange(7), torch.tensor([101])]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", ["padded", "packed", "single"])
def test_activations_that_are_not_finite_name_layer_and_dialogue(lm: LanguageModel, value: float, way: Way) -> None:
    tokens = bare_tokens(BROKEN)
    with spoiled(lm, value, 2, 100, 101):
        with pytest.raises(UserError, match=r"layer 2, dialogue '1': NaN or infinite activations at 2 of 6 tokens"):
            forward(lm, tokens, way)
        with pytest.raises(UserError, match=r"layer 2, dialogue '[13]': NaN .*float32, or harvest.on_nan skip"):
            list(Harvest(lm, [tokens], way=way))
    with spoiled(lm, value, 0, 100, 101), pytest.raises(UserError, match="layer 0, dialogue '1'"):
        forward(lm, tokens, way)


def test_dialogues_that_are_not_finite_can_be_left_out(lm: LanguageModel) -> None:
    tokens, tally = bare_tokens(BROKEN), Counter[str]()
    for budget in (1000, 1):
        whole = by_name(list(Harvest(lm, [tokens], way="padded", token_budget=budget)))
        with spoiled(lm, float("nan"), 0, 100, 101):
            harvest = Harvest(lm, [tokens], way="padded", token_budget=budget, on_nan="skip", tally=tally)
            batches = list(harvest)
        got = by_name(batches)
        assert got.keys() == {"0", "2"}
        assert all(torch.equal(got[name], whole[name]) for name in got)
        assert all(b.acts.shape[1] == len(b.tokens.input_ids) for b in batches)
        assert harvest.state_dict()["batches"] == len(batches) == (1 if budget == 1000 else 4)
        assert {(b.name, b.layer, b.tokens, b.length) for b in harvest.broken} == {("1", 0, 2, 6), ("3", 0, 1, 1)}
    assert tally == {"NaN or infinite activations": 4}


def test_a_model_that_never_gives_a_finite_number_ends_the_harvest(lm: LanguageModel) -> None:
    endless = (bare_tokens([torch.tensor([101, 5])] * 64) for _ in count())
    with spoiled(lm, float("nan"), 0, 101):
        with pytest.raises(UserError, match=r"none of the first 1,0\d\d sequences has finite .*try model.dtype"):
            list(Harvest(lm, endless, way="padded", token_budget=64, on_nan="skip"))
        with pytest.raises(UserError, match=r"none of the first 2 sequences has finite activations"):
            list(Harvest(lm, [bare_tokens([torch.tensor([101])] * 2)], way="padded", on_nan="skip"))


@pytest.mark.parametrize("prefix", [False, True])
def test_reading_ahead_changes_nothing(lm: LanguageModel, prefix: bool) -> None:
    def run(read_ahead: bool, skip: int = 0) -> list[ActivationBatch]:
        source = (random_tokens(LENGTHS, seed=s) for s in range(4))
        return list(
            Harvest(lm, source, way="padded", token_budget=90, pool=9, read_ahead=read_ahead, skip=skip, prefix=prefix)
        )

    want, got = run(False), run(True)
    assert len(want) > 20
    for skip in (0, 7):
        got = run(True, skip)
        assert all(torch.equal(a.acts, b.acts) for a, b in zip(got, want[skip:], strict=True))


def test_an_error_of_the_data_comes_through_the_thread_in_its_place() -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise UserError("row 4 is broken")

    stream = ahead(source())
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="row 4 is broken"):
        next(stream)
    assert list(ahead([])) == []


def test_the_thread_reads_one_ahead_and_ends_with_its_reader() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    before = threading.active_count()
    stream = ahead(source())
    assert next(stream) == 0
    deadline = time.monotonic() + 300  # a hang, not a slow machine
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2]  # one in use, one waiting, one in hand
    stream.close()
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert made == [0, 1, 2]


def test_wrong_options_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"harvest.token_budget: -1 given"):
        Harvest(lm, [], token_budget=-1)
    with pytest.raises(UserError, match=r"harvest.pool: 0"):
        Harvest(lm, [], pool=0)
    with pytest.raises(UserError, match="no layers to read"):
        Harvest(LanguageModel(lm.name), [])
