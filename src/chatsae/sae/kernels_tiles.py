"""A float32 matrix product on the tile registers of a CPU with AMX, which multiply bfloat16 and sum in float32.

A float32 is exactly the sum of three bfloat16, high + middle + low, each 2⁻⁸ of the one before or less. Of the nine
products of two such sums the six largest are made; the three left out are below 2⁻²³ of the product, and mostly far
below. The five small ones are summed first and the large one on top, so that few additions round a large sum: what
comes out is nearer to the exact product than what float32 arithmetic gives (`tests/test_sae_tiles.py`). Numbers below
2⁻¹¹⁰ lose digits, and infinities become NaN.

A *bundle* is the tiles (see `chatsae.sae.instructions`) of the parts high, middle and low. Packed, a matrix is [panel
of 32 lines, depth / 32, 2] bundles, where a line is a row of the left matrix or a column of the right one. Matrices
come as the address of their first number and the bytes from row to row.
"""

from chatsae.sae.instructions import (
    TILE,
    add,
    add_products,
    clear_sums,
    configure,
    load_left,
    load_right,
    release,
    split,
    split_two,
    store_sums,
    turn,
)
from chatsae.sae.kernels import jit

BUNDLE = 3 * TILE
STEP = 2 * BUNDLE
"""Bytes of a panel per 32 of depth."""
CHUNK = 4
"""So many steps of two panels are 48 KB, which the first-level cache holds."""


@jit(False)
def _pack(source, stride, by_line, turned, panels, steps, to):
    """Packs lines, 32 per panel, so many steps of 32 deep. by_line: a row of the source is a line, else of one depth.

    Rows are read from end to end, as the cache expects it. turned: the words of a tile then lie the other way round
    than they belong.
    """
    if by_line:
        for line in range(32 * panels):
            panel, half, r = line // 32, line // 16 % 2, line % 16
            for k in range(steps):
                at = to + STEP * (panel * steps + k) + BUNDLE * half + 64 * r
                split(source + line * stride + 128 * k, at)
    else:
        for pair in range(16 * steps):
            k, r = pair // 16, pair % 16
            row = source + 2 * pair * stride
            for half in range(2 * panels):
                at = to + STEP * (half // 2 * steps + k) + BUNDLE * (half % 2) + 64 * r
                split_two(row + 64 * half, row + stride + 64 * half, at)
    if turned:
        for tile in range(6 * panels * steps):
            turn(to + TILE * tile, 64, to + TILE * tile)


@jit(False)
def _block(left, right, steps, to, stride):
    """32 x 32 numbers of the product of two panels."""
    clear_sums()
    for k in range(steps):
        a, b = left + STEP * k, right + STEP * k
        load_left(a, a + BUNDLE, 64)  # high
        load_right(b + 2 * TILE, b + BUNDLE + 2 * TILE)  # low
        add_products()
        load_right(b + TILE, b + BUNDLE + TILE)  # middle
        add_products()
        load_left(a + TILE, a + BUNDLE + TILE, 64)
        add_products()
        load_right(b, b + BUNDLE)
        add_products()
        load_left(a + 2 * TILE, a + BUNDLE + 2 * TILE, 64)
        add_products()
    for k in range(steps):
        a, b = left + STEP * k, right + STEP * k
        load_left(a, a + BUNDLE, 64)
        load_right(b, b + BUNDLE)
        add_products()
    store_sums(to, stride)


@jit(False)
def _product(a, b, c, rows, columns, inner, more, spare, kc, nc):
    """c = a @ b, or that added to it if `more`, with blocks of b of kc x nc that stay in the second-level cache."""
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
                    some, fresh = min(CHUNK, steps - chunk), k + chunk == 0 and not more
                    for panel in range(panels):
                        to, right = c_at + m * c_stride + 4 * (n + 32 * panel), spare + STEP * (panel * steps + chunk)
                        if fresh:
                            _block(left + STEP * chunk, right, some, to, c_stride)
                            continue
                        _block(left + STEP * chunk, right, some, sums, 128)
                        for r in range(32):
                            add(to + r * c_stride, sums + 128 * r)


@jit(False)
def multiply(first, last, parts, a, b, c, shape, more, block, memory):
    """Parts first <= part < last, of the longer side, of c [M, N] = a [M, K] @ b [K, N], or that added to c if `more`.

    a, b: address, stride, whether rows of what lies there are lines. c: address, stride. shape: M, N and K, multiples
    of 32. block: `kc` and `nc`, the depth and the columns of b that are packed at a time. memory: the address of what
    `configure` takes, that of `spare_bytes` for each part, and how many these are.
    """
    (rows, columns, inner), (kc, nc), (config, spares, size) = shape, block, memory
    (a_at, a_stride, a_by_row), (b_at, b_stride, b_by_column), (c_at, c_stride) = a, b, c
    panels = max(rows, columns) // 32
    configure(config)
    for part in range(first, last):
        begin, end = 32 * (panels * part // parts), 32 * (panels * (part + 1) // parts)
        spare = spares + part * size
        if rows >= columns:
            some = a_at + begin * (a_stride if a_by_row else 4), a_stride, a_by_row
            _product(some, b, (c_at + begin * c_stride, c_stride), end - begin, columns, inner, more, spare, kc, nc)
        else:
            some = b_at + begin * (b_stride if b_by_column else 4), b_stride, b_by_column
            _product(a, some, (c_at + 4 * begin, c_stride), rows, end - begin, inner, more, spare, kc, nc)
    release()


def spare_bytes(kc: int, nc: int) -> int:
    """What `multiply` needs for each part: a block of b, a panel of a, 32 x 32 sums, in whole pages."""
    size = STEP * (kc // 32) * (nc // 32 + 1) + 4 * 32 * 32
    return size + -size % 4096
