"""Greedy generation of a batch of prompts, each with its own steering."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import cache_argument, cache_of
from chatsae.steering.attach import attach
from chatsae.steering.guard import Guard, GuardEvent, Watch
from chatsae.steering.hooks import Steering, model_inputs
from chatsae.steering.rows import Prompt, Row, left_padded, row_of_prompt
from chatsae.steering.spec import SteerSpec


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt."""

    text: str
    """Without special tokens."""
    token_ids: tuple[int, ...]
    """As they were generated, the one that ended the answer included."""
    finish_reason: Literal["stop", "length"]
    n_prompt: int
    """Tokens of the prompt."""
    events: tuple[GuardEvent, ...] = ()
    """What the guard did."""

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"token_ids": list(self.token_ids), "events": [e.facts() for e in self.events]}


@dataclass(frozen=True, slots=True)
class Generated:
    """Answers in the order of the prompts, and how often the model was hooked for them.

    forwards; hook_calls by layer (equal to forwards); acted: tokens that each spec changed; tested: see `self_test`.
    """

    completions: tuple[Completion, ...]
    forwards: int
    hook_calls: dict[int, int]
    acted: tuple[int, ...]
    tested: dict[str, Any] | None


def generate(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    specs: Sequence[Sequence[SteerSpec]] | None = None,
    *,
    max_new_tokens: int = 64,
    use_cache: bool = True,
    guard: Guard | None = None,
    test: bool = True,
    advance: Callable[[float], object] = lambda _: None,
) -> Generated:
    """The greedy answers to prompts in one batch, padded on the left; `specs` are those of each prompt.

    `advance` is told the share of the prompts that each token answers; in all it is their number.

    Raises:
        UserError: there is not one list of specs per prompt, a prompt cannot be rendered or leaves no room for an
            answer, or steering does not act (`Steering`).
    """
    if not prompts:
        raise UserError("steering: no prompt to answer")
    if specs is None:
        specs = [()] * len(prompts)
    if len(specs) != len(prompts):
        raise UserError(f"steering: {len(prompts)} prompts, but specs for {len(specs)}")
    full = lm.with_head()
    rows = [row_of_prompt(prompt, full.tokenizer) for prompt in prompts]
    longest = max(map(len, rows))
    if full.max_positions is not None:
        max_new_tokens = min(max_new_tokens, full.max_positions - longest)
    if max_new_tokens < 1:
        raise UserError(f"{full.name}: a prompt of {longest} tokens leaves no room for an answer")
    beside = guard is not None and guard.max_kl > 0  # an unsteered copy of every row, fed the same tokens
    flat, index = distinct_specs(specs)
    steering = attach(lm, flat, rows=[*index, *([()] * len(rows) if beside else [])], test=test)
    watch = None if guard is None else Watch(guard, len(rows))
    with steering, torch.inference_mode():
        loop = _Loop(steering, rows * 2 if beside else rows, use_cache)
        ids = loop.run(len(rows), max_new_tokens, watch, advance)
    ends = full.stop_ids
    completions = []
    for i, (row, new) in enumerate(zip(rows, ids, strict=True)):
        text = str(full.tokenizer.decode(new, skip_special_tokens=True))
        events = () if watch is None else tuple(watch.events[i])
        reason: Literal["stop", "length"] = "stop" if new[-1] in ends else "length"
        completions.append(Completion(text, tuple(new), reason, len(row), events))
    return Generated(
        tuple(completions), steering.forwards, dict(steering.hook_calls), tuple(steering.acted), steering.tested
    )


class _Loop:
    """One batch on its way: tokens so far, mask, cache."""

    def __init__(self, steering: Steering, rows: Sequence[Row], use_cache: bool) -> None:
        self._steering, self._rows, self._use_cache = steering, rows, use_cache
        self._full = steering.full
        self._takes = inspect.signature(self._full.model.forward).parameters
        self._ids, self._mask = left_padded(rows, 0)
        self._offsets = (self._mask == 0).sum(1).tolist()
        self._cache: Any = None

    def run(
        self, n: int, max_new_tokens: int, watch: Watch | None, advance: Callable[[float], object]
    ) -> list[list[int]]:
        """New tokens of the first n rows; the rows after them are fed the same."""
        new: list[list[int]] = [[] for _ in range(n)]
        ends, done = self._full.stop_ids, [False] * n
        with self._steering.prompts(self._rows, self._offsets):
            for column in range(max_new_tokens):
                logits = self._forward()
                chosen = logits[:n].argmax(-1).cpu()
                for i, token in enumerate(chosen.tolist()):
                    if not done[i]:
                        new[i].append(token)
                if watch is not None:
                    taken = [None if done[i] else new[i][-1] for i in range(n)]
                    self._steering.factors[:n] = watch.see(logits[:n], logits[n:] if len(logits) > n else None, taken)
                done = [end or row[-1] in ends for end, row in zip(done, new, strict=True)]
                if all(done):
                    advance(n * (max_new_tokens - column) / max_new_tokens)
                    break
                advance(n / max_new_tokens)
                self._append(chosen.repeat(len(self._rows) // n))
        return new

    def _forward(self) -> Float[Tensor, "B V"]:
        """Logits after the last column."""
        start = 0 if self._cache is None else self._ids.shape[1] - 1
        given = model_inputs(self._full, self._ids, self._mask, start)
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        if self._cache is not None:
            given |= cache_argument(self._full.model, self._cache)
        out = self._full.model(**given, use_cache=self._use_cache)
        if self._use_cache:
            self._cache = cache_of(out)  # None: every forward reads all tokens
        return out.logits[:, -1]

    def _append(self, tokens: Tensor) -> None:
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(tokens[:, None])], dim=1)


def distinct_specs(specs: Sequence[Sequence[SteerSpec]]) -> tuple[list[SteerSpec], list[list[int]]]:
    """Every spec once, and for each row the indices of its own; a spec that several rows share is one object."""
    flat: list[SteerSpec] = []
    places: dict[int, int] = {}
    index = []
    for row in specs:
        for spec in row:
            if id(spec) not in places:
                places[id(spec)] = len(flat)
                flat.append(spec)
        index.append([places[id(spec)] for spec in row])
    return flat, index
