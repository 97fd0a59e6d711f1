"""The standard SAE: ReLU, penalised by the L1 norm of its activations."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.sae.base import SAE, normalize_rows_


class StandardSAE(SAE, architecture="standard"):
    """ReLU + L1 (paper, section 2).

    form="paper": decoder rows of unit norm, restored before every step; penalty ‖f‖₁.
    form="v6": free decoder rows; penalty Σ fᵢ ‖W_dec[i]‖, which no rescaling of a row can cheat.
    """

    _order: ClassVar = {
        "paper": ("b_enc", "W_dec", "W_enc", "b_dec"),
        "v6": ("b_dec", "W_dec", "W_enc", "b_enc"),
    }

    def before_step_(self) -> None:
        if self.spec.form == "paper":
            normalize_rows_(self.W_dec)

    def _activation(self, hidden_pre: Float[Tensor, "*N F"]) -> Float[Tensor, "*N F"]:
        return hidden_pre.relu()

    def _penalty(self, hidden_pre: Float[Tensor, "N F"], feature_acts: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
        if self.spec.form == "v6":
            feature_acts = feature_acts * torch.linalg.vector_norm(self.W_dec, dim=1)
        return torch.linalg.vector_norm(feature_acts, ord=1, dim=-1)
