"""Steering strength in units that mean something, and chosen by what it does to the predictions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chatsae import console
from chatsae.batch import TokenBatch
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.steering.hooks import Steering, model_inputs
from chatsae.steering.rows import Row, left_padded
from chatsae.steering.spec import SteerSpec

FORWARDS = 8
"""Batch forwards that an automatic strength may cost, the unsteered one included."""

Measure = Literal["kl", "perplexity"]


@dataclass(frozen=True, slots=True)
class Scale:
    """What strengths are measured against at one layer: the median norm of its stream, and features' maxima."""

    median_norm: float
    max_acts: Float[Tensor, " F"] | None = None

    def relative(self, spec: SteerSpec) -> dict[str, float | None]:
        """A spec's absolute strength beside it in both units; None where a unit is not known."""
        most = self.maximum(spec)
        return {
            "alpha": spec.strength,
            "rel_norm": spec.strength / self.median_norm,
            "rel_maxact": None if not most else spec.strength / most,
        }

    def maximum(self, spec: SteerSpec) -> float | None:
        """The feature's largest activation, times the length of its decoder row: how far it moves the stream."""
        if spec.feature is None or self.max_acts is None:
            return None
        return float(self.max_acts[spec.feature]) * float(torch.linalg.vector_norm(spec.direction()))


def measure_scale(lm: LanguageModel, dialogues: TokenBatch, layer: int, sae: SAE | None = None) -> Scale:
    """The scale of a layer over dialogues; `lm` reads the layer.

    Raises:
        UserError: the model does not read the layer.
    """
    if layer not in lm.layers:
        raise UserError(f"layer {layer} is not read from {lm.name}; it reads {', '.join(map(str, lm.layers))}")
    norms, most = [], None
    batches = console.tracked("measure the layer", len(dialogues), lm.harvest([dialogues]), lambda b: len(b.tokens))
    for batch in batches:
        x = batch.acts[lm.layers.index(layer)]
        norms.append(x.float().norm(dim=-1).cpu())
        if sae is not None:
            with torch.inference_mode():
                found = torch.stack([sae.encode(part).amax(0) for part in x.to(sae.W_enc.device).split(4096)])
            largest = found.amax(0).cpu()
            most = largest if most is None else torch.maximum(most, largest)
    return Scale(float(torch.cat(norms).median()), most)


def absolute(spec: SteerSpec, scale: Scale) -> SteerSpec:
    """The spec with its strength in absolute units.

    Raises:
        UserError: it is auto, or relative to a maximum that is not known or zero.
    """
    spec = spec.loaded()
    if spec.unit == "absolute":
        return spec
    if spec.unit == "rel_norm":
        return spec.at(spec.strength * scale.median_norm)
    if spec.unit == "auto":
        raise UserError("steering: unit auto has to be chosen on calibration prompts (auto_alpha)")
    most = scale.maximum(spec)
    if not most:
        raise UserError(f"steering: {spec.label()}: the feature's largest activation is not known, or it never fires")
    return spec.at(spec.strength * most)


@dataclass(frozen=True, slots=True)
class Effect:
    """What steering does to the predictions of given answers, means over their tokens."""

    kl: float
    """KL(steered || unsteered) in nats."""
    log_ratio: float
    """Logarithm of the perplexity of the answers, steered over unsteered."""

    def of(self, measure: Measure) -> float:
        """The number that a bound is on."""
        return self.kl if measure == "kl" else self.log_ratio


class Calibration:
    """Answered prompts on which strengths are tried; one unsteered forward when it is made.

    The predictions are those of the answers' tokens, at most `tokens` evenly spread ones per answer; `batch_tokens`
    bounds the tokens that go through the model at once, for memory. Attributes: forwards (over all rows), n_rows,
    n_predictions; `on_rows` is told the rows of each batch that a forward has read.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[Row], *, tokens: int = 32, batch_tokens: int = 8192) -> None:
        if not rows:
            raise UserError("steering: no answered prompt to calibrate on")
        self.full = lm.with_head()
        ordered = sorted(rows, key=len)
        per_batch = max(1, batch_tokens // len(ordered[-1]))
        self._batches = [_Batch(ordered[i : i + per_batch], tokens) for i in range(0, len(ordered), per_batch)]
        self.n_predictions = sum(len(batch.row) for batch in self._batches)
        if not self.n_predictions:
            raise UserError("steering: the answers to calibrate on have no token")
        self.forwards = 1
        self.n_rows = len(ordered)
        self.on_rows: Callable[[int], object] = lambda _: None
        with torch.inference_mode():
            batches = console.tracked("unsteered answers", self.n_rows, self._batches, lambda batch: len(batch.rows))
            self._clean = [batch.log_p(self.full) for batch in batches]

    def effect(self, specs: Sequence[SteerSpec]) -> Effect:
        """What the specs, all on every row, do to the predictions; one forward."""
        self.forwards += 1
        kl = ratio = 0.0
        for batch, clean in zip(self._batches, self._clean, strict=True):
            steering = Steering(self.full, specs, quiet=True)
            with torch.inference_mode(), steering, steering.prompts(batch.rows, batch.offsets):
                found = batch.log_p(self.full)
            kl += float((found.exp() * (found - clean)).nan_to_num().sum(dtype=torch.float64))
            at = batch.target[:, None]
            ratio += float((clean.gather(1, at) - found.gather(1, at)).sum(dtype=torch.float64))
            self.on_rows(len(batch.rows))
        return Effect(kl / self.n_predictions, ratio / self.n_predictions)


class _Batch:
    """Rows that go through the model together, and the predictions that are looked at."""

    def __init__(self, rows: Sequence[Row], tokens: int) -> None:
        self.rows = list(rows)
        self.ids, self.mask = left_padded(rows, 0)
        self.offsets = (self.mask == 0).sum(1).tolist()
        row, column = [], []
        for i, (one, offset) in enumerate(zip(rows, self.offsets, strict=True)):
            n = len(one) - one.n_prompt
            chosen = range(n) if n <= tokens else [round(j * (n - 1) / max(tokens - 1, 1)) for j in range(tokens)]
            row += [i] * len(chosen)
            column += [offset + one.n_prompt + j for j in chosen]
        self.row: Int[Tensor, " N"] = torch.tensor(row, dtype=torch.int64)
        self._column = torch.tensor(column, dtype=torch.int64)
        self.target: Int[Tensor, " N"] = self.ids[self.row, self._column]

    def log_p(self, full: LanguageModel) -> Float[Tensor, "N V"]:
        """Log-probabilities of the chosen predictions, in float32, on the CPU."""
        out = full.model(**model_inputs(full, self.ids, self.mask), use_cache=False).logits
        chosen = out[self.row.to(out.device), (self._column - 1).to(out.device)]
        return chosen.float().log_softmax(-1).cpu()


@dataclass(frozen=True, slots=True)
class AutoAlpha:
    """A strength that was chosen: the largest one tried whose effect stays within the bound."""

    alpha: float
    effect: Effect
    measure: Measure
    bound: float
    forwards: int
    """Batch forwards that it took, the unsteered one included."""
    tried: tuple[tuple[float, float], ...]
    """Strengths and what was measured, in their order."""

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def auto_alpha(
    calibration: Calibration,
    spec: SteerSpec,
    *,
    bound: float = 0.5,
    measure: Measure = "kl",
    start: float = 1.0,
    forwards: int = FORWARDS,
) -> AutoAlpha:
    """The largest strength of an add whose mean effect on the calibration answers stays within `bound`.

    The bracket is doubled or halved from `start` until it holds the bound, then divided where a power law through its
    ends meets 98 % of the bound (a bisection of the logarithms, weighted), until the effect is within 5 % below it.

    Args:
        calibration: its unsteered forward counts as one of `forwards`.
        spec: an `add`; its strength is not looked at.
        bound: nats of KL(steered || unsteered), or the largest ratio of perplexities.
        start: the first strength tried.

    Raises:
        UserError: the operation is not add, the bound cannot be, or no strength that was tried stays within it.
    """
    limit = bound if measure == "kl" else math.log(bound) if bound > 1 else 0.0
    if limit <= 0:
        raise UserError(f"steering: bound: {'above 0' if measure == 'kl' else 'above 1'} is needed, {bound} given")
    if spec.op != "add":
        raise UserError(f"steering: an automatic strength is one of add, not of {spec.op}")
    spec = spec.loaded()
    tried: dict[float, Effect] = {}
    low, high, alpha = None, None, start
    for _ in range(forwards - 1):
        tried[alpha] = calibration.effect([spec.at(alpha)])
        value = tried[alpha].of(measure)
        if value <= limit:
            low = alpha
        else:
            high = alpha
        if value <= limit and value >= 0.95 * limit:
            break
        alpha = _next(low, high, {a: e.of(measure) for a, e in tried.items()}, limit)
    if low is None:
        raise UserError(
            f"steering: even at {min(tried):g} the effect is {tried[min(tried)].of(measure):.3g}, above {limit:.3g}"
        )
    shown = tuple((a, e.of(measure)) for a, e in tried.items())
    return AutoAlpha(low, tried[low], measure, bound, 1 + len(tried), shown)


def _next(low: float | None, high: float | None, values: Mapping[float, float], limit: float) -> float:
    """The next strength to try."""
    if high is None or low is None:
        at = low if high is None else high
        assert at is not None
        value = max(values[at], 1e-12)
        step = (0.98 * limit / value) ** 0.5  # small steps act with their square
        return at * (min(max(step, 1.3), 16.0) if high is None else max(min(step, 0.77), 1 / 16))
    a, b = math.log(low), math.log(high)
    va, vb = math.log(max(values[low], 1e-12)), math.log(values[high])
    share = (math.log(0.98 * limit) - va) / max(vb - va, 1e-12)
    return math.exp(a + min(max(share, 0.05), 0.95) * (b - a))
