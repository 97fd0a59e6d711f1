"""The mixing buffer: activations leave in random order, each exactly once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chatsae.batch import ActivationBatch
from chatsae.errors import UserError


@runtime_checkable
class _Resumable(Protocol):
    """A source that counts the batches it has given."""

    def state_dict(self) -> dict[str, int]: ...


class Mixer(Iterator[Float[Tensor, "L B D"]]):
    """Serve activations of all layers in random order, from a ring that holds `capacity` of them.

    The ring is filled; a random half of it (in whole batches) is served; the slots that were served are filled with
    new activations; and so on. When the data end all that is left is served, so every activation leaves exactly once
    and only the last batch may be short. A row of every layer belongs to the same token.

    The ring has the dtype and the device of the activations and is allocated at the first of them.
    """

    def __init__(
        self,
        batches: Iterable[ActivationBatch],
        *,
        capacity: int,
        batch_size: int,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        """Wrap a stream of activations; nothing is read before the first batch is asked for.

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
        self._generator = torch.Generator().manual_seed(seed) if generator is None else generator
        self.on_fill: Callable[[int], object] = lambda n: None
        """Called with the number of activations that were just put into the ring: filling it can take minutes."""
        self._ring: Tensor | None = None
        self._pending: Tensor | None = None  # what the last batch read had beyond the free slots, [L, n, D]
        # Slots in the order they are served: those before _cursor are free, those from _stop on stay for the next
        # round. Nothing is in the ring yet, so all of it counts as served.
        self._order = torch.arange(capacity)
        self._cursor = self._stop = capacity

    def __next__(self) -> Float[Tensor, "L B D"]:
        if self._cursor == self._stop:
            self._refill()
        if self._ring is None or self._cursor == self._stop:
            raise StopIteration
        end = min(self._cursor + self._batch_size, self._stop)
        slots = self._order[self._cursor : end]
        self._cursor = end
        return _rows(self._ring, slots)

    @property
    def capacity(self) -> int:
        """Activations the ring holds."""
        return self._capacity

    @property
    def lm_seconds(self) -> float:
        """Seconds that the language model behind the source has worked; 0 for a source that does not measure them."""
        return float(getattr(self._source, "seconds", 0.0))

    def peek(self, n: int) -> Float[Tensor, "L n D"]:
        """Up to `n` random rows of those waiting in the buffer, which is filled if it is empty.

        They are served later all the same, and what is served does not change. Equal states give equal rows.

        Raises:
            UserError: there are no activations.
        """
        if self._cursor == self._stop:
            self._refill()
        waiting = self._order[self._cursor :]
        if self._ring is None or not len(waiting):
            raise UserError("there are no activations: the stream of sequences is empty")
        generator = torch.Generator().manual_seed(self._seed)
        return _rows(self._ring, waiting[torch.randperm(len(waiting), generator=generator)[:n].to(waiting.device)])

    def state_dict(self) -> dict[str, Tensor | int]:
        """All that the rest of the stream depends on, flat; tensors are those in use, to be saved before the next step.

        `harvest_batches` counts the batches read from the source, which a resumed source must skip.
        """
        state: dict[str, Tensor | int] = {
            "harvest_batches": self._n_upstream,
            "cursor": self._cursor,
            "stop": self._stop,
            "order": self._order,
            "generator": self._generator.get_state(),
        }
        if self._ring is not None:
            state["ring"] = self._ring
        if self._pending is not None:
            state["pending"] = self._pending.contiguous()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Continue where `state_dict` was taken; the source has to continue there as well.

        The tensors are taken over, not copied, and stay on their device, which must be that of the activations.

        Raises:
            UserError: the state is incomplete or of another capacity, or the source stands elsewhere.
        """
        missing = {"harvest_batches", "cursor", "stop", "order", "generator"} - state.keys()
        if missing:
            raise UserError(f"the buffer's state lacks {', '.join(sorted(missing))}")
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        n_upstream, ring = int(state["harvest_batches"]), tensors.get("ring")
        if ring is not None and ring.shape[1] != self._capacity:
            raise UserError(f"buffer.capacity: {self._capacity} given, the checkpoint was made with {ring.shape[1]}")
        if isinstance(self._source, _Resumable) and self._source.state_dict()["batches"] != n_upstream:
            stands = self._source.state_dict()["batches"]
            raise UserError(f"the buffer continues after {n_upstream} harvested batches, its source stands at {stands}")
        self._ring, self._pending, self._order = ring, tensors.get("pending"), tensors["order"]
        self._n_upstream, self._cursor, self._stop = n_upstream, int(state["cursor"]), int(state["stop"])
        self._generator.set_state(tensors["generator"].cpu())

    def _refill(self) -> None:
        """Put new activations where served ones were, and draw the order of the next round."""
        free, kept = self._order[: self._stop].sort().values, self._order[self._stop :]
        n_new = self._fill(free)
        waiting = torch.cat([kept, free[:n_new]])
        shuffle = torch.randperm(len(waiting), generator=self._generator).to(waiting.device)
        self._order = waiting[shuffle]
        half = self._capacity // 2 // self._batch_size * self._batch_size
        self._cursor, self._stop = 0, half if len(waiting) == self._capacity else len(waiting)

    def _fill(self, free: Int[Tensor, " S"]) -> int:
        """Copy activations into free slots until they are full or the data end; returns how many were copied."""
        done = 0
        while done < len(free):
            acts = self._pending if self._pending is not None else self._read()
            if acts is None:
                break
            if self._ring is None:
                self._ring = acts.new_empty(acts.shape[0], self._capacity, acts.shape[2])
            slots = free[done : done + acts.shape[1]].to(acts.device)
            for ring, new in zip(self._ring, acts[:, : len(slots)], strict=True):
                ring.index_copy_(0, slots, new)
            done += len(slots)
            self.on_fill(len(slots))
            self._pending = acts[:, len(slots) :] if len(slots) < acts.shape[1] else None
        return done

    def _read(self) -> Float[Tensor, "L N D"] | None:
        batch = next(self._upstream, None)
        if batch is None:
            return None
        self._n_upstream += 1
        return batch.acts


def _rows(ring: Float[Tensor, "L C D"], slots: Int[Tensor, " S"]) -> Float[Tensor, "L S D"]:
    return ring.index_select(1, slots.to(ring.device))


def mix(
    batches: Iterable[ActivationBatch],
    *,
    capacity: int,
    batch_size: int,
    generator: torch.Generator | None = None,
    seed: int = 0,
) -> Mixer:
    """Batches [L, batch_size, D] of activations in random order, each activation exactly once; see `Mixer`.

    Raises:
        UserError: the buffer cannot hold two batches.
    """
    return Mixer(batches, capacity=capacity, batch_size=batch_size, generator=generator, seed=seed)
