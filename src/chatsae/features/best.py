"""The largest keys of every feature over a stream of any length, in memory for features times keys."""

from itertools import pairwise

import numpy as np

_ROWS = 2048  # features that are merged together
_LAST = 0xFFFFFFFF


def pack(score: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Keys that order by score, and of equal ones by the earlier token: int64, above zero.

    `score` is of 31 bits, or a float32 that is not negative, whose bits order as it does.
    """
    bits = score.view(np.int32) if score.dtype == np.float32 else score
    return (bits.astype(np.int64) << 32) | (_LAST - token)


def scores(keys: np.ndarray) -> np.ndarray:
    """The float32 scores of packed keys."""
    return (keys >> 32).astype(np.int32).view(np.float32)


def tokens_of(keys: np.ndarray) -> np.ndarray:
    """The tokens of packed keys, int64; of an empty key a number beyond all tokens."""
    return _LAST - (keys & _LAST)


class Best:
    """The `n` largest keys of each feature, which do not depend on the order or the portions in which they come.

    Keys are those of `pack`; zero stands for none. With `starts`, the first token of each dialogue and one past the
    last token of all, at most one key per dialogue is kept, its largest.

    Memory: 8 bytes per feature and key; 12 bytes for each of as many offers as an eighth of that, at least 65,536,
    that wait to be merged; and what merging 2,048 features takes.
    """

    def __init__(self, n_features: int, n: int, starts: np.ndarray | None = None) -> None:
        self.keys = np.zeros((n_features, n), np.int64)
        self._starts = starts
        self._limit = max(2**16, n_features * n // 8)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_waiting = 0
        self.refresh()

    def offer(self, feature: np.ndarray, key: np.ndarray) -> None:
        """Take part of a stream; no token may be offered twice for a feature."""
        for start in range(0, len(key), self._limit):
            some = slice(start, start + self._limit)
            good = np.flatnonzero(key[some] > self._floor[feature[some]])
            if len(good):
                self._waiting.append((feature[some][good].astype(np.int32), key[some][good]))
                self._n_waiting += len(good)
            if self._n_waiting >= self._limit:
                self.merge()

    def merge(self) -> None:
        """Bring `keys` up to date: each row falls, with zeros at its end."""
        if not self._waiting:
            return
        feature = np.concatenate([f for f, _ in self._waiting])
        key = np.concatenate([k for _, k in self._waiting])
        self._waiting, self._n_waiting = [], 0
        order = np.argsort(feature, kind="stable")
        feature, key = feature[order], key[order]
        del order
        bounds = np.searchsorted(feature, np.arange(0, len(self.keys) + _ROWS, _ROWS))
        for start, stop in pairwise(bounds.tolist()):
            if stop > start:
                self._merge(feature[start:stop], key[start:stop])
        self.refresh()

    def refresh(self) -> None:
        """Take note of `keys` that were changed from outside."""
        n_features, n = self.keys.shape
        self._floor = self.keys[:, -1].copy() if n else np.full(n_features, np.iinfo(np.int64).max)

    def _merge(self, feature: np.ndarray, key: np.ndarray) -> None:
        rows, n = np.unique(feature), self.keys.shape[1]
        feature = np.concatenate([np.repeat(rows, n), feature])
        key = np.concatenate([self.keys[rows].ravel(), key])
        full = np.flatnonzero(key)
        feature, key = feature[full], key[full]
        order = np.lexsort((~key, feature))  # ~ turns the order round
        feature, key = feature[order], key[order]
        if self._starts is not None:
            dialogue = np.searchsorted(self._starts, tokens_of(key), side="right")
            _, first = np.unique(feature.astype(np.int64) * (len(self._starts) + 1) + dialogue, return_index=True)
            first.sort()
            feature, key = feature[first], key[first]
        begin = np.searchsorted(feature, rows)
        rank = np.arange(len(feature)) - np.repeat(begin, np.diff(np.append(begin, len(feature))))
        kept = np.flatnonzero(rank < n)
        self.keys[rows] = 0
        self.keys[feature[kept], rank[kept]] = key[kept]
