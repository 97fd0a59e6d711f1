"""Which features respond to a token or a text, and which are like another one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chatsae.batch import Dialogue, Kind, Message, Role, TokenBatch
from chatsae.data.render import render
from chatsae.data.template import encode
from chatsae.errors import UserError
from chatsae.features.collect import Reading, check, harvest
from chatsae.features.directions import cofiring, decoder_neighbours
from chatsae.features.firings import ELEMENTS
from chatsae.features.store import FeatureStore
from chatsae.features.text import TokenText
from chatsae.lm.harvest import bare_tokens
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE

Row = dict[str, Any]


def token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The one token that a text is.

    Raises:
        UserError: it is none, or several.
    """
    ids = encode(tokenizer, [text], offsets=False)["input_ids"][0]
    if len(ids) != 1:
        pieces = " ".join(repr(TokenText(tokenizer).one(i)) for i in ids[:12])
        raise UserError(f"{text!r} is {len(ids)} tokens of this model, not one" + (f": {pieces}" if pieces else ""))
    return ids[0]


@torch.no_grad()
def by_token(
    stores: Mapping[str, FeatureStore],
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    tokens: TokenBatch,
    token: int,
    reading: Reading,
    *,
    dialogues: int = 256,
    rows: int = 20,
) -> dict[str, list[Row]]:
    """The features that are most active on a token, by the difference to their mean over all tokens of the split.

    The mean on the token is over where it stands in the first `dialogues` dialogues that hold it.

    Raises:
        UserError: it is in none.
    """
    here = tokens.input_ids == token
    holding = torch.unique(tokens.sequence[here])[:dialogues].tolist()
    if not holding:
        text = TokenText(lm.tokenizer).one(token)
        raise UserError(f"token {text!r} is in none of the {len(tokens):,} dialogues; ask for more --dialogues")
    sums = {name: np.zeros((2, sae.spec.d_sae)) for name, sae in saes.items()}
    n = 0
    for batch, acts, _, _ in harvest(lm, tokens.select(holding), reading):
        chosen = (batch.input_ids == token).nonzero().squeeze(1)
        n += len(chosen)
        for name, sae in saes.items():
            for part in _encoded(sae, acts[lm.layers.index(sae.spec.layer), chosen.to(acts.device)]):
                sums[name] += np.stack([part.double().sum(0).cpu().numpy(), (part > 0).sum(0).cpu().numpy()])
    found = {}
    for name, (total, active) in sums.items():
        mean, everywhere = total / n, stores[name].columns["mean_act"]
        order = np.argsort(-(mean - everywhere), kind="stable")[:rows]
        found[name] = [
            {
                "feature": i,
                "mean_on_token": float(mean[i]),
                "mean_everywhere": float(everywhere[i]),
                "difference": float(mean[i] - everywhere[i]),
                "active_on_token": float(active[i] / n),
                "density": float(stores[name].columns["density"][i]),
                "occurrences": n,
            }
            for i in order.tolist()
        ]
    return found


@torch.no_grad()
def on_text(
    saes: Mapping[str, SAE], lm: LanguageModel, text: str, reading: Reading, *, raw: bool = False, k: int = 5
) -> dict[str, list[Row]]:
    """The `k` strongest features on each token of a text: what a user says in a dialogue of one turn, or `raw`.

    Raises:
        UserError: the text is empty, or holds a special token and is not raw.
    """
    if raw:
        ids = encode(lm.tokenizer, [text], offsets=False)["input_ids"][0]
        tokens = bare_tokens([torch.tensor(ids, dtype=torch.int64)])
    else:
        try:
            (tokens,) = render([Dialogue("the text", "", (Message("user", text),))], lm.tokenizer)
        except UserError as error:
            raise UserError(f"{error}; with --raw the text is taken as it is") from None
    return on_tokens(saes, lm, tokens, reading, k=k)


@torch.no_grad()
def on_tokens(
    saes: Mapping[str, SAE], lm: LanguageModel, tokens: TokenBatch, reading: Reading, *, k: int = 5
) -> dict[str, list[Row]]:
    """The `k` strongest features on each token of one sequence.

    Raises:
        UserError: the sequence is empty.
    """
    check(saes, lm)
    if not len(tokens.input_ids):
        raise UserError("the text is empty")
    pieces = TokenText(lm.tokenizer).of(tokens.input_ids.tolist())
    _, acts, _, _ = next(harvest(lm, tokens, reading))
    found = {}
    for name, sae in saes.items():
        best = [part.topk(min(k, sae.spec.d_sae), dim=1) for part in _encoded(sae, _layer(acts, lm, sae))]
        values, index = (torch.cat([getattr(b, field) for b in best]).tolist() for field in ("values", "indices"))
        found[name] = [
            {
                "position": position,
                "token": piece,
                "token_id": int(tokens.input_ids[position]),
                "role": Role(int(tokens.role[position])).name.lower(),
                "kind": Kind(int(tokens.kind[position])).name.lower(),
                "features": [{"feature": i, "value": v} for i, v in zip(row, on, strict=True) if v > 0],
            }
            for position, (piece, row, on) in enumerate(zip(pieces, index, values, strict=True))
        ]
    return found


def like(store: FeatureStore, sae: SAE, index: int, *, k: int = 10) -> dict[str, list[Row]]:
    """The features whose decoder directions are closest to that of another, and those that fire where it does.

    Raises:
        UserError: the SAE has no such feature.
    """
    store.check(index)
    one, density = np.array([index]), store.columns["density"]
    near, cosine = decoder_neighbours(sae.W_dec, one, k)
    with_it, correlation, share = cofiring(store.kept["bits"], store.facts["sampled_tokens"], one, k)
    rows = zip(with_it[0].tolist(), correlation[0].tolist(), share[0].tolist(), strict=True)
    return {
        "decoder": [
            {"feature": i, "cosine": c, "density": float(density[i])}
            for i, c in zip(near[0].tolist(), cosine[0].tolist(), strict=True)
        ],
        "cofiring": [
            {"feature": i, "correlation": c, "share": s, "density": float(density[i])} for i, c, s in rows if i >= 0
        ],
    }


def _layer(acts: Float[Tensor, "L N D"], lm: LanguageModel, sae: SAE) -> Float[Tensor, "N D"]:
    return acts[lm.layers.index(sae.spec.layer)]


def _encoded(sae: SAE, x: Float[Tensor, "N D"]) -> list[Tensor]:
    """Activations, a bounded number at a time."""
    return [sae.encode(part.to(sae.W_enc.device)).float() for part in x.split(max(1, ELEMENTS // sae.spec.d_sae))]
