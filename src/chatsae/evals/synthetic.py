"""Chat activations whose true features are known: the ground truth that a real language model cannot give.

x = features @ dictionary + noise, with features that are sparse and not negative. The same dialogues can be read alone
(fast) or in blocks (bt-f); documents have none of a template's features (bt-p). What is assumed: docs/synthetic.md.

Letters in shapes: A slots of a token, each one feature that may be active; J true features; else `chatsae.batch`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatsae.batch import ActivationBatch, Kind, Role, TokenBatch
from chatsae.errors import UserError

Reading = Literal["fast", "bt-f", "bt-p"]

GROUPS = ("role", "template", "sink", "topic", "content", "prefix")
"""Kinds of true features, in the order of the dictionary; `prefix` is last, so that its length moves no other."""

START, SYSTEM, USER, ASSISTANT, NEWLINE, END, FIRST_WORD = range(7)
"""Token ids: those of the template, then content."""

SPECIAL_IDS = (START, USER, ASSISTANT, END)

_HEADER, _AROUND = 3, 5  # START role NEWLINE; with END NEWLINE
_ROLES = np.array([Role.DEFAULT_SYSTEM, Role.USER, Role.ASSISTANT])
_KINDS = np.array([Kind.CONTROL, *[Kind.ROLE_NAME] * 3, Kind.TEMPLATE_TEXT, Kind.END_OF_TURN, Kind.CONTENT])
_STRENGTH = {"role": 1.5, "template": 2.5, "topic": 1.5, "content": 2.0, "prefix": 2.0}
_SPREAD = 0.4  # of a strength, uniformly around 1
_ROLE_SLOT, _TOKEN_SLOT, _SINK_SLOT, _PREFIX_SLOT, _TOPIC_SLOT = range(5)  # topics take the rest
_TOPIC_ON, _TOPIC_CHANGES = 0.7, 0.1  # share of a dialogue; chance per token that it is drawn anew
_BATCHES = 2**20  # of a stream, so that streams share none
_TURN_LEAST, _TURN_MORE, _PAIRS, _DOCUMENT = 4, 20.0, 2.0, 300.0  # tokens, tokens, turns / 2, tokens
_WORLD, _DIALOGUES, _DOCUMENTS, _BLOCKS, _NOISE = range(5)  # streams of random numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """A world of synthetic chat activations."""

    d_in: int = 64
    topics: int = 64
    words: int = 96
    """Content tokens, each with a feature of its own."""
    topics_per_dialogue: int = 3
    zipf: float = 1.0
    """Exponent of the frequencies of topics and words; documents have them in another order than dialogues."""
    sink_norm: float = 10.0
    """Length that position 0 gains, in multiples of the typical length of an activation."""
    prefix_length: int = 24
    """Tokens that begin every dialogue: a system turn and the header of the user's; 3 is without a system turn."""
    leakage: float = 0.3
    """Share of what a token draws from context that comes from other dialogues before it in its block."""
    block_size: int = 512
    noise: float = 0.05
    """Standard deviation per dimension."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prefix_length != _HEADER and self.prefix_length <= _HEADER + _AROUND:
            raise UserError(
                f"prefix_length: {self.prefix_length} given; it is {_HEADER} (no system turn) or more than "
                f"{_HEADER + _AROUND}"
            )
        if not 0 <= self.leakage <= 1:
            raise UserError(f"leakage: {self.leakage} given, it is a share between 0 and 1")
        if self.topics_per_dialogue > self.topics:
            raise UserError(f"topics_per_dialogue: {self.topics_per_dialogue} given, there are {self.topics} topics")
        for name, least in (("sink_norm", 0), ("noise", 0), ("block_size", 2), ("words", 1), ("d_in", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)} given, at least {least} needed")


@dataclass(frozen=True, slots=True)
class Sample:
    """Activations with their true features, as slots: the id of a feature and its activation, 0 for an empty slot."""

    tokens: TokenBatch
    ids: Int[Tensor, "N A"]
    values: Float[Tensor, "N A"]
    acts: Float[Tensor, "N D"]
    n_features: int

    def features(self, rows: slice = slice(None)) -> Float[Tensor, "n J"]:
        """The true feature activations of some tokens, as a matrix."""
        ids, values = self.ids[rows], self.values[rows]
        return values.new_zeros(len(ids), self.n_features).scatter_add_(1, ids, values)


@dataclass(frozen=True, slots=True)
class _Flat:
    """Dialogues or documents end to end, before it is known how they are read."""

    start: Int[np.ndarray, " N"]
    """Index of the first token of the dialogue."""
    header: Int[np.ndarray, " N"]
    """Index of the token that names the role of the turn."""
    word: Int[np.ndarray, " N"]
    role: Int[np.ndarray, " N"]
    in_prefix: Bool[np.ndarray, " N"]
    ids: Int[np.ndarray, "N A"]
    values: Float[np.ndarray, "N A"]

    @property
    def index(self) -> Int[np.ndarray, " N"]:
        return np.arange(len(self.start))


class SyntheticChat:
    """The world of a `SyntheticConfig`: one dictionary, one vocabulary, any number of dialogues and documents.

    Everything follows from the seed of the configuration and the seed of a call. `dialogues` and `blocks` of one seed
    are the same dialogues, token for token and feature for feature; only the reading differs.
    """

    def __init__(self, config: SyntheticConfig | None = None) -> None:
        self.config = config = config or SyntheticConfig()
        rng = np.random.default_rng([config.seed, _WORLD])
        sizes = {"role": 3, "template": FIRST_WORD, "sink": 1, "topic": config.topics, "content": config.words}
        bounds = np.cumsum([0, *sizes.values(), config.prefix_length]).tolist()
        self.groups = {name: slice(*bounds[i : i + 2]) for i, name in enumerate(GROUPS)}
        """Where the features of each group are in the dictionary."""
        self._shares = {
            (kind, name): _zipf(rng, sizes[name], config.zipf)
            for kind in ("chat", "text")
            for name in ("topic", "content")
        }
        rows = rng.standard_normal((bounds[-2], config.d_in))
        own = np.random.default_rng([config.seed, _WORLD, 1])  # draws whose number is that of the prefix
        rows = np.concatenate([rows, own.standard_normal((config.prefix_length, config.d_in))])
        self.dictionary = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).float()
        """The true features, rows of unit norm [J, D]."""
        n_slots = _TOPIC_SLOT + config.topics_per_dialogue
        self._prefix_words = own.choice(config.words, config.prefix_length)
        self._prefix_spread = own.uniform(1 - _SPREAD, 1 + _SPREAD, (config.prefix_length, n_slots))
        self._prefix_noise = own.standard_normal((config.prefix_length, config.d_in))

    @property
    def typical_norm(self) -> float:
        """Length of a content token's activation without noise, if its features were orthogonal (root mean square)."""
        squares = {name: value**2 for name, value in _STRENGTH.items()}
        topics = self.config.topics_per_dialogue * _TOPIC_ON * squares["topic"]
        return float(np.sqrt((1 + _SPREAD**2 / 3) * (squares["role"] + squares["content"] + topics)))

    def dialogues(self, n: int, seed: int) -> Sample:
        """`n` dialogues, each alone (fast): no foreign features, a sink at the first token, a constant prefix."""
        flat = self._chat(n, seed)
        ids, values = flat.ids, flat.values.copy()
        values[:, _SINK_SLOT] = (flat.index == flat.start) * self.config.sink_norm * self.typical_norm
        starts = np.unique(flat.start)
        return self._sample(flat, ids, values, starts, clean=np.ones(len(ids), bool), seed=seed, named="dialogue")

    def blocks(self, n: int, seed: int) -> Sample:
        """The same dialogues in blocks (bt-f); the last block may be short.

        A sink only where a block starts; no role before the first header in the block, no feature of a prefix that
        begins before it; and leakage: a token with other dialogues before it in its block looks at a random one of
        their tokens, takes `leakage` of its features, and keeps 1 - `leakage` of its own roles and topics.
        """
        return self._in_blocks(self._chat(n, seed), seed)

    def documents(self, n: int, seed: int) -> Sample:
        """`n` documents in blocks (bt-p): words and topics alone, in other frequencies, and leakage as in `blocks`."""
        return self._in_blocks(self._text(n, seed), seed)

    def read(self, reading: Reading, n: int, seed: int) -> Sample:
        """`dialogues`, `blocks` or `documents`."""
        return {"fast": self.dialogues, "bt-f": self.blocks, "bt-p": self.documents}[reading](n, seed)

    def _chat(self, n: int, seed: int) -> _Flat:
        """Turns of alternating roles, the system's first; each is START role NEWLINE content END NEWLINE."""
        config, rng = self.config, np.random.default_rng([self.config.seed, _DIALOGUES, seed])
        system = int(config.prefix_length > _HEADER)
        turns = system + 2 * rng.geometric(1 / _PAIRS, n)  # per dialogue
        first_turn = np.cumsum(turns) - turns
        dialogue = np.repeat(np.arange(n), turns)  # per turn
        turn = np.arange(len(dialogue)) - first_turn[dialogue] - system  # -1 is the system's
        content = _TURN_LEAST + rng.geometric(1 / _TURN_MORE, len(turn))
        content[turn < 0] = config.prefix_length - _HEADER - _AROUND
        role = np.where(turn < 0, 0, 1 + turn % 2)
        lengths = content + _AROUND
        begin = np.cumsum(lengths) - lengths
        of = np.repeat(np.arange(len(turn)), lengths)  # per token
        within = np.arange(len(of)) - begin[of]
        left = lengths[of] - within
        start = begin[first_turn[dialogue[of]]]
        position = np.arange(len(of)) - start
        in_prefix = position < config.prefix_length
        word = rng.choice(config.words, len(of), p=self._shares["chat", "content"]) + FIRST_WORD
        word[in_prefix] = self._prefix_words[position[in_prefix]] + FIRST_WORD
        word = np.where(within == 0, START, np.where(within == 1, SYSTEM + role[of], word))
        word = np.where((within == 2) | (left == 1), NEWLINE, np.where(left == 2, END, word))
        ids, values = self._slots(rng, "chat", np.repeat(np.arange(n), np.add.reduceat(lengths, first_turn)), word)
        ids[:, _ROLE_SLOT], values[:, _ROLE_SLOT] = role[of], _STRENGTH["role"] * (within > 0)
        ids[:, _PREFIX_SLOT] = self.groups["prefix"].start + np.where(in_prefix, position, 0)
        values[:, _PREFIX_SLOT] = _STRENGTH["prefix"] * in_prefix
        values[in_prefix, _TOPIC_SLOT:] = 0  # nothing has been said yet
        spread = rng.uniform(1 - _SPREAD, 1 + _SPREAD, values.shape)
        spread[in_prefix] = self._prefix_spread[position[in_prefix]]
        return _Flat(start, begin[of] + 1, word, _ROLES[role[of]], in_prefix, ids, values * spread)

    def _text(self, n: int, seed: int) -> _Flat:
        rng = np.random.default_rng([self.config.seed, _DOCUMENTS, seed])
        lengths = rng.geometric(1 / _DOCUMENT, n)
        document = np.repeat(np.arange(n), lengths)
        start = (np.cumsum(lengths) - lengths)[document]
        word = rng.choice(self.config.words, len(start), p=self._shares["text", "content"]) + FIRST_WORD
        ids, values = self._slots(rng, "text", document, word)
        values *= rng.uniform(1 - _SPREAD, 1 + _SPREAD, values.shape)
        none = np.full(len(start), int(Role.NONE))
        return _Flat(start, start, word, none, np.zeros(len(start), bool), ids, values)

    def _slots(
        self, rng: np.random.Generator, kind: str, dialogue: Int[np.ndarray, " N"], word: Int[np.ndarray, " N"]
    ) -> tuple[Int[np.ndarray, "N A"], Float[np.ndarray, "N A"]]:
        """Token and topic features; each topic of a dialogue is on or off in stretches, drawn anew now and then."""
        k, n_tokens = self.config.topics_per_dialogue, len(word)
        ids = np.zeros((n_tokens, _TOPIC_SLOT + k), np.int64)
        values = np.zeros(ids.shape)
        template = word < FIRST_WORD
        content = self.groups["content"].start + word - FIRST_WORD
        ids[:, _TOKEN_SLOT] = np.where(template, self.groups["template"].start + word, content)
        values[:, _TOKEN_SLOT] = np.where(template, _STRENGTH["template"], _STRENGTH["content"])
        ids[:, _SINK_SLOT] = self.groups["sink"].start
        chances = np.log(self._shares[kind, "topic"]) + rng.gumbel(size=(int(dialogue[-1]) + 1, self.config.topics))
        topics = np.argpartition(-chances, k - 1, axis=1)[:, :k]  # k without replacement
        changes = rng.random((n_tokens, k)) < _TOPIC_CHANGES
        changes[1:] |= (dialogue[1:] != dialogue[:-1])[:, None]
        on = rng.random((n_tokens + 1, k)) < _TOPIC_ON
        ids[:, _TOPIC_SLOT:] = self.groups["topic"].start + topics[dialogue]
        values[:, _TOPIC_SLOT:] = _STRENGTH["topic"] * np.take_along_axis(on, changes.cumsum(axis=0), axis=0)
        return ids, values

    def _in_blocks(self, flat: _Flat, seed: int) -> Sample:
        config, index = self.config, flat.index
        rng = np.random.default_rng([config.seed, _BLOCKS, seed])
        block = index - index % config.block_size  # index of the block's first token
        cut, before = flat.start < block, np.maximum(flat.start - block, 0)
        own = flat.values.copy()
        own[:, _SINK_SLOT] = (index == block) * config.sink_norm * self.typical_norm
        own[cut, _PREFIX_SLOT] = 0
        own[flat.header < block, _ROLE_SLOT] = 0
        foreign_ids, foreign = flat.ids.copy(), np.zeros(own.shape)
        exposed = (before > 0) & (config.leakage > 0)
        if exposed.any():
            source = (block + np.floor(rng.random(len(index)) * before).astype(np.int64))[exposed]
            foreign_ids[exposed], foreign[exposed] = flat.ids[source], config.leakage * own[source]
            foreign[:, [_SINK_SLOT, _PREFIX_SLOT]] = 0
            kept = np.where(exposed, 1 - config.leakage, 1.0)
            own[:, _ROLE_SLOT] *= kept
            own[:, _TOPIC_SLOT:] *= kept[:, None]
        ids, values = np.concatenate([flat.ids, foreign_ids], axis=1), np.concatenate([own, foreign], axis=1)
        return self._sample(flat, ids, values, np.unique(block), clean=~cut & ~exposed, seed=seed, named="block")

    def _sample(
        self,
        flat: _Flat,
        ids: Int[np.ndarray, "N A"],
        values: Float[np.ndarray, "N A"],
        starts: Int[np.ndarray, " B"],
        *,
        clean: Bool[np.ndarray, " N"],
        seed: int,
        named: str,
    ) -> Sample:
        """Activations and labels; `clean` tokens of the prefix have the noise of their position, as all they see is."""
        noise = np.random.default_rng([self.config.seed, _NOISE, seed]).standard_normal(
            (len(ids), self.config.d_in), dtype=np.float32
        )
        constant = flat.in_prefix & clean
        noise[constant] = self._prefix_noise[(flat.index - flat.start)[constant]]
        slots, strengths = torch.from_numpy(ids), torch.from_numpy(values).float()
        acts = torch.nn.functional.embedding_bag(slots, self.dictionary, per_sample_weights=strengths, mode="sum")
        acts += self.config.noise * torch.from_numpy(noise)
        first = np.isin(flat.index, starts)
        kind = np.where(first, int(Kind.FIRST), _KINDS[np.minimum(flat.word, FIRST_WORD)])
        position = flat.index - np.repeat(starts, np.diff([*starts, len(ids)]))
        tokens = TokenBatch(
            names=tuple(f"{named} {seed}.{i}" for i in range(len(starts))),
            input_ids=torch.from_numpy(flat.word),
            cu_seqlens=torch.tensor([*starts, len(ids)], dtype=torch.int32),
            position=torch.from_numpy(position.astype(np.int32)),
            role=torch.from_numpy(flat.role.astype(np.uint8)),
            kind=torch.from_numpy(kind.astype(np.uint8)),
            special=torch.from_numpy(np.isin(flat.word, SPECIAL_IDS)),
            prefix=torch.from_numpy(flat.in_prefix & (flat.start >= flat.index - position)),
        )
        return Sample(tokens, slots, strengths, acts, len(self.dictionary))


@dataclass
class SyntheticStream:
    """Activations of one reading without end, for `chatsae.buffer.mix`; axis 0 is the only layer.

    Streams of one seed read the same dialogues. Batch i has what a call with the seed 2²⁰ `seed` + i gives.
    """

    chat: SyntheticChat
    reading: Reading
    seed: int = 0
    at_once: int = 128
    """Dialogues or documents per batch."""

    def __iter__(self) -> Iterator[ActivationBatch]:
        for number in itertools.count():
            sample = self.chat.read(self.reading, self.at_once, self.seed * _BATCHES + number)
            yield ActivationBatch(sample.acts[None], sample.tokens)


def _zipf(rng: np.random.Generator, n: int, exponent: float) -> Float[np.ndarray, " K"]:
    """Shares that fall with the rank, the ranks in random order."""
    weights = (1.0 + rng.permutation(n)) ** -exponent
    return weights / weights.sum()
