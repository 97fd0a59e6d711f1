"""The active pairs of a batch: the encoder and its activation."""

from dataclasses import dataclass

import numpy as np
import torch

from chatsae.sae import kernels_pairs
from chatsae.sae.crew import share
from chatsae.sae.workspace import Array, grown, product, space

_BLOCK, _PAIRS = 2**23, 2**20
"""Weights and pairs per block of features at the most."""
_LEAST = 256
"""Features per block at the least, so that the products stay efficient."""


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
    """The pairs of inputs x [N, D] and an encoder by feature [F, D]; None when they are more than `limit` of all."""
    search = _Search(x, rows, act)
    search.all(limit)
    return search.by_token(room) if search.total <= limit * len(x) * len(rows) else None


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
