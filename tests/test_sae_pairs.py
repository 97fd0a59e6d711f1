"""Which pairs the fast step finds, and what memory it takes."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="the fast step needs numba: pip install 'chatsae[fast]'")

from chatsae.errors import UserError
from chatsae.sae import kernels_pairs, pairs, products, train_step, workspace
from step_samples import CASES, fresh, go, x_at

tiles = pytest.mark.skipif(not products.tiles(), reason="this CPU has no AMX, or Linux does not let us use it")


def screened(patch: pytest.MonkeyPatch) -> list[bool]:
    """Go through bfloat16 however little it pays; whether each search did."""
    patch.setattr(pairs, "_SCREENED", 1.0)
    seen, screen = [], pairs._Search.screened
    patch.setattr(pairs._Search, "screened", lambda search: seen.append(screen(search)) or seen[-1])
    return seen


@tiles
@settings(deadline=None, max_examples=40)
@given(
    st.integers(32, 90),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([32, 64, 96, 160]),
    st.sampled_from([0.0, 1.0, 30.0]),
    st.sampled_from([1e-12, 1.0, 1e12]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 10**6),
)
def test_the_screen_misses_no_pair_and_keeps_exact_activations(n, d_in, d_sae, common, scale, bandwidth, threads, seed):
    """Also where all inputs share a large part, as massive activations have it, and where there was too little room."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d_in, generator=generator) + common) * scale
    rows = torch.randn(d_sae, d_in, generator=generator)
    product = x.double() @ rows.double().T
    b_enc = -product.quantile(0.95, dim=0).float()
    act = pairs.Activation(b_enc.numpy(), torch.full((d_sae,), 0.1 * scale).numpy(), bandwidth * scale)
    with pytest.MonkeyPatch.context() as patch:
        searches, before = screened(patch), torch.get_num_threads()
        patch.setattr(pairs, "_CACHED", 64)
        patch.setattr(pairs, "_FIRST_ROOM", 0.001)
        patch.setattr(pairs, "NARROW_RATE", 1)
        patch.setattr(workspace, "_spaces", workspace._Spaces())
        torch.set_num_threads(threads)
        found = pairs.find(x.numpy(), rows.numpy(), act, limit=1.0, room=3)
        torch.set_num_threads(before)
    assert found is not None
    assert searches == [True]
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


@tiles
@pytest.mark.parametrize("value", [1 + 2.0**-8 - 2.0**-20, 1 + 2.0**-8])
def test_the_screen_allows_for_the_worst_that_rounding_can_do(value):
    """Around the middle between two numbers of bfloat16, every rounding goes the same way, in x and in W."""
    x = rows = np.full((32, 64), value, np.float32)
    z = float(x[0].astype(float) @ rows[0])
    for theta, active in ((z - 1e-3, 32 * 32), (z + 1e-3, 0)):
        act = pairs.Activation(np.zeros(32, np.float32), np.full(32, theta, np.float32), 0.0)
        found = pairs.find(x, rows, act, limit=1.0, room=3)
        assert found is not None
        assert found.total == active


@tiles
@pytest.mark.parametrize("n", [32, 45, 64])
def test_the_screen_passes_what_may_be_active_and_little_else(n, monkeypatch):
    """Beside exact products: nothing is missed, and what passes in vain lies within the bound."""
    rng = np.random.default_rng(n)
    x, rows = (rng.standard_normal(shape, dtype=np.float32) for shape in ((n, 96), (64, 96)))
    narrow, norms = np.empty((64, 96), np.uint16), np.empty((2, 64), np.float32)
    kernels_pairs.narrow(0, 64, rows, narrow, norms)
    rounded = torch.from_numpy(narrow).view(torch.bfloat16).float().numpy()
    assert np.array_equal(rounded, torch.from_numpy(rows).bfloat16().float().numpy())
    assert norms[0] == pytest.approx(np.linalg.norm(rows, axis=1), rel=1e-5)
    assert norms[1] == pytest.approx(np.linalg.norm(rows - rounded, axis=1), rel=1e-5)

    monkeypatch.setattr(pairs, "_CACHED", 64 * 96)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    search = pairs._Search(x, rows, pairs.Activation(np.zeros(64, np.float32), np.full(64, 15.0, np.float32), 0.0))
    assert search.screened()
    z, (flags,) = (
        x.astype(float) @ rows.T.astype(float),
        workspace.space("narrow_flags", (1, 64, n + -n % 32), np.uint8),
    )
    flags = flags.T
    bound = 2.0**-7 * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    assert flags[:n][z > 15].all()
    assert not flags[:n][z < 15 - bound].any()
    assert not flags[n:].any()
    assert search.total == (z > 15).sum()
    assert 0.02 < (z > 15).mean() < flags[:n].mean() < 1.5 * (z > 15).mean()


@tiles
def test_a_batch_with_too_many_pairs_for_the_screen_is_multiplied_in_full(monkeypatch):
    searches = screened(monkeypatch)
    monkeypatch.setattr(pairs, "_SCREENED", 0.08)
    plain, fast = (fresh(d_in=64, dtype=torch.float32, step=step, shift=0.0) for step in ("plain", "fast"))
    a, b = go(plain, 0, 5, n=48)[-1], go(fast, 0, 5, n=48)[-1]
    assert searches == 5 * [False]
    assert b.firings.sum() > 0.3 * 48 * 256
    assert b.total.item() == pytest.approx(a.total.item(), rel=1e-5)


@tiles
@pytest.mark.parametrize("case", CASES)
def test_the_screen_changes_nothing_but_the_order_of_sums(case, monkeypatch):
    made = {"d_in": 64, "dtype": torch.float32, "shift": -1.0 if case[1] == "paper" else -0.1}
    searches = screened(monkeypatch)
    with_screen = go(fresh(*case, **made), 0, 40, n=48)
    assert searches == 40 * [True]
    monkeypatch.setattr(pairs, "tiles", lambda: False)
    without = go(fresh(*case, **made), 0, 40, n=48)
    assert len(searches) == 40
    assert 1 < without[0].l0.item() < 80
    for a, b in zip(without, with_screen, strict=True):
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-4)


@tiles
@pytest.mark.parametrize("active", [0.07, 0.13, 0.3])
def test_the_number_of_threads_changes_no_bit(active, monkeypatch):
    """Also where the pairs that may be active are those of a few features, and one thread alone would give up."""
    monkeypatch.setattr(pairs, "NARROW_RATE", 1)
    monkeypatch.setattr(pairs, "_CACHED", 32 * 64)
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, rows = (torch.randn(size, 64, generator=generator).numpy() for size in (64, 256))
    b_enc = np.full(256, -100, np.float32)
    b_enc[:64] = -np.quantile(x @ rows[:64].T, 1 - 4 * active, axis=0) if active < 0.25 else 100
    act, seen, ways = pairs.Activation(b_enc, np.zeros(256, np.float32), 0.0), [], screened(monkeypatch)
    monkeypatch.setattr(pairs, "_SCREENED", 0.1)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = pairs.find(x, rows, act, limit=1.0, room=3)
        assert found is not None
        seen.append((found.features[: found.total].tobytes(), found.acts[: found.total].tobytes()))
    torch.set_num_threads(before)
    assert ways == 3 * [active == 0.07]
    assert seen[0] == seen[1] == seen[2]


@tiles
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_the_screen_lets_nothing_pass_that_is_not_a_number(bad, where, monkeypatch):
    screened(monkeypatch)
    state, x = fresh(d_in=64, dtype=torch.float32, shift=-2.0), x_at(0, 48, 64, torch.float32)
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
