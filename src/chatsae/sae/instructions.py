"""Instructions of AMX and AVX-512 as functions for compiled loops.

AMX has eight tile registers of 16 rows of 64 bytes. Here 0 to 3 sum up 32 x 32 float32 (upper left, upper right, lower
left, lower right), 4 and 5 hold the upper and lower half of 32 rows of the left matrix, 6 and 7 the left and right half
of 32 columns of the right one: bfloat16 both, 32 deep. A *word* is two bfloat16 that are neighbours in depth; a tile
is 16 rows of the left matrix, 16 words each, or 16 columns of the right one, whose words lie side by side.

Addresses and strides are integers, in bytes. numba's cache does not notice what changes here: delete it then.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 1024
"""Bytes."""
CONFIG = np.zeros(64, np.uint8)
"""What `configure` takes: the registers as above."""
CONFIG[0], CONFIG[16:32:2], CONFIG[48:56] = 1, 64, 16  # palette, bytes of a row, rows

_I8, _I16, _I32, _I64, _F32, _VOID = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType(), ir.VoidType())
_POINTER = ir.PointerType(_I8)


def _function(count: int) -> Any:
    """A function of so many addresses and strides, whose code the decorated one builds from a builder and them."""

    def decorate(build: Callable[..., None]) -> Any:
        def typed(_typing: Any, *_given: Any) -> Any:
            def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
                build(builder, *args)
                return context.get_dummy_value()

            return types.void(*[types.intp] * count), generate

        names = ["typing", *(f"argument_{i}" for i in range(count))]  # numba asks for them
        signature = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
        setattr(typed, "__signature__", signature)  # noqa: B010
        return intrinsic(typed)

    return decorate


def _call(builder: Any, name: str, *values: Any) -> None:
    kind = ir.FunctionType(_VOID, [value.type for value in values])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)


def _at(builder: Any, address: Any, offset: int, kind: ir.Type = _I8) -> Any:
    return builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), ir.PointerType(kind))


def _move_tile(builder: Any, name: str, register: int, pointer: Any, stride: Any) -> None:
    _call(builder, name, ir.Constant(_I8, register), pointer, stride)


def _move_sums(builder: Any, name: str, address: Any, stride: Any) -> None:
    below = builder.add(address, builder.mul(stride, ir.Constant(_I64, 16)))
    for register, (half, offset) in enumerate(((address, 0), (address, 64), (below, 0), (below, 64))):
        _move_tile(builder, name, register, _at(builder, half, offset), stride)


@_function(1)
def configure(builder: Any, config: Any) -> None:
    """Before all else: `CONFIG`."""
    _call(builder, "ldtilecfg", _at(builder, config, 0))


@_function(0)
def release(builder: Any) -> None:
    """After all else."""
    _call(builder, "tilerelease")


@_function(0)
def clear_sums(builder: Any) -> None:
    for register in range(4):
        _call(builder, "tilezero", ir.Constant(_I8, register))


@_function(2)
def store_sums(builder: Any, address: Any, stride: Any) -> None:
    """32 x 32 float32, to rows so many bytes apart."""
    _move_sums(builder, "tilestored64", address, stride)


@_function(3)
def load_left(builder: Any, upper: Any, lower: Any, stride: Any) -> None:
    for register, address in ((4, upper), (5, lower)):
        _move_tile(builder, "tileloadd64", register, _at(builder, address, 0), stride)


@_function(2)
def load_right(builder: Any, left: Any, right: Any) -> None:
    """From tiles without gaps."""
    for register, address in ((6, left), (7, right)):
        _move_tile(builder, "tileloadd64", register, _at(builder, address, 0), ir.Constant(_I64, 64))


@_function(0)
def add_products(builder: Any) -> None:
    """sums += left @ right"""
    for registers in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
        _call(builder, "tdpbf16ps", *(ir.Constant(_I8, register) for register in registers))


def _splat(kind: ir.Type, n: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, n), [value] * n)


def _read(builder: Any, address: Any, offset: int, kind: ir.Type, n: int) -> Any:
    return builder.load(_at(builder, address, offset, ir.VectorType(kind, n)), align=4)


def _write(builder: Any, value: Any, address: Any, offset: int) -> None:
    builder.store(value, _at(builder, address, offset, value.type), align=4)


def _parts(builder: Any, address: Any, n: int) -> list[Any]:
    """Each of n numbers in three: the bits of a float32 whose lower half is zero. x - high and the like are exact."""
    x, parts = _read(builder, address, 0, _F32, n), []
    for rounded in (True, True, False):
        bits = builder.bitcast(x, ir.VectorType(_I32, n))
        if rounded:
            bits = builder.add(bits, _splat(_I32, n, 0x8000))
        parts.append(builder.and_(bits, _splat(_I32, n, 0xFFFF0000)))
        x = builder.fsub(x, builder.bitcast(parts[-1], x.type))
    return parts


@_function(2)
def split(builder: Any, row: Any, to: Any) -> None:
    """32 numbers side by side, deep, become a row of words in each of three tiles: high, middle, low."""
    for i, part in enumerate(_parts(builder, row, 32)):
        upper = builder.lshr(part, _splat(_I32, 32, 16))
        _write(builder, builder.trunc(upper, ir.VectorType(_I16, 32)), to, i * TILE)


@_function(3)
def split_two(builder: Any, row: Any, below: Any, to: Any) -> None:
    """16 numbers of a row and those of the one below, deeper by one, become a row of words in each of three tiles."""
    for i, (lower, upper) in enumerate(zip(_parts(builder, row, 16), _parts(builder, below, 16), strict=True)):
        _write(builder, builder.or_(builder.lshr(lower, _splat(_I32, 16, 16)), upper), to, i * TILE)


@_function(3)
def turn(builder: Any, source: Any, stride: Any, tile: Any) -> None:
    """16 rows of 16 words become columns: blocks off the diagonal change places, of 1 x 1, 2 x 2, 4 x 4 and 8 x 8."""
    at = [builder.add(source, builder.mul(stride, ir.Constant(_I64, i))) for i in range(16)]
    rows = [_read(builder, address, 0, _I32, 16) for address in at]
    for size in (1, 2, 4, 8):
        upper = [16 + j - size if j & size else j for j in range(16)]
        lower = [16 + j if j & size else j + size for j in range(16)]
        for i in (i for i in range(16) if not i & size):
            pair = rows[i], rows[i + size]
            for row, places in ((i, upper), (i + size, lower)):
                rows[row] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_I32, 16), places))
    for i, row in enumerate(rows):
        _write(builder, row, tile, 64 * i)


@_function(2)
def add(builder: Any, to: Any, numbers: Any) -> None:
    """Adds 32 numbers to 32."""
    _write(builder, builder.fadd(_read(builder, to, 0, _F32, 32), _read(builder, numbers, 0, _F32, 32)), to, 0)
