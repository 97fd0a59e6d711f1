"""What the language model predicts with something else in place of the residual stream. M: tokens that have a loss."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chatsae.batch import TokenBatch
from chatsae.evals.resume import Trunk

_CELLS = 2**22  # logits at a time; all those of a batch would not fit for large vocabularies
_LEAST_ROWS = 256  # tokens at a time at least

LOSS_SUMS = ("loss_sae", "kl", "top1")
"""Of each token: its cross-entropy with the SAE spliced in, KL(model || model with the SAE) in nats, and 1 where the
most likely token stays the same."""


class Predictions:
    """What the model predicts by itself at some tokens; float32, or float64 for a model in float64."""

    def __init__(self, logits: Float[Tensor, "M V"], targets: Int[Tensor, " M"]) -> None:
        self._logits, self._targets = _wide(logits), targets[:, None]
        self._norm = self._logits.logsumexp(-1)
        self._shares = (self._logits - self._norm[:, None]).exp_()
        self._top = self._logits.argmax(-1, keepdim=True)
        self.losses = self._cross_entropy(self._logits, self._norm)

    def against(self, logits: Float[Tensor, "M V"]) -> Float[Tensor, "M 3"]:
        """`LOSS_SUMS` of other logits at the same tokens; exactly 0 loss and KL more where they are equal."""
        other = _wide(logits)
        norm = other.logsumexp(-1)
        kl = ((self._logits - other) * self._shares).sum(-1) - (self._norm - norm)
        agree = other.gather(1, self._top)[:, 0] >= other.amax(-1)  # faster than a second argmax
        return torch.stack([self._cross_entropy(other, norm), kl.double(), agree.double()], dim=1)

    def _cross_entropy(self, logits: Float[Tensor, "M V"], norm: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
        return (norm - logits.gather(1, self._targets)[:, 0]).double()


def token_losses(
    trunk: Trunk,
    clean: Float[Tensor, "M S"],
    others: Mapping[str, Float[Tensor, "M S"]],
    targets: Int[Tensor, " M"],
) -> tuple[Float[Tensor, " M"], dict[str, Float[Tensor, "M 3"]]]:
    """The loss of each token in nats, and `LOSS_SUMS` for each of the other states; a part of the tokens at a time.

    The logits of the model by itself are made once for all others.
    """
    own: list[Tensor] = [torch.empty(0, dtype=torch.float64)]
    found: dict[str, list[Tensor]] = {name: [torch.empty(0, 3, dtype=torch.float64)] for name in others}
    for rows in torch.arange(len(targets), device=clean.device).split(_rows(trunk)):
        predictions = Predictions(trunk.logits(clean[rows]), targets[rows])
        own.append(predictions.losses.cpu())
        for name, states in others.items():
            found[name].append(predictions.against(trunk.logits(states[rows])).cpu())
    return torch.cat(own), {name: torch.cat(parts) for name, parts in found.items()}


def constant_losses(trunk: Trunk, layer: int, vector: Float[Tensor, " D"], tokens: TokenBatch) -> Float[Tensor, " N"]:
    """The loss of every token but the first of its dialogue, 0 there, with one vector as the whole residual stream.

    A token then sees nothing but its position, so that one sequence as long as the longest dialogue serves all of
    them: see `Trunk.constant`. Twice as many where the rotary scheme depends on the length (`rope_split`).
    """
    full = trunk.full
    losses = torch.zeros(len(tokens.input_ids), dtype=torch.float64)
    long = tokens.lengths > (full.rope_split or 2**62)
    for side in (False, True):
        longest = int(tokens.lengths[long == side].max()) if bool((long == side).any()) else 0
        if longest < 2:
            continue
        stream = vector.to(full.device, full.dtype).expand(1, longest, -1)
        states = trunk.spliced(layer, stream, torch.zeros(1, longest, dtype=torch.int64, device=full.device))[0]
        scored = ((long[tokens.sequence] == side) & (tokens.position > 0)).nonzero()[:, 0]
        before = tokens.position[scored] - 1
        order = before.argsort(stable=True)
        scored, before = scored[order], before[order]
        for rows in torch.arange(longest - 1).split(_rows(trunk)):
            start, stop = torch.searchsorted(before, torch.tensor([int(rows[0]), int(rows[-1]) + 1])).tolist()
            logits = _wide(trunk.logits(states[rows.to(states.device)]))
            at, wanted = before[start:stop] - rows[0], tokens.input_ids[scored[start:stop]]
            norm = logits.logsumexp(-1).cpu()
            losses[scored[start:stop]] = (
                norm[at] - logits[at.to(logits.device), wanted.to(logits.device)].cpu()
            ).double()
    return losses


def _wide(logits: Float[Tensor, "M V"]) -> Float[Tensor, "M V"]:
    return logits if logits.dtype == torch.float64 else logits.float()


def _rows(trunk: Trunk) -> int:
    return max(_LEAST_ROWS, _CELLS // trunk.full.vocab_size)
