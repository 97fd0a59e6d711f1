"""The dense step in parts of a batch, and the memory it works in."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the fast step needs numba: pip install 'chatsae[fast]'")

from chatsae.sae import choose, dense, workspace
from step_samples import CASES, assert_same_state, fresh, go


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n", "most"), [(512, 1024), (512, 256), (513, 256), (5, 2)])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(case, n, most, monkeypatch):
    """512 and 256 tokens of 8 bytes: with rows that are longer than the batch."""
    monkeypatch.setattr(choose, "CROSSOVER", -1.0)  # always dense
    monkeypatch.setattr(dense, "_MOST", most)
    seen = []
    monkeypatch.setattr(
        dense._Batch, "add", lambda batch, x, add=dense._Batch.add: seen.append(len(x)) or add(batch, x)
    )
    plain, ours = (fresh(*case, step=kind, shift=0.0) for kind in ("plain", "auto"))
    for k in range(3):
        (a,), (b,) = go(plain, k, k + 1, n), go(ours, k, k + 1, n)
        for name in ("total", "mse", "sparsity", "l0"):
            assert getattr(b, name).item() == pytest.approx(getattr(a, name).item(), rel=1e-12, abs=1e-15), name
        assert b.firings.equal(a.firings)
    assert_same_state(plain, ours, 1e-12)
    parts = seen[: len(seen) // 3]
    assert sum(parts) == n
    assert max(parts) <= most
    assert max(parts) - min(parts) <= 1


def test_large_arrays_begin_at_huge_pages():
    for size in (3, 2**17, 2**20 + 1):
        array = workspace.memory(size, np.float64)
        assert array.shape == (size,)
        assert array.dtype == np.float64
        assert size < 2**16 or array.ctypes.data % 2**21 == 0
        array[:] = 1
        assert array.sum() == size


def test_the_work_space_keeps_what_fits():
    one = workspace.space("test_a", (3, 5), np.float32)
    assert workspace.space("test_a", (3, 5), np.float32) is one
    assert workspace.space("test_a", 7, np.float32).base is one.base  # the same memory
    more = workspace.space("test_a", (30, 50), np.float32)
    assert more.shape == (30, 50)
    one[:] = 4
    more[:] = 5
    assert (one == 4).all()
    rows = workspace.grown("test_b", 10, 0, np.float32)
    rows[:4] = 9
    assert (workspace.grown("test_b", 10**6, 4, np.float32)[:4] == 9).all()
    workspace.release("test_")
    assert workspace.space("test_a", (30, 50), np.float32) is not more
    workspace.release("test_")


@pytest.mark.parametrize(("columns", "longer"), [(512, 16), (511, 0), (8, 0), (1024, 16)])
def test_rows_that_collide_in_the_cache_are_longer_than_the_product(columns, longer):
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((6, 4), (4, columns)))
    array, tensor = workspace.product("test_p", a, b, np.float32, padded=True)
    assert array.shape == (6, columns + longer)
    assert tensor.equal(torch.from_numpy(array[:, :columns]))
    assert torch.allclose(tensor, a @ b, atol=1e-6)
    _, same = workspace.product("test_p", a, b, np.float32, add=tensor)
    assert same is tensor
    assert torch.allclose(tensor, 2 * (a @ b), atol=1e-6)
    workspace.release("test_")
