"""Reconstruction metrics of one SAE, summed in float64 as tokens stream by; batching changes nothing but rounding."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def dialogue_means(
    values: Float[Tensor, " N"], sequence: Int[Tensor, " N"], chosen: Bool[Tensor, " N"], n_sequences: int
) -> tuple[float, int]:
    """Sum over dialogues of the mean of the chosen tokens of each, and how many dialogues have a chosen token.

    The inner mean of eq. 7 of the paper: over the tokens of a dialogue first, so that long dialogues weigh no more.
    """
    rows = sequence[chosen]
    count = torch.bincount(rows, minlength=n_sequences)
    total = torch.bincount(rows, weights=values[chosen], minlength=n_sequences)
    present = count > 0
    return float((total[present] / count[present]).sum()), int(present.sum())


@dataclass
class Mean:
    """A running mean over dialogues."""

    total: float = 0.0
    count: int = 0

    def add(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class Reconstruction:
    """Streaming sums behind `metrics`; one per SAE."""

    d_in: int
    d_sae: int
    mse: Mean = field(default_factory=Mean)
    mse_st: Mean = field(default_factory=Mean)
    mse_st_template: Mean = field(default_factory=Mean)
    n_tokens: int = 0
    sum_e2: float = 0.0
    sum_x2: float = 0.0
    n_active: int = 0
    sum_x: Tensor = field(init=False)
    fired: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sum_x = torch.zeros(self.d_in, dtype=torch.float64)
        self.fired = torch.zeros(self.d_sae, dtype=torch.bool)

    def add(
        self,
        x: Float[Tensor, "N D"],
        sae_out: Float[Tensor, "N D"],
        feature_acts: Float[Tensor, "N F"],
        sequence: Int[Tensor, " N"],
        by_id: Bool[Tensor, " N"],
        by_template: Bool[Tensor, " N"],
        n_sequences: int,
    ) -> None:
        """Add the tokens of whole dialogues; `by_id` and `by_template` choose the special tokens of MSE_st."""
        x = x.double().cpu()
        error = (sae_out.double().cpu() - x).square().sum(-1)
        everything = torch.ones_like(by_id)
        for mean, chosen in ((self.mse, everything), (self.mse_st, by_id), (self.mse_st_template, by_template)):
            mean.add(*dialogue_means(error / self.d_in, sequence, chosen, n_sequences))
        self.n_tokens += x.shape[0]
        self.sum_e2 += float(error.sum())
        self.sum_x2 += float(x.square().sum())
        self.sum_x += x.sum(0)
        active = feature_acts != 0
        self.n_active += int(active.sum())
        self.fired |= active.any(0).cpu()

    def metrics(self) -> dict[str, float | int | None]:
        """mse and mse_st (eq. 7: mean over d_in, tokens of a dialogue, dialogues) with log2; explained variance; l0.

        `mse_st` matches special tokens by id, as the paper; `mse_st_template` by template position.
        `explained_variance` is 1 - sum |x - sae_out|^2 / sum |x - mean x|^2 over all tokens.
        `dead_fraction` is the share of features that no token of the evaluation fired.
        """
        variance = self.sum_x2 - float(self.sum_x.square().sum()) / max(self.n_tokens, 1)
        values: dict[str, float | int | None] = {}
        for name in ("mse", "mse_st", "mse_st_template"):
            value = getattr(self, name).value
            values[name] = value
            values[f"log2_{name}"] = None if value is None else math.log2(value) if value > 0 else -math.inf
        values["explained_variance"] = 1 - self.sum_e2 / variance if variance > 0 else None
        values["l0"] = self.n_active / self.n_tokens if self.n_tokens else None
        values["dead_fraction"] = 1 - float(self.fired.double().mean())
        values["n_tokens"] = self.n_tokens
        values["n_dialogues"] = self.mse.count
        return values
