"""SAEs in training and their batches, for the tests of the fast step."""

from dataclasses import replace

import torch

from chatsae.sae import SAE, Losses, StepState, init_sae, make_state, train_step
from sae_samples import spec

CASES = [(a, f, b) for a in ("standard", "jumprelu") for f in ("paper", "v6") for b in (False, True)]


def fresh(
    architecture="standard",
    form="paper",
    apply_b_dec=False,
    *,
    d_in=12,
    factor=4,
    step="fast",
    dtype=torch.float64,
    shift=-0.1,
    bandwidth=0.2,
) -> StepState:
    """An SAE of `half_active` in a step."""
    sae = half_active(
        architecture, form, apply_b_dec, d_in=d_in, factor=factor, dtype=dtype, shift=shift, bandwidth=bandwidth
    )
    return make_state(sae, step=step)


@torch.no_grad()
def half_active(
    architecture: str,
    form: str,
    apply_b_dec: bool,
    *,
    d_in: int,
    factor: int,
    dtype: torch.dtype,
    shift: float,
    bandwidth: float = 0.2,
) -> SAE:
    """An SAE a few features of which are active on random inputs, and some inside the bandwidth of their threshold."""
    s = replace(
        spec(d_in, architecture=architecture, form=form, factor=factor),
        apply_b_dec_to_input=apply_b_dec,
        bandwidth=bandwidth,
        init_threshold=0.15,
        coefficient=0.3,
    )
    sae = init_sae(s, torch.Generator().manual_seed(0), dtype)
    sae.b_enc.fill_(shift)
    sae.b_dec.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    return sae


def x_at(k: int, n: int = 24, d_in: int = 12, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(k), dtype=dtype)


def go(
    state: StepState, first: int, last: int, n: int = 24, lr_warmup: int = 20, sparsity_warmup: int = 30
) -> list[Losses]:
    d_in, dtype = state.sae.spec.d_in, state.sae.W_enc.dtype
    return [
        train_step(
            state,
            x_at(k, n, d_in, dtype),
            lr=3e-3 * min(1.0, (k + 1) / lr_warmup),
            sparsity_scale=min(k / sparsity_warmup, 1.0),
            clip_grad_norm=1.0,
        )
        for k in range(first, last)
    ]


def assert_same_state(a: StepState, b: StepState, tolerance: float) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert {*left} - {"dense"} == {*right} - {"dense"}
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            off = (value - right[key]).abs().max().item()
            assert off <= tolerance * max(1.0, value.abs().max().item()), f"{key}: {off}"
            assert value.dtype == right[key].dtype
