"""Answers that go through the model together, each as if it went alone; they come and go while the others go on."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from chatsae import console
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import cache_argument, cache_of
from chatsae.serve.answer import Answer
from chatsae.serve.errors import ApiError
from chatsae.serve.sampling import choose, greedy
from chatsae.steering.hooks import Steering, model_inputs
from chatsae.steering.rows import Row, left_padded

_NOT_FINITE = "the steered stream is no longer finite; lower the strength"


@dataclass(slots=True)
class _Part:
    """Rows with one cache, padded on the left; the cache holds all but the last column, None: nothing yet."""

    answers: list[Answer]
    ids: Int[Tensor, "B T"]
    mask: Int[Tensor, "B T"]
    cache: Any
    steering: Steering
    owner: list[tuple[Answer, int]]
    """Whose each spec of the steering is, and which of them."""


class Rows:
    """The answers under way, and one step of all of them at a time.

    Rounding differs with what a row shares a forward with. Where a token leads by less than `margin` in logits, the
    row is read again alone and whole, and that reading decides; so an answer does not depend on the others as long
    as sharing moves no logit by more than margin / 2. margin None: every token is read alone.

    Attributes: full, margin, alone (tokens that were decided by reading a row alone), tokens (that were chosen), worst
    (how far sharing has moved a logit, where that was seen; more than margin / 2 raises the margin).
    """

    def __init__(self, full: LanguageModel, margin: float | None, *, token_budget: int = 4096) -> None:
        self.full, self.margin, self.token_budget = full, margin, token_budget
        self.alone = self.tokens = 0
        self.worst = 0.0
        self._part: _Part | None = None
        self._single: list[Answer] = []
        self._takes = inspect.signature(full.model.forward).parameters

    @property
    def answers(self) -> list[Answer]:
        """Those that are not over."""
        there = self._single if self._part is None else [*self._single, *self._part.answers]
        return [a for a in there if not a.over]

    def fit(self, waiting: Sequence[Answer], most: int) -> int:
        """How many of the first answers that wait can be read in one forward; at least one."""
        n, longest = 0, 0
        for answer in waiting[:most]:
            longest = max(longest, len(answer.row))
            if n and (n + 1) * longest > self.token_budget:
                break
            n += 1
        return n

    def join(self, joining: Sequence[Answer]) -> list[tuple[Answer, int]]:
        """Read the prompts of more answers; the first token of each, and of all where the cache is not a plain one.

        The tokens of the step before must have been taken.
        """
        if self.margin is None:
            tokens = self._choose(joining, None)
            self._single = [*self._single, *joining]
            return tokens
        before = self._part
        anew = before is not None and not _plain(before.cache)
        if before is not None and anew:
            joining = [*(answer for answer in before.answers if not answer.over), *joining]
        part = self._read(joining)
        tokens = self._next(part)
        self._part = part if before is None or anew else self._merged(before, part)
        return tokens

    def step(self) -> list[tuple[Answer, int]]:
        """The next token of every answer that is not over."""
        if self.margin is None:
            return self._choose([answer for answer in self._single if not answer.over], None)
        return [] if self._part is None else self._next(self._part)

    def leave(self) -> None:
        """Drop the answers that are over; where the cache is not a plain one they are computed on until all are."""
        self._single = [answer for answer in self._single if not answer.over]
        part = self._part
        if part is None:
            return
        kept = [i for i, answer in enumerate(part.answers) if not answer.over]
        if not kept:
            self._part = None
        elif len(kept) < len(part.answers) and _plain(part.cache):
            self._part = self._kept(part, kept)

    def clear(self) -> None:
        """Forget all answers."""
        self._single, self._part = [], None

    def read_alone(self, answer: Answer) -> Float[Tensor, " V"]:
        """The logits of an answer's next token: its row whole, by itself, without a cache."""
        if answer.alone is None:
            answer.alone = Steering(self.full, answer.specs, quiet=True)
        steering: Steering = answer.alone
        ids = _ids(answer)[None]
        before = list(steering.acted)
        with torch.inference_mode(), steering, steering.prompts([answer.row]):
            logits = self._forward(ids, torch.ones_like(ids), 0, None)[0][0]
        if self.margin is None:  # no other reading counts them
            answer.acted = [now - old for now, old in zip(steering.acted, before, strict=True)]
        return logits

    def _read(self, answers: Sequence[Answer]) -> _Part:
        """Rows that are read from their first token on."""
        ids, mask = left_padded([_bare(_ids(answer)) for answer in answers], 0)
        return self._steered(answers, ids, mask, None)

    def _steered(self, answers: Sequence[Answer], ids: Tensor, mask: Tensor, cache: Any) -> _Part:
        owner = [(answer, i) for answer in answers for i in range(len(answer.specs))]
        at = {(id(answer), i): n for n, (answer, i) in enumerate(owner)}
        rows = [[at[id(answer), i] for i in range(len(answer.specs))] for answer in answers]
        steering = Steering(self.full, [answer.specs[i] for answer, i in owner], rows=rows, quiet=True)
        return _Part(list(answers), ids, mask, cache, steering, owner)

    def _next(self, part: _Part) -> list[tuple[Answer, int]]:
        """One forward; the tokens are appended to the rows."""
        start = 0 if part.cache is None else part.ids.shape[1] - 1
        offsets = (part.mask == 0).sum(1).tolist()
        before = list(part.steering.acted)
        if part.cache is None:  # all tokens are read again
            for answer in part.answers:
                answer.acted = [0] * len(answer.specs)
        with torch.inference_mode(), part.steering as steering:
            with steering.prompts([answer.row for answer in part.answers], offsets):
                logits, part.cache = self._forward(part.ids, part.mask, start, part.cache, use_cache=True)
            for n, (answer, i) in enumerate(part.owner):
                answer.acted[i] += 0 if answer.over else steering.acted[n] - before[n]
        live = [i for i, answer in enumerate(part.answers) if not answer.over]
        chosen = dict(zip(live, self._choose([part.answers[i] for i in live], logits[live]), strict=True))
        last = torch.tensor([chosen[i][1] if i in chosen else 0 for i in range(len(part.answers))])
        part.ids = torch.cat([part.ids, last.clamp(min=0)[:, None]], dim=1)
        part.mask = torch.cat([part.mask, torch.ones_like(part.mask[:, :1])], dim=1)
        return list(chosen.values())

    def _forward(
        self, ids: Tensor, mask: Tensor, start: int, cache: Any, *, use_cache: bool = False
    ) -> tuple[Float[Tensor, "B V"], Any]:
        """Logits after the last column, and the cache."""
        given = model_inputs(self.full, ids, mask, start)
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        if cache is not None:
            given |= cache_argument(self.full.model, cache)
        out = self.full.model(**given, use_cache=use_cache)
        return out.logits[:, -1], cache_of(out)

    def _choose(self, answers: Sequence[Answer], logits: Float[Tensor, "B V"] | None) -> list[tuple[Answer, int]]:
        """A token for each answer; -1: it has failed."""
        quick = None if logits is None else greedy(logits, self.margin or 0.0)
        return [
            (answer, self._token(answer, None if logits is None else logits[i], None if quick is None else quick[i]))
            for i, answer in enumerate(answers)
        ]

    def _token(self, answer: Answer, logits: Float[Tensor, " V"] | None, quick: tuple[int, bool] | None) -> int:
        self.tokens += 1
        own = self.read_alone(answer) if logits is None else None
        shared = logits if own is None else own
        assert shared is not None
        noise = answer.dice.throw(shared.shape[0])
        if own is None:
            quickly = quick if noise is None else None
            token, safe = quickly or choose(shared, answer.sampling, noise, self.margin or 0.0)
            if safe:
                return token
            own = self.read_alone(answer)
            self._watch(shared, own)
        self.alone += 1
        if not bool(own.max().isfinite()):
            answer.fail(ApiError(400, _NOT_FINITE, param="steering", code="not_finite"))
            return -1
        return choose(own, answer.sampling, noise)[0]

    def _watch(self, logits: Float[Tensor, " V"], own: Float[Tensor, " V"]) -> None:
        """See whether the margin is wide enough."""
        error = (logits.double() - own.double()).abs()
        self.worst = max(self.worst, float(error.nan_to_num(0.0, 0.0, 0.0).max()))
        if self.margin and self.worst > self.margin / 2:
            self.margin = 4 * self.worst
            console.warn(f"sharing a forward moves logits by {self.worst:.2g}; the margin is now {self.margin:.2g}")

    def _merged(self, a: _Part, b: _Part) -> _Part:
        """Two parts with plain caches as one."""
        n = max(a.ids.shape[1], b.ids.shape[1])
        pairs = list(zip(a.cache.layers, b.cache.layers, strict=True))
        joined = [
            [_together(getattr(x, name), getattr(y, name), n - 1) for x, y in pairs] for name in ("keys", "values")
        ]
        for layer, keys, values in zip(a.cache.layers, *joined, strict=True):  # only once all are there
            layer.keys, layer.values = keys, values
        ids, mask = (
            torch.cat([torch.nn.functional.pad(x, (n - x.shape[1], 0)) for x in pair])
            for pair in ((a.ids, b.ids), (a.mask, b.mask))
        )
        return self._steered([*a.answers, *b.answers], ids, mask, a.cache)

    def _kept(self, part: _Part, kept: Sequence[int]) -> _Part:
        """Some rows of a part with a plain cache, without the columns that are padding in all of them."""
        index = torch.tensor(kept)
        ids, mask = part.ids[index], part.mask[index]
        padding = int((mask == 0).sum(1).min())
        for layer in part.cache.layers:
            there = index.to(layer.keys.device)
            layer.keys, layer.values = (x[there][..., padding:, :] for x in (layer.keys, layer.values))
        return self._steered([part.answers[i] for i in kept], ids[:, padding:], mask[:, padding:], part.cache)


def _plain(cache: Any) -> bool:
    """Whether every layer keeps the keys and values of all tokens, and nothing else."""
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer and layer.get_seq_length() > 0 for layer in cache.layers
    )


def _together(a: Float[Tensor, "A H S E"], b: Float[Tensor, "B H T E"], n: int) -> Float[Tensor, "C H n E"]:
    """Keys or values of two sets of rows, C = A + B, padded on the left to n columns."""
    return torch.cat([torch.nn.functional.pad(x, (0, 0, n - x.shape[2], 0)) for x in (a, b)])


def _bare(ids: Int[Tensor, " N"]) -> Row:
    none = torch.zeros(len(ids), dtype=torch.uint8)
    return Row(ids, none, none, len(ids))


def _ids(answer: Answer) -> Int[Tensor, " N"]:
    return torch.cat([answer.row.input_ids, torch.tensor(answer.new, dtype=torch.int64)])
