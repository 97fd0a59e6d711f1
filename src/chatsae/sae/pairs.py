"""The active pairs of a batch: the encoder and its activation, in blocks of features that stay in the cache."""

from dataclasses import dataclass

import numpy as np
import torch

from chatsae.sae import kernels, kernels_pairs, kernels_tiles
from chatsae.sae.crew import share
from chatsae.sae.products import NARROW_RATE, SIDE, config, product, tiles
from chatsae.sae.workspace import Array, grown, space

_BLOCK, _PAIRS = 2**23, 2**20
"""Weights and pairs per block of features at the most."""
_LEAST = 256
"""Features per block at the least, so that the products stay efficient."""
_SCREENED = 0.08
"""Share of the pairs of a block behind the screen up to which exact products for them alone are the faster way."""


@dataclass
class Activation:
    """What decides which pairs are active, per feature: acts = hidden_pre where it exceeds theta."""

    b_enc: Array
    theta: Array
    bandwidth: float
    """0 where theta does not learn."""

    @property
    def low(self) -> Array:
        """Safely below everything that is active or within the bandwidth."""
        if self.bandwidth == 0:
            return self.theta
        dtype = self.theta.dtype.type
        margin = dtype(4 * np.finfo(dtype).eps) * abs(self.theta)
        return self.theta - dtype(0.501) * dtype(self.bandwidth) - margin


@dataclass
class Pairs:
    """The (token, feature) pairs that are active or within the bandwidth, by token and by feature.

    By token (all pairs): start [N + 1], features, acts, band. By feature (active ones): `rows` that have any, row_of
    [F] its inverse (-1: none), r_begin, and per pair its token, its activation and its place among those by token.
    """

    start: Array
    features: Array
    acts: Array
    band: Array
    rows: Array
    row_of: Array
    r_begin: Array
    r_tokens: Array
    r_acts: Array
    places: Array
    slot: Array
    """Per row of more than `room` pairs its number among these, else -1."""
    slots: int
    total: int


def find(
    x: Array, rows: Array, act: Activation, *, limit: float, room: int, narrowed: tuple[Array, Array] | None = None
) -> Pairs | None:
    """The pairs of inputs x [N, D] and an encoder by feature [F, D]; None when they are more than `limit` of all.

    Every activation is a product in the dtype of x; the screen only leaves out what cannot be active.
    narrowed: `kernels.narrow` of the rows, where someone has it.
    """
    n, (F, d) = len(x), rows.shape
    search = _Search(x, rows, act)
    size = min(max(min(_BLOCK // d, _PAIRS // n) // SIDE * SIDE, _LEAST), F)
    if screens(n, rows):
        search.screen = _Screen(x, size, narrowed)
    for f0 in range(0, F, size):
        block = slice(f0, min(f0 + size, F))
        search(block)
        if search.total > limit * n * F:
            return None
    return search.by_token(room)


def screens(n: int, rows: Array) -> bool:
    """Whether products in bfloat16 leave pairs out before the exact ones are made."""
    F, d = rows.shape
    return rows.dtype == np.float32 and min(n, F, d) >= SIDE and F % SIDE == d % SIDE == 0 and tiles()


class _Search:
    """Finds the pairs of one block of features after another, by feature."""

    def __init__(self, x: Array, rows: Array, act: Activation) -> None:
        self.x, self.rows, self.act, self.low = x, rows, act, act.low
        self.begin, self.end = space("begin", len(rows), np.int64), space("end", len(rows), np.int64)
        self.screen: _Screen | None = None
        self.total = self._used = 0

    def __call__(self, block: slice) -> None:
        n, k, dtype = len(self.x), block.stop - block.start, self.x.dtype.type
        rows, b_enc, theta, low = (a[block] for a in (self.rows, self.act.b_enc, self.act.theta, self.low))
        counts, flags = space("counts", k, np.int64), space("flags", (k, (n + 7) // 8 * 8), np.uint8)
        begin, end = self.begin[block], self.end[block]
        z, used = None, self._used
        if self.screen is not None:
            self.screen.count(block, rows, b_enc, low, flags, counts)
            used = kernels_pairs.make_room(counts, begin, self._used)
            flagged = used - self._used - kernels_pairs.FREE * k
            if flagged > _SCREENED * n * k:  # exact products for all are faster, in the blocks to come too most likely
                self.screen = None
        if self.screen is None:
            z, _ = product("hidden_pre", torch.from_numpy(rows), torch.from_numpy(self.x).T, dtype)
            share(kernels_pairs.count, k, z.size, z, b_enc, low, flags, counts)
            used = kernels_pairs.make_room(counts, begin, self._used)
        kinds = ("tokens", np.int32), ("acts", dtype), ("band", np.bool_)
        self._lists = tuple(grown(name, used, self._used, kind) for name, kind in kinds)
        tail = (flags.view(np.uint64), b_enc, theta, dtype(self.act.bandwidth), dtype(0.5), begin, end)
        if z is None:
            work = (used - self._used) * rows.shape[1]
            share(kernels_pairs.compact_screened, k, work, rows, self.x, *tail, *self._lists)
        else:
            share(kernels_pairs.compact, k, z.size, z, *tail, *self._lists)
        self._used = used
        self.total += kernels_pairs.found(begin, end)

    def by_token(self, room: int) -> Pairs:
        """Everything that was found."""
        n, F, total, dtype = len(self.x), len(self.rows), self.total, self.x.dtype.type
        rows, row_of, slot = space("by_feature", (3, F), np.int32)
        features, places, r_tokens = space("by_pair", (3, total), np.int32)
        acts, r_acts = space("acts_by_pair", (2, total), dtype)
        band, r_begin = space("band_by_pair", total, np.bool_), space("r_begin", F + 1, np.int64)
        start, cursor = space("start", n + 1, np.int64), space("cursor", n, np.int64)
        by_feature = (self.begin, self.end, *self._lists, self.act.bandwidth > 0, room)
        by_row = (rows, row_of, r_begin, r_tokens, r_acts, places, slot)
        r, slots = kernels_pairs.by_token(*by_feature, start, cursor, features, acts, band, *by_row)
        return Pairs(
            start=start,
            features=features,
            acts=acts,
            band=band,
            rows=rows[:r],
            row_of=row_of,
            r_begin=r_begin[: r + 1],
            r_tokens=r_tokens,
            r_acts=r_acts,
            places=places,
            slot=slot[:r],
            slots=slots,
            total=total,
        )


class _Screen:
    """Leaves out the pairs whose product in bfloat16 lies so low that the exact one cannot be active.

    With vectors x', w' in bfloat16, |x w - x' w'| is at most ‖x - x'‖ ‖w‖ + ‖x'‖ ‖w - w'‖. Sums in float32 add D · 2⁻²⁴
    each.
    """

    def __init__(self, x: Array, size: int, narrowed: tuple[Array, Array] | None) -> None:
        n, d = x.shape
        whole = n + -n % SIDE
        bits, norms = space("narrow_x", (whole, d), np.uint16), space("narrow_x_norms", (2, n), x.dtype)
        kernels.narrow(0, n, x, bits, norms)
        bits[n:] = 0
        self._packed = space("narrow_packed", (whole, d), np.uint16)
        kernels_tiles.pack_narrow(bits, self._packed)
        above = np.float32(1.01)  # the norms are sums in float32
        self._slack = above * norms[1] + np.float32(d * 2.0**-22) * norms[0]
        self._size = above * (norms[0] + norms[1])
        self._narrowed = narrowed
        if narrowed is None:
            self._rows = space("narrow_rows", (size, d), np.uint16), space("narrow_norms", (2, size), x.dtype)
        self._strips = space("narrow_strips", (torch.get_num_threads(), SIDE, whole), x.dtype)

    def count(self, block: slice, rows: Array, b_enc: Array, low: Array, flags: Array, counts: Array) -> None:
        """Flag the pairs of a block that may pass."""
        k, parts = len(rows), len(self._strips)
        if self._narrowed is not None:
            bits, norms = self._narrowed[0][block], self._narrowed[1][:, block]
        else:
            bits, norms = self._rows[0][:k], self._rows[1][:, :k]
            share(kernels.narrow, k, rows.size, rows, bits, norms)
        bounds = self._packed, self._slack, self._size, b_enc, low
        work = rows.size * len(self._slack) // NARROW_RATE
        share(kernels_tiles.screen, parts, work, parts, config(), bits, norms, *bounds, flags, counts, self._strips)
