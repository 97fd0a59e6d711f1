"""What a dictionary has to beat: random directions, and principal components, at the L0 of the SAE that is judged."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.batch import ActivationBatch
from chatsae.errors import UserError
from chatsae.sae.base import SAE, normalize_rows_

Control = Literal["random-sae", "pca"]

FIT_TOKENS = 65_536
"""Training-split tokens on which the mean and the principal components are fitted."""

_CELLS = 2**24  # pre-activations at a time


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the residual stream after a layer, over `n` tokens; float64."""

    n: int
    mean: Float[Tensor, " D"]
    covariance: Float[Tensor, "D D"]


def fit_moments(batches: Iterable[ActivationBatch], layers: Sequence[int]) -> dict[int, Moments]:
    """The moments of each layer over all tokens.

    Raises:
        UserError: there is no token.
    """
    n, sums = 0, dict[int, tuple[Tensor, Tensor]]()
    for batch in batches:
        n += batch.acts.shape[1]
        for layer, acts in zip(layers, batch.acts, strict=True):
            x = acts.double()
            first, second = x.sum(0).cpu(), (x.T @ x).cpu()
            before = sums.get(layer)
            sums[layer] = (first, second) if before is None else (before[0] + first, before[1] + second)
    if not n:
        raise UserError("--control: the training split gives no token to fit on")
    moments = {}
    for layer, (first, second) in sums.items():
        mean = first / n
        moments[layer] = Moments(n, mean, second / n - mean.outer(mean))
    return moments


@dataclass(frozen=True)
class Controls:
    """Controls of some kinds for every SAE of an evaluation; `moments` by layer."""

    kinds: tuple[Control, ...]
    moments: Mapping[int, Moments]
    seed: int = 0

    def make(
        self, saes: Mapping[str, SAE], l0: Mapping[str, float], acts: Mapping[int, Float[Tensor, "N D"]]
    ) -> dict[str, tuple[SAE, dict[str, Any]]]:
        """Controls named `SAE~kind`, and what a report says of them; `acts` by layer is a sample of the tokens."""
        found = {}
        for name, sae in saes.items():
            moments = self.moments[sae.spec.layer]
            for kind in self.kinds:
                if kind == "pca":
                    made, how = pca_sae(sae, moments, l0[name])
                else:
                    made, how = random_sae(sae, moments, l0[name], acts[sae.spec.layer], seed=self.seed)
                found[f"{name}~{kind}"] = made.to(sae.W_enc.device), {"kind": kind, "of": name, "made": how}
        return found


@torch.no_grad()
def pca_sae(sae: SAE, moments: Moments, l0: float) -> tuple[SAE, str]:
    """The round(l0) first principal components, and a sentence about them.

    As an SAE: each component is a pair of ReLU features of opposite directions, one of which is active on a token.
    """
    k = min(max(round(l0), 1), sae.spec.d_in)
    components = torch.linalg.eigh(moments.covariance).eigenvectors.flip(1)[:, :k].T
    made = _blank(sae, "pca", d_sae=2 * k)
    both = torch.cat([components, -components])
    made.W_enc.copy_(both.T)
    made.W_dec.copy_(both)
    made.b_dec.copy_(moments.mean)
    return made, f"{k} principal components of {moments.n:,} tokens of the training split, as {2 * k} ReLU features"


@torch.no_grad()
def random_sae(sae: SAE, moments: Moments, l0: float, x: Float[Tensor, "N D"], *, seed: int = 0) -> tuple[SAE, str]:
    """As many random directions as the SAE has features, and a sentence about them.

    Decoder rows are random unit vectors, the encoder is their transpose times one gain, b_enc one number: chosen so
    that the L0 on `x` is `l0` and the squared error the least. b_dec is the mean of the training split.
    """
    made = _blank(sae, "random-sae", d_sae=sae.spec.d_sae)
    draw = torch.randn(made.W_dec.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made.W_dec.copy_(draw)
    normalize_rows_(made.W_dec)
    centred = (x.double().cpu() - moments.mean).to(made.W_dec)
    chunks = centred.split(max(1, _CELLS // sae.spec.d_sae))
    threshold = _threshold(chunks, made.W_dec, round(l0 * len(x)))
    along = power = 0.0
    for chunk in chunks:
        sae_out = (chunk @ made.W_dec.T - threshold).relu_() @ made.W_dec
        along += float((sae_out.double() * chunk.double()).sum())
        power += float(sae_out.double().square().sum())
    gain = along / power if along > 0 else 1.0
    made.W_enc.copy_(made.W_dec.T * gain)
    made.b_enc.fill_(-threshold * gain)
    made.b_dec.copy_(moments.mean)
    text = f"{sae.spec.d_sae:,} random directions (seed {seed}); threshold and gain fitted on {len(x):,} of the tokens"
    return made, f"{text}, mean on {moments.n:,} of the training split"


def _threshold(chunks: Sequence[Float[Tensor, "_ D"]], W_dec: Float[Tensor, "F D"], active: int) -> float:
    """What exactly `active` of all pre-activations exceed."""
    highest = W_dec.new_empty(0)
    for chunk in chunks:
        known = torch.cat([highest, (chunk @ W_dec.T).flatten()])
        highest = known.topk(min(active + 1, len(known))).values
    if active >= len(highest):
        return float(highest[-1]) - 1.0
    return float(highest[max(active - 1, 0)] + highest[active]) / 2 if active else float(highest[0])


def _blank(sae: SAE, kind: Control, *, d_sae: int) -> SAE:
    spec = replace(sae.spec, name=f"{sae.spec.name}~{kind}", architecture="standard", form="v6", d_sae=d_sae)
    spec = replace(spec, coefficient=0.0, apply_b_dec_to_input=True)
    dtype = sae.W_enc.dtype if sae.W_enc.dtype == torch.float64 else torch.float32
    return SAE.create(spec, dtype=dtype)
