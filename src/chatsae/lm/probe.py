"""Whether sequences that share a forward see each other, measured on the model at hand before it costs an hour."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.batch import TokenBatch
from chatsae.errors import UserError
from chatsae.lm.forward import Way, bare_tokens, unchecked
from chatsae.lm.packed import PackingRefused
from chatsae.lm.prefix import PrefixCache
from chatsae.lm.tap import FORWARD_ERRORS, Decoder

ISOLATION_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest `isolation_error` that rounding explains, by dtype of the model."""

WAYS: tuple[Way, ...] = get_args(Way)
"""In the order they are tried: padded and packed are equally fast where both were measured (docs/log.md), and padded
leaves the model its own attention."""

# Many short ones, because some leaks reach only the first tokens of a sequence (a convolution, a token shift).
_LENGTHS = (33, 1, 17, 64, 2, 11, 3, 7)
_BEYOND = 64  # tokens past a window, so that they make a group of their own
_PREFIX = 9  # tokens of a common beginning
_GROUP = 32  # tokens at least over which a quantile is taken
_LONGEST = {"cpu": 1024}  # longest sequence worth its time


@dataclass(frozen=True, slots=True)
class Isolation:
    """The way a model is read, how far it is from one sequence at a time, and why not in the ways before it.

    `median` and `p90` are of the relative error per token, in the worst layer and the worst group of tokens. `prefix`:
    a common prefix read from a cache changes nothing either.
    """

    way: Way
    median: float
    p90: float
    prefix: bool = False
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        exact = f"{self.way} (relative error: median {self.median:.1e}, 90 % below {self.p90:.1e})"
        return "; ".join([exact if self.way != "single" else "single", *(f"{w}: {r}" for w, r in self.refused.items())])


def choose_way(lm: Decoder, prefer: Way | Literal["auto"] = "auto") -> Isolation:
    """The first of `WAYS` in which this model's sequences do not see each other, or the one preferred.

    Raises:
        UserError: the way preferred changes the activations, or the model cannot be read so.
    """
    refused: dict[str, str] = {}
    for way in WAYS if prefer == "auto" else (prefer,):
        found = isolation(lm, way)
        if isinstance(found, str):
            refused[way] = found
            continue
        prefix = isolation(lm, way, prefix=True) if way == "padded" else "the way is not padded"
        if isinstance(prefix, str):
            refused["prefix"] = prefix
        return Isolation(way, *found, "prefix" not in refused, refused)
    raise UserError(f"harvest.way: {lm.name} cannot be read {prefer}: {refused[prefer]}; set it to auto")


def isolation(lm: Decoder, way: Way, *, prefix: bool = False) -> tuple[float, float] | str:
    """Median and 90 % quantile of the error of a way, or the reason why the model cannot be read so.

    With `prefix` the sequences begin alike, and what they have in common is read from a cache.

    Raises:
        UserError: the model cannot even be run on one sequence.
    """
    if way == "single":
        _alone(lm, probe_tokens(lm))
        return 0.0, 0.0
    if prefix and lm.rope_split is not None:
        return "its rotary scheme depends on the longest sequence"
    tokens = probe_tokens(lm, prefix=_PREFIX if prefix else 0)
    try:
        together = unchecked(lm, tokens, way, prefix=PrefixCache(lm, least_share=0.0) if prefix else None)
    except PackingRefused as error:
        return str(error)
    except FORWARD_ERRORS as error:
        return _first_line(error)
    median, p90 = _errors(together, _alone(lm, tokens), tokens, _windows(lm))
    if not p90 <= ISOLATION_TOLERANCE[together.dtype]:
        return (
            f"its activations differ by {p90:.2g} from those of one sequence at a time (relative; rounding "
            f"explains {ISOLATION_TOLERANCE[together.dtype]:.0e})"
        )
    return median, p90


def isolation_error(lm: Decoder, way: Way = "padded") -> float:
    """How far a few random sequences in one forward are from the same sequences one at a time.

    The 90 % quantile over tokens of the relative error, in the worst layer and the worst group of tokens. It is
    rounding (`ISOLATION_TOLERANCE`) when sequences do not see each other. In the model's dtype, on its device.

    Raises:
        PackingRefused: the way is packed, and the model cannot be read so.
        UserError: the model cannot even be run on one sequence.
    """
    tokens = probe_tokens(lm)
    return _errors(unchecked(lm, tokens, way), _alone(lm, tokens), tokens, _windows(lm))[1]


def probe_tokens(lm: Decoder, seed: int = 0, *, prefix: int = 0) -> TokenBatch:
    """Random sequences of many lengths, some longer than the model's windows where that is affordable.

    They begin with the same `prefix` tokens, marked as such.
    """
    longest = min(_LONGEST.get(lm.device.type, 8192), lm.max_positions or sys.maxsize)
    beyond = [window + _BEYOND for window in _windows(lm) if window + _BEYOND <= longest]
    lengths = [min(n, longest - prefix) for n in (*_LENGTHS[:4], *beyond, *_LENGTHS[4:])]
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(lm.vocab_size, (prefix,), generator=generator)
    tokens = bare_tokens([torch.cat([head, torch.randint(lm.vocab_size, (n,), generator=generator)]) for n in lengths])
    return replace(tokens, prefix=tokens.position < prefix)


def _alone(lm: Decoder, tokens: TokenBatch) -> Float[Tensor, "L N D"]:
    try:
        return unchecked(lm, tokens, "single")
    except FORWARD_ERRORS as error:
        raise UserError(f"{lm.name} cannot be run on a sequence of token ids: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"


def _windows(lm: Decoder) -> list[int]:
    """Lengths at which the model's attention or its rotary scheme changes."""
    config = getattr(lm.decoder, "config", None)
    names = ("sliding_window", "attention_chunk_size", "window_size")
    found = {getattr(config, name, None) for name in names} | {lm.rope_split}
    return sorted(n for n in found if isinstance(n, int) and n > 0)


def _errors(
    together: Float[Tensor, "L N D"], alone: Float[Tensor, "L N D"], tokens: TokenBatch, windows: Sequence[int]
) -> tuple[float, float]:
    """Median and 90 % quantile of the error in the worst layer and group: each long sequence, the short ones in one.

    What lies beyond a window is a group of its own: else an error there would hide among the tokens before it.
    """
    error = torch.stack([token_errors(a, b) for a, b in zip(together, alone, strict=True)])
    position = tokens.position
    long = tokens.lengths[tokens.sequence] >= _GROUP
    stretch = sum(((position >= window).long() for window in windows), torch.zeros_like(position))
    group = torch.where(long, 1 + tokens.sequence * (len(windows) + 1) + stretch, 0).to(error.device)
    levels = torch.tensor([0.5, 0.9], device=error.device)
    worst = torch.stack([error[:, group == g].quantile(levels, dim=1).amax(dim=1) for g in group.unique()]).amax(dim=0)
    return float(worst[0]), float(worst[1])


def token_errors(a: Float[Tensor, "N D"], b: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """|a - b| / |b| per row."""
    return (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def relative_error(a: Float[Tensor, "N D"], b: Float[Tensor, "N D"]) -> float:
    """`token_errors`, their 90 % quantile: one token may flip between experts of an MoE by rounding alone."""
    return float(token_errors(a, b).quantile(0.9))
