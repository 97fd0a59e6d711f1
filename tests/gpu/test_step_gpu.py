"""The GPU step on a GPU: `pytest -m gpu` where there is one. What needs none is in test_sae_step_triton.py."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the GPU step needs triton: pip install 'chatsae[gpu]'")

from chatsae.sae import Losses, StepState, choose_gpu, init_sae, make_state, train_step
from chatsae.sae.choose_gpu import GpuSwitch
from sae_samples import spec

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA GPU", allow_module_level=True)
CASES = [(a, f, b) for a in ("standard", "jumprelu") for f in ("paper", "v6") for b in (False, True)]
ROUTES = ["dense", "stored", "folded"]


def fresh(
    architecture="standard", form="paper", apply_b_dec=False, *, step="auto", dtype=torch.float64, d_in=48, **options
) -> StepState:
    s = replace(
        spec(d_in, architecture=architecture, form=form, factor=8),
        apply_b_dec_to_input=apply_b_dec,
        bandwidth=0.2,
        init_threshold=0.15,
        coefficient=0.3,
    )
    sae = init_sae(s, torch.Generator().manual_seed(0), dtype)
    with torch.no_grad():
        sae.b_enc.fill_(-0.6 if form == "paper" else -0.1)
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    return make_state(sae.to("cuda"), step=step, **options)


def force(state: StepState, route: str, monkeypatch) -> None:
    assert isinstance(state.switch, GpuSwitch)
    monkeypatch.setattr(choose_gpu, "FOLD_UP_TO", 0 if route == "stored" else 10**6)
    monkeypatch.setattr(GpuSwitch, "_coming", lambda self: self.dense)
    state.switch.dense = route == "dense"


def go(state: StepState, first: int, last: int, n: int = 40) -> list[Losses]:
    d_in, W = state.sae.spec.d_in, state.sae.W_enc
    batches = [torch.randn(n, d_in, generator=torch.Generator().manual_seed(k)).to(W) for k in range(first, last)]
    torch.cuda.synchronize()
    return [
        train_step(
            state,
            x,
            lr=3e-3 * min(1.0, (k + 1) / 20),
            sparsity_scale=min(k / 30, 1.0),
            clip_grad_norm=1.0,
        )
        for k, x in zip(range(first, last), batches, strict=True)
    ]


def assert_same(a: StepState, b: StepState, tolerance: float) -> None:
    left, right = a.state_dict(), b.state_dict()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            off = (value - right[key]).abs().max().item()
            assert off <= tolerance * max(1.0, value.abs().max().item()), f"{key}: {off}"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CASES)
def test_200_steps_in_float64_are_those_of_the_plain_step(case, route, monkeypatch):
    """With CUDA graphs from the fourth step on."""
    plain, fast = fresh(*case, step="plain"), fresh(*case)
    force(fast, route, monkeypatch)
    for a, b in zip(go(plain, 0, 200), go(fast, 0, 200), strict=True):
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-12)
        assert b.firings.equal(a.firings)
    assert_same(plain, fast, 1e-11)
    assert isinstance(fast.switch, GpuSwitch)
    assert len(fast.switch.gpu._graphs._made) == 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_in_float32(case, route, monkeypatch):
    plain, fast = fresh(*case, step="plain", dtype=torch.float32), fresh(*case, dtype=torch.float32)
    force(fast, route, monkeypatch)
    for a, b in zip(go(plain, 0, 200), go(fast, 0, 200), strict=True):
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-4)


@pytest.mark.parametrize("route", ROUTES)
def test_graphs_change_no_bit(route, monkeypatch):
    graphed, eager = (fresh("jumprelu", "paper", True, dtype=torch.float32) for _ in range(2))
    assert isinstance(eager.switch, GpuSwitch)
    eager.switch.gpu._graphs._capture = None
    for state in (graphed, eager):
        force(state, route, monkeypatch)
    for a, b in zip(go(graphed, 0, 30), go(eager, 0, 30), strict=True):
        assert a.total.equal(b.total)
    assert_same(graphed, eager, 0.0)


@pytest.mark.parametrize("graphs", [True, False])
def test_the_host_never_waits(graphs):
    state = fresh("jumprelu", "v6", True, dtype=torch.float32)
    assert isinstance(state.switch, GpuSwitch)
    if not graphs:
        state.switch.gpu._graphs._capture = None
    go(state, 0, 20)
    x = torch.randn(40, 48, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            train_step(state, x, lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_batch_that_overflows_the_lists_and_one_token_and_none_active(monkeypatch):
    for shift in (-50.0, 50.0):
        for route in ROUTES:
            plain, fast = (fresh("standard", "v6", True, step=step) for step in ("plain", "auto"))
            force(fast, route, monkeypatch)
            for state in (plain, fast):
                state.sae.b_enc.data.fill_(shift)
            for k, n in enumerate((40, 1, 7)):
                (a,), (b,) = go(plain, k, k + 1, n), go(fast, k, k + 1, n)
                assert b.total.item() == pytest.approx(a.total.item(), rel=1e-12)
                assert b.firings.equal(a.firings)
            assert_same(plain, fast, 1e-11)


@pytest.mark.parametrize("route", ROUTES)
def test_input_that_is_not_a_number_changes_nothing(route, monkeypatch):
    state = fresh(dtype=torch.float32)
    force(state, route, monkeypatch)
    go(state, 0, 6)
    before = {k: v.clone() for k, v in state.state_dict().items() if k.startswith(("sae.", "adam."))}
    x = torch.randn(40, 48, device="cuda")
    for batch in (x.clone().fill_(math.nan), x):
        assert train_step(state, batch, lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0).total.isnan()
    for key, value in before.items():
        torch.testing.assert_close(state.state_dict()[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 5e-3), ("bf16", 3e-2)])
def test_precisions_of_the_encoder(precision, tolerance):
    exact, rounded = (fresh(dtype=torch.float32, encoder_precision=p) for p in ("float32", precision))
    losses = [go(state, 0, 100) for state in (exact, rounded)]
    assert not losses[0][0].total.equal(losses[1][0].total)
    for a, b in zip(*losses, strict=True):
        assert b.total.item() == pytest.approx(a.total.item(), rel=tolerance)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_checkpoint_goes_on_bit_for_bit():
    whole = fresh("jumprelu", "v6", dtype=torch.float32)
    go(whole, 0, 25)
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in whole.state_dict().items()}
    resumed = fresh("jumprelu", "v6", dtype=torch.float32)
    resumed.load_state_dict(saved)
    for state in (whole, resumed):
        go(state, 25, 60)
    assert_same(whole, resumed, 0.0)


def test_a_step_of_a_wide_sae_keeps_to_its_memory(monkeypatch):
    """Weights, moments, gradients, and per batch little beyond the encoder's output."""
    state = fresh(dtype=torch.float32, d_in=1024)
    state.sae.b_enc.data.fill_(-3.0)
    force(state, "stored", monkeypatch)
    n, weights = 4096, 1024 * 8192 * 4
    go(state, 0, 1, n)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    x = torch.randn(n, 1024, device="cuda")
    train_step(state, x, lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)
    encoder = n * 8192 * 4
    assert torch.cuda.max_memory_allocated() - held < 2 * weights + 1.2 * encoder + 6 * x.nbytes
