"""The active pairs of a batch: the encoder and its activation, in blocks of features that stay in the cache."""

from dataclasses import dataclass

import numpy as np
import torch

from chatsae.sae import kernels_pairs
from chatsae.sae.crew import share
from chatsae.sae.workspace import Array, fast_bfloat16, grown, product, space

_BLOCK, _PAIRS = 2**23, 2**20
"""Weights and pairs per block of features at the most."""
_LEAST = 256
"""Features per block at the least, so that the products stay efficient."""
_SCREENED = 0.08
"""Share of the pairs of a block behind the screen up to which exact products for them alone are the faster way."""

_NARROWEST = 32


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
    touched: Array
    rows: Array
    row_of: Array
    r_begin: Array
    r_tokens: Array
    r_acts: Array
    places: Array
    slot: Array
    """Per row of more than `room` pairs its number among these, else -1."""
    slots: int

    @property
    def total(self) -> int:
        return int(self.start[-1])


def find(x: Array, rows: Array, act: Activation, *, limit: float, room: int) -> Pairs | None:
    """The pairs of inputs x [N, D] and an encoder by feature [F, D]; None when they are more than `limit` of all.

    Every activation is a product in the dtype of x; see `chatsae.sae.kernels_pairs` for what the screen may do.
    """
    n, (F, d) = len(x), rows.shape
    search, size = _Search(x, rows, act), min(max(min(_BLOCK // d, _PAIRS // n), _LEAST), F)
    if x.dtype == np.float32 and min(n, d, F) >= _NARROWEST and fast_bfloat16():
        search.screen = _Screen(x, size)
    for f0 in range(0, F, size):
        block = slice(f0, min(f0 + size, F))
        search(block)
        if int((search.end[: block.stop] - search.begin[: block.stop]).sum()) > limit * n * F:
            return None
    return search.by_token(room)


class _Search:
    """Finds the pairs of one block of features after another, by feature."""

    def __init__(self, x: Array, rows: Array, act: Activation) -> None:
        self.x, self.rows, self.act, self.low = x, rows, act, act.low
        self.begin, self.end = space("begin", len(rows), np.int64), space("end", len(rows), np.int64)
        self.screen: _Screen | None = None
        self._used = 0

    def __call__(self, block: slice) -> None:
        n, k, dtype, kernels = len(self.x), block.stop - block.start, self.x.dtype.type, kernels_pairs
        rows, b_enc, theta = self.rows[block], self.act.b_enc[block], self.act.theta[block]
        counts, flags = space("counts", k, np.int64), space("flags", (k, (n + 7) // 8 * 8), np.uint8)
        if self.screen is not None and not self.screen.count(rows, b_enc, self.low[block], flags, counts):
            self.screen = None  # nor for the blocks to come, which are likely to be alike
        z = None
        if self.screen is None:
            z = product("hidden_pre", torch.from_numpy(rows), torch.from_numpy(self.x).T, dtype)
            share(kernels.count, k, z.size, z, b_enc, self.low[block], flags, counts)
        bits = (flags, flags.view(np.uint64), b_enc, theta, dtype(self.act.bandwidth), dtype(0.5))
        tail = (*bits, *self._make_room(block, counts))
        if z is None:
            work = int(counts.sum()) * rows.shape[1]
            share(kernels.compact_screened, k, work, rows, self.x, *tail)
        else:
            share(kernels.compact, k, z.size, z, *tail)

    def _make_room(self, block: slice, counts: Array) -> tuple[Array, ...]:
        """Where the pairs of each feature begin and end, and the lists they go to."""
        begin, used = self.begin[block], self._used
        begin[0] = used
        np.cumsum(counts[:-1] + 1, out=begin[1:])
        begin[1:] += used
        self._used = int(begin[-1] + counts[-1] + 1)
        kinds = ("tokens", np.int32), ("acts", self.x.dtype.type), ("band", np.bool_)
        self._lists = tuple(grown(name, self._used, used, kind) for name, kind in kinds)
        return (begin, self.end[block], *self._lists)

    def by_token(self, room: int) -> Pairs:
        """Everything that was found."""
        n, F, dtype = len(self.x), len(self.rows), self.x.dtype.type
        total = int((self.end - self.begin).sum())
        start, cursor = space("start", n + 1, np.int64), space("cursor", n, np.int64)
        features, places = space("features", total, np.int32), space("places", total, np.int32)
        r_tokens, r_acts = space("r_tokens", total, np.int32), space("r_acts", total, dtype)
        acts, band = space("t_acts", total, dtype), space("t_band", total, np.bool_)
        rows, row_of, slot = (space(name, F, np.int32) for name in ("rows", "row_of", "slot"))
        touched, r_begin = space("touched", F, np.int32), space("r_begin", F + 1, np.int64)
        by_feature = (self.begin, self.end, *self._lists, self.act.bandwidth > 0, room)
        by_row = (rows, row_of, r_begin, r_tokens, r_acts, places, slot, touched)
        r, slots, met = kernels_pairs.by_token(*by_feature, start, cursor, features, acts, band, *by_row)
        of_rows = {"rows": rows[:r], "row_of": row_of, "r_begin": r_begin[: r + 1], "slot": slot[:r], "slots": slots}
        of_pairs = {"features": features, "acts": acts, "band": band, "r_tokens": r_tokens, "r_acts": r_acts}
        return Pairs(start=start, touched=touched[:met], places=places, **of_rows, **of_pairs)


class _Screen:
    """Leaves out the pairs whose product in bfloat16 lies so low that the exact one cannot be active.

    bfloat16 rounds by 2⁻⁹ at the most: the two vectors and the product, so that the error is below 3 · 2⁻⁹ ‖x‖ ‖w‖;
    sums in float32 add D · 2⁻²⁴ each.
    """

    def __init__(self, x: Array, size: int) -> None:
        d = x.shape[1]
        with np.errstate(all="ignore"):
            norms = np.sqrt(np.einsum("nd,nd->n", x, x))
        self._slack = norms * np.float32(1.01 * 3 * 2.0**-9 + d * 2.0**-22)
        self._x = torch.from_numpy(x).bfloat16()
        self._rows = space("narrow_rows", (size, d), np.uint16)
        self._norms = space("narrow_norms", size, np.float32)

    def count(self, rows: Array, b_enc: Array, low: Array, flags: Array, counts: Array) -> bool:
        """Flag the pairs of a block that may pass; False when they are too many for exact products."""
        k = len(rows)
        narrow, norms = self._rows[:k], self._norms[:k]
        share(kernels_pairs.narrow, k, rows.size, rows, narrow, norms)
        weights = torch.from_numpy(narrow).view(torch.bfloat16)
        z = space("narrow_z", (k, len(self._x)), np.uint16)
        torch.mm(weights, self._x.T, out=torch.from_numpy(z).view(torch.bfloat16))
        with np.errstate(all="ignore"):
            bound = low - b_enc
            bound -= np.float32(2**-21) * (abs(low) + abs(b_enc)) + np.float32(1e-30)  # the rounding of z + b_enc
        share(kernels_pairs.count_screened, k, z.size, z, norms, self._slack, bound, flags, counts)
        return int(counts.sum()) <= _SCREENED * z.size
