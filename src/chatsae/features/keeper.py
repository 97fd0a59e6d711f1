"""What is kept of every feature of an SAE while a split streams by: bounded by features, never by what fires."""

import math
from collections.abc import Mapping

import numpy as np

from chatsae.batch import Kind, Role, TokenBatch
from chatsae.features.best import Best, pack
from chatsae.features.firings import Firings, hashed
from chatsae.features.records import POSITIONS, VALUE_BINS, VALUE_EDGES, VALUES_PER_OCTAVE, Options

PARTS: Mapping[str, tuple[str, ...]] = {
    "role": tuple(r.name.lower() for r in Role),
    "kind": tuple(k.name.lower() for k in Kind),
    "position": POSITIONS,
}
"""Ways to part all tokens, and the names of the parts, in the order of their columns."""

_STARTS = (1, 8, 64, 512)  # of the position buckets after the first
_COLUMNS = sum(map(len, PARTS.values()))
_SAMPLE_BITS = 2**28  # of firing on sampled tokens: 32 MB
_SAMPLE = (4096, 16_384)  # fewest and most tokens whose firing is kept


def part_columns(name: str) -> slice:
    """The columns of a way to part tokens."""
    names = list(PARTS)
    before = sum(len(PARTS[n]) for n in names[: names.index(name)])
    return slice(before, before + len(PARTS[name]))


class Split:
    """What is known of the tokens of a split before anything fires on them.

    Attributes: starts (of each dialogue, and the end), codes [N, 3] (a column for role, kind and position of each
    token), totals (tokens of each column).
    """

    def __init__(self, tokens: TokenBatch) -> None:
        self.starts = tokens.cu_seqlens.numpy().astype(np.int64)
        self.n_tokens = int(self.starts[-1])
        position = np.searchsorted(np.array(_STARTS), tokens.position.numpy(), side="right")
        codes = [tokens.role.numpy(), tokens.kind.numpy(), position]
        offsets = [part_columns(name).start for name in PARTS]
        self.codes = np.stack(codes, axis=1).astype(np.uint8) + np.array(offsets, np.uint8)
        self.totals = np.bincount(self.codes.ravel(), minlength=_COLUMNS)

    def dialogue(self, tokens: np.ndarray) -> np.ndarray:
        """The dialogue each token is in."""
        return np.searchsorted(self.starts, tokens, side="right") - 1

    def sample(self, n: int, seed: int) -> np.ndarray:
        """Tokens chosen by the seed, ascending: `n` of them, or all there are."""
        if n >= self.n_tokens:
            return np.arange(self.n_tokens)
        priority = hashed(np.arange(self.n_tokens), 2 * seed + 1)
        return np.sort(np.argpartition(priority, n)[:n])


class Keeper:
    """Contexts, counts and firing of every feature of one SAE, whatever the order and portions they come in.

    top: the strongest positions. sampled: a uniform sample of all activations. counts, sums [F, columns]: tokens on
    which a feature is active, and its activations, by the columns of `PARTS`. values [F, bins]. bits [F, T / 8]: on
    which of T sampled tokens it fires, T being 2^28 / F, at least 4,096 and at most 16,384.
    """

    def __init__(self, split: Split, n_features: int, options: Options) -> None:
        self._split = split
        self._seed = options.seed
        self.top = Best(n_features, options.kept, split.starts if options.one_per_dialogue else None)
        self.sampled = Best(n_features, options.sampled)
        self.counts = np.zeros((n_features, _COLUMNS), np.uint32)
        self.sums = np.zeros((n_features, _COLUMNS), np.float64)
        self.values = np.zeros((n_features, VALUE_BINS), np.uint32)
        least, most = _SAMPLE
        size = 8 * -(-min(max(_SAMPLE_BITS // n_features, least), most, split.n_tokens) // 8)
        self.bits = np.zeros((n_features, size // 8), np.uint8)
        self.tokens = split.sample(size, options.seed)
        self._slots = np.full(split.n_tokens, -1, np.int32)
        self._slots[self.tokens] = np.arange(len(self.tokens))
        self._salt = hashed(np.arange(n_features), 2 * options.seed)

    def add(self, fired: Firings) -> None:
        """Take part of the activations; each is given once."""
        token, feature, value = fired.token, fired.feature, fired.value
        self.top.offer(feature, pack(value, token))
        priority = (hashed(token.astype(np.uint64) ^ self._salt[feature]) >> np.uint64(33)).astype(np.int64)
        self.sampled.offer(feature, pack(priority, token))
        row, exact = feature * _COLUMNS, value.astype(np.float64)
        for code in self._split.codes[token].T:
            np.add.at(self.counts.reshape(-1), row + code, np.uint32(1))
            np.add.at(self.sums.reshape(-1), row + code, exact)
        np.add.at(self.values.reshape(-1), feature * VALUE_BINS + value_bins(value), np.uint32(1))
        slot = self._slots[token]
        chosen = np.flatnonzero(slot >= 0)
        slot, width = slot[chosen], self.bits.shape[1]
        np.bitwise_or.at(self.bits.reshape(-1), feature[chosen] * width + slot // 8, _bit(slot))

    def state(self) -> dict[str, np.ndarray]:
        """Everything that is kept, by name."""
        self.top.merge()
        self.sampled.merge()
        kept = {"top": self.top.keys, "sampled": self.sampled.keys, "counts": self.counts, "sums": self.sums}
        return kept | {"values": self.values, "bits": self.bits}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""
        for name, array in self.state().items():
            array[...] = state[name]
        for best in (self.top, self.sampled):
            best.refresh()


def value_bins(value: np.ndarray) -> np.ndarray:
    """The bin of each activation, which is above zero."""
    bins = np.floor((np.log2(value.astype(np.float64)) - math.log2(VALUE_EDGES[0])) * VALUES_PER_OCTAVE)
    return np.clip(bins, 0, VALUE_BINS - 1).astype(np.int64)


def share_below(values: np.ndarray, value: np.ndarray, feature: np.ndarray) -> np.ndarray:
    """For a sample of a feature's activations, the share of all of them that are smaller than each.

    `values` [F, bins] counts all; `value` and `feature` are the sample of every feature. Counted where they lie in
    other bins, estimated from the sample where they lie in the same; exact where the sample is all there is.
    """
    below = np.cumsum(values, axis=1, dtype=np.int64) - values
    bins = value_bins(value)
    group = feature.astype(np.int64) * VALUE_BINS + bins
    order = np.lexsort((value, group))
    _, first, size = np.unique(group[order], return_index=True, return_counts=True)
    start, size = np.repeat(first, size), np.repeat(size, size)
    changed = np.diff(value[order], prepend=-1) != 0
    index = np.arange(len(order))
    smaller = np.maximum(np.maximum.accumulate(np.where(changed, index, 0)), start) - start
    inside = np.empty(len(order))
    inside[order] = smaller / np.maximum(size, 1)
    total = np.maximum(values.sum(axis=1, dtype=np.int64), 1)
    return (below[feature, bins] + inside * values[feature, bins]) / total[feature]


def _bit(slot: np.ndarray) -> np.ndarray:
    return (np.uint8(128) >> (slot % 8).astype(np.uint8)).astype(np.uint8)
