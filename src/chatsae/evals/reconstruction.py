"""Reconstruction of the residual stream, summed in float64 as tokens stream by; batching changes nothing but rounding.

Letters in shapes: G groups, K sums, U bins; else `chatsae.batch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chatsae.batch import TokenBatch
from chatsae.evals.groups import NAMES, membership, norm_bins

TOKEN_SUMS = ("e2", "out2", "x_out", "l0", "l1", "normalized_mse", "l2_ratio", "cosine", "n_ratio", "n_cosine")
"""What is summed over tokens: |sae_out - x|^2, |sae_out|^2, x.sae_out, active features, their sum, |sae_out - x|^2 /
|x|^2, |sae_out| / |x|, the cosine of x and sae_out, and the tokens on which the ratios and the cosine are defined."""

_CONSTANT = 1e-10  # share of the squared norm below which a variance is rounding


@dataclass(frozen=True)
class Labelled:
    """The tokens of a batch with the groups they are in; `dialogues` [B, G] counts them per dialogue."""

    tokens: TokenBatch
    groups: Float[Tensor, "N G"]
    dialogues: Float[Tensor, "B G"]

    @classmethod
    def of(cls, tokens: TokenBatch, special_ids: Sequence[int]) -> "Labelled":
        groups = membership(tokens, special_ids)
        return cls(tokens, groups, per_dialogue(groups, tokens.sequence, len(tokens)))


def per_dialogue(values: Float[Tensor, "N K"], sequence: Int[Tensor, " N"], n: int) -> Float[Tensor, "B K"]:
    """Sums over the tokens of each of `n` dialogues."""
    return values.new_zeros(n, values.shape[1]).index_add_(0, sequence.to(values.device), values)


@dataclass
class Binned:
    """Sums per bin of norms; of few bins, since norms of one layer are alike."""

    sums: dict[int, Tensor] = field(default_factory=dict)

    def add(self, bins: Int[Tensor, " U"], inverse: Int[Tensor, " N"], values: Float[Tensor, "N K"]) -> None:
        rows = values.new_zeros(len(bins), values.shape[1]).index_add_(0, inverse, values).cpu()
        for found, row in zip(bins.tolist(), rows, strict=True):
            self.sums[found] = self.sums[found] + row if found in self.sums else row

    def total(self, least: int, *, below: bool) -> Float[Tensor, " K"]:
        """The sum over all bins from `least` on, or over those below it."""
        width = next(iter(self.sums.values()))
        rows = [self.sums[b] for b in sorted(self.sums) if (b < least) == below]
        return torch.stack(rows).sum(0) if rows else torch.zeros_like(width)


class Stream:
    """Sums over the residual stream after one layer, shared by its SAEs."""

    def __init__(self, d_in: int) -> None:
        self.x2 = torch.zeros(len(NAMES), dtype=torch.float64)
        self.x = torch.zeros(len(NAMES), d_in, dtype=torch.float64)
        self.bins = Binned()  # of 1, |x|^2 and x
        self.dialogue_x2: list[Tensor] = []
        self.dialogue_x: list[Tensor] = []

    def add(self, x: Float[Tensor, "N D"], batch: Labelled) -> tuple[Int[Tensor, " U"], Int[Tensor, " N"]]:
        """Add the tokens of whole dialogues, x in float64; returns the bins their norms are in, and which each is."""
        x2 = x.square().sum(-1, keepdim=True)
        groups = batch.groups.to(x.device)
        self.x2 += (groups.T @ x2)[:, 0].cpu()
        self.x += (groups.T @ x).cpu()
        bins, inverse = norm_bins(x2[:, 0].sqrt()).unique(return_inverse=True)
        self.bins.add(bins, inverse, torch.cat([torch.ones_like(x2), x2, x], dim=1))
        sequence, n = batch.tokens.sequence, len(batch.tokens)
        self.dialogue_x2.append(per_dialogue(x2, sequence, n)[:, 0].cpu())
        self.dialogue_x.append(torch.stack([rows.sum(0) for rows in x.split(batch.tokens.lengths.tolist())]).cpu())
        return bins, inverse

    def median_bin(self) -> int:
        """The bin that the (lower) median norm is in."""
        ordered = sorted(self.bins.sums)
        count = torch.stack([self.bins.sums[b][0] for b in ordered]).cumsum(0)
        return ordered[int(torch.searchsorted(count, (count[-1] + 1) // 2))]

    def dialogue_variance(self, mean: Float[Tensor, " D"]) -> Float[Tensor, " S"]:
        """Sum of |x - mean|^2 over the tokens of each dialogue, in the order they were added, up to n |mean|^2."""
        return torch.cat(self.dialogue_x2) - 2 * torch.cat([x @ mean for x in self.dialogue_x])


class Reconstruction:
    """Sums over what one SAE makes of the residual stream."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.d_in, self.d_sae = d_in, d_sae
        self.sums = torch.zeros(len(NAMES), len(TOKEN_SUMS), dtype=torch.float64)
        self.n = torch.zeros(len(NAMES), dtype=torch.float64)
        self.eq7 = torch.zeros(len(NAMES), dtype=torch.float64)
        """Sum over dialogues of the mean of |sae_out - x|^2 / d_in over the tokens that a dialogue has in a group."""
        self.eq7_n = torch.zeros(len(NAMES), dtype=torch.float64)
        self.bins = Binned()
        self.firings = torch.zeros(d_sae, dtype=torch.int64)
        self.l0_counts = torch.zeros(d_sae + 1, dtype=torch.int64)

    def add(
        self,
        x: Float[Tensor, "N D"],
        sae_out: Float[Tensor, "N D"],
        feature_acts: Float[Tensor, "N F"],
        batch: Labelled,
        where: tuple[Int[Tensor, " U"], Int[Tensor, " N"]],
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B G"]]:
        """Add the tokens of whole dialogues, x in float64; `where` is what `Stream.add` gave.

        Returns:
            The sums of each dialogue, and its mean squared error (per dimension) in each group, NaN where it has no
            token in it.
        """
        if feature_acts.dtype != torch.float64:
            feature_acts = feature_acts.float()  # counts would not fit into half precision
        active = (feature_acts != 0).to(feature_acts.dtype)
        values = token_sums(x, sae_out.double(), active.sum(-1), feature_acts.abs().sum(-1))
        self.firings += active.sum(0, dtype=torch.float64).long().cpu()
        self.l0_counts += torch.bincount(values[:, TOKEN_SUMS.index("l0")].long(), minlength=self.d_sae + 1).cpu()
        groups = batch.groups.to(x.device)
        self.sums += (groups.T @ values).cpu()
        self.n += batch.groups.sum(0)
        self.bins.add(*where, values)
        sequence, n = batch.tokens.sequence, len(batch.tokens)
        errors = per_dialogue(groups * (values[:, :1] / self.d_in), sequence, n).cpu() / batch.dialogues
        self.eq7 += errors.nan_to_num(0.0).sum(0)
        self.eq7_n += (batch.dialogues > 0).sum(0)
        return per_dialogue(values, sequence, n).cpu(), errors


def token_sums(
    x: Float[Tensor, "N D"], sae_out: Float[Tensor, "N D"], l0: Float[Tensor, " N"], l1: Float[Tensor, " N"]
) -> Float[Tensor, "N K"]:
    """`TOKEN_SUMS` of each token, in float64."""
    e2 = (sae_out - x).square().sum(-1)
    x2, out2, x_out = x.square().sum(-1), sae_out.square().sum(-1), (x * sae_out).sum(-1)
    some, both = x2 > 0, (x2 > 0) & (out2 > 0)
    one = torch.ones_like(x2)
    safe_x, safe_both = torch.where(some, x2, one), torch.where(both, x2 * out2, one)
    columns = [e2, out2, x_out, l0.double(), l1.double()]
    columns += [
        torch.where(some, e2 / safe_x, 0 * one),
        torch.where(some, (out2 / safe_x).sqrt(), 0 * one),
        torch.where(both, x_out / safe_both.sqrt(), 0 * one),
    ]
    return torch.stack([*columns, some.double(), both.double()], dim=1)


def figures(
    n: int, x2: float, x: Float[Tensor, " D"], sums: Float[Tensor, " K"]
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The figures of a group of `n` tokens from its sums, and for each that is None the reason.

    `explained_variance` is 1 - `fvu`, and `fvu` is sum |sae_out - x|^2 / sum |x - mean|^2 with the mean of the group.
    `relative_bias` is sum |sae_out|^2 / sum x.sae_out (eq. 10 of arXiv 2404.16014), below 1 for shrinkage.
    """
    s = dict(zip(TOKEN_SUMS, sums.tolist(), strict=True))
    variance = x2 - float(x.square().sum()) / n
    parts = {
        "mse_token": (s["e2"], n * x.numel(), ""),
        "mse_sum": (s["e2"], n, ""),
        "fvu": (s["e2"], variance if variance > _CONSTANT * x2 else 0.0, "the activations do not vary"),
        "normalized_mse": (s["normalized_mse"], s["n_ratio"], "all activations are zero"),
        "cosine": (s["cosine"], s["n_cosine"], "an activation or its reconstruction is zero on every token"),
        "l0": (s["l0"], n, ""),
        "l1": (s["l1"], n, ""),
        "l2_ratio": (s["l2_ratio"], s["n_ratio"], "all activations are zero"),
        "relative_bias": (s["out2"], s["x_out"], "the reconstruction is orthogonal to the activations"),
    }
    values = {name: above / below if below else None for name, (above, below, _) in parts.items()}
    reasons = {name: reason for name, (_, below, reason) in parts.items() if not below}
    values["explained_variance"] = None if values["fvu"] is None else 1 - values["fvu"]
    if "fvu" in reasons:
        reasons["explained_variance"] = reasons["fvu"]
    return values, reasons
