"""Which pairs the fast step finds, the products it finds them by, and what memory it takes."""

import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="the fast step needs numba: pip install 'chatsae[fast]'")

from chatsae.sae import pairs, workspace
from step_samples import fresh, go


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 90),
    st.integers(1, 96),
    st.integers(20, 160),
    st.sampled_from([0.0, 1.0, 30.0]),
    st.sampled_from([1e-12, 1.0, 1e12]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(0, 10**6),
)
def test_no_active_pair_is_missed(n, d_in, d_sae, common, scale, bandwidth, seed):
    """Also where all inputs share a large part, as massive activations have it, and the search takes several blocks."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d_in, generator=generator) + common) * scale
    rows = torch.randn(d_sae, d_in, generator=generator)
    product = x.double() @ rows.double().T
    b_enc = -product.quantile(0.95, dim=0).float()
    act = pairs.Activation(b_enc.numpy(), torch.full((d_sae,), 0.1 * scale).numpy(), bandwidth * scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_LEAST", 16)
        patch.setattr(pairs, "_BLOCK", 16 * d_in)
        patch.setattr(workspace, "_spaces", workspace._Spaces())
        found = pairs.find(x.numpy(), rows.numpy(), act, limit=1.0, room=3)
    assert found is not None
    dense, seen = torch.zeros(n, d_sae), torch.zeros(n, d_sae, dtype=torch.bool)
    tokens = torch.arange(n).repeat_interleave(torch.from_numpy(found.start).diff())
    features = torch.from_numpy(found.features[: found.total]).long()
    dense[tokens, features] = torch.from_numpy(found.acts[: found.total])
    seen[tokens, features] = True
    z = product + b_enc
    rounding = 1e-5 * (x.double().norm(dim=1)[:, None] * rows.double().norm(dim=1) + b_enc.abs())
    edge = 0.1 * scale - (bandwidth * scale / 2)
    assert seen[z > edge + rounding].all()
    assert not seen[z < edge - rounding].any()
    active = z > 0.1 * scale + rounding
    assert ((dense - z).abs() <= rounding)[active].all()


LAYOUTS = {
    "rows": lambda r, c: torch.randn(r, c),
    "columns": lambda r, c: torch.randn(c, r).T,
    "padded rows": lambda r, c: torch.randn(r, c + 16)[:, :c],
    "padded columns": lambda r, c: torch.randn(c, r + 16)[:, :r].T,
}


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_a_product_of_any_layout_takes_no_more_than_three_times_that_of_torch(left, right, padded, add):
    """oneDNN's reference loop, which some strides fall into, takes a thousand times as long.

    CPU time of this thread, the least of several runs: what others do on the machine does not count.
    """
    m, k, n = 512, 256, 512  # 2,048-byte rows, which are padded; some milliseconds
    a, b = LAYOUTS[left](m, k), LAYOUTS[right](k, n)
    out, (plain_a, plain_b) = torch.zeros(m, n), (a.contiguous(), b.contiguous())
    total = torch.zeros(m, n) if add else None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours = _least(lambda: workspace.product("test_product", a, b, np.float32, padded=padded, add=total))
        theirs = _least(lambda: torch.mm(plain_a, plain_b, out=out))
        result = workspace.product("test_product", a, b, np.float32, padded=padded, add=None)[1]
    finally:
        torch.set_num_threads(threads)
        workspace.release("test_product")
    assert torch.allclose(result, a @ b, atol=1e-3)
    assert ours < 3 * theirs


def _least(run, times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return min(seconds)


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
