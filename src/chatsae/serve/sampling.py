"""How the next token is taken from logits, and whether rounding could have changed it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_FEW = 1024  # tokens that most nuclei fit in


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """temperature 0: the likeliest token. top_p: only the likeliest tokens that together have this probability."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


class Dice:
    """The random numbers of one answer: the same seed gives the same, whatever else is answered."""

    def __init__(self, sampling: Sampling) -> None:
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._greedy = sampling.temperature == 0

    def throw(self, vocab_size: int) -> Float[Tensor, " V"] | None:
        """Gumbel noise for one token: the largest logit / temperature + noise is a draw from the softmax.

        None: the answer is greedy.
        """
        if self._greedy:
            return None
        return -torch.empty(vocab_size, dtype=torch.float64).exponential_(generator=self._generator).log()


def choose(
    logits: Float[Tensor, " V"], sampling: Sampling, noise: Float[Tensor, " V"] | None, margin: float = 0.0
) -> tuple[int, bool]:
    """The next token, and whether logits that are off by up to margin / 2 each would give the same one.

    A token wins by its logit + temperature x noise among those in the nucleus. It is safe if it leads all tokens that
    may be in the nucleus by more than the margin, and is itself in it for sure.
    """
    logits = logits.double().cpu()
    score = logits if noise is None else logits + sampling.temperature * noise
    if noise is None or sampling.top_p >= 1:
        return _winner(score, margin)
    slack = 2 * margin / sampling.temperature  # by how much a sum of probabilities may be off
    edge, lowest, highest = _edges(logits, sampling, (0.0, slack, -slack))
    token, _ = _winner(score.masked_fill(logits < edge, -torch.inf), 0.0)
    leader, leads = _winner(score.masked_fill(logits < lowest - margin, -torch.inf), margin)
    inside = bool(logits[token] >= highest + margin)
    top, clear = _winner(logits, margin)
    return token, leads and leader == token and (inside or (clear and top == token))


def greedy(logits: Float[Tensor, "B V"], margin: float = 0.0) -> list[tuple[int, bool]]:
    """`choose` at temperature 0 for a batch, on its device."""
    best = logits.topk(2, dim=1)
    first, second = best.values.double().unbind(1)
    safe = ((first - second > margin) & first.isfinite()).tolist()
    return list(zip(best.indices[:, 0].tolist(), safe, strict=True))


def _winner(score: Float[Tensor, " V"], margin: float) -> tuple[int, bool]:
    values, index = score.topk(2)
    return int(index[0]), bool((values[0] - values[1] > margin) & values[0].isfinite())


def _edges(logits: Float[Tensor, " V"], sampling: Sampling, slacks: Sequence[float]) -> list[float]:
    """The lowest logit in the nucleus of top_p + each slack."""
    total = (logits / sampling.temperature).logsumexp(0)
    for few in (_FEW, len(logits)):  # mostly a few tokens are enough, and sorting all takes the longest of all
        ordered = logits.topk(min(few, len(logits))).values
        sums = (ordered / sampling.temperature - total).exp().cumsum(0)
        if len(ordered) == len(logits) or float(sums[-1]) >= sampling.top_p + max(slacks):
            break
    before = torch.cat([sums.new_zeros(1), sums[:-1]])
    return [float(ordered[max(int((before < sampling.top_p + slack).sum()), 1) - 1]) for slack in slacks]
