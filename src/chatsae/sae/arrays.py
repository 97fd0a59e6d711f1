"""An SAE's parameters as arrays, for the compiled loops."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.config import SAESpec
from chatsae.sae.base import SAE, Losses
from chatsae.sae.jumprelu import JumpReLUSAE
from chatsae.sae.pairs import Activation
from chatsae.sae.workspace import Array


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
        self.b_enc, self.b_dec = named["b_enc"].numpy(), named["b_dec"].numpy()
        self.dtype = self.b_enc.dtype.type
        self.theta = np.zeros_like(self.b_enc)

    def current(self) -> bool:
        """Whether the parameters lie where they did."""
        return all(p.data_ptr() == place for p, place in self._places)

    def update_(self) -> None:
        """Read what the parameters hold into what is derived from them."""
        if isinstance(self._sae, JumpReLUSAE):
            if not self.unit:
                self._sae.before_step_()
            self.theta = self._sae.threshold.detach().numpy()

    def inputs(self, x: Float[Tensor, "N D"]) -> tuple[Array, Array]:
        """A batch, and what of it goes to the encoder."""
        batch = x.contiguous().numpy()
        return batch, batch - self.b_dec if self.spec.apply_b_dec_to_input else batch

    def activation(self) -> Activation:
        return Activation(self.b_enc, self.theta, self.spec.bandwidth if self.jump else 0.0)

    @property
    def threshold_name(self) -> str:
        return "log_threshold" if self.unit else "raw_threshold"


def losses_of(mse: float, penalty: float, l0: float, firings: Array) -> Losses:
    """The losses in the dtype of the SAE, which is that of `firings`."""
    values = np.array([mse + penalty, mse, penalty, l0], firings.dtype)
    total, mse_, penalty_, l0_ = torch.from_numpy(values).unbind()
    return Losses(total, mse_, penalty_, l0_, torch.from_numpy(firings))


def by_feature(name: str, tensor: Tensor) -> Array:
    """W_enc by feature, W_dec as it is, a vector as one row; shares memory."""
    if tensor.dim() == 1:
        return tensor.numpy()[None]
    return (tensor.T if name == "W_enc" else tensor).numpy()
