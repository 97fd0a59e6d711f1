"""Float32 products on the tile registers of AMX, beside float64 and beside torch's float32."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="the fast step needs numba: pip install 'chatsae[fast]'")

from chatsae.sae import choose, products, workspace
from step_samples import CASES, fresh, go

tiles = pytest.mark.skipif(not products.tiles(), reason="this CPU has no AMX, or Linux does not let us use it")
sides = st.integers(1, 6).map(lambda panels: 32 * panels)


def matrix(rng: np.random.Generator, rows: int, columns: int, *, turned: bool, longer: int, wide: bool) -> torch.Tensor:
    """Random numbers as they lie in a step: transposed or not, with rows that are longer than what counts of them."""
    shape = (columns, rows) if turned else (rows, columns)
    array = rng.standard_normal((shape[0], shape[1] + longer), dtype=np.float32)
    if wide:
        array *= np.float32(2.0) ** rng.integers(-60, 20, array.shape).astype(np.float32)
    tensor = torch.from_numpy(array)[:, : shape[1]]
    return tensor.T if turned else tensor


@tiles
@settings(max_examples=60, deadline=None)
@given(
    m=sides, k=sides, n=sides, a_turned=st.booleans(), b_turned=st.booleans(), longer=st.sampled_from([0, 16, 3]),
    wide=st.booleans(), add=st.booleans(), block=st.sampled_from([(1024, 2**17), (64, 2**12), (32, 2**14)]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_products_are_as_exact_as_float32(m, k, n, a_turned, b_turned, longer, wide, add, block, seed):
    """Every layout, sums in several blocks, numbers of 80 binary orders of magnitude; any number of threads."""
    rng = np.random.default_rng(seed)
    a = matrix(rng, m, k, turned=a_turned, longer=longer, wide=wide)
    b = matrix(rng, k, n, turned=b_turned, longer=longer, wide=wide)
    before = matrix(rng, m, n, turned=False, longer=longer, wide=wide)
    exact, size = a.double() @ b.double(), a.abs().double() @ b.abs().double()
    if add:
        exact, size = exact + before, size + before.abs()
    outs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_COLUMNS", block[0])
        patch.setattr(products, "_BLOCK", block[1])
        patch.setattr(products, "_RATE", 1)  # small work goes to several threads, too
        threads = torch.get_num_threads()
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            outs.append(before.clone())
            products.on_tiles(a, b, outs[-1], add=add)
        torch.set_num_threads(threads)
    assert outs[0].equal(outs[1])
    assert outs[0].equal(outs[2])
    assert ((outs[0] - exact).abs() <= (k + 4) * 2.0**-24 * size).all()


@tiles
def test_what_is_left_out_of_a_product_is_below_its_last_digit():
    """One number per row and column, at the same depth: nothing hides behind the rounding of a sum."""
    a, b = torch.zeros(512, 32), torch.zeros(32, 512)
    a[:, 5], b[5] = torch.rand(2, 512, generator=torch.Generator().manual_seed(0)) + 1
    out, exact = torch.empty(512, 512), a.double() @ b.double()
    products.on_tiles(a, b, out)
    assert ((out - exact).abs() <= 1.5 * 2.0**-23 * exact).all()


@tiles
@pytest.mark.parametrize("k", [128, 256, 2048])
def test_products_are_nearer_to_the_exact_ones_than_torchs(k):
    rng = np.random.default_rng(k)
    a, b = (matrix(rng, *shape, turned=False, longer=0, wide=False) for shape in ((256, k), (k, 128)))
    exact, out = a.double() @ b.double(), torch.empty(256, 128)
    products.on_tiles(a, b, out)
    ours, torchs = ((result - exact).square().mean() for result in (out, a @ b))
    assert ours < torchs


@tiles
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_and_column_alone(bad):
    rng = np.random.default_rng(0)
    a, b = (matrix(rng, *shape, turned=False, longer=0, wide=False) for shape in ((64, 96), (96, 64)))
    clean, out = torch.empty(64, 64), torch.empty(64, 64)
    products.on_tiles(a, b, clean)
    a[5, 77] = bad
    b[3, 40] = bad
    products.on_tiles(a, b, out)
    finite = torch.ones(64, 64, dtype=torch.bool)
    finite[5] = finite[:, 40] = False
    assert out.isfinite().equal(finite)
    assert out[finite].equal(clean[finite])


@tiles
def test_what_tiles_do_not_fit_goes_to_torch(monkeypatch):
    assert products.fits_tiles(torch.float32, 256, 512, 256)
    assert not products.fits_tiles(torch.float64, 256, 512, 256)
    assert not any(products.fits_tiles(torch.float32, *sides) for sides in ((240, 1024, 512), (256, 496, 1024)))
    assert not products.fits_tiles(torch.float32, 64, 64, 64)  # packing would take longer than the product
    a, b = torch.randn(256, 1024)[:, ::2], torch.randn(512, 256)
    monkeypatch.delattr(products, "on_tiles")
    _, out = products.product("test_tiles", a, b, np.float32)
    assert out.equal(a @ b)
    workspace.release("test_tiles")


def test_the_sparse_step_pays_further_where_products_are_slow():
    for n, d_in in ((128, 256), (1024, 256), (4096, 896)):
        assert choose.crossover(n, d_in, tiles=True) < choose.crossover(n, d_in, tiles=False) < 0.2
    assert choose.crossover(1024, 256, tiles=True) > choose.crossover(1024, 896, tiles=True)


@tiles
@pytest.mark.parametrize("case", CASES)
def test_the_dense_step_on_tiles_is_the_same_but_for_rounding(case, monkeypatch):
    """96 and 70 tokens: those that are no multiple of 32 go to torch."""
    monkeypatch.setattr(choose, "CROSSOVER", -1.0)  # always dense
    monkeypatch.setattr(products, "_LEAST", 1)
    calls, on_tiles = [], products.on_tiles
    monkeypatch.setattr(products, "on_tiles", lambda *args, **more: calls.append(0) or on_tiles(*args, **more))
    made = {"dtype": torch.float32, "step": "auto", "d_in": 64, "shift": 0.0}
    ours, torchs = fresh(*case, **made), fresh(*case, **made)
    some = go(ours, 0, 10, n=96) + go(ours, 10, 12, n=70)
    assert len(calls) == 50
    monkeypatch.setattr(products, "tiles", lambda: False)
    for a, b in zip(some, go(torchs, 0, 10, n=96) + go(torchs, 10, 12, n=70), strict=True):
        assert a.total.item() == pytest.approx(b.total.item(), rel=1e-5)
        assert a.l0.item() == pytest.approx(b.l0.item(), rel=1e-3)
    for one, two in zip(ours.sae.parameters(), torchs.sae.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5)


def test_a_cpu_without_amx_asks_nobody_for_permission(monkeypatch):
    monkeypatch.setattr(products, "_AMX", False)
    monkeypatch.delattr(products.ctypes, "CDLL")
    assert not products.tiles.__wrapped__()


def test_matrices_of_any_size_begin_where_a_line_of_the_cache_does():
    for size in (1, 100, 10**5, 10**6):
        assert workspace.memory(size, np.float32).ctypes.data % 64 == 0
