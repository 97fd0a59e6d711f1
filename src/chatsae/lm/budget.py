"""How many tokens go through the model in one forward, when nobody says."""

import time
from collections.abc import Callable

import torch

from chatsae.lm.forward import Ceiling, Way, bare_tokens, unchecked
from chatsae.lm.tap import Decoder

CPU_BUDGET = 1024
"""On a CPU 1k tokens were fastest or within noise of 2k, and 4k slower (docs/log.md). A constant needs no timing: the
same seed gives the same batches on every machine."""

_FIRST, _LAST = 4096, 262_144
_WORTH = 1.05  # a doubling that gives less than this is not worth its memory
_LENGTH = 512  # tokens of the sequences that are timed


def choose_budget(lm: Decoder, way: Way = "padded") -> int:
    """The token budget per forward for this model here: a constant on a CPU, measured on a GPU in a few forwards.

    What a GPU is given depends on timing and on free memory; who wants the same batches again passes it on.
    """
    if lm.device.type != "cuda":
        return CPU_BUDGET
    return grow(lambda budget: _seconds(lm, way, budget))


def grow(seconds: Callable[[int], float | None], first: int = _FIRST, last: int = _LAST) -> int:
    """Double the budget until a token gets hardly cheaper, or memory ends (`seconds` is None): the smallest good one.

    When even `first` has no memory it is halved until it has, down to one token.
    """
    budget, taken = first, seconds(first)
    while taken is None and budget > 1:
        budget //= 2
        taken = seconds(budget)
        last = budget
    while taken is not None and budget < last:
        more = seconds(2 * budget)
        if more is None or 2 * taken < _WORTH * more:
            break
        budget, taken = 2 * budget, more
    return budget


def _seconds(lm: Decoder, way: Way, budget: int) -> float | None:
    """Seconds for a forward of so many random tokens; None when they have to be split to fit into memory."""
    length = min(_LENGTH, budget, lm.max_positions or _LENGTH)
    generator = torch.Generator().manual_seed(0)
    tokens = bare_tokens(
        [torch.randint(lm.vocab_size, (length,), generator=generator) for _ in range(budget // length)]
    )
    ceiling = Ceiling()
    taken = []
    for _ in range(3):  # the first one warms up
        torch.cuda.synchronize(lm.device)
        start = time.perf_counter()
        unchecked(lm, tokens, way, ceiling=ceiling)
        torch.cuda.synchronize(lm.device)
        taken.append(time.perf_counter() - start)
        if ceiling.tokens is not None:
            return None
    return min(taken[1:])
