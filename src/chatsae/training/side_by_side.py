"""Several SAEs that train at the same time on the threads of a CPU."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Together(Protocol):
    """Calls a function with everything, maybe at once, and gives the results in order."""

    def __call__(self, call: Callable[[T], R], items: Iterable[T]) -> list[R]: ...


def in_turn(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The plain twin of `side_by_side`."""
    return [call(item) for item in items]


@contextmanager
def side_by_side(n: int, devices: Sequence[torch.device]) -> Iterator[Together]:
    """Gives what calls a function with up to n things at once, on an equal part of torch's threads each.

    A second thread gains an SAE's step little, a second SAE all of it (`python bench/step_threads.py`). Things must not
    share what they change: then what is computed does not hang on who is first. In turn on a GPU, or on one thread. An
    exception is raised when all calls have ended, the first in order.
    """
    threads = torch.get_num_threads()
    workers = min(n, threads) if all(device.type == "cpu" for device in devices) else 1
    if workers < 2:
        yield in_turn
        return
    everyone = threading.Barrier(workers)

    def begin(_: int) -> None:
        torch.get_num_threads()  # before the first such call, a thread takes over what another sets later
        torch.set_num_threads(threads // workers)
        everyone.wait()  # so that each of them has a thread

    with ThreadPoolExecutor(workers, thread_name_prefix="side-by-side") as pool:
        list(pool.map(begin, range(workers)))
        torch.set_num_threads(threads)  # threads that start from now on take over what was set last

        def call_all(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
            calls = [pool.submit(call, item) for item in items]
            wait(calls)
            return [made.result() for made in calls]

        yield call_all
