"""What SAEs train on: the harvested activations with their sinks as asked, normalised where asked."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from chatsae.batch import PARTS, ActivationBatch
from chatsae.lm.norms import LayerNorms, measure_norms, sinks
from chatsae.sae.base import SAE

SAMPLE = 16_384
"""Activations that norms are measured on, at most: the first of the training, which are held meanwhile and then trained
on."""

Sinks = Literal["keep", "skip", "clip"]


@dataclass(frozen=True, slots=True)
class Unit:
    """What activations of a layer are measured in: `factor` times their own length, `bound` of a sink in it.

    `bound` is None where no sink is trained on.
    """

    factor: float = 1.0
    bound: float | None = None


class Source(Protocol):
    """What activations come from (`chatsae.lm.harvest.Harvest`, `chatsae.buffer.ahead.Ahead`)."""

    seconds: float

    def __next__(self) -> ActivationBatch: ...
    def __iter__(self) -> Iterator[ActivationBatch]: ...
    def state_dict(self) -> dict[str, int]: ...


class Inputs(Iterator[ActivationBatch]):
    """The batches of a source, without sinks or with sinks of bounded length, times `scales` by layer.

    A token that is a sink at one of the layers read is left out at all of them: a row of the buffer is one token. The
    norms are measured on the first batches, which costs no forward, unless they are `known` from when the run began.

    Attributes: norms (None before the first batch).
    """

    def __init__(
        self,
        source: Source,
        layers: Sequence[int],
        *,
        policy: Sinks = "keep",
        normalize: bool = False,
        known: Sequence[LayerNorms] | None = None,
        sample: int = SAMPLE,
        on_measured: Callable[[list[LayerNorms]], object] = lambda _: None,
        tally: Counter[str] | None = None,
    ) -> None:
        """`sample`: activations to measure; `on_measured` is told the norms; `tally` counts what is left out or
        shortened."""
        self._source, self._layers = source, tuple(layers)
        self._policy, self._normalize = policy, normalize
        self._on_measured, self._tally = on_measured, Counter[str]() if tally is None else tally
        self._held: list[ActivationBatch] = []
        self._sample = sample
        self.norms = None if known is None else list(known)

    def __next__(self) -> ActivationBatch:
        if self.norms is None:
            self._measure()
        return self._changed(self._held.pop(0) if self._held else next(self._source))

    @property
    def seconds(self) -> float:
        """Those of the source."""
        return self._source.seconds

    def state_dict(self) -> dict[str, int]:
        """That of the source."""
        return self._source.state_dict()

    def close(self) -> None:
        """Close the source, where it can be."""
        getattr(self._source, "close", lambda: None)()

    def _measure(self) -> None:
        n = 0
        while n < self._sample and (batch := next(self._source, None)) is not None:
            self._held.append(batch)
            n += batch.acts.shape[1]
        if self._held:
            self.norms = measure_norms(self._held, self._layers)
            self._on_measured(self.norms)

    def _changed(self, batch: ActivationBatch) -> ActivationBatch:
        assert self.norms is not None
        acts = batch.acts
        if self._policy != "keep":
            sink = sinks(acts, self.norms)
            any_layer = sink.any(0)
            self._count(batch, any_layer.cpu())
            if self._policy == "skip":
                acts = acts[:, ~any_layer]
            else:
                bound = torch.tensor([one.bound for one in self.norms], device=acts.device)[:, None]
                norm = torch.linalg.vector_norm(acts, dim=-1, dtype=torch.float32)
                acts = torch.where(sink[..., None], acts * (bound / norm)[..., None].to(acts.dtype), acts)
        if self._normalize:
            by_layer = torch.tensor([scale_of(one, acts.shape[-1]) for one in self.norms], device=acts.device)
            acts = acts * by_layer[:, None, None].to(acts.dtype)
        return ActivationBatch(acts, batch.tokens)

    def _count(self, batch: ActivationBatch, sink: torch.Tensor) -> None:
        done = "left out" if self._policy == "skip" else "shortened"
        for part, n in zip(*batch.tokens.part[sink].unique(return_counts=True), strict=True):
            self._tally[f"sink {done} ({PARTS[int(part)].replace('_', ' ')})"] += int(n)


def units_of(norms: Sequence[LayerNorms], d_in: int, *, policy: Sinks, normalize: bool) -> dict[int, Unit]:
    """By layer."""
    found = {}
    for one in norms:
        factor = scale_of(one, d_in) if normalize else 1.0
        found[one.layer] = Unit(factor, factor * one.bound if policy == "keep" and one.n_sinks else None)
    return found


def scale_of(norms: LayerNorms, d_in: int) -> float:
    """The factor that makes activations that are no sinks √d_in long on average (`sae.normalize: scale`)."""
    return d_in**0.5 / norms.mean


def unscale_(sae: SAE, factor: float) -> None:
    """Turn an SAE of normalised activations into one of the activations as they are, coefficients included."""
    if factor == 1:
        return
    sae.unscale_input_(factor)
    spec = sae.spec
    squared = factor if spec.architecture == "standard" else factor**2  # of the error, over what the penalty scales by
    sae.spec = replace(
        spec,
        coefficient=spec.coefficient / squared,
        bandwidth=spec.bandwidth / factor,
        init_threshold=spec.init_threshold / factor,
    )
    sae.metadata["activation_scale"] = factor
