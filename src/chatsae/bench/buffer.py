"""`chatsae bench buffer`: what the mixing buffer costs per activation, beside one copy of the same bytes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chatsae import console
from chatsae.batch import ActivationBatch
from chatsae.bench.result import BenchResult, Claim
from chatsae.buffer import mix
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.lm.forward import bare_tokens

SIZES = (256, 896, 3584)
LAYERS = (1, 3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPIES = 2.0  # the project's goal: one in, one out
BATCH = 128
FORWARD = 1024  # activations that arrive at once
ROUNDS = 7
RING_BYTES = 2**26  # beyond the caches
_SOURCE_BYTES = 2**25
_ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_strided")
_COLUMNS = (
    Column("d_in"),
    Column("layers"),
    Column("dtype"),
    Column("ns", "ns / activation"),
    Column("copy_ns", "one copy, ns"),
    Column("over_copy", "/ one copy"),
    Column("copies", "copies, in bytes"),
    Column("index_share", "indices, in bytes"),
    Column("whole_ns", "shuffled whole, ns"),
    Column("over_whole", "shuffled whole / ring"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One shape; an activation of it has `row_bytes` at all layers together."""

    d_in: int
    layers: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        return self.layers * self.d_in * DTYPES[self.dtype].itemsize

    @property
    def capacity(self) -> int:
        """Activations in the buffer, in whole forwards."""
        return max(RING_BYTES // self.row_bytes // (2 * FORWARD), 1) * 2 * FORWARD

    def source(self) -> Iterator[ActivationBatch]:
        """Forwards without end; they repeat, but too late for a cache."""
        n = max(_SOURCE_BYTES // self.row_bytes // FORWARD, 2)
        acts = torch.rand(self.layers, n * FORWARD, self.d_in, generator=torch.Generator().manual_seed(0))
        tokens = bare_tokens([torch.arange(FORWARD)])
        return cycle([ActivationBatch(part, tokens) for part in acts.to(DTYPES[self.dtype]).split(FORWARD, dim=1)])


def bench_buffer(size: int = 0) -> BenchResult:
    """The buffer in steady state, on one thread: time and bytes per activation; `size` is d_in (0: 256, 896, 3584).

    `one copy` is the time to copy an activation of all layers from one place in memory to another. `shuffled whole` is
    the obvious buffer, a tensor that is shuffled whole and joined to the new half.

    Raises:
        UserError: the size is no number of an activation.
    """
    if size < 0:
        raise UserError(f"size: expected d_in of the activations, or 0 for {SIZES}, got {size}")
    cases = [Case(d, n, t) for t in DTYPES for d in ((size,) if size else SIZES) for n in LAYERS]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with console.progress("buffer", len(cases)) as advance:
            rows = []
            for case in cases:
                rows.append(_measured(case))
                advance(1)
    finally:
        torch.set_num_threads(threads)
    conditions = {"batch": BATCH, "forward": FORWARD, "rounds": ROUNDS, "ring_bytes": RING_BYTES, "threads": 1}
    claims = [
        Claim.at_most("copies of an activation, counted in bytes written", max(r["copies"] for r in rows), COPIES),
        Claim.at_most("batches that differ from those of the obvious buffer", sum(r["differ"] for r in rows), 0),
    ]
    return BenchResult("buffer", _COLUMNS, conditions, rows, claims)


def shuffled_whole(
    source: Iterator[ActivationBatch], capacity: int, batch_size: int, seed: int = 0
) -> Iterator[Tensor]:
    """The obvious buffer, for a source without end whose batches fill half of it; it serves what `mix` does."""
    generator = torch.Generator().manual_seed(0)
    half = capacity // 2 // batch_size * batch_size

    def taken(n: int) -> Tensor:
        return torch.cat([batch.acts for batch in islice(source, n // FORWARD)], dim=1)

    waiting = taken(capacity)
    while True:
        waiting = waiting[:, torch.randperm(capacity, generator=generator)]
        yield from waiting[:, :half].split(batch_size, dim=1)
        waiting = torch.cat([waiting[:, half:], taken(half)], dim=1)


class Written(TorchDispatchMode):
    """Counts the bytes that torch writes while it is entered.

    Attributes: activations (numbers with a fraction), indices (all other bytes).
    """

    def __init__(self) -> None:
        super().__init__()
        self.activations = self.indices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        outputs = found if isinstance(found, tuple | list) else [found]
        returns = func._schema.returns * (len(outputs) if len(func._schema.returns) == 1 else 1)
        for output, told in zip(outputs, returns, strict=True):
            if isinstance(output, Tensor) and (told.alias_info is None or told.alias_info.is_write):  # else a view
                self._count(func._schema.name, args[3] if func._schema.name == "aten::index_copy_" else output)
        return found

    def _count(self, name: str, written: Tensor) -> None:
        if name in _ALLOCATIONS:
            return
        if written.is_floating_point() or written.is_complex():
            self.activations += written.nbytes
        else:
            self.indices += written.nbytes


def _measured(case: Case) -> dict[str, Any]:
    """The row of a case."""
    half = case.capacity // 2
    sizes = {"capacity": case.capacity, "batch_size": BATCH}
    ring, whole = mix(case.source(), **sizes), shuffled_whole(case.source(), **sizes)
    differ = sum(not torch.equal(next(ring), next(whole)) for _ in range(case.capacity // BATCH + 1))
    bytes_of = Written()
    n_counted = 2 * half // BATCH  # two rounds in all, from the second batch of one to the first of another
    with bytes_of:
        _serve(ring, n_counted)
    a, b = (torch.zeros(case.layers, half, case.d_in, dtype=DTYPES[case.dtype]) for _ in range(2))
    parts = list(zip(a.split(BATCH, dim=1), b.split(BATCH, dim=1), strict=True))
    works: dict[str, Callable[[], object]] = {
        "ring": lambda: _serve(ring, len(parts)),
        "copy": lambda: [to.copy_(from_) for to, from_ in parts],
        "whole": lambda: _serve(whole, len(parts)),
    }
    spent: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            start = time.process_time()
            work()
            spent[name].append((time.process_time() - start) / half * 1e9)
    ns = {name: median(times) for name, times in spent.items()}
    return {
        "d_in": case.d_in,
        "layers": case.layers,
        "dtype": case.dtype,
        "capacity": case.capacity,
        "ns": round(ns["ring"], 1),
        "copy_ns": round(ns["copy"], 1),
        "over_copy": round(ns["ring"] / ns["copy"], 3),
        "copies": bytes_of.activations / (2 * half * case.row_bytes),
        "index_share": round(bytes_of.indices / (2 * half * case.row_bytes), 4),
        "whole_ns": round(ns["whole"], 1),
        "over_whole": round(ns["whole"] / ns["ring"], 3),
        "differ": differ,
    }


def _serve(batches: Iterator[Tensor], n: int) -> None:
    for _ in range(n):
        next(batches)
