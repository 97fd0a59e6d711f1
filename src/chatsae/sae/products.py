"""Matrix products on a CPU into the work space, with what multiplies fastest there."""

import ctypes
import functools
import math
import platform
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.sae import kernels_tiles
from chatsae.sae.crew import share
from chatsae.sae.instructions import CONFIG
from chatsae.sae.workspace import Array, both, space

_AMD = llvmlite.binding.get_host_cpu_name().startswith("znver")
_FEATURES = llvmlite.binding.get_host_cpu_features()
_AMX = bool(_FEATURES.get("amx-bf16"))

SIDE = 32
"""What the sides of matrices on tiles are multiples of."""
_LEAST = 2**25
"""Multiplications from which packing for tiles pays."""
_COLUMNS, _BLOCK, _CHUNK = 1024, 2**17, 128
"""Numbers of the right matrix that are packed at a time: columns at the most, all at the most (768 KB packed), and what
their depth is a multiple of."""
_RATE, NARROW_RATE = 32, 192
"""How much faster a multiplication is on tiles than in a loop: of float32, and of bfloat16."""


def product(
    name: str, a: Tensor, b: Tensor, dtype: Any, *, padded: bool = False, add: Tensor | None = None
) -> tuple[Array, Tensor]:
    """a @ b, in the work space, as an array and as a tensor (see `both`); `add`: what becomes the sum of it and a @ b.

    On AMD, torch's own float32 product takes twice the time of oneDNN's, which runs there; with AMX, large ones run on
    tiles. By the kind of CPU and not by a timing: what is computed must not hang on how busy the machine was.
    """
    if _AMD and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        try:
            out = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
            out = out if add is None else add.add_(out)
            return out.numpy(), out
        except (AttributeError, RuntimeError, TypeError):  # it is not a public operator
            pass
    array, out = both(name, (a.shape[0], b.shape[1]), dtype, padded) if add is None else (add.numpy(), add)
    if fits_tiles(a.dtype, *a.shape, b.shape[1]) and 1 in a.stride() and 1 in b.stride():
        on_tiles(a, b, out, add=add is not None)
    elif add is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(add, a, b, out=add)
    return array, out


@functools.cache
def tiles() -> bool:
    """Whether this CPU has tile registers (AMX) and Linux lets this process, with all of its threads, use them."""
    if not (_AMX and _FEATURES.get("avx512f") and (platform.system(), platform.machine()) == ("Linux", "x86_64")):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def fits_tiles(dtype: torch.dtype, *sides: int) -> bool:
    """Whether a product of matrices with these three sides can run on tiles, and gains by it."""
    return dtype == torch.float32 and not any(side % SIDE for side in sides) and math.prod(sides) >= _LEAST and tiles()


def on_tiles(a: Float[Tensor, "M K"], b: Float[Tensor, "K N"], out: Float[Tensor, "M N"], *, add: bool = False) -> None:
    """out = a @ b, or that added to it, of what `fits_tiles`, as exact as float32 (`chatsae.sae.kernels_tiles`).

    The number of threads changes no bit. Numbers side by side in a row of out are neighbours in memory, and those in a
    row or in a column of a and b.
    """
    (m, k), n, threads = a.shape, b.shape[1], torch.get_num_threads()
    nc = min(n, _COLUMNS)
    kc = min(max(_BLOCK // nc // _CHUNK, 1) * _CHUNK, k)
    size = kernels_tiles.spare_bytes(kc, nc)
    spares = space("tiles", (threads, size), np.uint8)
    left = a.data_ptr(), 4 * max(a.stride()), a.stride(1) == 1
    right = b.data_ptr(), 4 * max(b.stride()), b.stride(0) == 1
    to, memory = (out.data_ptr(), 4 * out.stride(0)), (CONFIG.ctypes.data, spares.ctypes.data, size)
    work = m * n * k // _RATE
    share(kernels_tiles.multiply, threads, work, threads, left, right, to, (m, n, k), add, (kc, nc), memory)
