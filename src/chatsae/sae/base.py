"""What every sparse autoencoder here has in common. Letters in shapes: see `chatsae.batch`."""

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chatsae.config import SAESpec
from chatsae.errors import UserError
from chatsae.sae import interop


class Losses(NamedTuple):
    """The loss of one batch, still on its device.

    total: what is minimised, mse + sparsity.
    mse: squared error, summed over d_in and averaged over the batch.
    sparsity: the penalty with its coefficient, averaged over the batch.
    l0: features that are active on a token, on average.
    firings: tokens of the batch on which each feature is active [F].
    """

    total: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    firings: Float[Tensor, " F"]

    @property
    def fired(self) -> Bool[Tensor, " F"]:
        """Which features were active on at least one token of the batch."""
        return self.firings > 0


class SAE(nn.Module):
    """feature_acts = activation((x - b_dec) @ W_enc + b_enc), sae_out = feature_acts @ W_dec + b_dec.

    b_dec is subtracted only if `spec.apply_b_dec_to_input`. Subclasses bring the activation and the sparsity penalty;
    `SAE.create(spec)` picks the subclass of `spec.architecture`. All parameters start at zero: `init_sae` and `load`
    fill them.
    """

    W_enc: nn.Parameter
    """[d_in, d_sae]"""
    b_enc: nn.Parameter
    """[d_sae]"""
    W_dec: nn.Parameter
    """[d_sae, d_in]"""
    b_dec: nn.Parameter
    """[d_in]"""

    _architectures: ClassVar[dict[str, type["SAE"]]] = {}
    _order: ClassVar[dict[str, tuple[str, ...]]]
    """Parameters by form, in the order sae_lens registers them: the clipped norm is summed in this order."""

    def __init_subclass__(cls, *, architecture: str) -> None:
        SAE._architectures[architecture] = cls

    def __init__(
        self, spec: SAESpec, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        self.spec = spec
        self.metadata: dict[str, Any] = {}
        """Free-form facts that are saved with the SAE."""
        self.fresh = False
        """Whether its weights are initial ones, of which training first places b_dec."""
        shapes = {"W_enc": (spec.d_in, spec.d_sae), "W_dec": (spec.d_sae, spec.d_in), "b_dec": (spec.d_in,)}
        for name in self._order[spec.form]:
            shape = shapes.get(name, (spec.d_sae,))
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))

    @staticmethod
    def create(spec: SAESpec, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> "SAE":
        """An SAE of the architecture that `spec` names, with all parameters zero."""
        return SAE._architectures[spec.architecture](spec, dtype=dtype, device=device)

    def encode(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N F"]:
        """Feature activations of residual-stream vectors, in the dtype of the SAE."""
        return self._activation(self._hidden_pre(x.to(self.W_enc.dtype)))

    def decode(self, feature_acts: Float[Tensor, "*N F"]) -> Float[Tensor, "*N D"]:
        """Residual-stream vectors that feature activations stand for."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """The reconstruction of residual-stream vectors."""
        return self.decode(self.encode(x))

    def loss(self, x: Float[Tensor, "N D"], sparsity_scale: float) -> Losses:
        """The training loss on a batch; `sparsity_scale` is the warm-up factor of the coefficient, 0 to 1."""
        hidden_pre = self._hidden_pre(x)
        feature_acts = self._activation(hidden_pre)
        sae_out = self.decode(feature_acts)

        mse = (sae_out - x).pow(2).sum(-1).mean()
        penalty = self._penalty(hidden_pre, feature_acts)
        sparsity = (self.spec.coefficient * sparsity_scale * penalty).mean()

        firings = feature_acts.detach().sign().sum(0)  # activations are never negative; float masks vectorise on CPUs
        return Losses(mse + sparsity, mse, sparsity, firings.sum() / x.shape[0], firings)

    def before_step_(self) -> None:
        """Put the parameters where the form wants them; training calls it before each step and after the last one."""

    @torch.no_grad()
    def take_up_(self) -> None:
        """Prepare weights that were trained before for training, which changes no output.

        Where the form keeps decoder rows at unit norm, the norms go into the encoder.
        """
        if self.spec.form == "paper":
            norms = torch.linalg.vector_norm(self.W_dec, dim=1)
            self._scale_features_(torch.where(norms > 0, norms, 1))

    @torch.no_grad()
    def unscale_input_(self, factor: float) -> None:
        """Turn an SAE of activations times `factor` into one of the activations themselves.

        Its features become `factor` times smaller, and so do biases and thresholds; decoder rows keep their norms.
        """
        self.b_enc.div_(factor)
        self.b_dec.div_(factor)

    def _scale_features_(self, scale: Float[Tensor, " F"]) -> None:
        """Multiply every feature's activations, and divide its decoder row by the same."""
        self.W_enc.mul_(scale)
        self.b_enc.mul_(scale)
        self.W_dec.div_(scale[:, None])

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors of `sae_weights.safetensors`, in the layout of sae_lens."""
        return {name: getattr(self, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}

    def load_file_tensors_(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors in the layout of `file_tensors`."""
        with torch.no_grad():
            for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
                getattr(self, name).copy_(tensors[name])

    def save(
        self,
        directory: str | Path,
        *,
        metadata: dict[str, Any] | None = None,
        sparsity: Float[Tensor, " F"] | None = None,
    ) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`, which sae_lens 5 and 6 read as well.

        Args:
            directory: made if it does not exist; files in it are replaced atomically.
            metadata: facts to keep, over those in `self.metadata`; JSON-able.
            sparsity: how often each feature fires, 0 to 1; goes to `sparsity.safetensors` as log10(sparsity + 1e-10).

        Raises:
            UserError: the directory cannot be written.
        """
        facts = {**self.metadata, **(metadata or {})}
        interop.write(directory, self.spec, self.file_tensors(), metadata=facts, sparsity=sparsity)

    @staticmethod
    def load(directory: str | Path, device: str | torch.device = "cpu") -> "SAE":
        """Read an SAE that chatsae or sae_lens 2 to 6 wrote (see `chatsae.sae.interop`).

        Raises:
            UserError: files are missing or damaged, or hold what would be read wrongly; names the file and the field.
                Or the device is not there.
        """
        spec, tensors, metadata = interop.read(directory)
        try:
            sae = SAE.create(spec, dtype=tensors["W_enc"].dtype, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's, of a device that is not there
            reason = str(error).partition("\n")[0]
            raise UserError(f"SAE {directory} cannot be put on device {device}: {reason}") from None
        sae.load_file_tensors_(tensors)
        sae.metadata = metadata
        return sae

    def extra_repr(self) -> str:
        return f"{self.spec.name}: {self.spec.architecture} ({self.spec.form}), {self.spec.d_in} -> {self.spec.d_sae}"

    def _hidden_pre(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N F"]:
        sae_in = x - self.b_dec if self.spec.apply_b_dec_to_input else x
        return sae_in @ self.W_enc + self.b_enc

    def _activation(self, hidden_pre: Float[Tensor, "*N F"]) -> Float[Tensor, "*N F"]:
        raise NotImplementedError

    def _penalty(self, hidden_pre: Float[Tensor, "N F"], feature_acts: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
        """The sparsity penalty of each token, without its coefficient."""
        raise NotImplementedError


@torch.no_grad()
def normalize_rows_(W_dec: Float[Tensor, "F D"]) -> None:
    """Scale every row to unit norm, in place; rows of zeros stay."""
    norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    W_dec.div_(norms.clamp_min(torch.finfo(W_dec.dtype).tiny))
