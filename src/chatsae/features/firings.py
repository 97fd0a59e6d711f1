"""The activations of an SAE that are not zero, a bounded number at a time. Letters in shapes: see `chatsae.batch`."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.errors import UserError
from chatsae.sae.base import SAE

ELEMENTS = 2**22
"""Activations, zeros included, that are looked at together: 16 MB in float32."""

_DROPPED = 12  # low bits of a float32's 23 that rounding clears


@dataclass(frozen=True, slots=True)
class Firings:
    """Activations above zero, by token and then by feature; arrays of one length."""

    token: np.ndarray
    """Index of the token, int64."""
    feature: np.ndarray
    """int64."""
    value: np.ndarray
    """float32, rounded."""

    def __len__(self) -> int:
        return len(self.token)


def rounded(values: np.ndarray) -> np.ndarray:
    """Float32 numbers, not negative, to 12 significant bits (1 part in 4,000).

    What a forward rounds differently from batch to batch (1 part in a million) becomes equal, so that a feature's
    equal activations, such as those on a constant prefix, are ties, and sums do not depend on their order.
    """
    bits = values.view(np.int32)
    return ((bits + (1 << (_DROPPED - 1))) & np.int32(-(1 << _DROPPED))).view(np.float32)


def firings(sae: SAE, x: Float[Tensor, "N D"], index: np.ndarray) -> Iterator[Firings]:
    """What fires on vectors of a residual stream; `index` are the tokens they belong to.

    Raises:
        UserError: an activation is NaN or infinite.
    """
    width = sae.spec.d_sae
    rows = max(1, ELEMENTS // width)
    for start in range(0, len(x), rows):
        with torch.no_grad():
            acts = sae.encode(x[start : start + rows].to(sae.W_enc.device)).float().flatten()
        where = acts.nonzero().squeeze(1)
        value = acts[where].cpu().numpy()
        if not np.isfinite(value).all():
            raise UserError(f"{sae.spec.name}: its activations hold NaN or infinite numbers")
        row, feature = np.divmod(where.cpu().numpy(), width)
        yield Firings(index[start + row], feature, rounded(value))


@torch.no_grad()
def narrow(sae: SAE, features: np.ndarray) -> SAE:
    """The same SAE with some of its features only, in the order given."""
    chosen = torch.from_numpy(np.ascontiguousarray(features)).to(sae.W_enc.device)
    part = SAE.create(replace(sae.spec, d_sae=len(features)), dtype=sae.W_enc.dtype, device=sae.W_enc.device)
    whole = sae.file_tensors()
    part.load_file_tensors_({name: _cut(name, tensor, chosen) for name, tensor in whole.items()})
    return part


def _cut(name: str, tensor: Tensor, chosen: Tensor) -> Tensor:
    if name == "b_dec":
        return tensor
    return tensor[:, chosen] if name == "W_enc" else tensor[chosen]


def digest(sae: SAE) -> str:
    """sha256 of an SAE's architecture, layer and weights."""
    found = hashlib.sha256(f"{sae.spec.architecture} {sae.spec.layer} {sae.spec.apply_b_dec_to_input}".encode())
    for name, tensor in sorted(sae.file_tensors().items()):
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def hashed(values: np.ndarray, *salts: int) -> np.ndarray:
    """A fixed pseudo-random permutation of 64-bit numbers for each salt (the finaliser of splitmix64), as uint64."""
    x = values.astype(np.uint64)
    for salt in salts:
        x = x ^ hashed(np.array([salt]))
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
