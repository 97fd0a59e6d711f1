"""The memory of the mixing buffer: rows that are written and read at any slots, one copy in and one out."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chatsae.errors import UserError

Place = Literal["auto", "cpu", "cuda"]

_ROOM = 0.5  # of a GPU's free memory that a ring may take; the rest is for forwards and steps
# Rows are copied as the widest numbers that they are made of: a third of the time for bfloat16 on a CPU.
_WORDS = ((16, torch.complex128), (8, torch.int64), (4, torch.int32), (2, torch.int16))


class Ring:
    """Slots for the activations of one token each, at every layer, on the device of the activations."""

    def __init__(self, rows: Float[Tensor, "L C D"]) -> None:
        self.rows = rows

    @property
    def capacity(self) -> int:
        """Slots."""
        return self.rows.shape[1]

    def bring(self, acts: Float[Tensor, "L N D"]) -> Float[Tensor, "L N D"]:
        """Activations where `put` wants them."""
        return acts.to(self.rows.device)

    def settle(self) -> None:
        """Wait until what was brought last has arrived."""

    def put(self, slots: Int[Tensor, " N"], acts: Float[Tensor, "L N D"]) -> None:
        """Overwrite slots, no two of which are the same."""
        self.settle()
        if self.rows.device.type != "cpu":
            self.rows.index_copy_(1, slots, acts)
            return
        for kept, new in zip(*_words(self.rows, acts), strict=True):
            kept.index_copy_(0, slots, new)

    def take(self, slots: Int[Tensor, " N"]) -> Float[Tensor, "L N D"]:
        """A copy of what is in slots, on the device of the activations."""
        return self.rows.index_select(1, slots)


class HostRing(Ring):
    """Slots in CPU memory for activations on a GPU.

    Both ways lead through pinned memory and a stream of their own, so that copies overlap with the GPU's work. The
    rows themselves are not pinned: no copy between the devices touches them.
    """

    def __init__(self, rows: Float[Tensor, "L C D"], device: torch.device) -> None:
        super().__init__(rows)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._arrived = torch.cuda.Event()

    def bring(self, acts: Float[Tensor, "L N D"]) -> Float[Tensor, "L N D"]:
        """A copy in pinned memory, complete once `settle` returns."""
        host = torch.empty(acts.shape, dtype=acts.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the model may still be writing them
        with torch.cuda.stream(self._stream):
            host.copy_(acts, non_blocking=True)
            self._arrived.record()
        acts.record_stream(self._stream)
        return host

    def settle(self) -> None:
        """Wait for the copy to the CPU."""
        self._arrived.synchronize()

    def take(self, slots: Int[Tensor, " N"]) -> Float[Tensor, "L N D"]:
        """A copy on the GPU, which the work that is queued from now on waits for."""
        n_layers, _, d_in = self.rows.shape
        host = torch.empty(n_layers, len(slots), d_in, dtype=self.rows.dtype, pin_memory=True)
        torch.index_select(self.rows, 1, slots, out=host)
        with torch.cuda.stream(self._stream):
            batch = host.to(self._device, non_blocking=True)  # torch keeps `host` until the copy is done
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        batch.record_stream(current)
        return batch


def allocate(like: Float[Tensor, "L N D"], capacity: int, place: Place) -> Ring:
    """A ring of so many slots for activations like these.

    Raises:
        UserError: see `ring_device`.
    """
    n_layers, _, d_in = like.shape
    device = ring_device(place, like.device, n_layers * capacity * d_in * like.element_size())
    return _ring(torch.zeros(n_layers, capacity, d_in, dtype=like.dtype, device=device), like.device)


def restored(rows: Float[Tensor, "L C D"], device: torch.device, place: Place) -> Ring:
    """The ring of a checkpoint; `device` is that of the activations. Rows that are in place are not copied.

    Raises:
        UserError: see `ring_device`.
    """
    there = rows.device.type == device.type
    return _ring(rows if there and place == "auto" else rows.to(ring_device(place, device, rows.nbytes)), device)


def ring_device(place: Place, device: torch.device, n_bytes: int, free: int | None = None) -> torch.device:
    """Where a ring of so many bytes is: auto is the device of the activations, unless it takes over half of what is
    free there (`free` bytes; measured by default), and then the CPU.

    Raises:
        UserError: a GPU is asked for, and the activations are not on one.
    """
    if device.type == "cpu":
        if place == "cuda":
            raise UserError("buffer.device: cuda given, but the activations are on the CPU; set it to auto")
        return device
    if place == "auto" and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] if free is None else free
        place = "cuda" if n_bytes <= _ROOM * free else "cpu"
    return torch.device("cpu") if place == "cpu" else device


def _ring(rows: Float[Tensor, "L C D"], device: torch.device) -> Ring:
    return HostRing(rows, device) if rows.device.type == "cpu" and device.type == "cuda" else Ring(rows)


def _words(kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors, seen as the widest numbers that the rows of both are made of; the bits are the same."""
    for width, dtype in _WORDS:
        if all(_made_of(tensor, width) for tensor in (kept, new)):
            return kept.view(dtype), new.view(dtype)
    return kept, new


def _made_of(tensor: Tensor, width: int) -> bool:
    """Whether every row is a run of whole numbers of so many bytes, aligned to them."""
    *strides, last = tensor.stride()
    sizes = (tensor.shape[-1], tensor.storage_offset(), *strides)
    aligned = all(size * tensor.element_size() % width == 0 for size in sizes)
    return last == 1 and aligned and tensor.data_ptr() % width == 0 and width >= tensor.element_size()
