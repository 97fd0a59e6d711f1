"""GSNR from squared matrix products: equal to per-sample autograd, and right where the answer is known."""

import math
from dataclasses import asdict, replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatsae.sae import SAE, JumpReLUSAE
from chatsae.sae import gsnr as module
from chatsae.sae.gsnr import Gsnr, GsnrSums, gsnr
from sae_samples import spec

FORMS = [(a, f, b) for a in ("standard", "jumprelu") for f in ("paper", "v6") for b in (False, True)]


@torch.no_grad()
def random_sae(
    architecture: str, form: str, apply_b_dec: bool, *, d_in: int = 4, factor: int = 3, seed: int = 0
) -> SAE:
    """float64, everything random; the kernel of a threshold is wide enough that every one has a gradient."""
    own = spec(d_in, architecture=architecture, form=form, factor=factor)
    sae = SAE.create(
        replace(own, apply_b_dec_to_input=apply_b_dec, bandwidth=1.5, coefficient=0.7), dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if isinstance(sae, JumpReLUSAE):
        sae.set_threshold_(torch.rand(sae.spec.d_sae, generator=generator, dtype=torch.float64))
    return sae


def tokens(n: int, d_in: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_sample(sae: SAE, samples: list[Tensor], scale: float) -> dict[str, Tensor]:
    """The gradient of the training loss on every sample alone, by autograd: [n, ...] for each parameter."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in sae.named_parameters()}
    for x in samples:
        gradients = torch.autograd.grad(sae.loss(x, scale).total, list(sae.parameters()))
        for rows, gradient in zip(found.values(), gradients, strict=True):
            rows.append(gradient)
    return {name: torch.stack(rows) for name, rows in found.items()}


def by_hand(gradients: dict[str, Tensor]) -> tuple[dict[str, dict[str, float | int | None]], float, float]:
    """Per parameter and of all, written out with the textbook mean and variance."""
    parameters, every, signal, noise = {}, [], 0.0, 0.0
    for name, g in gradients.items():
        mean, variance = g.mean(0), g.var(0)
        varies = variance > 1e-12 * g.square().mean(0)
        corrected = torch.where(varies, mean.square() - variance / len(g), mean.square())
        ratios = (corrected / variance)[varies]
        own = float(corrected.sum()), float(variance[varies].sum())
        parameters[name] = {
            "mean": float(ratios.mean()) if len(ratios) else None,
            "median": float(ratios.median()) if len(ratios) else None,
            "total": own[0] / own[1] if own[1] else None,
            "n_varying": len(ratios),
            "n_silent": int((g == 0).all(0).sum()),
            "n_constant": int((~varies & (g != 0).any(0)).sum()),
        }
        every.append(ratios)
        signal, noise = signal + own[0], noise + own[1]
    return parameters, float(torch.cat(every).mean()), signal / noise


def check(found: Gsnr, gradients: dict[str, Tensor], n: int) -> None:
    parameters, value, total = by_hand(gradients)
    assert found.n == n
    assert found.value == pytest.approx(value, rel=1e-10, abs=1e-12)
    assert found.total == pytest.approx(total, rel=1e-10, abs=1e-12)
    assert found.by_parameter.keys() == parameters.keys()
    for name, expected in parameters.items():
        assert asdict(found.by_parameter[name]) == pytest.approx(expected, rel=1e-10, abs=1e-12), name


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), FORMS)
@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 9), d_in=st.integers(1, 5), factor=st.integers(1, 4), seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
def test_moments_are_those_of_per_sample_autograd(architecture, form, apply_b_dec, n, d_in, factor, seed, scale):
    sae = random_sae(architecture, form, apply_b_dec, d_in=d_in, factor=factor, seed=seed)
    x = tokens(n, d_in, seed)
    gradients = per_sample(sae, list(x.split(1)), scale)
    moments = {name: (first, second) for name, first, second in module._moments(sae, x, scale)}
    assert moments.keys() == gradients.keys()
    for name, g in gradients.items():
        first, second = moments[name]
        size = float(g.square().sum(0).max())  # 1e-12 of the largest entry: smaller ones are differences
        torch.testing.assert_close(first, g.sum(0), rtol=1e-12, atol=1e-12 * (1 + size**0.5), msg=name)
        torch.testing.assert_close(second, g.square().sum(0), rtol=1e-12, atol=1e-12 * (1e-300 + size), msg=name)


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), FORMS)
def test_gsnr_is_that_of_per_sample_autograd(architecture, form, apply_b_dec):
    sae, x = random_sae(architecture, form, apply_b_dec), tokens(200)
    gradients = per_sample(sae, list(x.split(1)), 0.3)
    assert all(g.square().sum() > 0 for g in gradients.values()), "the test would show nothing"
    check(gsnr(sae, x, sparsity_scale=0.3), gradients, 200)


@pytest.mark.parametrize("unit", ["sequence", "step"])
def test_a_sample_can_be_a_sequence(unit):
    sae, samples = random_sae("jumprelu", "v6", True), list(tokens(60).split([7, 1, 20, 12, 20]))
    sums = GsnrSums(sae, unit=unit, sparsity_scale=0.5)
    for x in samples:
        sums.add(x)
    found = sums.result()
    assert found.unit == unit
    check(found, per_sample(sae, samples, 0.5), 5)


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(0, 50), max_size=4), rows=st.integers(1, 60), two=st.booleans())
def test_batches_chunks_and_merging_change_nothing(cuts, rows, two):
    sae, x = random_sae("standard", "v6", False), tokens(50)
    whole = gsnr(sae, x)
    bounds = [0, *sorted(cuts), 50]
    parts = [GsnrSums(sae), GsnrSums(sae)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ACTIVATIONS", rows * sae.spec.d_sae)
        patch.setattr(module, "_ENTRIES", rows)
        for i, (start, stop) in enumerate(pairwise(bounds)):
            parts[i % 2 if two else 0].add(x[start:stop])
        found = GsnrSums.merged(parts).result()
    assert (found.n, found.unit) == (50, "token")
    assert found.value == pytest.approx(whole.value, rel=1e-10)
    assert found.total == pytest.approx(whole.total, rel=1e-10)
    for name, own in whole.by_parameter.items():
        assert asdict(found.by_parameter[name]) == pytest.approx(asdict(own), rel=1e-9, abs=1e-12)


def test_merging_leaves_the_parts_as_they_are():
    sae, parts = random_sae("standard", "paper", False), []
    for seed in range(2):
        parts.append(GsnrSums(sae))
        parts[-1].add(tokens(9, seed=seed))
    before = parts[0].result()
    both = GsnrSums.merged(parts).result()
    assert parts[0].result() == before
    assert both.n == 18
    assert both.value != before.value


def test_across_parts_the_signal_is_what_they_share():
    sae, samples = random_sae("standard", "v6", False), list(tokens(60).split([7, 1, 20, 12, 20]))
    parts = []
    for x in samples:
        parts.append(GsnrSums(sae))
        parts[-1].add(x)
    part = torch.repeat_interleave(torch.arange(5), torch.tensor([7, 1, 20, 12, 20]))
    other = part[:, None] != part
    found = GsnrSums.across([GsnrSums(sae), *parts])
    ratios, signal, noise = [], 0.0, 0.0
    for g in per_sample(sae, list(tokens(60).split(1)), 1.0).values():
        flat = g.flatten(1)
        shared = torch.stack([column.outer(column)[other].mean() for column in flat.T])
        varies = flat.var(0) > 1e-12
        ratios.append((shared / flat.var(0))[varies])
        signal, noise = signal + float(shared.sum()), noise + float(flat.var(0).sum())
    assert found.n == 60
    assert found.value == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-9)
    assert found.total == pytest.approx(signal / noise, rel=1e-9)
    assert GsnrSums.across(parts[:1]).reason == "1 independent parts; two are needed"
    assert GsnrSums.across([]).reason == "0 independent parts; two are needed"


def test_across_parts_what_a_part_has_in_common_is_no_signal():
    """Tokens of a dialogue share a random shift: independent samples it is not, and the plain estimate is fooled."""
    generator = torch.Generator().manual_seed(0)
    sae = dead_sae(2000)
    parts = [GsnrSums(sae) for _ in range(8)]
    for sums in parts:
        shift = torch.randn(2000, generator=generator, dtype=torch.float64)
        sums.add(shift + torch.randn(16, 2000, generator=generator, dtype=torch.float64))
    assert GsnrSums.merged(parts).result().value > 0.05
    assert abs(GsnrSums.across(parts).value) < 0.01


def dead_sae(d_in: int, dtype: torch.dtype = torch.float64) -> SAE:
    """Its only feature never fires, so that a token's only gradient is −2x, that of b_dec."""
    sae = SAE.create(replace(spec(d_in), d_sae=1), dtype=dtype)
    with torch.no_grad():
        sae.b_enc.fill_(-1)
    return sae


def only_b_dec(samples: Tensor) -> Gsnr:
    return gsnr(dead_sae(samples.shape[1], samples.dtype), samples)


def test_a_known_mean_and_variance_give_their_ratio():
    x = 3 + 2 * torch.randn(4000, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = only_b_dec(x)
    assert found.value == pytest.approx(9 / 4, rel=0.005)  # 500 entries of 4,000 samples: a standard error of 0.002
    assert found.total == pytest.approx(9 / 4, rel=0.005)
    assert found.by_parameter["W_enc"].n_silent == 500


def test_a_step_of_independent_tokens_has_its_tokens_times_the_gsnr():
    x = 0.3 + torch.randn(8000, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = GsnrSums(dead_sae(500), unit="step")
    for batch in x.split(8):
        steps.add(batch)
    found = steps.result()
    assert (found.n, found.unit) == (1000, "step")
    assert found.value == pytest.approx(8 * only_b_dec(x).value, rel=0.01)
    assert found.value == pytest.approx(8 * 0.09, rel=0.02)


def test_pure_noise_scores_nothing():
    n, entries = 128, 20_000
    x = torch.randn(n, entries, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    naive = x.mean(0).square() / x.var(0)
    assert float(naive.mean()) == pytest.approx(1 / n, rel=0.05)
    error = float(naive.std()) / entries**0.5
    assert abs(only_b_dec(x).value - 2 / n**2) < 3 * error  # the ratio's own bias, (GSNR + 1/n) · 2/n
    assert abs(only_b_dec(x).value) < 0.05 / n


@pytest.mark.parametrize("n", [2, 5, 8])
def test_numerator_and_denominator_are_unbiased(n):
    """Over all 2ⁿ equally likely draws of ±1 the corrected signal is zero on average and the noise the true one."""
    draws = torch.tensor(list(product((1.0, -1.0), repeat=n)), dtype=torch.float64).T
    mean, variance = draws.mean(0), draws.var(0)
    assert float((mean.square() - variance / n).mean()) == pytest.approx(0, abs=1e-15)
    assert only_b_dec(draws).total == pytest.approx(0, abs=1e-14)
    constant = int((variance == 0).sum())
    assert only_b_dec(draws).by_parameter["b_dec"].n_constant == constant == 2


def test_a_gradient_that_never_varies_is_counted_apart():
    found = only_b_dec(torch.full((10, 3), 2.0))
    assert (found.value, found.total, found.reason) == (None, None, "no entry of the gradient varies")
    assert (found.by_parameter["b_dec"].n_constant, found.by_parameter["b_dec"].n_varying) == (3, 0)
    mixed = torch.full((10, 2), 2.0)
    mixed[:, 0] = torch.arange(10.0)
    assert only_b_dec(mixed).value == pytest.approx((4.5**2 - 55 / 6 / 10) / (55 / 6))
    assert only_b_dec(mixed).by_parameter["b_dec"].n_constant == 1


def test_what_cannot_be_computed_has_a_reason():
    sae = random_sae("standard", "paper", False)
    assert gsnr(sae, tokens(1)) == Gsnr(None, None, 1, "token", {}, "1 samples; a variance needs two")
    assert gsnr(sae, tokens(0)).reason == GsnrSums(sae).result().reason == "0 samples; a variance needs two"
    broken = tokens(5)
    broken[2, 1] = math.nan
    assert gsnr(sae, broken).reason == "the gradient is not finite"
    assert gsnr(sae, broken).value is None


def test_half_and_single_precision_agree_with_double():
    sae, x = random_sae("jumprelu", "paper", False), tokens(300)
    sae.to(torch.bfloat16)
    half, double = gsnr(sae, x.bfloat16()), gsnr(sae.double(), x.bfloat16().double())
    assert sae.W_enc.dtype == torch.float64
    assert half.value == pytest.approx(double.value, rel=1e-4)
    assert half.total == pytest.approx(double.total, rel=1e-4)


def test_it_leaves_the_sae_and_its_gradients_alone():
    sae, x = random_sae("jumprelu", "v6", True), tokens(20).requires_grad_()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    assert gsnr(sae, x).value is not None
    for name, p in sae.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    assert x.grad is None
