"""Evaluate SAEs on held-out dialogues, each fed whole and alone."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatsae import console
from chatsae.batch import Dialogue, Role, TokenBatch
from chatsae.data.render import render
from chatsae.data.template import template_facts
from chatsae.evals.loss import DeltaLoss, token_losses
from chatsae.evals.reconstruction import Reconstruction
from chatsae.evals.report import Report
from chatsae.lm.harvest import ISOLATION_TOLERANCE, isolation_error, plan
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import splice
from chatsae.sae.base import SAE

_BUDGET = 4096  # padded tokens of one forward, where nobody says
_LOGITS = 2**27  # logits of one forward: half a gigabyte in float32


def evaluate(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    dialogues: Iterable[Dialogue],
    *,
    limit: int | None = None,
    max_length: int = 8192,
    token_budget: int = 0,
    tally: Counter[str] | None = None,
) -> Report:
    """The metrics of `evaluate_tokens` on the first `limit` dialogues, each cut at `max_length` tokens.

    Raises:
        UserError: there is no dialogue to evaluate on, or the model cannot take one.
    """
    tokens = render(islice(dialogues, limit), lm.tokenizer, method="fast", max_length=max_length, tally=tally)
    return evaluate_tokens(saes, lm, tokens, limit=limit, max_length=max_length, token_budget=token_budget)


@torch.inference_mode()
def evaluate_tokens(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    tokens: Iterable[TokenBatch],
    *,
    limit: int | None = None,
    max_length: int = 8192,
    token_budget: int = 0,
) -> Report:
    """MSE and MSE_st (eq. 7), explained variance, l0, dead fraction and Delta Loss of every SAE.

    The model runs whole: once as it is, and once more per SAE with its reconstruction in place of the residual stream.

    Raises:
        UserError: there is no dialogue to evaluate on, or the model cannot take one.
    """
    full = lm.with_head()
    special = torch.tensor(template_facts(lm.tokenizer).special_ids)
    layers = sorted({sae.spec.layer for sae in saes.values()})
    sums = {name: Reconstruction(sae.spec.d_in, sae.spec.d_sae) for name, sae in saes.items()}
    losses = {name: DeltaLoss() for name in saes}
    budget = min(token_budget or _BUDGET, _LOGITS // full.vocab_size)
    if isolation_error(lm) > ISOLATION_TOLERANCE[lm.dtype]:
        budget = 1  # one dialogue at a time
    n_dialogues, digest = 0, hashlib.sha256()
    with console.progress("evaluate", limit) as advance:
        for batch in _batches(_hashed(_first(tokens, limit), digest), budget, full.rope_split):
            n_dialogues += len(batch)
            ids, real = batch.padded().to(full.device), _real(batch).to(full.device)
            logits, residuals = _forward(full, ids, layers)
            clean = token_losses(logits, ids, real)
            assistant = _scored(batch, real.cpu()) == Role.ASSISTANT
            by_id = torch.isin(batch.input_ids, special)
            for name, sae in saes.items():
                x = residuals[sae.spec.layer][real]
                feature_acts = sae.encode(x)
                sae_out = sae.decode(feature_acts)
                sums[name].add(x, sae_out, feature_acts, batch.sequence, by_id, batch.special, len(batch))
                spliced = _spliced(full, sae.spec.layer, sae_out.to(x), real, ids)
                losses[name].add(clean, token_losses(spliced, ids, real), assistant)
            advance(len(batch))
    rows = {name: sums[name].metrics() | losses[name].metrics() for name in saes}
    facts = {
        "model": lm.name,
        "n_dialogues": n_dialogues,
        "max_length": max_length,
        "tokens_sha256": digest.hexdigest(),
    }
    return Report(rows=rows, facts=facts)


def _first(stream: Iterable[TokenBatch], limit: int | None) -> Iterator[TokenBatch]:
    left = limit
    for tokens in stream:
        if left is not None and len(tokens) >= left:
            yield tokens.select(range(left))
            return
        yield tokens
        left = None if left is None else left - len(tokens)


def _hashed(stream: Iterator[TokenBatch], digest: "hashlib._Hash") -> Iterator[TokenBatch]:
    """Take the digest before batches are formed: it tells the dialogues, not how they were batched."""
    for tokens in stream:
        digest.update(tokens.input_ids.numpy().tobytes())
        yield tokens


def _batches(stream: Iterator[TokenBatch], budget: int, split: int | None) -> Iterator[TokenBatch]:
    for tokens in stream:
        for chosen in plan(tokens.lengths.tolist(), token_budget=budget, split=split):
            yield tokens.select(chosen)


def _forward(
    full: LanguageModel, ids: Int[Tensor, "B T"], layers: list[int]
) -> tuple[Float[Tensor, "B T V"], dict[int, Float[Tensor, "B T D"]]]:
    """Logits of the model as it is, and the residual stream after each layer."""
    residuals: dict[int, Tensor] = {}

    def keep(x: Tensor, layer: int) -> Tensor:
        residuals[layer] = x
        return x

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(splice(full, layer, partial(keep, layer=layer)))
        return full.model(input_ids=ids, use_cache=False).logits, residuals


def _spliced(
    full: LanguageModel,
    layer: int,
    sae_out: Float[Tensor, "N D"],
    real: Bool[Tensor, "B T"],
    ids: Int[Tensor, "B T"],
) -> Float[Tensor, "B T V"]:
    """Logits with the reconstruction in place of the residual stream; padding keeps its own."""

    def replace(x: Tensor) -> Tensor:
        y = x.clone()
        y[real] = sae_out
        return y

    with splice(full, layer, replace):
        return full.model(input_ids=ids, use_cache=False).logits


def _real(tokens: TokenBatch) -> Bool[Tensor, "B T"]:
    return torch.arange(int(tokens.lengths.max())) < tokens.lengths[:, None]


def _scored(tokens: TokenBatch, real: Bool[Tensor, "B T"]) -> Int[Tensor, " M"]:
    """The role of every token that has a loss, in the order of `token_losses`."""
    role = torch.full(real.shape, int(Role.NONE))
    role[real] = tokens.role.long()
    return role[:, 1:][real[:, 1:]]
