"""Arrays that the steps of all SAEs of one thread share."""

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_HUGE, _LINE = 2**21, 64


class _Spaces(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[tuple[str, Any], Array] = {}
        self.views: dict[tuple[str, Any], tuple[int | tuple[int, ...], Array]] = {}
        self.both: dict[tuple[str, Any], tuple[Array, Array, Tensor]] = {}


_spaces = _Spaces()


def space(name: str, shape: int | tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array of the work space; the same object for the same shape, as making one takes a while."""
    key = name, dtype
    found = _spaces.views.get(key)
    if found is not None and found[0] == shape:
        return found[1]
    size = shape if isinstance(shape, int) else math.prod(shape)
    array = _spaces.arrays.get(key)
    if array is None or array.size < size:
        array = memory(size + size // 4, dtype)  # room for the next, slightly larger batch
        _spaces.arrays[key] = array
    view = array[:size] if isinstance(shape, int) else array[:size].reshape(shape)
    _spaces.views[key] = shape, view
    return view


def both(name: str, shape: tuple[int, int], dtype: Any, padded: bool = False) -> tuple[Array, Tensor]:
    """`space` that mostly has the same shape, and the tensor of its memory.

    padded: where rows would begin at multiples of 2,048 bytes, those of the array are 64 bytes longer than those of the
    tensor: a column then does not share a few sets of the cache, which costs a product a twentieth of its time.
    """
    found, whole = _spaces.both.get((name, dtype)), _spaces.arrays.get((name, dtype))
    if found is None or found[0] is not whole or found[2].shape != shape:
        rows, columns = shape
        size = np.dtype(dtype).itemsize
        wide = columns + 64 // size if padded and columns * size % 2048 == 0 else columns
        array = space(name, (rows, wide), dtype)
        tensor = torch.from_numpy(array)[:, :columns]
        found = _spaces.both[name, dtype] = _spaces.arrays[name, dtype], array, tensor
    return found[1], found[2]


def product(
    name: str, a: Tensor, b: Tensor, dtype: Any, *, padded: bool = False, add: Tensor | None = None
) -> tuple[Array, Tensor]:
    """a @ b in the work space, as an array and as a tensor (see `both`); with `add`, add + a @ b in its place.

    torch.mm is the only route. On an AMD CPU with AVX2, oneDNN's product through torch was at most 7 % faster and up to
    2.2 times slower, and with padded rows it falls back to a reference loop, a thousand times slower
    (docs/log.md); on Intel it was slower throughout.
    """
    if add is not None:
        return add.numpy(), torch.addmm(add, a, b, out=add)
    array, out = both(name, (a.shape[0], b.shape[1]), dtype, padded)
    torch.mm(a, b, out=out)
    return array, out


def grown(name: str, size: int, used: int, dtype: Any) -> Array:
    """`space` that keeps its first `used` elements."""
    before = _spaces.arrays.get((name, dtype))
    if before is not None and before.size >= size:
        return before
    array = memory(size + size // 2, dtype)
    if before is not None:
        array[:used] = before[:used]
    _spaces.arrays[name, dtype] = array
    _spaces.views.pop((name, dtype), None)
    return array


def release(prefix: str) -> None:
    """Give back the arrays whose names begin like this."""
    for key in [key for key in _spaces.arrays if key[0].startswith(prefix)]:
        del _spaces.arrays[key]
        _spaces.views.pop(key, None)
        _spaces.both.pop(key, None)


def memory(size: int, dtype: Any) -> Array:
    """An uninitialised vector; a large one begins where a huge page does.

    Linux gives huge pages to what numpy allocates from 4 MB on, and none to torch's; going through 25 MB of weights in
    small pages takes a sixth longer.
    """
    n = size * np.dtype(dtype).itemsize
    page, most = (_LINE, n + _LINE) if n < _HUGE // 4 else (_HUGE, max(n + _HUGE, 2 * _HUGE))
    raw = np.empty(most, np.uint8)
    start = -raw.ctypes.data % page
    return raw[start : start + n].view(dtype)


def moved(tensor: Tensor) -> Tensor:
    """A copy with rows one after another, in `memory`."""
    array = memory(tensor.numel(), tensor.numpy().dtype).reshape(tensor.shape)
    np.copyto(array, tensor.numpy())
    return torch.from_numpy(array)
