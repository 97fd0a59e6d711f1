"""The active pairs of a batch: the encoder and its activation."""

from dataclasses import dataclass

import numpy as np
import torch

from chatsae.sae import kernels_pairs
from chatsae.sae.crew import share
from chatsae.sae.instructions import CONFIG
from chatsae.sae.products import NARROW_RATE, SIDE, product, tiles
from chatsae.sae.workspace import Array, grown, space

_BLOCK, _PAIRS = 2**23, 2**20
"""Weights and pairs per block of features at the most."""
_LEAST = 256
"""Features per block at the least, so that the products stay efficient."""
_SCREENED = 0.1
"""Share of all pairs, behind the screen, up to which exact products for them alone are the faster way. Of all, and not
of what a thread has seen: the ways round differently, and the number of threads must change no bit."""
_FIRST_ROOM = 0.02
"""Share of the pairs behind the screen for which there is room at first."""
_CACHED = 2**17
"""Numbers of the rows that are screened at a time."""


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


def find(x: Array, rows: Array, act: Activation, *, limit: float, room: int) -> Pairs | None:
    """The pairs of inputs x [N, D] and an encoder by feature [F, D]; None when they are more than `limit` of all.

    Every activation is a product in the dtype of x; the screen only leaves out what cannot be active.
    """
    search = _Search(x, rows, act)
    if not (screens(len(x), rows) and search.screened()):
        search.all(limit)
    return search.by_token(room) if search.total <= limit * len(x) * len(rows) else None


def screens(n: int, rows: Array) -> bool:
    """Whether products in bfloat16 leave pairs out before the exact ones are made."""
    F, d = rows.shape
    return rows.dtype == np.float32 and min(n, F, d) >= SIDE and F % SIDE == d % SIDE == 0 and tiles()


class _Search:
    """Finds the pairs, by feature."""

    def __init__(self, x: Array, rows: Array, act: Activation) -> None:
        self.x, self.rows, self.act, self.low, self.dtype = x, rows, act, act.low, x.dtype.type
        self.begin, self.end = space("begin", len(rows), np.int64), space("end", len(rows), np.int64)
        self.band = self.dtype(act.bandwidth), self.dtype(0.5)
        self.total = 0

    def all(self, limit: float) -> None:
        """By exact products of all pairs, in blocks of features; stops when more than `limit` are found."""
        (n, d), F, used = self.x.shape, len(self.rows), 0
        size = min(max(min(_BLOCK // d, _PAIRS // n), _LEAST), F)
        self.total = 0
        for f0 in range(0, F, size):
            some = slice(f0, min(f0 + size, F))
            rows, b_enc, low = self.rows[some], self.act.b_enc[some], self.low[some]
            theta, begin, end = self.act.theta[some], self.begin[some], self.end[some]
            k = len(rows)
            counts, flags = space("counts", k, np.int64), space("flags", (k, (n + 7) // 8 * 8), np.uint8)
            z, _ = product("hidden_pre", torch.from_numpy(rows), torch.from_numpy(self.x).T, self.dtype)
            share(kernels_pairs.count, k, z.size, z, b_enc, low, flags, counts)
            before, used = used, kernels_pairs.make_room(counts, begin, used)
            self._make_lists(used, before)
            tail = (b_enc, theta, *self.band, begin, end, *self._lists)
            share(kernels_pairs.compact, k, z.size, z, flags.view(np.uint64), *tail)
            self.total += kernels_pairs.found(begin, end)
            if self.total > limit * n * F:
                return

    def screened(self) -> bool:
        """By products in bfloat16, and exact ones of what passes; False, and nothing, where too many pass.

        With vectors x', w' in bfloat16, |x w - x' w'| is at most ‖x - x'‖ ‖w‖ + ‖x'‖ ‖w - w'‖. Sums in float32 add
        D · 2⁻²⁴ each.
        """
        (n, d), F, parts = self.x.shape, len(self.rows), torch.get_num_threads()
        whole, some = n + -n % SIDE, max(_CACHED // d // SIDE, 1) * SIDE
        bits, norms = space("narrow_x", (whole, d), np.uint16), space("narrow_x_norms", (2, n), self.dtype)
        kernels_pairs.narrow(0, n, self.x, bits, norms)
        bits[n:] = 0
        packed = space("narrow_packed", (whole, d), np.uint16)
        kernels_pairs.pack(bits, packed)
        above = np.float32(1.01)  # the norms are sums in float32
        bounds = above * np.stack((norms[1] + np.float32(d * 2.0**-22) * norms[0], norms[0] + norms[1]))
        flags, (reached, passed) = space("narrow_flags", (parts, some, whole), np.uint8), np.empty((2, parts), np.int64)
        rooms = (
            space("narrow_rows", (parts, some, d), np.uint16),
            space("narrow_norms", (parts, 2, some), self.dtype),
            space("narrow_z", (parts, SIDE, whole), self.dtype),
            *(flags, flags.view(np.uint64), reached, passed),
        )
        act = self.act.b_enc, self.low, self.act.theta, *self.band
        head = (parts, CONFIG.ctypes.data, self.x, packed, bounds, self.rows, *act, self.begin, self.end)
        share_of_pairs, most = _FIRST_ROOM, int(_SCREENED * n * F)
        ends = [SIDE * (F // SIDE * (part + 1) // parts) for part in range(parts)]
        while True:
            self._make_lists(int(share_of_pairs * n * F) + kernels_pairs.FREE * (F + parts), 0)
            room = min(array.size for array in self._lists) // parts
            args = (*head, *self._lists, room, most, *rooms)
            share(kernels_pairs.search, parts, n * F * d // NARROW_RATE, *args)
            if passed.sum() > most:
                return False
            if (reached == ends).all():
                self.total = kernels_pairs.found(self.begin, self.end)
                return True
            share_of_pairs *= 2

    def _make_lists(self, size: int, used: int) -> None:
        """Lists for so many pairs, the first `used` of which stay."""
        kinds = ("tokens", np.int32), ("acts", self.dtype), ("band", np.bool_)
        self._lists = tuple(grown(name, size, used, kind) for name, kind in kinds)

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
