"""An SAE's parameters as arrays, for the compiled loops."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.config import SAESpec
from chatsae.sae import kernels, kernels_sums
from chatsae.sae.base import SAE, Losses
from chatsae.sae.crew import share
from chatsae.sae.jumprelu import JumpReLUSAE
from chatsae.sae.pairs import Activation
from chatsae.sae.workspace import Array, space

Vectors = dict[str, Array]
"""The gradients of the parameters that are vectors, by name."""


class Weights:
    """The parameters of an SAE as arrays that share their memory, W_enc by feature; good for as long as `current`."""

    def __init__(self, sae: SAE) -> None:
        self.spec: SAESpec = sae.spec
        self.jump, self.unit = isinstance(sae, JumpReLUSAE), sae.spec.form == "paper"
        self.weighted = not self.jump and not self.unit
        self._sae, named = sae, {name: p.detach() for name, p in sae.named_parameters()}
        self._places = [(p, p.data_ptr()) for p in sae.parameters()]
        self.rows = {name: by_feature(name, p) for name, p in named.items()}
        self.W_enc, self.W_dec = self.rows["W_enc"], self.rows["W_dec"]
        self.tensors = {name: torch.from_numpy(self.rows[name]) for name in ("W_enc", "W_dec")}
        self.b_enc, self.b_dec = named["b_enc"].numpy(), named["b_dec"].numpy()
        self.dtype = self.b_enc.dtype.type
        self.theta = np.zeros_like(self.b_enc)
        self.keeps_norms = self.unit or self.weighted
        self._norms, self._version = np.empty_like(self.b_enc), -1

    def current(self) -> bool:
        """Whether the parameters lie where they did."""
        return all(p.data_ptr() == place for p, place in self._places)

    def update_(self) -> None:
        """Read what the parameters hold into what is derived from them."""
        if isinstance(self._sae, JumpReLUSAE):
            if not self.unit:
                self._sae.before_step_()
            self.theta = self._sae.threshold.detach().numpy()

    def norms(self) -> Array:
        """Those of the rows of W_dec where the form needs them: the steps keep them, others count as versions."""
        if self.keeps_norms and self._version != self._sae.W_dec._version:
            share(kernels.row_norms, len(self._norms), self.W_dec.size, self.W_dec, self._norms)
            self._version = self._sae.W_dec._version
        return self._norms

    def inputs(self, x: Float[Tensor, "N D"]) -> tuple[Array, Array]:
        """A batch, and what of it goes to the encoder."""
        batch = x.contiguous().numpy()
        if not self.spec.apply_b_dec_to_input:
            return batch, batch
        sae_in = space("sae_in", batch.shape, self.dtype)
        kernels_sums.subtract(batch, self.b_dec, sae_in)
        return batch, sae_in

    def activation(self) -> Activation:
        return Activation(self.b_enc, self.theta, self.spec.bandwidth if self.jump else 0.0)

    @property
    def threshold_name(self) -> str:
        return "log_threshold" if self.unit else "raw_threshold"


def losses_of(mse: float, penalty: float, l0: float, firings: Array) -> Losses:
    """The losses in the dtype of the SAE, which is that of `firings`."""
    total, mse_, penalty_, l0_ = (
        torch.from_numpy(np.array(value, firings.dtype)) for value in (mse + penalty, mse, penalty, l0)
    )
    return Losses(total, mse_, penalty_, l0_, torch.from_numpy(firings))


def by_feature(name: str, tensor: Tensor) -> Array:
    """W_enc by feature, W_dec as it is, a vector as one row; shares memory."""
    if tensor.dim() == 1:
        return tensor.numpy()[None]
    return (tensor.T if name == "W_enc" else tensor).numpy()
