"""Threads that share the rows of a compiled loop."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_WORTH_A_THREAD = 1 << 19  # multiplications, some 80 microseconds; handing over a part costs 50
_crew: ThreadPoolExecutor | None = None


def share(
    kernel: Callable[..., Any], rows: int, work: int, *args: Any, ends: npt.NDArray[np.integer] | None = None
) -> None:
    """kernel(first, last, *args) over all rows, on as many threads as torch uses.

    Plain threads around loops without the interpreter lock: numba's own would be compiled for three times as long,
    and its default layer must not be entered by two SAEs at once. They wait asleep while torch multiplies.

    Args:
        kernel: a compiled loop over first <= row < last.
        rows: how many there are.
        work: multiplications in all; small work stays on the calling thread.
        args: what else the loop takes.
        ends: running total of the work after each row; without it all rows weigh the same.
    """
    if work < _WORTH_A_THREAD:
        kernel(0, rows, *args)
        return
    threads = min(torch.get_num_threads(), 1 + work // _WORTH_A_THREAD, max(rows, 1))
    if threads == 1:
        kernel(0, rows, *args)
        return
    cuts = [_cut(i, threads, rows, ends) for i in range(threads + 1)]
    parts = [_members().submit(kernel, a, b, *args) for a, b in pairwise(cuts[1:])]
    try:
        kernel(cuts[0], cuts[1], *args)
    finally:
        for part in parts:
            part.result()


def _cut(i: int, threads: int, rows: int, ends: npt.NDArray[np.integer] | None) -> int:
    if ends is None or i in (0, threads):
        return rows * i // threads
    return int(ends.searchsorted(ends[-1] * i // threads))


def _members() -> ThreadPoolExecutor:
    global _crew
    if _crew is None:
        _crew = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="sae-step")
    return _crew


def _forget() -> None:
    global _crew
    _crew = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # threads do not survive a fork
