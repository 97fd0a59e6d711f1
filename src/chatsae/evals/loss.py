"""Delta Loss: how much the language model's loss changes when an SAE's reconstruction replaces the residual stream."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ROWS = 1024  # logits turned into losses at a time: a float32 copy of all would not fit for large vocabularies


def token_losses(
    logits: Float[Tensor, "B T V"], input_ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"]
) -> Float[Tensor, " M"]:
    """Cross-entropy in nats of every real token but the first of its dialogue, given those before it, as float64."""
    targets, scored = input_ids[:, 1:], real[:, 1:]
    rows, wanted = logits[:, :-1][scored], targets[scored]
    parts = [
        torch.nn.functional.cross_entropy(r.float(), w, reduction="none").double()
        for r, w in zip(rows.split(_ROWS), wanted.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.float64)


@dataclass
class DeltaLoss:
    """Summed losses with and without the SAE, on all tokens and on those of assistant turns."""

    clean: float = 0.0
    spliced: float = 0.0
    clean_assistant: float = 0.0
    spliced_assistant: float = 0.0
    n_tokens: int = 0
    n_assistant: int = 0

    def add(self, clean: Float[Tensor, " M"], spliced: Float[Tensor, " M"], assistant: Bool[Tensor, " M"]) -> None:
        self.clean += float(clean.sum())
        self.spliced += float(spliced.sum())
        self.clean_assistant += float(clean[assistant].sum())
        self.spliced_assistant += float(spliced[assistant].sum())
        self.n_tokens += clean.numel()
        self.n_assistant += int(assistant.sum())

    def metrics(self) -> dict[str, float | None]:
        """`loss`, `delta_loss` in nats per token, `delta_loss_percent` of the loss; the same on assistant tokens."""
        values: dict[str, float | None] = {}
        for suffix, clean, spliced, n in (
            ("", self.clean, self.spliced, self.n_tokens),
            ("_assistant", self.clean_assistant, self.spliced_assistant, self.n_assistant),
        ):
            values[f"loss{suffix}"] = clean / n if n else None
            values[f"delta_loss{suffix}"] = (spliced - clean) / n if n else None
            values[f"delta_loss_percent{suffix}"] = 100 * (spliced - clean) / clean if clean else None
        return values
