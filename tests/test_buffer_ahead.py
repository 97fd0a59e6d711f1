"""Reading ahead in a thread: the same batches, states and counts whatever the timing; errors and ends as without it."""

import gc
import random
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.batch import ActivationBatch
from chatsae.buffer import mix
from chatsae.buffer.ahead import DEPTH, Ahead
from chatsae.errors import UserError
from chatsae.lm.forward import bare_tokens

SETTINGS = settings(max_examples=25, deadline=None)
SIZES = st.lists(st.integers(0, 40), max_size=12)


class Source(Iterator[ActivationBatch]):
    """Random activations of given sizes that come with delays; every third batch is counted as one with a flaw."""

    def __init__(self, sizes: list[int], *, skip: int = 0, delays: int | None = None, fails_at: int = -1) -> None:
        self.sizes, self.given, self.fails_at = sizes, skip, fails_at
        self.counts: Counter[str] = Counter()
        self.random = None if delays is None else random.Random(delays)

    def __next__(self) -> ActivationBatch:
        if self.random is not None and self.random.random() < 0.5:
            time.sleep(self.random.random() * 2e-3)
        if self.given == self.fails_at:
            raise UserError(f"batch {self.given} is broken")
        if self.given == len(self.sizes):
            self.counts["end"] += 1
            raise StopIteration
        n, self.given = self.sizes[self.given], self.given + 1
        self.counts["flaw"] += self.given % 3 == 0
        acts = torch.rand(2, n, 3, generator=torch.Generator().manual_seed(self.given))
        return ActivationBatch(acts, bare_tokens([torch.arange(n)]))

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.given}


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "chatsae-harvest-ahead"]


def no_thread_is_left() -> bool:
    """The last thing that a thread does is to hand over its end; it may still be leaving."""
    for thread in threads():
        thread.join(timeout=300)
    return not threads()


def wait_until_full(ahead: Ahead) -> None:
    end = time.monotonic() + 300  # a hang, not a slow machine
    while ahead.waiting < DEPTH and time.monotonic() < end:
        time.sleep(1e-3)
    assert ahead.waiting == DEPTH


@SETTINGS
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_batches_states_and_counts_are_those_of_the_source_alone(sizes: list[int], seed: int) -> None:
    alone, source, tally = Source(sizes), Source(sizes, delays=seed), Counter({"before": 1})
    ahead = Ahead(source, counts=source.counts, tally=tally)
    rng = random.Random(seed)
    for expected in alone:
        batch = next(ahead)
        assert torch.equal(batch.acts, expected.acts)
        assert ahead.state_dict() == alone.state_dict()
        assert +tally == alone.counts + Counter(before=1)
        if rng.random() < 0.3:
            time.sleep(rng.random() * 3e-3)
    assert list(ahead) == list(ahead) == []
    assert +tally == source.counts + Counter(before=1)
    assert ahead.state_dict() == {"batches": len(sizes)}
    assert no_thread_is_left()


@SETTINGS
@given(sizes=SIZES, batch_size=st.integers(1, 9), at=st.integers(0, 40), seed=st.integers(0, 99))
def test_a_buffer_of_it_is_the_same_across_an_interruption(sizes, batch_size, at, seed) -> None:
    """The state does not show how far the thread has got; what it has made beyond it is made again."""
    sizes_of = {"capacity": 3 * batch_size + 5, "batch_size": batch_size}
    alone = mix(Source(sizes), **sizes_of)
    first = mix(Ahead(Source(sizes, delays=seed)), **sizes_of)
    for _ in range(at):
        expected, batch = next(alone, None), next(first, None)
        assert (expected is None) == (batch is None)
        assert expected is None or torch.equal(batch, expected)
    before, state = alone.state_dict(), first.state_dict()
    assert before.keys() == state.keys()
    for key, value in before.items():
        assert torch.equal(state[key], value) if isinstance(value, torch.Tensor) else state[key] == value, key
    first.close()
    resumed = mix(Ahead(Source(sizes, skip=int(state["harvest_batches"]), delays=seed + 1)), **sizes_of)
    resumed.load_state_dict(state)
    rest = list(alone)
    assert all(torch.equal(a, b) for a, b in zip(resumed, rest, strict=True))
    assert no_thread_is_left()


def test_it_works_while_the_batch_before_is_in_use_and_no_further_than_it_may() -> None:
    source = Source([1] * 50)
    ahead = Ahead(source)
    assert source.given == 0  # nothing before the first batch is asked for
    next(ahead)
    wait_until_full(ahead)
    time.sleep(0.02)
    assert source.given == 1 + DEPTH + 1
    assert ahead.state_dict() == {"batches": 1}
    ahead.close()
    assert no_thread_is_left()
    assert list(ahead) == []


def test_an_error_comes_where_its_batch_would_with_its_traceback() -> None:
    ahead = Ahead(Source([2] * 9, delays=1, fails_at=5))
    assert len(list(islice(ahead, 5))) == 5
    for _ in range(2):  # and again, where somebody asks again
        with pytest.raises(UserError, match="batch 5 is broken") as caught:
            next(ahead)
        assert 'raise UserError(f"batch {self.given} is broken")' in "".join(traceback.format_tb(caught.tb))
    assert ahead.state_dict() == {"batches": 5}
    assert no_thread_is_left()


def test_an_interrupt_inside_the_thread_is_not_lost() -> None:
    class Interrupted(Source):
        def __next__(self) -> ActivationBatch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(Ahead(Interrupted([1])))
    assert no_thread_is_left()


def test_the_thread_ends_with_the_last_reference() -> None:
    ahead = Ahead(Source([3] * 50))
    next(ahead)
    wait_until_full(ahead)  # and the thread waits for room
    assert len(threads()) == 1
    del ahead
    gc.collect()
    assert not threads()


def test_closing_waits_for_the_batch_that_the_thread_is_at() -> None:
    started, done = threading.Event(), threading.Event()

    class Long(Source):
        def __next__(self) -> ActivationBatch:
            if self.given == 1:
                started.set()
                time.sleep(0.2)
                done.set()
            return super().__next__()

    ahead = Ahead(Long([1] * 9))
    next(ahead)
    started.wait(10)
    ahead.close()
    assert done.is_set()
    assert no_thread_is_left()
    ahead.close()  # once is enough, twice does no harm


def test_time_is_counted_where_the_loop_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long(Source):
        def __next__(self) -> ActivationBatch:
            time.sleep(0.05)
            return super().__next__()

    ahead = Ahead(Long([1] * 3))
    mixed = mix(ahead, capacity=4, batch_size=1)
    next(mixed)
    assert 0.15 <= mixed.lm_seconds == ahead.seconds
    ahead = Ahead(Source([1] * 9))
    next(ahead)
    wait_until_full(ahead)
    queue, waits = ahead._made.get, []
    monkeypatch.setattr(ahead._made, "get", lambda: waits.append(ahead.waiting) or queue())
    next(ahead)
    assert waits == [DEPTH]  # the batch was there: nothing to wait for


SCRIPT = """
import sys, time
import torch
from chatsae.batch import ActivationBatch
from chatsae.buffer.ahead import Ahead
from chatsae.lm.forward import bare_tokens

class Source:
    def __next__(self):
        a = torch.rand(400, 400)
        for _ in range(20):
            a = a @ a
        return ActivationBatch(a[None], bare_tokens([torch.arange(400)]))
    def state_dict(self):
        return {"batches": 0}

ahead = Ahead(Source())
next(ahead)
print("end", flush=True)
"""


def test_a_program_ends_cleanly_while_the_thread_is_at_work() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
