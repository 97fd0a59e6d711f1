"""Cases and batches of the comparisons with sae_lens: the same numbers on every machine, from seeds alone."""

import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chatsae.config import SAESpec

D_IN, D_SAE, N = 16, 40, 32
STEPS, WARMUP, DECAY, SPARSITY_WARMUP = 300, 15, 60, 10
LR, LR_END = 1e-3, 1e-4
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Case:
    """What differs between the runs that are compared."""

    name: str
    architecture: str
    coefficient: float
    bandwidth: float = 0.001
    init_threshold: float = 0.001
    apply_b_dec_to_input: bool = False

    def spec(self, form: str, d_in: int = D_IN, d_sae: int = D_SAE) -> SAESpec:
        return SAESpec(
            name=self.name,
            architecture=self.architecture,
            form=form,
            layer=0,
            d_in=d_in,
            d_sae=d_sae,
            coefficient=self.coefficient,
            lr=LR,
            bandwidth=self.bandwidth,
            init_threshold=self.init_threshold,
            apply_b_dec_to_input=self.apply_b_dec_to_input,
        )


CASES = (
    Case("standard", "standard", 0.3),
    Case("standard-b_dec", "standard", 0.3, apply_b_dec_to_input=True),
    Case("jumprelu", "jumprelu", 0.01),  # the paper's bandwidth and threshold
    Case("jumprelu-wide", "jumprelu", 0.3, bandwidth=0.2, init_threshold=0.1, apply_b_dec_to_input=True),
)


def batch(step: int, dtype: torch.dtype, rows: int = N, d_in: int = D_IN) -> Tensor:
    """Activations [rows, d_in] with an offset, unequal scales and massive rows.

    Uniform numbers and elementwise arithmetic only: neither a libm nor a BLAS of another machine changes a bit.
    """
    x = np.random.default_rng([7, step]).random((rows, d_in)) - 0.5
    x *= 0.25 + np.arange(d_in) / d_in
    x += 0.5 * np.random.default_rng(11).random(d_in)
    x[::16, 3] += 40.0
    return torch.from_numpy(x).to(dtype)


def machine() -> str:
    """The torch and the kind of CPU: float32 results are promised to the bit between equal ones only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("vendor_id", "cpu family", "model", "cache size")
    facts = dict(tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    cpu = " ".join(facts.get(key, "?") for key in wanted) if facts else platform.machine()
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {cpu}"
