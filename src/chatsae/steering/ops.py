"""Steering operations, each as a change (delta) of the residual stream along one unit direction.

For a stream x, a direction d, u = d / |d| and a strength s, with the projection c = x @ u:

    add        s u              the paper's z' = z + alpha d_k; its decoder rows are unit vectors
    set        (s - c) u        the projection becomes s
    min_clamp  max(s - c, 0) u  the projection becomes at least s
    cap        min(s - c, 0) u  the projection becomes at most s
    scale      (s - 1) c u      the projection becomes s c
    ablate     -c u             the projection becomes 0

What is set is the projection on the direction, not what the SAE's encoder reads there: that also depends on the
other features.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Op = Literal["add", "set", "min_clamp", "scale", "ablate", "cap"]
OPS: tuple[Op, ...] = get_args(Op)

# How far each operation moves along the direction, from the projection and the strength.
_MOVES: dict[Op, Callable[[Tensor, float], Tensor]] = {
    "add": lambda c, s: torch.full_like(c, s),
    "set": lambda c, s: s - c,
    "min_clamp": lambda c, s: (s - c).clamp(min=0),
    "cap": lambda c, s: (s - c).clamp(max=0),
    "scale": lambda c, s: (s - 1) * c,
    "ablate": lambda c, s: -c,
}


def projection(x: Float[Tensor, "*N D"], direction: Float[Tensor, " D"]) -> Float[Tensor, "*N"]:
    """x @ u in float32 at least, u the unit vector of the direction."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ unit(direction).to(x.device, wide)


def unit(direction: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """The direction at length 1, in float64."""
    direction = direction.double()
    return direction / torch.linalg.vector_norm(direction)


def delta(
    x: Float[Tensor, "N D"],
    op: Op,
    direction: Float[Tensor, " D"],
    strength: float,
    factor: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "N D"]:
    """What the operation adds to each vector, times its `factor`; in float32 at least."""
    c = projection(x, direction)
    move = _MOVES[op](c, strength)
    if factor is not None:
        move = move * factor.to(move)
    return move[:, None] * unit(direction).to(move)


def steered(
    x: Float[Tensor, "N D"],
    op: Op,
    direction: Float[Tensor, " D"],
    strength: float,
    factor: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "N D"]:
    """The stream after the operation, in its own dtype; the sum is taken in float32 at least."""
    change = delta(x, op, direction, strength, factor)
    return (x.to(change.dtype) + change).to(x.dtype)
