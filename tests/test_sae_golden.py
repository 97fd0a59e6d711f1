"""The paper form against what sae_lens 5.10.7 computed (recorded by tests/parity/golden_v5.py)."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from chatsae.sae import SAE, StepState, geometric_median, init_sae, make_state, train_step
from chatsae.training.schedule import lr_at, sparsity_scale_at
from parity_inputs import BETAS, CASES, DECAY, LR, LR_END, SPARSITY_WARMUP, STEPS, WARMUP, batch, machine

GOLDEN = Path(__file__).parent / "golden" / "sae_lens_5.10.7.safetensors"


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def follow(case, dtype: torch.dtype, tensors) -> tuple[StepState, torch.Tensor]:
    sae = SAE.create(case.spec("paper"), dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    with torch.no_grad():
        sae.W_enc.copy_(tensors[f"init/{name}/W_enc"])
        sae.W_dec.copy_(tensors[f"init/{name}/W_dec"])
        if case.architecture == "jumprelu":
            sae.set_threshold_(case.init_threshold)
    state = make_state(sae, betas=BETAS, fused=False)
    losses = []
    for step in range(STEPS):
        lr = lr_at(step, total_steps=STEPS, lr=LR, lr_end=LR_END, warmup_steps=WARMUP, decay_steps=DECAY)
        scale = sparsity_scale_at(step, warmup_steps=SPARSITY_WARMUP)
        losses.append(train_step(state, batch(step, dtype), lr=lr, sparsity_scale=scale, clip_grad_norm=1.0).total)
    return state, torch.stack(losses)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64_follows_5_10_7(case, golden, one_thread):
    tensors, _ = golden
    state, losses = follow(case, torch.float64, tensors)
    expected = tensors[f"{case.name}/float64/losses"]
    worst = ((losses - expected).abs() / expected).max().item()
    weights = {n: relative(p.detach(), tensors[f"{case.name}/float64/{n}"]) for n, p in state.sae.named_parameters()}
    print(f"{case.name}: loss {worst:.1e}, " + ", ".join(f"{n} {v:.1e}" for n, v in weights.items()))
    assert worst <= 1e-12
    assert max(weights.values()) <= 1e-12
    assert state.steps_since_fired.equal(tensors[f"{case.name}/float64/steps_since_fired"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32_follows_5_10_7(case, golden, one_thread):
    """To the bit on the kind of machine that recorded it; another BLAS rounds otherwise."""
    tensors, facts = golden
    state, losses = follow(case, torch.float32, tensors)
    expected = tensors[f"{case.name}/float32/losses"]
    worst = ((losses - expected).abs() / expected).max().item()
    print(f"{case.name}: {int((losses == expected).sum())} of {STEPS} losses bit-equal, otherwise within {worst:.1e}")
    if facts["machine"] == machine():
        assert losses.equal(expected)
        for name, parameter in state.sae.named_parameters():
            assert parameter.equal(tensors[f"{case.name}/float32/{name}"])
    assert worst <= 1e-5  # noise of one ulp on the initial weights moves a loss by up to 2.5e-6


def test_thresholds_moved_in_the_recorded_runs(golden):
    """Else they would show nothing about the straight-through estimator."""
    tensors, _ = golden
    for case in CASES:
        if case.architecture == "jumprelu":
            moved = tensors[f"{case.name}/float64/log_threshold"].exp() - case.init_threshold
            assert (moved != 0).sum() > 30


def test_initial_weights_are_those_of_5_10_7(golden):
    tensors, _ = golden
    for case in CASES:
        torch.manual_seed(0)
        sae = init_sae(case.spec("paper"))
        assert sae.W_enc.equal(tensors["init/float32/W_enc"])
        assert relative(sae.W_dec.detach(), tensors["init/float32/W_dec"]) <= 2e-7
        assert [name for name, _ in sae.named_parameters()][-4:] == ["b_enc", "W_dec", "W_enc", "b_dec"]


def test_geometric_median_is_that_of_5_10_7(golden):
    tensors, _ = golden
    assert relative(geometric_median(batch(0, torch.float32, rows=500)), tensors["geometric_median"]) <= 1e-6
