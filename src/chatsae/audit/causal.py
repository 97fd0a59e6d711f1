"""Whether the chosen features cause the behaviour: remove them, push them, and do the same to features like them.

The operations are those of `chatsae.steering` on the span of decoder rows, at the layer of the SAE.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.audit.behaviour import shows
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.statistics import wilson
from chatsae.steering.generate import generate
from chatsae.steering.rows import Row
from chatsae.steering.spec import SteerSpec, Where
from chatsae.steering.strength import Calibration

_ROWS = 64  # prompts that are answered in one batch
_GUARDED = 5  # controls whose effect on held-out answers is measured
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Rate:
    """How many answers show the behaviour, with the Wilson interval of the share."""

    hits: int
    n: int

    @property
    def share(self) -> float:
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson(self.hits, self.n)


@dataclass(frozen=True, slots=True)
class Intervention:
    """One change of the stream, on the prompts that it was not chosen on.

    name: ablate (positive prompts, every token) or clamp (negative prompts, the template's tokens after the user's
    text). before, after: the behaviour without and with it. p_value: exact McNemar on the prompts whose answer changed
    sides. controls: rates with random features of like density in place of the chosen; rank_p: (1 + controls that
    change the rate as much) / (1 + controls). perplexity_ratio: of held-out answers, steered over unsteered, of the
    chosen features and on average over the first five controls.
    """

    name: str
    features: tuple[int, ...]
    before: Rate
    after: Rate
    p_value: float
    controls: tuple[Rate, ...]
    rank_p: float
    perplexity_ratio: float
    control_perplexity_ratio: float | None
    within: bool
    """Whether the perplexity ratio stays within the bound."""
    examples: tuple[dict[str, str], ...]

    @property
    def acts(self) -> bool:
        """Whether the rate changes by more than chance, more than with any control, and the model still works."""
        far = abs(self.after.share - self.before.share)
        beaten = all(far > abs(one.share - self.before.share) for one in self.controls)
        return self.p_value <= ALPHA and beaten and self.within


class Bench:
    """What every intervention is measured on: model, prompts of the half to report on, guard, and how to judge.

    Attributes: positive and negative (the prompts), plain (for each side, which unsteered answers show the behaviour,
    and the answers), advance (told the share of a call of `answers` that each token is).
    """

    def __init__(
        self,
        lm: LanguageModel,
        positive: Sequence[Row],
        negative: Sequence[Row],
        guard: Calibration,
        *,
        prefixes: Sequence[str],
        max_new_tokens: int = 12,
        max_perplexity_ratio: float = 1.5,
        advance: Callable[[float], object] = lambda _: None,
    ) -> None:
        self.lm, self.positive, self.negative = lm, positive, negative
        self.max_perplexity_ratio = max_perplexity_ratio
        self.advance = advance
        self._guard, self.prefixes, self._max_new_tokens = guard, tuple(prefixes), max_new_tokens
        self.plain = {"ablate": self.answers(positive, ()), "clamp": self.answers(negative, ())}

    def answers(self, rows: Sequence[Row], specs: Sequence[SteerSpec]) -> tuple[list[bool], list[str]]:
        """Which answers show the behaviour, and the answers."""
        texts: list[str] = []
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            found = generate(
                self.lm,
                part,
                [list(specs)] * len(part),
                max_new_tokens=self._max_new_tokens,
                test=False,
                advance=lambda n: self.advance(n / len(rows)),
            )
            texts += [one.text for one in found.completions]
        return [shows(text, self.prefixes) for text in texts], texts

    def perplexity_ratio(self, specs: Sequence[SteerSpec]) -> float:
        """Of held-out answers, steered over unsteered."""
        return math.exp(self._guard.effect(specs).log_ratio)


def like_density(
    chosen: Sequence[int], density: Float[Tensor, " F"], n: int, seed: int, *, factor: float = 2.0
) -> list[tuple[int, ...]]:
    """`n` draws of a random other feature for each chosen one, of a density within `factor` of its own.

    Where fewer than 20 are that close, the 20 closest are drawn from. No feature stands twice in a draw.
    """
    rng = np.random.default_rng(seed)
    logs = density.double().clamp(min=1e-12).log()
    live = (density > 0).nonzero().flatten()
    live = live[~torch.isin(live, torch.tensor(list(chosen)))]
    pools = []
    for k in chosen:
        gap = (logs[live] - logs[k]).abs()
        near = live[gap <= math.log(factor)]
        pools.append((near if len(near) >= 20 else live[gap.argsort(stable=True)[:20]]).tolist())
    draws = []
    for _ in range(n):
        taken: list[int] = []
        for pool in pools:
            left = [k for k in pool if k not in taken]
            if left:
                taken.append(int(rng.choice(left)))
        draws.append(tuple(taken))
    return [draw for draw in draws if draw]


def span(sae: SAE, features: Sequence[int]) -> Float[Tensor, "K D"]:
    """Orthonormal vectors that span the decoder rows of features."""
    rows = sae.W_dec[list(features)].detach().double().cpu()
    _, s, vt = torch.linalg.svd(rows, full_matrices=False)
    return vt[s > 1e-9 * s.max()]


def ablation(sae: SAE, features: Sequence[int]) -> list[SteerSpec]:
    """The stream without its part in the span of the decoder rows, on every token."""
    return [SteerSpec(op="ablate", vector=u, layer=sae.spec.layer) for u in span(sae, features)]


def clamping(sae: SAE, features: Sequence[int], floors: Float[np.ndarray, "P K"]) -> list[SteerSpec]:
    """Projections on the unit decoder rows of at least `floors`, at each of the prompt's last P tokens its own."""
    n = len(floors)
    places = [Where(phase="prompt", positions=(p - n,)) for p in range(n)]
    return [
        SteerSpec(op="min_clamp", strength=float(floors[p, i]), sae=sae, feature=k, where=places[p])
        for p in range(n)
        for i, k in enumerate(features)
    ]


def ablate(bench: Bench, sae: SAE, features: Sequence[int], controls: Sequence[Sequence[int]]) -> Intervention:
    """The behaviour on positive prompts with the features removed."""
    draws = [ablation(sae, draw) for draw in controls]
    return _measured(bench, "ablate", features, bench.positive, ablation(sae, features), draws)


def clamp(
    bench: Bench,
    sae: SAE,
    features: Sequence[int],
    controls: Sequence[Sequence[int]],
    ends: tuple[Float[Tensor, "S P D"], Float[Tensor, "S P D"]],
) -> Intervention:
    """The behaviour on negative prompts, each feature's projection pushed at each place to its mean on positive ones.

    `ends`: the stream at the template's tokens of positive and of negative prompts of the half to choose on. A control
    is pushed as far from its own mean on negative prompts as the chosen feature in its place.
    """

    def means(side: Float[Tensor, "S P D"], which: Sequence[int]) -> Float[np.ndarray, "P K"]:
        rows = torch.nn.functional.normalize(sae.W_dec[list(which)].detach().double().cpu(), dim=1)
        return (side.double().mean(0) @ rows.T).numpy()

    above = means(ends[0], features)
    pushes = above - means(ends[1], features)
    draws = [clamping(sae, draw, means(ends[1], draw) + pushes[:, : len(draw)]) for draw in controls]
    own = clamping(sae, features, above)
    return _measured(bench, "clamp", features, bench.negative, own, draws)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """The exact two-sided p value of a change on the same prompts."""
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    won = sum(b and not a for a, b in zip(before, after, strict=True))
    n = lost + won
    tail = sum(math.comb(n, i) for i in range(min(lost, won) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _measured(
    bench: Bench,
    name: Literal["ablate", "clamp"],
    features: Sequence[int],
    rows: Sequence[Row],
    own: Sequence[SteerSpec],
    draws: Sequence[Sequence[SteerSpec]],
) -> Intervention:
    before, plain = bench.plain[name]
    after, texts = bench.answers(rows, own)
    ratio = bench.perplexity_ratio(own)
    rates, ratios = [], []
    for specs in draws:
        hits, _ = bench.answers(rows, specs)
        rates.append(Rate(sum(hits), len(hits)))
        if len(ratios) < _GUARDED:
            ratios.append(bench.perplexity_ratio(specs))
    base, found = Rate(sum(before), len(before)), Rate(sum(after), len(after))
    far = abs(found.share - base.share)
    as_far = sum(abs(one.share - base.share) >= far for one in rates)
    return Intervention(
        name=name,
        features=tuple(features),
        before=base,
        after=found,
        p_value=mcnemar(before, after),
        controls=tuple(rates),
        rank_p=(1 + as_far) / (1 + len(rates)),
        perplexity_ratio=ratio,
        control_perplexity_ratio=float(np.exp(np.mean(np.log(ratios)))) if ratios else None,
        within=ratio <= bench.max_perplexity_ratio,
        examples=tuple({"before": a, "after": b} for a, b in list(zip(plain, texts, strict=True))[:4]),
    )
