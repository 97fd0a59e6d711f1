"""Activations of a stream of sequences, each as if it went through the model alone, from few forwards."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Literal, TypeVar

import torch

from chatsae.batch import ActivationBatch, TokenBatch
from chatsae.errors import UserError
from chatsae.lm.budget import choose_budget
from chatsae.lm.forward import Broken, Ceiling, Way, bare_tokens, broken_sequences, forward, plan, unchecked
from chatsae.lm.packed import PackingRefused
from chatsae.lm.prefix import PrefixCache
from chatsae.lm.probe import ISOLATION_TOLERANCE, choose_way, isolation_error, relative_error
from chatsae.lm.tap import Decoder

__all__ = [
    "ISOLATION_TOLERANCE",
    "Harvest",
    "Way",
    "bare_tokens",
    "forward",
    "isolation_error",
    "plan",
    "relative_error",
]

T = TypeVar("T")

_HOPELESS = 1000
"""Sequences without a finite one among them after which a harvest that skips such sequences ends."""


class Harvest(Iterator[ActivationBatch]):
    """The activations of a stream of sequences, `token_budget` tokens per forward, padding counted.

    `pool` sequences at a time are cut into batches, those padded sorted by length so that little is padding, and the
    batches are shuffled (`seed`). Each activation equals that of its sequence alone: `way` "auto" measures which way
    is exact (`choose_way`), and `token_budget` 0 picks a budget (`choose_budget`). With `prefix` the tokens that the
    template puts before every dialogue are computed once, where that pays; by default on a CPU if it is exact.
    Equal data, way, prefix, budget, pool and seed give equal batches.

    A forward that is skipped (`skip`, a count that `state_dict` gave) is planned but not computed; what follows is the
    same to the bit, if all of these are those of the first harvest. `counted` is what `tally` held by then; without it
    the skipped part is counted again. A sequence with NaN or infinite activations stops the harvest, or with `on_nan`
    "skip" is left out, counted in `tally` and listed in `broken`, unless no sequence is finite. With `read_ahead` the
    next pool is read in a thread while the model works on this one; by default where the model is on another device.

    Attributes: way, prefix, token_budget (those in use), seconds (spent in the model), broken.

    Raises:
        UserError: on the first sequence that is empty, longer than the context, or holds an unknown token id; or when
            an activation is not finite.
    """

    def __init__(
        self,
        lm: Decoder,
        tokens: Iterable[TokenBatch],
        *,
        way: Way | Literal["auto"] = "auto",
        token_budget: int = 0,
        pool: int = 4096,
        seed: int = 0,
        skip: int = 0,
        counted: Mapping[str, int] | None = None,
        prefix: bool | None = None,
        on_nan: Literal["stop", "skip"] = "stop",
        read_ahead: bool | None = None,
        tally: Counter[str] | None = None,
    ) -> None:
        if token_budget < 0:
            raise UserError(f"harvest.token_budget: {token_budget} given, at least 1 needed, or 0 for automatic")
        if pool < 1:
            raise UserError(f"harvest.pool: {pool} given, at least 1 needed")
        if not lm.layers:
            raise UserError(f"{lm.name}: no layers to read; name them when the model is loaded")
        self._lm = lm
        if way == "auto":
            chosen = choose_way(lm)
            way = chosen.way
            if prefix is None:  # on a GPU it is not measured whether it pays
                prefix = chosen.prefix and lm.device.type == "cpu"
        self.way: Way = way
        self.prefix = bool(prefix)
        self._prefix = PrefixCache(lm) if prefix else None
        self.token_budget = token_budget or choose_budget(lm, self.way)
        self.seconds = 0.0
        self.broken: list[Broken] = []
        self._skip_nan = on_nan == "skip"
        self._tally: Counter[str] = Counter() if tally is None else tally
        self._ceiling = Ceiling()
        self._batches = self._skip = skip
        self._finite_seen = skip > 0
        self._counted = counted
        self._tally.update(counted or {})
        if read_ahead is None:
            read_ahead = lm.device.type != "cpu"
        self._stream = self._planned(tokens, pool, seed, read_ahead)

    def __next__(self) -> ActivationBatch:
        if self._skip:
            self._pass_over()
        try:
            tokens = next(self._stream)
        except StopIteration:
            if self.broken and not self._finite_seen:
                raise self._none_finite() from None
            raise
        start = time.perf_counter()
        try:
            acts = unchecked(self._lm, tokens, self.way, ceiling=self._ceiling, prefix=self._prefix)
        except PackingRefused as error:
            raise UserError(f"harvest.way: {self._lm.name} cannot be read packed: {error}; set it to auto") from None
        batch = self._finite(ActivationBatch(acts, tokens))
        self.seconds += time.perf_counter() - start
        self._batches += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Batches served so far, those skipped included, and the budget they were planned with."""
        return {"batches": self._batches, "token_budget": self.token_budget}

    def _pass_over(self) -> None:
        for _ in islice(self._stream, self._skip):
            pass
        self._skip = 0
        if self._counted is not None:
            self._tally.clear()
            self._tally.update(self._counted)

    def _planned(self, tokens: Iterable[TokenBatch], pool: int, seed: int, read_ahead: bool) -> Iterator[TokenBatch]:
        generator = torch.Generator().manual_seed(seed)
        pools = _pools(tokens, pool)
        for pooled in ahead(pools) if read_ahead else pools:
            batches = plan(
                pooled.lengths.tolist(),
                token_budget=self.token_budget,
                split=self._lm.rope_split,
                way=self.way,
                kinds=None if self._prefix is None else self._prefix.lengths(pooled).tolist(),
            )
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield pooled.select(batches[i])

    def _finite(self, batch: ActivationBatch) -> ActivationBatch:
        """The batch without the sequences that are not finite.

        Raises:
            UserError: there is one, and it should stop the harvest.
        """
        found = broken_sequences(self._lm.layers, batch.acts, batch.tokens)
        if not found:
            self._finite_seen = True
            return batch
        if not self._skip_nan:
            raise UserError(f"{found[0]}; try model.dtype float32, or harvest.on_nan skip")
        self.broken += found
        self._finite_seen = self._finite_seen or len(found) < len(batch.tokens)
        if not self._finite_seen and len(self.broken) >= _HOPELESS:
            raise self._none_finite()
        self._tally["NaN or infinite activations"] += len(found)
        lost = torch.tensor([b.index for b in found])
        kept = ~torch.isin(batch.tokens.sequence, lost)
        good = sorted(set(range(len(batch.tokens))) - set(lost.tolist()))
        return ActivationBatch(batch.acts[:, kept.to(batch.acts.device)], batch.tokens.select(good))

    def _none_finite(self) -> UserError:
        return UserError(
            f"{self._lm.name}: none of the first {len(self.broken):,} sequences has finite activations "
            f"({self.broken[0]}); try model.dtype float32"
        )


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; each is made in a thread while the one before it is in use.

    An exception of the source is raised where its item would have come. The thread ends with the iterator.
    """
    made: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(entry: tuple[T] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return made.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item,))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
            put(error)

    thread = threading.Thread(target=work, name="chatsae-read-ahead", daemon=True)
    thread.start()
    try:
        while (entry := made.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        stop.set()


def _pools(tokens: Iterable[TokenBatch], size: int) -> Iterator[TokenBatch]:
    """The same sequences in the same order, `size` at a time; the last pool may be smaller."""
    held: list[TokenBatch] = []
    n_held = 0
    for batch in tokens:
        held.append(batch)
        n_held += len(batch)
        if n_held >= size:
            merged = TokenBatch.concat(held)
            whole = n_held - n_held % size
            for start in range(0, whole, size):
                yield merged.select(range(start, start + size))
            held, n_held = [merged.select(range(whole, n_held))], n_held - whole
    if n_held:
        yield TokenBatch.concat(held)
