"""The mixing buffer: every activation once, in an order that repeats, across an interruption too."""

import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatsae.batch import ActivationBatch
from chatsae.buffer import Mixer, mix
from chatsae.errors import UserError
from chatsae.lm.harvest import bare_tokens

D = 3
SETTINGS = settings(max_examples=60, deadline=None)
SIZES = st.lists(st.integers(1, 40), max_size=12)
SHAPES = st.tuples(st.integers(1, 9), st.integers(0, 30)).map(lambda s: (s[0], 2 * s[0] + s[1]))  # batch_size, capacity


class Source(Iterator[ActivationBatch]):
    """Numbered activations: row k of layer l holds (k, l, -k); counts what it gave, as `Harvest` does."""

    def __init__(self, sizes: Iterable[int], n_layers: int = 2, skip: int = 0) -> None:
        self.given = skip
        self.stream = islice(self.batches(sizes, n_layers), skip, None)

    @staticmethod
    def batches(sizes: Iterable[int], n_layers: int) -> Iterator[ActivationBatch]:
        start = 0
        for n in sizes:
            k = torch.arange(start, start + n, dtype=torch.float32)
            acts = torch.stack([torch.stack([k, torch.full_like(k, layer), -k], -1) for layer in range(n_layers)])
            yield ActivationBatch(acts=acts, tokens=bare_tokens([torch.arange(n)]))
            start += n

    def __next__(self) -> ActivationBatch:
        batch = next(self.stream)
        self.given += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.given}


def row_numbers(batches: Iterable[Tensor]) -> list[int]:
    return [int(k) for batch in batches for k in batch[0, :, 0]]


@SETTINGS
@given(sizes=SIZES, shape=SHAPES, seed=st.integers(0, 3))
def test_every_activation_is_served_exactly_once(sizes: list[int], shape: tuple[int, int], seed: int) -> None:
    batch_size, capacity = shape
    served = list(mix(Source(sizes), capacity=capacity, batch_size=batch_size, seed=seed))
    assert sorted(row_numbers(served)) == list(range(sum(sizes)))
    assert all(b.shape == (2, batch_size, D) for b in served[:-1])
    for batch in served:  # the layers of a row belong to the same token
        assert torch.equal(batch[0, :, 0], batch[1, :, 0])
        assert torch.equal(batch[:, :, 1], torch.tensor([[0.0], [1.0]]).expand(2, batch.shape[1]))
        assert torch.equal(batch[0, :, 2], -batch[0, :, 0])


@SETTINGS
@given(sizes=SIZES, shape=SHAPES, at=st.integers(0, 60), peek=st.booleans())
def test_a_resumed_buffer_serves_the_same_bits(sizes: list[int], shape: tuple[int, int], at: int, peek: bool) -> None:
    batch_size, capacity = shape
    whole = list(mix(Source(sizes), capacity=capacity, batch_size=batch_size, seed=5))
    first = mix(Source(sizes), capacity=capacity, batch_size=batch_size, seed=5)
    served = list(islice(first, at))
    if peek and sum(sizes) > at * batch_size:
        first.peek(4)
    state = through_a_file(first)
    rest = Source(sizes, skip=int(state["harvest_batches"]))
    resumed = mix(rest, capacity=capacity, batch_size=batch_size, seed=99)  # the seed of the state wins
    resumed.load_state_dict(state)
    served += list(resumed)
    assert len(served) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(served, whole, strict=True))


def through_a_file(mixer: Mixer) -> dict[str, Tensor]:
    state = {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in mixer.state_dict().items()}
    with tempfile.TemporaryDirectory() as directory:
        save_file(state, Path(directory) / "buffer.safetensors")
        return load_file(Path(directory) / "buffer.safetensors")


@SETTINGS
@given(sizes=SIZES, shape=SHAPES, at=st.integers(0, 10), n=st.integers(1, 50))
def test_peek_takes_waiting_rows_and_changes_nothing(sizes: list[int], shape: tuple[int, int], at: int, n: int) -> None:
    batch_size, capacity = shape
    whole = list(mix(Source(sizes), capacity=capacity, batch_size=batch_size))
    mixer = mix(Source(sizes), capacity=capacity, batch_size=batch_size)
    served = list(islice(mixer, at))
    left = set(row_numbers(whole[at:]))
    if not left:
        with pytest.raises(UserError, match="no activations"):
            mixer.peek(n)
        return
    peeked = mixer.peek(n)
    assert torch.equal(peeked, mixer.peek(n))
    rows = row_numbers([peeked])
    assert 1 <= len(rows) == len(set(rows)) <= n
    assert set(rows) <= left
    served += list(mixer)
    assert all(torch.equal(a, b) for a, b in zip(served, whole, strict=True))


def test_peek_is_a_random_sample_of_the_whole_buffer() -> None:
    mixer = mix(Source([100] * 20), capacity=1000, batch_size=10)
    rows = row_numbers([mixer.peek(400)])
    assert len(rows) == 400
    assert abs(sum(rows) / 400 - 499.5) < 4 * 288.7 / 20
    assert rows != sorted(rows)


def test_rounds_serve_half_and_keep_half() -> None:
    mixer = mix(Source([10] * 30), capacity=100, batch_size=10)
    first = row_numbers(islice(mixer, 5))  # half of the first hundred
    assert max(first) < 100
    second = row_numbers(islice(mixer, 5))
    assert max(second) < 150
    assert 10 < sum(k < 100 for k in second) < 45  # of 50 old and 50 new rows, half of each is expected
    assert mixer.state_dict()["harvest_batches"] == 15


def test_what_is_mixed_does_not_come_in_order() -> None:
    rows = torch.tensor(row_numbers(mix(Source([50] * 40), capacity=1000, batch_size=20)), dtype=torch.float64)
    steps = rows.diff()
    assert float((steps == 1).double().mean()) < 0.01
    assert not torch.equal(
        rows, torch.tensor(row_numbers(mix(Source([50] * 40), capacity=1000, batch_size=20, seed=1)))
    )


def test_dtype_generator_and_early_reading() -> None:
    def batches() -> Iterator[ActivationBatch]:
        for batch in Source([30] * 4, n_layers=1):
            yield ActivationBatch(acts=batch.acts.bfloat16(), tokens=batch.tokens)

    own = torch.Generator().manual_seed(7)
    mixer = mix(batches(), capacity=40, batch_size=8, generator=own)
    same = mix(batches(), capacity=40, batch_size=8, seed=7)
    assert next(mixer).dtype == torch.bfloat16
    assert mixer.state_dict()["harvest_batches"] == 2
    assert torch.equal(next(mixer), list(islice(same, 2))[1])


def test_an_empty_stream_yields_nothing() -> None:
    mixer = mix(iter([]), capacity=10, batch_size=2)
    assert list(mixer) == []
    assert list(mixer) == []
    with pytest.raises(UserError, match="empty"):
        mixer.peek(1)


@pytest.mark.parametrize(("capacity", "batch_size"), [(15, 8), (0, 1), (100, 0)])
def test_a_buffer_too_small_is_refused(capacity: int, batch_size: int) -> None:
    with pytest.raises(UserError, match=r"buffer.capacity|train.batch_size"):
        mix(iter([]), capacity=capacity, batch_size=batch_size)


def test_a_state_that_does_not_fit_is_refused() -> None:
    mixer = mix(Source([10] * 9), capacity=40, batch_size=4)
    next(mixer)
    state = mixer.state_dict()
    with pytest.raises(UserError, match=r"buffer.capacity: 44 given, .* 40"):
        mix(Source([10] * 9, skip=4), capacity=44, batch_size=4).load_state_dict(state)
    with pytest.raises(UserError, match="after 4 harvested batches, its source stands at 0"):
        mix(Source([10] * 9), capacity=40, batch_size=4).load_state_dict(state)
    with pytest.raises(UserError, match="lacks cursor, order"):
        mixer.load_state_dict({k: v for k, v in state.items() if k not in ("cursor", "order")})


def test_filling_is_reported_and_the_models_time_passed_on():
    batches = [ActivationBatch(torch.rand(1, 10, D), bare_tokens([torch.arange(10)])) for _ in range(6)]

    class Timed:
        seconds = 2.5

        def __iter__(self):
            return iter(batches)

    mixer, filled = mix(Timed(), capacity=40, batch_size=5), []
    mixer.on_fill = filled.append
    assert (mixer.capacity, mixer.lm_seconds) == (40, 2.5)
    next(mixer)
    assert sum(filled) == 40
    list(mixer)
    assert sum(filled) == 60
