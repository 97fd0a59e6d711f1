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
from chatsae.buffer import Mixer, mix, mixer
from chatsae.buffer.ring import Ring, ring_device
from chatsae.errors import UserError
from chatsae.lm.harvest import bare_tokens

D = 3
SETTINGS = settings(max_examples=40, deadline=None)
SIZES = st.lists(st.integers(0, 40), max_size=12)
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


def reference(n: int, capacity: int, batch_size: int, seed: int) -> list[list[int]]:
    """The batches of activations 0 to n - 1, from a buffer that is a list: shuffle, serve half, replace half."""
    generator, stream = torch.Generator().manual_seed(seed), iter(range(n))
    waiting, batches = list(islice(stream, capacity)), []
    while waiting:
        waiting = [waiting[i] for i in torch.randperm(len(waiting), generator=generator).tolist()]
        half = capacity // 2 // batch_size * batch_size if len(waiting) == capacity else len(waiting)
        batches += [waiting[i : min(i + batch_size, half)] for i in range(0, half, batch_size)]
        waiting = waiting[half:] + list(islice(stream, half))
    return batches


@SETTINGS
@given(sizes=SIZES, shape=SHAPES, seed=st.integers(0, 3), needed=st.none() | st.integers(0, 400))
def test_the_order_is_that_of_the_obvious_buffer(sizes, shape, seed, needed) -> None:
    batch_size, capacity = shape
    served = list(mix(Source(sizes), capacity=capacity, batch_size=batch_size, seed=seed, needed=needed))
    assert [row_numbers([batch]) for batch in served] == reference(sum(sizes), capacity, batch_size, seed)


@SETTINGS
@given(sizes=SIZES, shape=SHAPES, needed=st.integers(1, 300))
def test_what_is_needed_is_read_and_no_more(sizes, shape, needed) -> None:
    """Whole rounds are needed; of the batch that completes one, what is left waits."""
    batch_size, capacity = shape
    source = Source(sizes)
    whole = mix(Source(sizes), capacity=capacity, batch_size=batch_size)
    frugal = mix(source, capacity=capacity, batch_size=batch_size, needed=needed)
    batches = -(-needed // batch_size)
    assert all(torch.equal(a, b) for a, b in zip(islice(frugal, batches), islice(whole, batches), strict=True))
    half = capacity // 2 // batch_size * batch_size
    room = capacity + (-(-batches * batch_size // half) - 1) * half
    n, given_rows = 0, 0
    while n < len(sizes) and given_rows < room:
        given_rows, n = given_rows + sizes[n], n + 1
    assert source.given <= n


@SETTINGS
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), shape=SHAPES)
def test_the_source_works_evenly_one_batch_ahead(sizes, shape) -> None:
    batch_size, capacity = shape
    source = Source(sizes)
    served, before = 0, None
    for batch in mix(source, capacity=capacity, batch_size=batch_size):
        read = sum(sizes[: source.given])
        if before is not None and read < sum(sizes):
            assert read - before < batch_size + 2 * max(sizes)  # not half a buffer at once
            assert capacity + served <= read + max(sizes)
        assert read - sizes[source.given - 1] < capacity + served or source.given == len(sizes)
        served, before = served + batch.shape[1], read


@SETTINGS
@given(sizes=SIZES, shape=SHAPES, at=st.integers(0, 9), more=st.integers(0, 20))
def test_a_state_of_a_buffer_that_was_refilled_in_bursts_goes_on_to_the_same_rows(sizes, shape, at, more) -> None:
    """At the first batch of a round nothing has been replaced yet: the states are the same but for two counts."""
    batch_size, capacity = shape
    whole = list(mix(Source(sizes), capacity=capacity, batch_size=batch_size))
    per_round = capacity // 2 // batch_size
    first = mix(Source(sizes), capacity=capacity, batch_size=batch_size)
    served = list(islice(first, at * per_round + 1))
    if len(served) <= at * per_round:
        return
    state = through_a_file(first)
    assert int(state.pop("filled")) == 0
    state.pop("served")
    more = min(more, len(whole) - len(served), per_round - 1)  # later in the same round
    state["cursor"] = torch.minimum(state["cursor"] + more * batch_size, state["stop"])
    resumed = mix(Source(sizes, skip=int(state["harvest_batches"])), capacity=capacity, batch_size=batch_size)
    resumed.load_state_dict(state)
    rest = list(resumed)
    expected = whole[len(served) + more :]
    assert len(rest) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True))


@SETTINGS
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 17)),
    start=st.integers(0, 9),
    cut=st.booleans(),
    data=st.data(),
)
def test_the_ring_keeps_every_bit(dtype, shape, start, cut, data) -> None:
    """NaN payloads, rows of any width, any alignment, activations that are part of wider ones."""
    n_layers, n, d_in = shape
    bits = torch.randint(256, (n_layers * (n + 2) * (d_in + 1) * dtype.itemsize + 80,), dtype=torch.uint8)
    bits = bits[start * dtype.itemsize :][: n_layers * (n + 2) * (d_in + 1) * dtype.itemsize].view(dtype)
    wide = bits.view(n_layers, n + 2, d_in + 1)
    acts = wide[:, 1 : n + 1, : d_in + 1 if not cut else d_in]
    acts = acts if cut else acts[..., : d_in + 1]
    ring = Ring(torch.zeros(n_layers, n + 5, acts.shape[2], dtype=dtype))
    slots = torch.tensor(data.draw(st.permutations(range(n + 5)))[:n])
    ring.put(slots, acts)
    kept = ring.take(slots)
    assert torch.equal(kept.contiguous().view(torch.uint8), acts.contiguous().view(torch.uint8))
    others = [i for i in range(n + 5) if i not in slots.tolist()]
    assert not ring.rows[:, others].contiguous().view(torch.uint8).any()


def test_the_ring_is_where_there_is_room() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert ring_device("auto", cpu, 10**15) == ring_device("cpu", cpu, 1) == cpu
    assert ring_device("auto", gpu, 500, free=1000) == gpu
    assert ring_device("auto", gpu, 501, free=1000) == cpu
    assert ring_device("cuda", gpu, 10**15, free=1) == gpu
    assert ring_device("cpu", gpu, 1, free=10**15) == cpu
    with pytest.raises(UserError, match=r"buffer.device: cuda given, but the activations are on the CPU"):
        next(mix(Source([9]), capacity=4, batch_size=2, place="cuda"))


def test_rows_that_are_on_their_way_are_waited_for(monkeypatch) -> None:
    """A ring that holds activations of another device: what it brings is whole once it has settled."""

    class Slow(Ring):
        on_its_way: tuple[Tensor, Tensor] | None = None

        def bring(self, acts: Tensor) -> Tensor:
            host = torch.full_like(acts, float("nan"))
            self.on_its_way = host, acts
            return host

        def settle(self) -> None:
            if self.on_its_way is not None:
                self.on_its_way[0].copy_(self.on_its_way[1])

    sizes = [7, 30, 12, 25, 40]
    whole = list(mix(Source(sizes), capacity=30, batch_size=4))
    monkeypatch.setattr(mixer, "allocate", lambda like, capacity, place: Slow(torch.zeros(2, capacity, D)))
    monkeypatch.setattr(mixer, "restored", lambda rows, device, place: Slow(rows))
    first = mix(Source(sizes), capacity=30, batch_size=4)
    served = list(islice(first, 5))
    state = through_a_file(first)
    assert not state["pending"].isnan().any()
    resumed = mix(Source(sizes, skip=int(state["harvest_batches"])), capacity=30, batch_size=4)
    resumed.load_state_dict(state)
    served += list(resumed)
    assert all(torch.equal(a, b) for a, b in zip(served, whole, strict=True))


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
    mixer = mix(Source([10] * 30), capacity=100, batch_size=10, needed=100)
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
