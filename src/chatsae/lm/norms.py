"""How long activations are, layer by layer, and which tokens are sinks."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chatsae.batch import PARTS, ActivationBatch
from chatsae.errors import UserError
from chatsae.files import read_object

SINK_RATIO = 10.0
"""A sink is a token whose activation is this many times longer than the median."""

POSITIONS = (0, 1, 2, 3, 4, 8, 16, 64, 256)
"""Where the ranges of positions begin that norms are told by."""

_PLACES = 3  # kinds of sinks that are kept of a layer


@dataclass(frozen=True, slots=True)
class SinkPlace:
    """Sinks of one token id at one position: how many, their longest norm over the median, their part."""

    position: int
    token_id: int
    part: str
    n: int
    ratio: float


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Norms of the activations after one block.

    median: of all tokens; mean: of those that are no sinks; n_sinks of n_tokens are; norm_share: what they hold of the
    squared norm of all tokens; by_position: medians by the ranges of `POSITIONS`, None without a token there; places:
    the most frequent kinds of sinks.
    """

    layer: int
    n_tokens: int
    median: float
    mean: float
    n_sinks: int
    norm_share: float
    by_position: tuple[float | None, ...]
    places: tuple[SinkPlace, ...]

    @property
    def bound(self) -> float:
        """The norm above which a token is a sink."""
        return SINK_RATIO * self.median

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @staticmethod
    def of(facts: dict[str, Any]) -> "LayerNorms":
        """What `facts` gave.

        Raises:
            UserError: it gave something else.
        """
        try:
            places = tuple(SinkPlace(**place) for place in facts["places"])
            return LayerNorms(**(facts | {"places": places, "by_position": tuple(facts["by_position"])}))
        except (KeyError, TypeError) as error:
            raise UserError(f"norms of a layer are damaged: {error}") from None


def read_norms(path: Path, advice: str = "") -> list[LayerNorms]:
    """The norms that a run keeps (RUN/norms.json).

    Raises:
        UserError: the file is damaged; `advice` says what to do.
    """
    return [LayerNorms.of(one) for one in read_object(path, advice, {"layers": list})["layers"]]


def measure_norms(batches: Iterable[ActivationBatch], layers: Sequence[int]) -> list[LayerNorms]:
    """The norms of activations [L, N, D] whose axis 0 follows `layers`.

    Raises:
        UserError: there is no activation, or a median norm is zero.
    """
    norms, tokens = [], []
    for batch in batches:
        norms.append(torch.linalg.vector_norm(batch.acts, dim=-1, dtype=torch.float32).cpu())
        tokens.append(torch.stack([batch.tokens.position.long(), batch.tokens.input_ids.long(), batch.tokens.part]))
    if not sum(one.shape[1] for one in norms):
        raise UserError("there are no activations to measure norms of: the stream of sequences is empty")
    whole = torch.cat(tokens, dim=1)
    return [_layer(layer, row, whole) for layer, row in zip(layers, torch.cat(norms, dim=1), strict=True)]


def _layer(layer: int, norm: Float[Tensor, " N"], tokens: Tensor) -> LayerNorms:
    median = float(norm.median())
    if not 0 < median < float("inf"):
        raise UserError(f"the median norm of the activations after block {layer} is {median:g}; a model's are above 0")
    sink = norm > SINK_RATIO * median
    squares = norm.double().square()
    longest: dict[tuple[int, int, int], float] = {}
    seen: Counter[tuple[int, int, int]] = Counter()
    for (position, token, part), length in zip(tokens[:, sink].T.tolist(), norm[sink].tolist(), strict=True):
        key = (position, token, part)
        seen[key] += 1
        longest[key] = max(longest.get(key, 0.0), length)
    bucket = torch.bucketize(tokens[0], torch.tensor(POSITIONS[1:]), right=True)
    within = [norm[bucket == i] for i in range(len(POSITIONS))]
    places = [SinkPlace(*key[:2], PARTS[key[2]], n, longest[key] / median) for key, n in seen.most_common(_PLACES)]
    return LayerNorms(
        layer=layer,
        n_tokens=len(norm),
        median=median,
        mean=float(norm[~sink].double().mean()),
        n_sinks=int(sink.sum()),
        norm_share=float(squares[sink].sum() / squares.sum()),
        by_position=tuple(float(some.median()) if len(some) else None for some in within),
        places=tuple(places),
    )


def sinks(acts: Float[Tensor, "L N D"], norms: Sequence[LayerNorms]) -> Bool[Tensor, "L N"]:
    """Which activations are longer than the bound of their layer."""
    bound = torch.tensor([one.bound for one in norms], device=acts.device)
    return torch.linalg.vector_norm(acts, dim=-1, dtype=torch.float32) > bound[:, None]


def norms_sentence(norms: LayerNorms, tokenizer: PreTrainedTokenizerBase) -> str:
    """What to know about a layer, in a line."""
    text = f"layer {norms.layer}: median norm {norms.median:.4g}"
    if not norms.n_sinks:
        return f"{text}, no sinks"
    places = ", ".join(
        f"{tokenizer.decode([p.token_id])!r} at position {p.position} ({p.n:,} ×, {p.ratio:,.0f} medians)"
        for p in norms.places
    )
    share = f"{norms.n_sinks / norms.n_tokens:.2%} of the tokens, {norms.norm_share:.1%} of the squared norm"
    return f"{text}; {norms.n_sinks:,} sinks, {share}: {places}"
