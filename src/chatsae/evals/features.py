"""Figures of an SAE's features: how many are active, which are dead or dense, and which point the same way."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chatsae.statistics import wilson

_RARE = {"rare_1e-6": 1e-6, "rare_1e-5": 1e-5}
_DENSE = {"dense_1pct": 0.01, "dense_10pct": 0.1}
_ROWS = 512  # decoder rows compared at a time
_COMPARED = 8192  # decoder rows of a wide SAE that are compared with all others

Values = dict[str, float | int | None]


def firing_figures(firings: Int[Tensor, " F"], n_tokens: int) -> tuple[Values, dict[str, tuple[float, float] | None]]:
    """Shares of features that never fire (`dead_fraction`), seldom, or on more than 1 % or 10 % of the tokens.

    With Wilson intervals; a share says nothing without `dead_tokens`, the tokens in which a firing was looked for.
    """
    n = len(firings)
    share = firings.double() / max(n_tokens, 1)
    counts = {"dead_fraction": int((firings == 0).sum())}
    counts |= {name: int((share < least).sum()) for name, least in _RARE.items()}
    counts |= {name: int((share > most).sum()) for name, most in _DENSE.items()}
    values: Values = {name: count / n for name, count in counts.items()}
    return values | {"dead_tokens": n_tokens}, {name: wilson(count, n) for name, count in counts.items()}


def l0_quantiles(counts: Int[Tensor, " C"]) -> Values:
    """Median and 95 % quantile of the active features per token; entry i of `counts` is how many tokens have i."""
    total = counts.cumsum(0)
    n = int(total[-1])
    ranks = torch.tensor([(n + 1) // 2, -(-19 * n // 20)])
    median, p95 = torch.searchsorted(total, ranks.clamp_min(1)).tolist()
    return {"l0_median": median, "l0_p95": p95}


@torch.no_grad()
def duplicate_figures(W_dec: Float[Tensor, "F D"]) -> tuple[Values, dict[str, str]]:
    """Mean over features of the largest cosine with another feature's decoder row, and the share above 0.9.

    Rows of zeros are left out. Of an SAE with more than 8,192 features, so many at even distances are compared with
    all.
    """
    names = ("duplicate_cosine", "duplicate_fraction")
    norms = W_dec.norm(dim=1)
    rows = W_dec[norms > 0].float() / norms[norms > 0, None].float()
    if len(rows) < 2:
        return dict.fromkeys(names), dict.fromkeys(names, "fewer than two decoder rows are not zero")
    chosen = torch.linspace(0, len(rows) - 1, min(len(rows), _COMPARED), device=rows.device).round().long()
    best = []
    for index in chosen.split(_ROWS):
        cosine = rows[index] @ rows.T
        cosine[torch.arange(len(index), device=rows.device), index] = -2
        best.append(cosine.amax(dim=1))
    largest = torch.cat(best).double()
    return {names[0]: float(largest.mean()), names[1]: float((largest > 0.9).double().mean())}, {}
