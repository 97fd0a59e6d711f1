"""Initial weights, the geometric median, and grids that start equal."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.errors import UserError
from chatsae.sae import JumpReLUSAE, build_grid, geometric_median, init_sae, set_b_dec_
from sae_samples import spec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_paper_weights_are_kaiming_uniform_with_unit_rows():
    s = spec(32, architecture="jumprelu", form="paper", factor=8)
    sae = init_sae(replace(s, init_threshold=0.001), seeded())
    bound = (6 / s.d_sae) ** 0.5  # torch takes dimension 1 for the fan-in, as sae_lens 5 let it
    assert 0.99 * bound < sae.W_enc.abs().max() <= bound
    assert sae.W_enc.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(s.d_sae))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert isinstance(sae, JumpReLUSAE)
    torch.testing.assert_close(sae.threshold.detach(), torch.full((s.d_sae,), 0.001), rtol=1e-6, atol=0)


def test_v6_weights_are_tied_with_short_rows():
    s = spec(32, architecture="jumprelu", form="v6", factor=8)
    sae = init_sae(replace(s, init_threshold=0.01), seeded())
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.full((s.d_sae,), 0.1))
    assert sae.W_enc.equal(sae.W_dec.T)
    assert sae.W_enc.is_contiguous()
    assert isinstance(sae, JumpReLUSAE)
    assert sae.threshold.equal(torch.full((s.d_sae,), 0.01))


def test_float64_on_request():
    assert {p.dtype for p in init_sae(spec(4), seeded(), torch.float64).parameters()} == {torch.float64}


def test_saes_of_one_shape_and_form_start_equal_whatever_else_is_in_the_grid():
    kinds = [(layer, factor, a) for layer in (1, 2) for factor in (2, 4) for a in ("standard", "jumprelu")]
    specs = [spec(8, architecture=a, layer=layer, factor=factor) for layer, factor, a in kinds]
    full, lone = build_grid(specs, seed=5), build_grid(specs[-1:], seed=5)
    assert list(full) == [s.name for s in specs]
    assert full["L2-4x-jumprelu"].W_enc.equal(lone["L2-4x-jumprelu"].W_enc)
    assert full["L1-4x-standard"].W_dec.equal(full["L2-4x-jumprelu"].W_dec)
    assert not full["L1-4x-standard"].W_enc.equal(build_grid(specs, seed=6)["L1-4x-standard"].W_enc)


def test_a_grid_with_one_name_twice_is_refused():
    with pytest.raises(ValueError, match="'L1-2x-standard'"):
        build_grid([spec(8), spec(8)], seed=0)


def test_the_median_of_a_majority_is_its_point():
    points = torch.cat([torch.tensor([[3.0, -1.0, 2.0]]).expand(60, 3), torch.randn(40, 3, generator=seeded()) * 100])
    torch.testing.assert_close(geometric_median(points), torch.tensor([3.0, -1.0, 2.0]), rtol=0, atol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 100))
def test_the_median_of_a_symmetric_set_is_its_centre(n, d, seed):
    half = torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)
    centre = torch.randn(d, generator=seeded(seed + 1), dtype=torch.float64)
    median = geometric_median(centre + torch.cat([half, -half]))
    torch.testing.assert_close(median, centre, rtol=0, atol=1e-9)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 100))
def test_a_weight_of_k_counts_a_point_k_times(d, k, seed):
    points = torch.randn(6, d, generator=seeded(seed), dtype=torch.float64)
    weights = torch.tensor([k, 1, 1, 2, 1, 1], dtype=torch.float64)
    repeated = points.repeat_interleave(weights.long(), dim=0)
    torch.testing.assert_close(geometric_median(points, weights=weights), geometric_median(repeated))


def test_no_point_nearby_has_a_smaller_sum_of_distances():
    points = torch.randn(200, 4, generator=seeded(), dtype=torch.float64).exp()
    median = geometric_median(points, max_iterations=1000)
    best = (points - median).norm(dim=1).sum()
    for step in torch.randn(50, 4, generator=seeded(1), dtype=torch.float64):
        assert (points - median - 1e-3 * step).norm(dim=1).sum() > best
    assert (points - points.mean(0)).norm(dim=1).sum() > best * 1.01


def test_identical_rows_and_one_row():
    row = torch.tensor([[1.5, -2.0, 0.25]])
    torch.testing.assert_close(geometric_median(row.expand(50, 3)), row[0])
    assert geometric_median(row).equal(row[0])


def test_massive_rows_do_not_move_it():
    points = torch.randn(2000, 8, generator=seeded())
    clean = geometric_median(points)
    points[:40] = 3e4
    assert (geometric_median(points) - clean).norm() < 0.1
    assert points.mean(0).norm() > 1000
    half = geometric_median(points.bfloat16())
    assert half.dtype == torch.float32
    assert (half - clean).norm() < 0.1


def test_b_dec_goes_where_the_spec_says():
    sample = torch.randn(100, 4, generator=seeded()) + 3
    at_median = init_sae(spec(4))
    set_b_dec_(at_median, sample)
    assert at_median.b_dec.equal(geometric_median(sample))
    at_zero = init_sae(replace(spec(4), b_dec_init="zeros"))
    set_b_dec_(at_zero, sample)
    assert not at_zero.b_dec.any()


def test_nan_in_the_sample_is_refused():
    sample = torch.zeros(10, 4)
    sample[3, 2] = torch.nan
    with pytest.raises(UserError, match=r"L1-2x-standard.*NaN or inf"):
        set_b_dec_(init_sae(spec(4)), sample)
