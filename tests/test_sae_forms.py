"""Both architectures in both forms: what they compute, and their gradients against explicit twins."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.sae import SAE, JumpReLUSAE
from chatsae.sae.jumprelu import _JumpReLU, _Step
from sae_samples import spec

FORMS = [(a, f, b) for a in ("standard", "jumprelu") for f in ("paper", "v6") for b in (False, True)]


@torch.no_grad()
def random_sae(architecture: str, form: str, apply_b_dec: bool, d_in: int = 5, seed: int = 0) -> SAE:
    """float64, everything random, thresholds and bandwidth wide enough that all kernels have entries."""
    s = replace(
        spec(d_in, architecture=architecture, form=form, factor=3),
        apply_b_dec_to_input=apply_b_dec,
        bandwidth=0.5,
        coefficient=0.7,
    )
    sae = SAE.create(s, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for p in sae.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    if isinstance(sae, JumpReLUSAE):
        sae.set_threshold_(torch.rand(s.d_sae, generator=generator, dtype=torch.float64))
    return sae


def x_like(sae: SAE, n: int = 7) -> torch.Tensor:
    return torch.randn(n, sae.spec.d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def twin(sae: SAE, x: torch.Tensor, scale: float) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss and gradients written out from the definitions, entry by entry where the straight-through estimator acts."""
    n, c, jump = len(x), sae.spec.coefficient * scale, sae.spec.architecture == "jumprelu"
    theta = sae.threshold if isinstance(sae, JumpReLUSAE) else torch.zeros(sae.spec.d_sae, dtype=x.dtype)
    inside = x - sae.b_dec if sae.spec.apply_b_dec_to_input else x
    z = inside @ sae.W_enc + sae.b_enc
    acts = torch.where(z > theta, z, 0)
    error = acts @ sae.W_dec + sae.b_dec - x
    weights = sae.W_dec.norm(dim=1) if sae.spec.form == "v6" else torch.ones_like(theta)
    penalty = (z > theta).double().sum() if jump else (acts * weights).sum()
    values = {"mse": error.pow(2).sum().item() / n, "sparsity": c * penalty.item() / n}

    d_out = 2 * error / n
    d_acts = d_out @ sae.W_dec.T + (0 if jump else c / n * weights)
    d_z = d_acts * (z > theta)
    grads = {"W_dec": acts.T @ d_out, "W_enc": inside.T @ d_z, "b_enc": d_z.sum(0), "b_dec": d_out.sum(0)}
    if sae.spec.apply_b_dec_to_input:
        grads["b_dec"] -= (d_z @ sae.W_enc.T).sum(0)
    if not jump and sae.spec.form == "v6":
        grads["W_dec"] += c / n * acts.sum(0)[:, None] * sae.W_dec / weights[:, None]
    if jump:
        d_theta = torch.zeros_like(theta)
        for i in range(n):
            for f in range(sae.spec.d_sae):
                if abs(z[i, f] - theta[f]) < sae.spec.bandwidth / 2:
                    d_theta[f] -= (theta[f] * d_acts[i, f] + c / n) / sae.spec.bandwidth
        paper = sae.spec.form == "paper"
        grads["log_threshold" if paper else "raw_threshold"] = d_theta * theta if paper else d_theta
    return values, grads


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), FORMS)
def test_loss_and_gradients_are_those_of_the_definitions(architecture, form, apply_b_dec):
    sae = random_sae(architecture, form, apply_b_dec)
    x = x_like(sae)
    losses = sae.loss(x, 0.5)
    losses.total.backward()
    values, grads = twin(sae, x, 0.5)
    assert losses.mse.item() == pytest.approx(values["mse"], rel=1e-14)
    assert losses.sparsity.item() == pytest.approx(values["sparsity"], rel=1e-14)
    assert losses.total.item() == pytest.approx(values["mse"] + values["sparsity"], rel=1e-14)
    assert set(grads) == {name for name, _ in sae.named_parameters()}
    for name, parameter in sae.named_parameters():
        assert grads[name].abs().max() > 1e-3, f"{name}: the test would show nothing"
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), FORMS)
def test_gradients_are_finite_differences_where_the_loss_is_smooth(architecture, form, apply_b_dec):
    sae = random_sae(architecture, form, apply_b_dec)
    x = x_like(sae)
    smooth = [n for n, _ in sae.named_parameters() if "threshold" not in n]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        named = {f"sae.{n}": v for n, v in zip(smooth, values, strict=True)}
        return torch.func.functional_call(_Total(sae), named, x)

    assert torch.autograd.gradcheck(loss, [getattr(sae, n).detach().requires_grad_() for n in smooth], eps=1e-7)


class _Total(torch.nn.Module):
    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae.loss(x, 1.0).total


def test_the_kernel_and_the_jump_exclude_their_edges():
    theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    edge = torch.tensor([[0.75], [0.7500001], [1.0], [1.2499999], [1.25]], dtype=torch.float64, requires_grad=True)
    acts = _JumpReLU.apply(edge, theta, 0.5)
    assert acts.flatten().tolist() == [0, 0, 0, 1.2499999, 1.25]
    acts.sum().backward()
    assert theta.grad.item() == -(1.0 / 0.5) * 3
    assert edge.grad.flatten().tolist() == [0, 0, 0, 1, 1]
    theta.grad = edge.grad = None
    gate = _Step.apply(edge, theta, 0.5)
    assert gate.flatten().tolist() == [0, 0, 0, 1, 1]
    gate.sum().backward()
    assert theta.grad.item() == -(1.0 / 0.5) * 3
    assert edge.grad is None


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 4), st.sampled_from(FORMS))
def test_any_leading_shape_gives_the_same_rows(d_in, n, m, form):
    sae = random_sae(*form, d_in=d_in).requires_grad_(False)
    x = torch.randn(n, m, d_in, dtype=torch.float64)
    acts, out = sae.encode(x), sae(x)
    assert acts.shape == (n, m, sae.spec.d_sae)
    assert out.shape == x.shape
    assert (acts >= 0).all()
    for i in range(n):
        for j in range(m):
            torch.testing.assert_close(acts[i, j], sae.encode(x[i, j]), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(out[i, j], sae.decode(sae.encode(x[i, j])), rtol=1e-12, atol=1e-12)


def test_half_precision_input_is_raised_to_the_dtype_of_the_sae():
    sae = random_sae("standard", "paper", False).float().requires_grad_(False)
    x = torch.randn(3, 5).bfloat16()
    assert sae.encode(x).dtype == torch.float32
    assert sae.encode(x).equal(sae.encode(x.float()))


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), FORMS)
def test_counts_of_a_batch(architecture, form, apply_b_dec):
    sae = random_sae(architecture, form, apply_b_dec)
    x = x_like(sae)
    losses = sae.loss(x, 1.0)
    active = sae.encode(x) > 0
    assert losses.firings.tolist() == active.sum(0).tolist()
    assert losses.fired.tolist() == active.any(0).tolist()
    assert losses.l0.item() == pytest.approx(active.sum().item() / len(x))
    assert 0 < losses.l0 < sae.spec.d_sae


def test_without_warm_up_there_is_no_penalty():
    for architecture, form, apply_b_dec in FORMS:
        losses = random_sae(architecture, form, apply_b_dec).loss(torch.randn(4, 5, dtype=torch.float64), 0.0)
        assert losses.sparsity.item() == 0
        assert losses.total.item() == losses.mse.item() > 0


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_rows_are_of_unit_norm_before_each_step_in_the_paper_form_only(architecture):
    paper, v6 = random_sae(architecture, "paper", False), random_sae(architecture, "v6", False)
    before, direction = v6.W_dec.detach().clone(), paper.W_dec.detach().clone()
    with torch.no_grad():
        paper.W_dec[3] = 0
    paper.before_step_()
    v6.before_step_()
    norms = paper.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(15, dtype=torch.float64).index_fill(0, torch.tensor(3), 0))
    assert torch.cosine_similarity(paper.W_dec[4], direction[4], dim=0).item() == pytest.approx(1)
    assert v6.W_dec.equal(before)


def test_a_threshold_below_zero_acts_as_zero_and_is_raised_before_the_next_step():
    sae = random_sae("jumprelu", "v6", False)
    assert isinstance(sae, JumpReLUSAE)
    with torch.no_grad():
        sae.raw_threshold.fill_(-5.0)
    x = x_like(sae)
    hidden_pre = x @ sae.W_enc + sae.b_enc
    assert (hidden_pre < 0).any()
    assert sae.encode(x).equal(hidden_pre.relu())
    sae.before_step_()
    assert (sae.raw_threshold == 0).all()
    sae.loss(x, 1.0).total.backward()
    assert (sae.raw_threshold.grad < 0).any()  # descent can lift it from zero again


def test_parameters_are_registered_as_sae_lens_does():
    orders = {
        ("standard", "paper"): ["b_enc", "W_dec", "W_enc", "b_dec"],
        ("jumprelu", "paper"): ["log_threshold", "b_enc", "W_dec", "W_enc", "b_dec"],
        ("standard", "v6"): ["b_dec", "W_dec", "W_enc", "b_enc"],
        ("jumprelu", "v6"): ["b_dec", "W_dec", "W_enc", "b_enc", "raw_threshold"],
    }
    for (architecture, form), names in orders.items():
        assert [n for n, _ in random_sae(architecture, form, False).named_parameters()] == names
