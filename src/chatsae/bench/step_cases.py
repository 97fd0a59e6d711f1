"""What `chatsae bench sae-step` measures: sizes, activations, and weights on which a given number of features fires."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.config import Architecture, SAESpec
from chatsae.errors import UserError
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae
from chatsae.sae.jumprelu import JumpReLUSAE

Dense = Literal["dense"]

LR = 1e-9  # Adam moves every weight by about this much a step: all of its work, and the L0 stays what it is
_COEFFICIENT = {"standard": 1.0, "jumprelu": 0.01}
_D_IN = {"cpu": (256, 896), "cuda": (256, 896, 3584)}
_EXPANSION_FACTORS, _BATCH_SIZES, _L0 = (8, 16), (128, 1024, 4096), ("64", "16", "256", "dense")
_NOISE = 0.3  # standard deviation, beside a signal of 1 in an eighth of the dimensions
_POOL = 2048  # tokens at least, in 2 to 16 batches
_CHUNK = 2048  # features calibrated at a time


@dataclass(frozen=True, slots=True)
class Case:
    """One SAE and one batch size; `l0` features are active on a token, half of all when it is "dense"."""

    architecture: Architecture
    d_in: int
    expansion_factor: int
    batch_size: int
    l0: int | Dense

    @property
    def d_sae(self) -> int:
        return self.d_in * self.expansion_factor

    @property
    def active(self) -> int:
        """Features that are to be active on a token."""
        return self.d_sae // 2 if self.l0 == "dense" else self.l0

    @property
    def weights(self) -> int:
        """Elements of W_enc and W_dec."""
        return 2 * self.d_in * self.d_sae

    @property
    def name(self) -> str:
        l0 = "dense" if self.l0 == "dense" else f"L0 {self.l0}"
        return f"{self.architecture} {self.d_in} x {self.d_sae}, B {self.batch_size:,}, {l0}"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The cases asked for: every combination of what is given. With nothing given, a few that take some minutes."""

    full: bool = False
    architectures: Sequence[str] = ()
    d_in: Sequence[int] = ()
    expansion_factors: Sequence[int] = ()
    batch_sizes: Sequence[int] = ()
    l0: Sequence[str] = ()
    rounds: int = 0
    """Turns of everyone in each case; 0: 9, with `full` 5."""

    def turns(self) -> int:
        """How often everyone's turn comes in each case."""
        return self.rounds or (5 if self.full else 9)

    def cases(self, device: str) -> list[Case]:
        """In the order they are measured, on a "cpu" or on "cuda".

        Raises:
            UserError: a value cannot be used, or none of the combinations has that many features.
        """
        self._check()
        given = (self.architectures, self.d_in, self.expansion_factors, self.batch_sizes, self.l0)
        if not self.full and not any(given):
            return _few(device)
        known: tuple[Architecture, ...] = get_args(Architecture)
        end = None if self.full else 1  # of the defaults
        found = [
            Case(architecture, d_in, factor, batch_size, "dense" if l0 == "dense" else int(l0))
            for d_in in self.d_in or _D_IN[device][:end]
            for factor in self.expansion_factors or _EXPANSION_FACTORS[:end]
            for batch_size in self.batch_sizes or _BATCH_SIZES[:end]
            for architecture in known
            if architecture in (self.architectures or known)
            for l0 in self.l0 or _L0[:end]
        ]
        fitting = [case for case in found if case.active <= case.d_sae // 2]
        if not fitting:
            raise UserError(f"l0: expected at most half of the features of an SAE, got {', '.join(self.l0)}")
        return fitting

    def _check(self) -> None:
        for name in self.architectures:
            if name not in get_args(Architecture):
                raise UserError(f"architectures: expected {' or '.join(get_args(Architecture))}, got {name!r}")
        for field in ("d_in", "expansion_factors", "batch_sizes"):
            for value in getattr(self, field):
                if value < 1:
                    raise UserError(f"{field}: expected whole numbers of at least 1, got {value}")
        for l0 in self.l0:
            if l0 != "dense" and not (l0.isdecimal() and int(l0) > 0):
                raise UserError(f"l0: expected numbers of active features or dense, got {l0!r}")
        if self.rounds < 0:
            raise UserError(f"rounds: expected a number of rounds, or 0 for the default, got {self.rounds}")


def _few(device: str) -> list[Case]:
    small, large = (896, 3584) if device == "cuda" else (256, 896)
    return [
        *(Case("standard", small, 8, batch_size, l0) for batch_size in (128, 1024) for l0 in (64, "dense")),
        Case("standard", large, 8, 128, 64),
        *(Case("jumprelu", small, 8, batch_size, 64) for batch_size in (128, 1024)),
        Case("jumprelu", large, 8, 128, 64),
    ]


@dataclass(frozen=True)
class Start:
    """What everyone begins with: the weights as sae_lens names them, and the batches that come round."""

    case: Case
    spec: SAESpec
    tensors: dict[str, Tensor]
    batches: list[Float[Tensor, "N D"]]


def make_start(case: Case, device: str, seed: int = 0) -> Start:
    """Weights of sae_lens' initialisation with a b_enc on which `case.active` features fire on a token."""
    generator = torch.Generator().manual_seed(seed)
    spec = SAESpec(
        name="bench",
        architecture=case.architecture,
        form="v6",
        layer=0,
        d_in=case.d_in,
        d_sae=case.d_sae,
        coefficient=_COEFFICIENT[case.architecture],
        lr=LR,
        apply_b_dec_to_input=True,
    )
    count = min(max(_POOL // case.batch_size, 2), 16)
    tokens = activations(count * case.batch_size, case.d_in, generator).to(device)
    sae = init_sae(spec, generator).to(device)
    calibrate_(sae, tokens, case.active)
    tensors = {name: tensor.clone() for name, tensor in sae.file_tensors().items()}
    return Start(case, spec, tensors, list(tokens.split(case.batch_size)))


def activations(count: int, d_in: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
    """Random vectors of norm sqrt(d_in), most of them in an eighth of the dimensions."""
    rank = max(d_in // 8, 1)
    signal = torch.randn(count, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)
    vectors = signal / rank**0.5 + _NOISE * torch.randn(count, d_in, generator=generator)
    return vectors * (d_in**0.5 / vectors.norm(dim=1, keepdim=True))


@torch.no_grad()
def calibrate_(sae: SAE, tokens: Float[Tensor, "N D"], active: int) -> None:
    """Set b_enc so that `active` features are active on a token on average, and every feature equally often.

    Equally often is what touches the most rows of the weights: with fewer, the sparse step would have less to do.
    """
    n, d_sae = len(tokens), sae.spec.d_sae
    bounds = torch.arange(d_sae + 1, dtype=torch.float64) * (active * n / d_sae)
    firings = bounds.floor().diff().long()  # of each feature; the sum is exact
    for first in range(0, d_sae, _CHUNK):
        part = slice(first, first + _CHUNK)
        wanted = firings[part].to(tokens.device)[:, None]
        hidden_pre = sae.W_enc[:, part].T @ (tokens - sae.b_dec).T
        top = hidden_pre.topk(min(int(wanted.max()) + 1, n), dim=1).values
        top = torch.cat([top[:, :1] + 1, top], dim=1)
        least, next_one = top.gather(1, wanted), top.gather(1, wanted + 1)
        sae.b_enc[part] = -(least + next_one)[:, 0] / 2
    if isinstance(sae, JumpReLUSAE):
        sae.b_enc.add_(sae.threshold)
