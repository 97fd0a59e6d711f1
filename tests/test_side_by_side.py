"""SAEs that train at the same time."""

import threading
import time
from itertools import cycle

import pytest
import torch

import chatsae as cs
from chatsae.config import SAEConfig, sae_specs
from chatsae.sae.grid import build_grid
from chatsae.training import loop
from chatsae.training.side_by_side import in_turn, side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_all_are_called_at_once_on_an_equal_part_of_the_threads(four_threads):
    met = threading.Barrier(2, timeout=300)

    def call(item):
        met.wait()
        return item, torch.get_num_threads()

    with side_by_side(2, [CPU, CPU]) as together:
        assert together(call, [5, 3]) == [(5, 2), (3, 2)]
        assert together(call, [1, 2]) == [(1, 2), (2, 2)]
        assert torch.get_num_threads() == 4
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [4]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("side-by-side")]


def test_more_than_there_are_threads_wait_for_one(four_threads):
    with side_by_side(10, [CPU]) as together:
        found = together(lambda item: (item, threading.current_thread().name, torch.get_num_threads()), range(10))
    assert [item for item, _, _ in found] == list(range(10))
    assert {threads for _, _, threads in found} == {1}
    assert len({name for _, name, _ in found}) <= 4


@pytest.mark.parametrize(("n", "device", "threads"), [(1, "cpu", 4), (3, "cuda", 4), (3, "cpu", 1)])
def test_one_sae_one_thread_or_a_gpu_goes_in_turn(n, device, threads, four_threads):
    torch.set_num_threads(threads)
    with side_by_side(n, [torch.device(device)]) as together:
        assert together is in_turn
        here = threading.current_thread()
        assert together(lambda item: (item, threading.current_thread() is here), "ab") == [("a", True), ("b", True)]


def test_an_error_is_raised_when_all_have_ended(four_threads):
    ended = []

    def call(item):
        if item:
            raise cs.UserError(item)
        time.sleep(0.2)
        ended.append(item)

    with side_by_side(3, [CPU]) as together:
        with pytest.raises(cs.UserError, match="one"):
            together(call, ["one", "", "two"])
        assert ended == [""]


def grid(*layers):
    return build_grid(sae_specs(SAEConfig(expansion_factors=(3,), lrs=(1e-3,)), layers=layers, d_in=16), seed=1)


class Acts:
    """The same batches for everyone."""

    capacity, lm_seconds = 64, 0.0

    def __init__(self, layers, d_in):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(layers, 7, 32, d_in, generator=generator)
        self.next = cycle(range(7))
        self.on_fill = lambda n: None

    def __iter__(self):
        return self

    def __next__(self):
        return self.x[:, next(self.next)]

    def peek(self, n):
        return self.x.flatten(1, 2)[:, :n]


@pytest.mark.parametrize("step", ["auto", "plain"])
def test_side_by_side_is_in_turn_to_the_bit(step, monkeypatch, four_threads):
    """Four SAEs of two layers on four threads, one of each now and then late, against one thread."""
    real, calls = loop.train_step, cycle([0, 0, 0.01, 0, 0.003, 0.01, 0])

    def late(*args, **options):
        time.sleep(next(calls))
        return real(*args, **options)

    monkeypatch.setattr(loop, "train_step", late)
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        saes = grid(0, 1)
        summary = cs.train(saes, Acts(2, 16), cs.TrainConfig(tokens=32 * 40, batch_size=32, step=step, log_every=10))
        assert summary.steps == 40
        found.append([p.detach().clone() for sae in saes.values() for p in sae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_loss_that_is_not_finite_names_its_sae(monkeypatch, four_threads):
    acts = Acts(1, 16)
    acts.x[:, 3] *= float("nan")
    acts.peek = lambda n: torch.randn(1, n, 16)
    pytest.importorskip("numba", reason="the plain step looks at the loss only where it is logged")
    with pytest.raises(cs.UserError, match="L0-3x-standard is nan at step 4; a lower"):
        cs.train(grid(0), acts, cs.TrainConfig(tokens=32 * 40, batch_size=32))
