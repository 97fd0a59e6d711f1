"""A float32 matrix product on the tile registers of a CPU with AMX, which multiply bfloat16 and sum in float32.

A float32 is exactly the sum of three bfloat16, high + middle + low, each 2⁻⁸ of the one before or less. Of the nine
products of two such sums the six largest are made; the three left out are below 2⁻²³ of the product, and mostly far
below. The five small ones are summed first and the large one on top, so that few additions round a large sum: what
comes out is nearer to the exact product than what float32 arithmetic gives (`tests/test_sae_tiles.py`). Numbers below
2⁻¹¹⁰ lose digits, and infinities become NaN.

A tile is 16 rows of 16 words, a word two bfloat16 that are neighbours along the summed dimension K: of the left
matrix 16 rows times 32 of K, of the right one 32 of K times 16 columns, of the result 16 x 16 float32. A *bundle* is
the three tiles of the parts high, middle, low. Packed, a matrix is [panel of 32 lines, K / 32, 2] bundles, where a
line is a row of the left matrix or a column of the right one. Matrices come as the address of their first number and
the bytes from row to row. All of it is in this file because numba's cache notices changes of one file only.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from chatsae.sae.kernels import jit

TILE = 1024
BUNDLE = 3 * TILE
STEP = 2 * BUNDLE
"""Bytes of a panel per 32 of K."""
CHUNK = 4
"""So many steps of two panels are 48 KB, which the first-level cache holds."""

_I8, _I16, _I32, _I64, _F32, _VOID = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType(), ir.VoidType())
_POINTER = ir.PointerType(_I8)
_ADDRESS = types.intp


def _intrinsic(typed: Any, count: int) -> Any:
    """numba's intrinsic of so many arguments; it asks for their names."""
    names = ["typing", *(f"argument_{i}" for i in range(count))]
    typed.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return intrinsic(prefer_literal=True)(typed)


def _instruction(name: str, tiles: int, *operands: ir.Type) -> Any:
    """A function that calls an LLVM intrinsic with constant numbers of registers, then with addresses and numbers."""

    def typed(_typing: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(_VOID, [_I8] * tiles + list(operands))
            values = [ir.Constant(_I8, number.literal_value) for number in given[:tiles]]
            for operand, value in zip(operands, args[tiles:], strict=True):
                values.append(builder.inttoptr(value, operand) if operand is _POINTER else value)
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)
            return context.get_dummy_value()

        return types.void(*given[:tiles], *[_ADDRESS] * len(operands)), generate

    return _intrinsic(typed, tiles + len(operands))


_zero = _instruction("llvm.x86.tilezero", 1)
_load = _instruction("llvm.x86.tileloadd64", 1, _POINTER, _I64)
_store = _instruction("llvm.x86.tilestored64", 1, _POINTER, _I64)
_dot = _instruction("llvm.x86.tdpbf16ps", 3)  # first += second @ third
_configure = _instruction("llvm.x86.ldtilecfg", 0, _POINTER)
_release = _instruction("llvm.x86.tilerelease", 0)


def _inlined(addresses: int) -> Any:
    """A function of so many addresses and numbers whose code the decorated function builds."""

    def decorate(build: Callable[[Any, list[Any]], None]) -> Any:
        def typed(_typing: Any, *_given: Any) -> Any:
            def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
                build(builder, args)
                return context.get_dummy_value()

            return types.void(*[_ADDRESS] * addresses), generate

        return _intrinsic(typed, addresses)

    return decorate


def _splat(kind: ir.Type, n: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, n), [value] * n)


def _at(builder: Any, address: Any, offset: int, kind: ir.Type) -> Any:
    return builder.inttoptr(builder.add(address, ir.Constant(_I64, offset)), ir.PointerType(kind))


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


@_inlined(2)
def _split(builder: Any, args: list[Any]) -> None:
    """32 numbers, one after another, become a row of words in each tile of a bundle."""
    row, to = args
    for i, part in enumerate(_parts(builder, row, 32)):
        upper = builder.lshr(part, _splat(_I32, 32, 16))
        _write(builder, builder.trunc(upper, ir.VectorType(_I16, 32)), to, i * TILE)


@_inlined(3)
def _split_two(builder: Any, args: list[Any]) -> None:
    """16 numbers of a row and those of the one below become a row of words in each tile of a bundle."""
    row, below, to = args
    for i, (lower, upper) in enumerate(zip(_parts(builder, row, 16), _parts(builder, below, 16), strict=True)):
        _write(builder, builder.or_(builder.lshr(lower, _splat(_I32, 16, 16)), upper), to, i * TILE)


@_inlined(3)
def _turn(builder: Any, args: list[Any]) -> None:
    """16 rows of 16 words become columns: blocks off the diagonal change places, of 1 x 1, 2 x 2, 4 x 4 and 8 x 8."""
    source, stride, tile = args
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


@_inlined(2)
def _add(builder: Any, args: list[Any]) -> None:
    """Adds 32 numbers to 32."""
    to, numbers = args
    _write(builder, builder.fadd(_read(builder, to, 0, _F32, 32), _read(builder, numbers, 0, _F32, 32)), to, 0)


@jit(False)
def _pack(source, stride, by_line, turned, panels, steps, to):
    """Packs 32 panels lines and 32 steps of K. by_line: a row of the source is a line, else one of K.

    Rows are read from end to end, as the cache expects it. turned: words were written by line where they belong by K,
    or the other way round.
    """
    if by_line:
        for line in range(32 * panels):
            panel, half, r = line // 32, line // 16 % 2, line % 16
            for k in range(steps):
                at = to + STEP * (panel * steps + k) + BUNDLE * half + 64 * r
                _split(source + line * stride + 128 * k, at)
    else:
        for pair in range(16 * steps):
            k, r = pair // 16, pair % 16
            row = source + 2 * pair * stride
            for half in range(2 * panels):
                at = to + STEP * (half // 2 * steps + k) + BUNDLE * (half % 2) + 64 * r
                _split_two(row + 64 * half, row + stride + 64 * half, at)
    if turned:
        for tile in range(6 * panels * steps):
            _turn(to + TILE * tile, 64, to + TILE * tile)


@jit(False, "always")
def _take_left(bundle):
    _load(4, bundle, 64)
    _load(5, bundle + BUNDLE, 64)


@jit(False, "always")
def _take_right(bundle):
    _load(6, bundle, 64)
    _load(7, bundle + BUNDLE, 64)


@jit(False, "always")
def _sum():
    _dot(0, 4, 6)
    _dot(1, 4, 7)
    _dot(2, 5, 6)
    _dot(3, 5, 7)


@jit(False)
def _block(left, right, steps, to, stride):
    """32 x 32 numbers of the product of two panels: registers 0 to 3."""
    _zero(0)
    _zero(1)
    _zero(2)
    _zero(3)
    for k in range(steps):
        a, b = left + STEP * k, right + STEP * k
        _take_left(a)  # high
        _take_right(b + 2 * TILE)  # low
        _sum()
        _take_right(b + TILE)  # middle
        _sum()
        _take_left(a + TILE)
        _sum()
        _take_right(b)
        _sum()
        _take_left(a + 2 * TILE)
        _sum()
    for k in range(steps):
        _take_left(left + STEP * k)
        _take_right(right + STEP * k)
        _sum()
    _store(0, to, stride)
    _store(1, to + 64, stride)
    _store(2, to + 16 * stride, stride)
    _store(3, to + 16 * stride + 64, stride)


@jit(False)
def _product(a, b, c, rows, columns, inner, add, spare, kc, nc):
    """c = a @ b, or that added to it, with blocks of b of kc x nc that stay in the second-level cache."""
    (a_at, a_stride, a_by_row), (b_at, b_stride, b_by_column), (c_at, c_stride) = a, b, c
    left = spare + STEP * (kc // 32) * (nc // 32)
    sums = left + STEP * (kc // 32)
    for n in range(0, columns, nc):
        panels = min(nc, columns - n) // 32
        for k in range(0, inner, kc):
            steps = min(kc, inner - k) // 32
            at = b_at + (n * b_stride + 4 * k if b_by_column else k * b_stride + 4 * n)
            _pack(at, b_stride, b_by_column, b_by_column, panels, steps, spare)
            for m in range(0, rows, 32):
                at = a_at + (m * a_stride + 4 * k if a_by_row else k * a_stride + 4 * m)
                _pack(at, a_stride, a_by_row, not a_by_row, 1, steps, left)
                for chunk in range(0, steps, CHUNK):
                    some, fresh = min(CHUNK, steps - chunk), k + chunk == 0 and not add
                    for panel in range(panels):
                        to, right = c_at + m * c_stride + 4 * (n + 32 * panel), spare + STEP * (panel * steps + chunk)
                        if fresh:
                            _block(left + STEP * chunk, right, some, to, c_stride)
                            continue
                        _block(left + STEP * chunk, right, some, sums, 128)
                        for r in range(32):
                            _add(to + r * c_stride, sums + 128 * r)


@jit(False)
def multiply(first, last, parts, a, b, c, shape, add, block, memory):
    """Parts first <= part < last of c [M, N] = a [M, K] @ b [K, N], or of that added to c; the longer side is cut.

    a, b: address, stride, whether rows of what lies there are lines. c: address, stride. shape: M, N and K, multiples
    of 32. block: `kc` and `nc`, the depth and the columns of b that are packed at a time. memory: the address of what
    `ldtilecfg` takes, that of `spare_bytes` for each part, and how many these are.
    """
    (rows, columns, inner), (kc, nc), (config, spares, size) = shape, block, memory
    (a_at, a_stride, a_by_row), (b_at, b_stride, b_by_column), (c_at, c_stride) = a, b, c
    panels = max(rows, columns) // 32
    _configure(config)
    for part in range(first, last):
        begin, end = 32 * (panels * part // parts), 32 * (panels * (part + 1) // parts)
        spare = spares + part * size
        if rows >= columns:
            some = a_at + begin * (a_stride if a_by_row else 4), a_stride, a_by_row
            _product(some, b, (c_at + begin * c_stride, c_stride), end - begin, columns, inner, add, spare, kc, nc)
        else:
            some = b_at + begin * (b_stride if b_by_column else 4), b_stride, b_by_column
            _product(a, some, (c_at + 4 * begin, c_stride), rows, end - begin, inner, add, spare, kc, nc)
    _release()


@jit(False)
def pack_narrow(rows, packed):
    """The bits of bfloat16 [32 panels, 32 steps] as the right side of a product: [panel, step, 2] tiles."""
    stride, to, steps = rows.strides[0], packed.ctypes.data, rows.shape[1] // 32
    for panel in range(rows.shape[0] // 32):
        for k in range(steps):
            at = rows.ctypes.data + 32 * panel * stride + 64 * k
            _turn(at, stride, to)
            _turn(at + 16 * stride, stride, to + TILE)
            to += 2 * TILE


@jit(False)
def _narrow_block(left, left_stride, right, steps, to, stride):
    """32 x 32 numbers of the product of 32 rows of bfloat16 and a panel of `pack_narrow`."""
    _zero(0)
    _zero(1)
    _zero(2)
    _zero(3)
    for k in range(steps):
        _load(4, left + 64 * k, left_stride)
        _load(5, left + 64 * k + 16 * left_stride, left_stride)
        _load(6, right + 2 * TILE * k, 64)
        _load(7, right + 2 * TILE * k + TILE, 64)
        _sum()
    _store(0, to, stride)
    _store(1, to + 64, stride)
    _store(2, to + 16 * stride, stride)
    _store(3, to + 16 * stride + 64, stride)


@jit(False)
def screen(first, last, parts, config, narrow, norms, packed, slack, size, b_enc, low, flags, counts, strips):
    """flags[f, t]: whether the pair may pass, by a product of bfloat16; counts[f]: how many. NaN may.

    narrow [F, D], norms [2, F]: see `kernels.narrow`; packed: the tokens. The product is off by norms[0, f] slack[t] +
    norms[1, f] size[t] at the most. Rows of flags may be longer than there are tokens. strips [parts, 32, N or more]:
    room.
    """
    rounding, least = np.float32(2**-21), np.float32(1e-17)  # of z + b_enc; of what is too small for its square
    n, steps, stride, panels = slack.size, narrow.shape[1] // 32, narrow.strides[0], narrow.shape[0] // 32
    _configure(config)
    for part in range(first, last):
        strip = strips[part]
        for panel in range(panels * part // parts, panels * (part + 1) // parts):
            left = narrow.ctypes.data + 32 * panel * stride
            for tokens in range((n + 31) // 32):
                right, to = packed.ctypes.data + 2 * TILE * steps * tokens, strip.ctypes.data + 128 * tokens
                _narrow_block(left, stride, right, steps, to, strip.strides[0])
            for f in range(32 * panel, 32 * panel + 32):
                row, out, passed, norm, error = strip[f % 32], flags[f], 0, norms[0, f], norms[1, f]
                most = low[f] - b_enc[f] - (rounding * (abs(low[f]) + abs(b_enc[f])) + least)
                for t in range(n):
                    may = not (row[t] + (norm * slack[t] + error * size[t]) <= most)
                    out[t] = may
                    passed += may
                out[n:] = 0
                counts[f] = passed
    _release()


def spare_bytes(kc: int, nc: int) -> int:
    """What `multiply` needs for each part: a block of b, a panel of a, 32 x 32 sums, in whole pages."""
    size = STEP * (kc // 32) * (nc // 32 + 1) + 4 * 32 * 32
    return size + -size % 4096
