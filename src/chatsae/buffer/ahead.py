"""Activations that are made in a thread while those before them are in use."""

import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch

from chatsae.batch import ActivationBatch

DEPTH = 2
"""Batches that wait at most; one more is being made. Enough for forwards of uneven length."""


@runtime_checkable
class Source(Protocol):
    """What is read ahead (see `chatsae.lm.harvest.Harvest`)."""

    def __next__(self) -> ActivationBatch: ...
    def state_dict(self) -> dict[str, int]: ...


class _Made:
    """A batch or the reason why there is none, what its source had counted by then, and a GPU's event to wait for."""

    def __init__(self, found: ActivationBatch | BaseException, counts: Counter[str], ready: Any = None) -> None:
        self.found, self.counts, self.ready = found, counts, ready


class Ahead(Iterator[ActivationBatch]):
    """The batches of a source, the same ones in the same order, made in a thread.

    All that can be seen from outside, `state_dict` and `tally` too, is of the batches that were handed out, whatever
    the thread has made beyond them; a resume makes that again. An exception of the source is raised where its batch
    would have come. On a GPU the source works on a stream of its own. The thread starts with the first batch that is
    asked for, and ends with `close`, with the last reference to this, or with the interpreter.

    Attributes: seconds (spent waiting for batches).
    """

    def __init__(
        self,
        source: Source,
        *,
        device: torch.device | None = None,
        counts: Counter[str] | None = None,
        tally: Counter[str] | None = None,
        depth: int = DEPTH,
    ) -> None:
        """Wrap a source; it must not be used elsewhere.

        Args:
            source: see above.
            device: that the source works on; by default the CPU.
            counts: what the source counts in.
            tally: gets what is in `counts` for the batches that were handed out.
            depth: batches that wait at most.
        """
        self.seconds = 0.0
        self._source, self._device = source, device or torch.device("cpu")
        self._counts = Counter[str]() if counts is None else counts
        self._tally = Counter[str]() if tally is None else tally
        self._tally.update(self._counts)
        self._batches = source.state_dict()["batches"]
        self._made: queue.Queue[_Made] = queue.Queue(maxsize=depth)
        self._end: BaseException | None = None
        self._close: weakref.finalize[..., Ahead] | None = None

    def __next__(self) -> ActivationBatch:
        if self._end is None:
            if self._close is None:
                self._start()
            start = time.perf_counter()
            made = self._made.get()
            self.seconds += time.perf_counter() - start
            self._tally.update(made.counts)
            if isinstance(made.found, ActivationBatch):
                self._batches += 1
                return _handed(made.found, made.ready)
            self._end = made.found
            self.close()
        if isinstance(self._end, StopIteration):
            raise StopIteration
        raise self._end

    def state_dict(self) -> dict[str, int]:
        """Batches handed out so far, those that the source had skipped included."""
        return {"batches": self._batches}

    @property
    def waiting(self) -> int:
        """Batches that are ready."""
        return self._made.qsize()

    def close(self) -> None:
        """End the thread; a batch that it is at is finished first. There are no more batches then."""
        if self._end is None:
            self._end = StopIteration()
        if self._close is not None:
            self._close()

    def _start(self) -> None:
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))  # weights may still be on their way
        stop, args = threading.Event(), (self._source, self._counts, stream, self._made)
        thread = threading.Thread(target=_work, args=(*args, stop), name="chatsae-harvest-ahead", daemon=True)
        self._close = weakref.finalize(self, _end_thread, thread, stop, self._made)  # at exit as well
        thread.start()


def _work(source: Source, counts: Counter[str], stream: Any, made: queue.Queue[_Made], stop: threading.Event) -> None:
    """The thread; it knows nothing of its `Ahead`, so that this can be collected."""
    before = Counter(counts)
    while not stop.is_set():
        ready = None
        found: ActivationBatch | BaseException
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                found = next(source)
                ready = None if stream is None else stream.record_event()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
            found = error
        now = Counter(counts)
        made.put(_Made(found, now - before, ready))
        before = now
        if not isinstance(found, ActivationBatch):
            return


def _end_thread(thread: threading.Thread, stop: threading.Event, made: queue.Queue[_Made]) -> None:
    stop.set()
    while thread.is_alive() and thread is not threading.current_thread():
        try:
            made.get_nowait()  # it may be waiting for room
        except queue.Empty:
            thread.join(timeout=0.01)


def _handed(batch: ActivationBatch, ready: Any) -> ActivationBatch:
    """The batch, which the work that is queued from now on waits for."""
    if ready is not None:
        current = torch.cuda.current_stream(batch.acts.device)
        current.wait_event(ready)
        batch.acts.record_stream(current)
    return batch
