"""Which pairs the fast step finds, and what memory it takes."""

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="the fast step needs numba: pip install 'chatsae[fast]'")

from chatsae.errors import UserError
from chatsae.sae import pairs, train_step, workspace
from step_samples import CASES, fresh, go, x_at


def screened(patch: pytest.MonkeyPatch) -> None:
    """Go through bfloat16 whatever the CPU and however little it pays."""
    patch.setattr(pairs, "fast_bfloat16", lambda: True)
    patch.setattr(pairs, "_SCREENED", 1.0)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(32, 90),
    st.integers(32, 90),
    st.integers(32, 150),
    st.sampled_from([0.0, 1.0, 30.0]),
    st.sampled_from([1e-12, 1.0, 1e12]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(0, 10**6),
)
def test_the_screen_misses_no_pair_and_keeps_exact_activations(n, d_in, d_sae, common, scale, bandwidth, seed):
    """Also where all inputs share a large part, as massive activations have it."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d_in, generator=generator) + common) * scale
    rows = torch.randn(d_sae, d_in, generator=generator)
    product = x.double() @ rows.double().T
    b_enc = -product.quantile(0.95, dim=0).float()
    act = pairs.Activation(b_enc.numpy(), torch.full((d_sae,), 0.1 * scale).numpy(), bandwidth * scale)
    with pytest.MonkeyPatch.context() as patch:
        screened(patch)
        patch.setattr(pairs, "_LEAST", 50)
        patch.setattr(pairs, "_BLOCK", 50)
        found = pairs.find(x.numpy(), rows.numpy(), act, limit=1.0, room=3)
    assert found is not None
    dense = torch.zeros(n, d_sae)
    tokens = torch.arange(n).repeat_interleave(torch.from_numpy(found.start).diff())
    features = torch.from_numpy(found.features[: found.total]).long()
    dense[tokens, features] = torch.from_numpy(found.acts[: found.total])
    seen = torch.zeros(n, d_sae, dtype=torch.bool)
    seen[tokens, features] = True
    z = product + b_enc
    rounding = 1e-5 * (x.double().norm(dim=1)[:, None] * rows.double().norm(dim=1) + b_enc.abs())
    edge = 0.1 * scale - (bandwidth * scale / 2)
    assert seen[z > edge + rounding].all()
    assert not seen[(z < edge - rounding) | (z > 1e300)].any()
    active = z > 0.1 * scale + rounding
    assert ((dense - z).abs() <= rounding)[active].all()
    assert 0.01 < active.double().mean() < 0.07


@pytest.mark.parametrize("case", CASES)
def test_the_screen_changes_nothing_but_the_order_of_sums(case, monkeypatch):
    made = {"d_in": 40, "dtype": torch.float32, "shift": -1.0 if case[1] == "paper" else -0.1}
    without = go(fresh(*case, **made), 0, 40, n=48)
    screened(monkeypatch)
    with_screen = go(fresh(*case, **made), 0, 40, n=48)
    assert 1 < without[0].l0.item() < 80
    for a, b in zip(without, with_screen, strict=True):
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-4)


def test_a_block_with_too_many_pairs_for_the_screen_is_multiplied_in_full(monkeypatch):
    screened(monkeypatch)
    monkeypatch.setattr(pairs, "_SCREENED", 0.08)
    plain, fast = (fresh(d_in=40, dtype=torch.float32, step=step, shift=0.0) for step in ("plain", "fast"))
    a, b = go(plain, 0, 5, n=48)[-1], go(fast, 0, 5, n=48)[-1]
    assert b.firings.sum() > 0.3 * 48 * 160
    assert b.total.item() == pytest.approx(a.total.item(), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_the_screen_lets_nothing_pass_that_is_not_a_number(bad, where, monkeypatch):
    screened(monkeypatch)
    state, x = fresh(d_in=40, dtype=torch.float32, shift=-2.0), x_at(0, 48, 40, torch.float32)
    target = x if where == "x" else getattr(state.sae, where).detach()
    target[(0,) * (target.dim() - 1) + (7,)] = bad
    if where == "b_enc" and bad < 0:  # a feature that is switched off
        train_step(state, x, lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)
        return
    with pytest.raises(UserError, match=r"is (nan|inf) at step 1"):
        train_step(state, x, lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)


def test_memory_grows_with_the_active_pairs_and_not_with_all(monkeypatch):
    """Not even the output of the encoder is held, but a block of it."""
    n, d_in, d_sae, block = 400, 4, 4000, 64
    monkeypatch.setattr(pairs, "_LEAST", block)
    monkeypatch.setattr(pairs, "_BLOCK", block * d_in)
    monkeypatch.setattr(workspace, "_spaces", workspace._Spaces())
    state = fresh(d_in=d_in, factor=d_sae // d_in, shift=-0.12)
    (losses,) = go(state, 0, 1, n)
    tracemalloc.start()
    try:
        go(state, 1, 2, n)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    active = losses.l0.item() * n
    assert 4000 < active < 0.02 * n * d_sae
    held = sum(array.nbytes for array in workspace._spaces.arrays.values())
    most = 100 * active + 20 * n * block + 300 * d_sae + 100 * n * d_in + 8 * n * n
    print(f"{active:.0f} pairs, held {held}, peak of a step {peak}, allowed {most:.0f}, encoder {8 * n * d_sae}")
    assert held + peak < most < 0.35 * 8 * n * d_sae


def test_what_the_dense_step_held_is_given_back(monkeypatch):
    monkeypatch.setattr(workspace, "_spaces", workspace._Spaces())
    state = fresh(step="auto", shift=0.0)
    go(state, 0, 2)
    assert any(name.startswith("dense") for name, _ in workspace._spaces.arrays)
    with torch.no_grad():
        state.sae.b_enc.fill_(-1.5)
    go(state, 2, 4)
    assert not any(name.startswith("dense") for name, _ in workspace._spaces.arrays)
