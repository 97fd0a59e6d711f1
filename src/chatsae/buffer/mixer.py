"""The order of the mixing buffer, and the state to go on from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.batch import ActivationBatch
from chatsae.buffer.ring import Place, Ring, allocate, restored
from chatsae.errors import UserError


@runtime_checkable
class _Resumable(Protocol):
    """A source that counts the batches it has given."""

    def state_dict(self) -> dict[str, int]: ...


@runtime_checkable
class _Closable(Protocol):
    """A source with a thread to end."""

    def close(self) -> None: ...


class Mixer(Iterator[Float[Tensor, "L B D"]]):
    """Serve activations of all layers in random order, from a ring that holds `capacity` of them.

    The ring is filled, and a random half of it (in whole batches) is served. Meanwhile new activations take the slots
    that are free again, in the order in which they were served, a batch of the source as soon as there is room for
    it: the source works evenly, one batch ahead. When the half is served and replaced, the next half is drawn from
    all that waits. When the data end all that is left is served, so every activation leaves exactly once and only the
    last batch may be short. A row of every layer belongs to the same token.

    The order follows from the seed and the data. The ring has the dtype of the activations and is allocated at the
    first of them.
    """

    def __init__(
        self,
        batches: Iterable[ActivationBatch],
        *,
        capacity: int,
        batch_size: int,
        generator: torch.Generator | None = None,
        seed: int = 0,
        needed: int | None = None,
        place: Place = "auto",
        device: torch.device | None = None,
    ) -> None:
        """Wrap a stream of activations; nothing is read before the first batch is asked for.

        Args:
            batches: the stream.
            capacity: activations that are held.
            batch_size: activations of a batch that is served.
            generator: draws the order, by default from `seed`.
            seed: see above.
            needed: activations that will be asked for: none are read that only later ones would wait for.
            place: of the ring; see `chatsae.buffer.ring.ring_device`.
            device: that of the activations, for a state that is loaded; by default that of the state.

        Raises:
            UserError: the ring cannot hold two batches.
        """
        if batch_size < 1:
            raise UserError(f"train.batch_size: {batch_size} given, at least 1 needed")
        if capacity < 2 * batch_size:
            raise UserError(f"buffer.capacity: {capacity} given, at least two batches ({2 * batch_size}) needed")
        self._source = batches
        self._upstream = iter(batches)
        self._n_upstream = batches.state_dict()["batches"] if isinstance(batches, _Resumable) else 0
        self._capacity, self._batch_size, self._seed = capacity, batch_size, seed
        self._needed, self._place, self._device = needed, place, device
        self._generator = torch.Generator().manual_seed(seed) if generator is None else generator
        self.on_fill: Callable[[int], object] = lambda n: None
        """Called with the number of activations that were just put into the ring: filling it can take minutes."""
        self._ring: Ring | None = None
        self._pending: Tensor | None = None  # of the last batch read, what has no slot yet, [L, n, D]
        # Slots in the order they are served: those before _cursor have been, those from _stop on stay for the next
        # round; those before _filled hold new activations. Nothing is in the ring yet, so all of it counts as served.
        self._order = torch.arange(capacity)
        self._filled, self._cursor, self._stop = 0, capacity, capacity
        self._served = 0

    def __next__(self) -> Float[Tensor, "L B D"]:
        if self._cursor == self._stop:
            self._begin_round()
        elif self._needed is None or self._served + self._stop - self._cursor < self._needed:
            self._fill()
        if self._ring is None or self._cursor == self._stop:
            raise StopIteration
        end = min(self._cursor + self._batch_size, self._stop)
        batch = self._ring.take(self._order[self._cursor : end])
        self._served += end - self._cursor
        self._cursor = end
        return batch

    @property
    def capacity(self) -> int:
        """Activations the ring holds."""
        return self._capacity

    @property
    def lm_seconds(self) -> float:
        """Seconds that were spent on the language model behind the source; 0 for a source that does not measure."""
        return float(getattr(self._source, "seconds", 0.0))

    def close(self) -> None:
        """End the thread of the source, if it has one."""
        if isinstance(self._source, _Closable):
            self._source.close()

    def peek(self, n: int) -> Float[Tensor, "L n D"]:
        """Up to `n` random rows of those waiting in the buffer, which is filled if it is empty.

        They are served later all the same, and what is served does not change. Equal states give equal rows.

        Raises:
            UserError: there are no activations.
        """
        if self._cursor == self._stop:
            self._begin_round()
        waiting = self._order[self._cursor :]
        if self._ring is None or not len(waiting):
            raise UserError("there are no activations: the stream of sequences is empty")
        generator = torch.Generator().manual_seed(self._seed)
        return self._ring.take(waiting[torch.randperm(len(waiting), generator=generator)[:n].to(waiting.device)])

    def state_dict(self) -> dict[str, Tensor | int]:
        """All that the rest of the stream depends on, flat; tensors are those in use, to be saved before the next step.

        `harvest_batches` counts the batches read from the source, which a resumed source must skip.
        """
        state: dict[str, Tensor | int] = {
            "harvest_batches": self._n_upstream,
            "served": self._served,
            "filled": self._filled,
            "cursor": self._cursor,
            "stop": self._stop,
            "order": self._order,
            "generator": self._generator.get_state(),
        }
        if self._ring is not None:
            self._ring.settle()
            state["ring"] = self._ring.rows
        if self._pending is not None:
            state["pending"] = self._pending.contiguous()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Continue where `state_dict` was taken; the source has to continue there as well.

        The tensors are taken over, and copied only where they have to go to another device. A state without `filled`
        is of a buffer that replaced the served half at the end of a round; it goes on to the same rows.

        Raises:
            UserError: the state is incomplete or of another capacity, or the source stands elsewhere.
        """
        missing = {"harvest_batches", "cursor", "stop", "order", "generator"} - state.keys()
        if missing:
            raise UserError(f"the buffer's state lacks {', '.join(sorted(missing))}")
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        n_upstream, rows, pending = int(state["harvest_batches"]), tensors.get("ring"), tensors.get("pending")
        if rows is not None and rows.shape[1] != self._capacity:
            raise UserError(f"buffer.capacity: {self._capacity} given, the checkpoint was made with {rows.shape[1]}")
        if isinstance(self._source, _Resumable) and self._source.state_dict()["batches"] != n_upstream:
            stands = self._source.state_dict()["batches"]
            raise UserError(f"the buffer continues after {n_upstream} harvested batches, its source stands at {stands}")
        self._ring = None if rows is None else restored(rows, self._device or rows.device, self._place)
        place = torch.device("cpu") if self._ring is None else self._ring.rows.device
        self._order, self._pending = tensors["order"].to(place), None if pending is None else pending.to(place)
        self._n_upstream, self._cursor, self._stop = n_upstream, int(state["cursor"]), int(state["stop"])
        self._filled, self._served = int(state.get("filled", 0)), int(state.get("served", 0))
        self._generator.set_state(tensors["generator"].cpu())

    def _begin_round(self) -> None:
        """Fill what is free, and draw the order in which all that waits is served."""
        self._fill()
        waiting = torch.cat([self._order[self._stop :], self._order[: self._filled]])
        self._order = waiting[torch.randperm(len(waiting), generator=self._generator).to(waiting.device)]
        half = self._capacity // 2 // self._batch_size * self._batch_size
        self._filled, self._cursor = 0, 0
        self._stop = half if len(waiting) == self._capacity else len(waiting)

    def _fill(self) -> None:
        """Put new activations where served ones were, batch by batch, until one has to wait for room."""
        while self._filled < self._cursor:
            if self._pending is None:
                self._pending = self._read()
            if self._pending is None or self._ring is None:
                return
            n_waiting = self._pending.shape[1]
            n = min(n_waiting, self._stop - self._filled)  # the rest belongs to the next round
            if self._filled + n > self._cursor:
                return
            self._ring.put(self._order[self._filled : self._filled + n], self._pending[:, :n])
            self._pending = self._pending[:, n:] if n < n_waiting else None
            self._filled += n
            self.on_fill(n)

    def _read(self) -> Float[Tensor, "L N D"] | None:
        batch = next(self._upstream, None)
        if batch is None:
            return None
        if not isinstance(batch, ActivationBatch):
            raise UserError(f"the buffer takes batches that are an ActivationBatch, got a {type(batch).__name__}")
        self._n_upstream += 1
        if self._ring is None:
            self._ring = allocate(batch.acts, self._capacity, self._place)
            self._order = self._order.to(self._ring.rows.device)
        return self._ring.bring(batch.acts)


def mix(
    batches: Iterable[ActivationBatch],
    *,
    capacity: int,
    batch_size: int,
    generator: torch.Generator | None = None,
    seed: int = 0,
    needed: int | None = None,
    place: Place = "auto",
    device: torch.device | None = None,
) -> Mixer:
    """Batches [L, batch_size, D] of activations in random order, each activation exactly once; see `Mixer`.

    Raises:
        UserError: the buffer cannot hold two batches.
    """
    return Mixer(
        batches,
        capacity=capacity,
        batch_size=batch_size,
        generator=generator,
        seed=seed,
        needed=needed,
        place=place,
        device=device,
    )
