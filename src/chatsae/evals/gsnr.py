"""GSNR of FAST and its baselines from the same weights on the same tokens: what leakage and cuts do to the gradient."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatsae.batch import Dialogue, Document, TokenBatch
from chatsae.config import Method
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.lm.forward import Ceiling, bare_tokens, forward
from chatsae.lm.load import LanguageModel
from chatsae.lm.probe import choose_way
from chatsae.sae.base import SAE
from chatsae.sae.gsnr import Gsnr, GsnrSums

_BUDGET = 4096  # padded tokens of one forward, unless one sequence has more


@dataclass(frozen=True)
class Readings:
    """The activations of the same tokens under every method; those of bt-p are of as many tokens of other text.

    acts: by method, [L, N, D]; token i is the same token for every chat method.
    sequence: the dialogue of each token.
    prefix: tokens of the prefix that is the same in every dialogue.
    dialogues: whole dialogues, of which the first N tokens were taken.
    """

    acts: dict[Method, Float[Tensor, "L N D"]]
    sequence: Int[Tensor, " N"]
    prefix: Bool[Tensor, " N"]
    dialogues: TokenBatch
    layers: tuple[int, ...]
    block_size: int


def read_methods(
    lm: LanguageModel,
    dialogues: Iterable[Dialogue],
    documents: Iterable[Document] | None = None,
    *,
    n_blocks: int,
    block_size: int = 2048,
    max_length: int = 8192,
    tally: Counter[str] | None = None,
) -> Readings:
    """Read the tokens of `n_blocks` blocks as fast, bt-f and bt-f-isolated do, and with `documents` as bt-p does.

    A dialogue longer than `max_length` is cut there for all methods alike.

    Raises:
        UserError: the dialogues or documents fill fewer blocks.
    """
    n_tokens = n_blocks * block_size
    rendered = render(dialogues, lm.tokenizer, max_length=max_length, tally=tally)
    whole = _taken(rendered, n_tokens, "dialogues")
    ids, bounds = whole.input_ids[:n_tokens], whole.cu_seqlens.tolist()
    edges = sorted({*(b for b in bounds if b < n_tokens), *range(0, n_tokens + 1, block_size)})
    sequences: dict[Method, TokenBatch] = {
        "fast": whole,
        "bt-f": bare_tokens(ids.split(block_size)),
        "bt-f-isolated": bare_tokens([ids[start:stop] for start, stop in pairwise(edges)]),
    }
    if documents is not None:
        blocks = render(documents, lm.tokenizer, method="bt-p", block_size=block_size, tally=tally)
        sequences["bt-p"] = _taken(blocks, n_tokens, "documents")
    way, ceiling = choose_way(lm).way, Ceiling()
    ceiling.tokens = _BUDGET
    acts: dict[Method, Tensor] = {}
    for method, batch in sequences.items():
        acts[method] = forward(lm, batch, way, ceiling=ceiling)[:, :n_tokens].cpu()
    return Readings(
        acts=acts,
        sequence=whole.sequence[:n_tokens],
        prefix=whole.prefix[:n_tokens],
        dialogues=whole,
        layers=lm.layers,
        block_size=block_size,
    )


def _taken(stream: Iterable[TokenBatch], n_tokens: int, what: str) -> TokenBatch:
    """The first sequences that have `n_tokens` tokens between them."""
    kept: list[TokenBatch] = []
    left = n_tokens
    for batch in stream:
        before = batch.cu_seqlens[:-1]  # tokens of the batch before each sequence
        kept.append(batch.select(range(int((before < left).sum()))))
        left -= len(batch.input_ids)
        if left <= 0:
            return TokenBatch.concat(kept)
    raise UserError(f"the {what} give {n_tokens - left:,} tokens, {n_tokens:,} are needed; ask for fewer blocks")


def method_gsnr(
    sae: SAE, readings: Readings, *, sparsity_scale: float = 1.0, folds: int = 8
) -> dict[Method, dict[str, Any]]:
    """GSNR of one SAE's weights under every method, with jackknife standard errors.

    Per method `token`: a sample is a token, all tokens; `variable`: without the tokens of the constant prefix;
    `sequence`: a sample is the mean gradient of a dialogue (None for bt-p, whose blocks hold none). Each has the
    fields of `Gsnr`, `se` of its value, and `over_fast` with `over_fast_se`: its value over that of fast. The signal is
    that which `folds` stretches of neighbouring blocks have in common (`GsnrSums.across`: the tokens of a dialogue are
    not independent); each is left out in turn for the errors, the same tokens in every method.

    Raises:
        UserError: see `GsnrSums`; or there are fewer blocks than folds.
    """
    n_blocks = len(readings.sequence) // readings.block_size
    if not 3 <= folds <= n_blocks:
        raise UserError(f"the GSNR needs 3 to {n_blocks} folds, as there are blocks, not {folds}")
    edges = [round(i * n_blocks / folds) * readings.block_size for i in range(folds + 1)]
    layer = readings.layers.index(sae.spec.layer)
    token: dict[Method, list[Gsnr]] = {}
    variable: dict[Method, list[Gsnr]] = {}
    sequence: dict[Method, list[Gsnr]] = {}
    for method, acts in readings.acts.items():
        x = acts[layer].to(sae.W_enc)
        prefix = torch.zeros_like(readings.prefix) if method == "bt-p" else readings.prefix
        rest, constant, dialogues = [], [], []
        for start, stop in pairwise(edges):
            part, inside = x[start:stop], prefix[start:stop].to(x.device)
            rest.append(_summed(sae, [part[~inside]], sparsity_scale))
            constant.append(_summed(sae, [part[inside]], sparsity_scale))
            if method != "bt-p":
                lengths = torch.unique_consecutive(readings.sequence[start:stop], return_counts=True)[1]
                dialogues.append(_summed(sae, part.split(lengths.tolist()), sparsity_scale, by_token=False))
        variable[method] = _left_out(rest)
        token[method] = _left_out([GsnrSums.merged(pair) for pair in zip(rest, constant, strict=True)])
        if dialogues:
            sequence[method] = _left_out(dialogues)
    found: dict[Method, dict[str, Any]] = {method: {"sequence": None} for method in token}
    for name, values in (("token", token), ("variable", variable), ("sequence", sequence)):
        for method, own in values.items():
            found[method][name] = _row(own, values["fast"])
    return found


def _summed(sae: SAE, parts: Sequence[Tensor], sparsity_scale: float, *, by_token: bool = True) -> GsnrSums:
    sums = GsnrSums(sae, unit="token" if by_token else "sequence", sparsity_scale=sparsity_scale)
    for part in parts:
        sums.add(part)
    return sums


def _left_out(folds: list[GsnrSums]) -> list[Gsnr]:
    """The GSNR of all folds, then of all but each."""
    return [GsnrSums.across(folds), *(GsnrSums.across([*folds[:i], *folds[i + 1 :]]) for i in range(len(folds)))]


def _row(own: list[Gsnr], fast: list[Gsnr]) -> dict[str, Any]:
    values, against = [g.value for g in own], [g.value for g in fast]
    ratios = [None if a is None or b is None or b == 0 else a / b for a, b in zip(values, against, strict=True)]
    return asdict(own[0]) | {
        "se": jackknife(values[1:]),
        "over_fast": ratios[0],
        "over_fast_se": jackknife(ratios[1:]),
    }


def jackknife(left_out: Sequence[float | None]) -> float | None:
    """Standard error of an estimate, from its values with one of k groups left out; None where one is None."""
    values = [v for v in left_out if v is not None]
    k = len(values)
    if k < 2 or k < len(left_out):
        return None
    mean = sum(values) / k
    return math.sqrt((k - 1) / k * sum((v - mean) ** 2 for v in values))


def methods_table(rows: Mapping[tuple[str, str], Mapping[Method, Mapping[str, Any]]]) -> str:
    """Markdown: GSNR and its ratio to fast by (SAE, weights) and method; values in thousandths."""
    names = ("token", "variable", "sequence")
    head = ["SAE", "weights", "method", *(f"{n} × 10³ | over fast" for n in names)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * (3 + 2 * len(names))]
    for (sae, weights), methods in rows.items():
        for method, row in methods.items():
            cells = [
                f"{_cell(row[n], 'value', 'se', 1e3)} | {_cell(row[n], 'over_fast', 'over_fast_se')}" for n in names
            ]
            lines.append(f"| {sae} | {weights} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None, value: str, error: str, factor: float = 1.0) -> str:
    if row is None or row[value] is None:
        return "–"
    return f"{row[value] * factor:.3g} ± {row[error] * factor:.1g}" if row[error] is not None else f"{row[value]:.3g}"
