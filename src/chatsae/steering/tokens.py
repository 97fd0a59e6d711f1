"""Features of the tokens that the chat template writes (the paper's Tables 12-18)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chatsae import console
from chatsae.batch import Role, TokenBatch
from chatsae.data.template import template_facts
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE

_CHUNK = 4096  # tokens that are encoded at once


@dataclass(frozen=True, slots=True)
class TokenFeature:
    """A feature on a token: mean activation there, and on all tokens elsewhere; both over silent tokens too."""

    feature: int
    mean: float
    elsewhere: float
    density: float
    """Share of the token's occurrences on which it fires."""

    @property
    def exclusivity(self) -> float | None:
        """mean / (mean + elsewhere): 1 only here, 0.5 everywhere alike; None where it never fires."""
        total = self.mean + self.elsewhere
        return self.mean / total if total else None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One token of the template, or one place of it, with the features of largest mean activation, largest first."""

    token: str
    token_id: int
    place: str
    """id: wherever the id stands, as the paper; template: only where the template wrote it; or that in turns of one
    role alone."""
    occurrences: int
    features: tuple[TokenFeature, ...]

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        features = [asdict(feature) | {"exclusivity": feature.exclusivity} for feature in self.features]
        return asdict(self) | {"features": features}


def token_features(
    lm: LanguageModel, saes: Mapping[str, SAE], dialogues: Iterable[TokenBatch], *, top: int = 5
) -> dict[str, list[TokenRow]]:
    """The features that fire on each special token, by SAE; places that do not occur are left out.

    The dialogues are read once, whatever the number of SAEs; each of `saes` must be of a layer that `lm` reads.

    Raises:
        UserError: an SAE is of another layer or model, the tokenizer has no chat template, or no token is special.
    """
    for name, sae in saes.items():
        if sae.spec.layer not in lm.layers:
            raise UserError(f"{name} is of layer {sae.spec.layer}; {lm.name} reads {', '.join(map(str, lm.layers))}")
        if sae.spec.d_in != lm.d_in:
            raise UserError(f"{name} has d_in {sae.spec.d_in}, {lm.name} {lm.d_in}")
    if top < 1:
        raise UserError(f"at least one feature per token is needed, not {top}")
    groups = _groups(template_facts(lm.tokenizer).special_ids)
    sums = {name: _Sums(len(groups), sae.spec.d_sae) for name, sae in saes.items()}
    read = list(dialogues)
    total = sum(map(len, read))
    for batch in console.tracked("special tokens", total, lm.harvest(read), lambda batch: len(batch.tokens)):
        member = membership(groups, batch.tokens)
        for name, sae in saes.items():
            acts = batch.acts[lm.layers.index(sae.spec.layer)]
            for x, m in zip(acts.split(_CHUNK), member.split(_CHUNK, dim=1), strict=True):
                with torch.inference_mode():
                    sums[name].add(sae.encode(x.to(sae.W_enc.device)).cpu(), m)
    texts = {i: str(lm.tokenizer.decode([i])) for i, _, _ in groups}
    return {name: _rows(groups, texts, found, top) for name, found in sums.items()}


Group = tuple[int, str, Role | None]
"""A token id; id, template, or the name of a role; and that role."""


def _groups(special_ids: Sequence[int]) -> list[Group]:
    places: list[tuple[str, Role | None]] = [("id", None), ("template", None)]
    places += [(role.name.lower(), role) for role in Role]
    return [(i, place, role) for i in special_ids for place, role in places]


def membership(groups: Sequence[Group], tokens: TokenBatch) -> Bool[Tensor, "G N"]:
    """Which tokens belong to which group."""
    rows = []
    for token_id, place, role in groups:
        mask = tokens.input_ids == token_id
        if place != "id":
            mask = mask & tokens.special
        rows.append(mask if role is None else mask & (tokens.role == int(role)))
    return torch.stack(rows)


class _Sums:
    """Activations added up over each group and over all tokens, in float64."""

    def __init__(self, n_groups: int, d_sae: int) -> None:
        self.total = torch.zeros(n_groups, d_sae, dtype=torch.float64)
        self.fired = torch.zeros(n_groups, d_sae, dtype=torch.float64)
        self.count = torch.zeros(n_groups, dtype=torch.float64)
        self.everywhere = torch.zeros(d_sae, dtype=torch.float64)
        self.tokens = 0

    def add(self, feature_acts: Float[Tensor, "N F"], member: Bool[Tensor, "G N"]) -> None:
        """A stretch of tokens."""
        weights = member.to(feature_acts.dtype)
        self.total += (weights @ feature_acts).double()
        self.fired += (weights @ (feature_acts > 0).to(feature_acts.dtype)).double()
        self.count += member.sum(1)
        self.everywhere += feature_acts.double().sum(0)
        self.tokens += feature_acts.shape[0]


def _rows(groups: Sequence[Group], texts: Mapping[int, str], sums: _Sums, top: int) -> list[TokenRow]:
    rows = []
    for g, (token_id, place, _) in enumerate(groups):
        n = int(sums.count[g])
        if n == 0:
            continue
        mean = sums.total[g] / n
        elsewhere = (sums.everywhere - sums.total[g]) / max(sums.tokens - n, 1)
        values, best = mean.topk(min(top, len(mean)))
        features = [
            TokenFeature(k, value, float(elsewhere[k]), float(sums.fired[g, k]) / n)
            for k, value in zip(best.tolist(), values.tolist(), strict=True)
            if value > 0
        ]
        rows.append(TokenRow(texts[token_id], token_id, place, n, tuple(features)))
    if not rows:
        raise UserError("no special token of the template occurs in the dialogues")
    return rows


def token_table(name: str, rows: Sequence[TokenRow]) -> str:
    """The rows as a text table: features with their mean, and in brackets how exclusive they are."""
    width = max(len(row.features) for row in rows)
    columns = [console.Column("token"), console.Column("place"), console.Column("n")]
    columns += [console.Column(f"f{i}", header=f"{i + 1}.") for i in range(width)]
    cells = []
    for row in rows:
        shown = {f"f{i}": _cell(feature) for i, feature in enumerate(row.features)}
        cells.append({"token": repr(row.token)[1:-1], "place": row.place, "n": row.occurrences} | shown)
    caption = "feature: mean activation on the token (share of it in mean + mean elsewhere)"
    return console.table(f"{name}: features of special tokens", columns, cells, group="token", caption=caption)


def _cell(feature: TokenFeature) -> str:
    share = feature.exclusivity
    return f"{feature.feature}: {feature.mean:.3g} ({'-' if share is None else format(share, '.2f')})"
