"""The training step, its counts, and a state that goes on from a file bit for bit."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatsae.errors import UserError
from chatsae.sae import SAE, StepState, init_sae, make_state, step, train_step
from sae_samples import spec

FORMS = [(a, f) for a in ("standard", "jumprelu") for f in ("paper", "v6")]


def fresh(architecture="standard", form="paper", *, d_in=6, dtype=torch.float32, fused=True) -> StepState:
    s = replace(spec(d_in, architecture=architecture, form=form, factor=4), bandwidth=0.3, init_threshold=0.1)
    return make_state(init_sae(s, torch.Generator().manual_seed(0), dtype), fused=fused)


def x_at(k: int, d_in: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(16, d_in, generator=torch.Generator().manual_seed(k), dtype=dtype)


def go(state: StepState, first: int, last: int, dtype: torch.dtype = torch.float32) -> list[float]:
    losses = []
    for k in range(first, last):
        x, scale = x_at(k, dtype=dtype), min(k / 4, 1.0)
        losses.append(train_step(state, x, lr=1e-2 / (k + 1), sparsity_scale=scale, clip_grad_norm=1.0).total.item())
    return losses


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("architecture", "form"), FORMS)
@pytest.mark.parametrize("cut", [0, 5])
def test_a_saved_state_goes_on_bit_for_bit(architecture, form, fused, cut, tmp_path):
    whole = fresh(architecture, form, fused=fused)
    go(whole, 0, cut)
    saved = whole.state_dict()
    save_file({k: v for k, v in saved.items() if isinstance(v, torch.Tensor)}, tmp_path / "state.safetensors")
    numbers = {k: v for k, v in saved.items() if isinstance(v, int)}
    assert numbers.keys() - {"dense"} == {"step", "window_tokens"}  # dense: with the fast step only
    expected = go(whole, cut, 12)

    resumed = fresh(architecture, form, fused=fused)
    go(resumed, 50, 53)  # whatever was there before is replaced
    resumed.load_state_dict({**load_file(tmp_path / "state.safetensors"), **numbers})
    assert go(resumed, cut, 12) == expected
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.equal(b[key]) if isinstance(value, torch.Tensor) else value == b[key], key
    assert any("exp_avg_sq" in key for key in a)


def test_loading_copies_so_that_the_given_tensors_stay():
    state = fresh()
    go(state, 0, 3)
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.state_dict().items()}
    kept = {k: v.clone() for k, v in saved.items() if isinstance(v, torch.Tensor)}
    state.load_state_dict(saved)
    go(state, 3, 5)
    assert all(saved[k].equal(v) for k, v in kept.items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("sae.W_enc"), r"no 'sae\.W_enc'"),
        (lambda s: s.pop("window_tokens"), "no 'window_tokens'"),
        (lambda s: s.pop("adam.b_dec.exp_avg"), r"no 'adam\.b_dec\.exp_avg'"),
        (
            lambda s: s.update({"sae.raw_threshold": torch.zeros(24)}),
            r"holds 'sae\.raw_threshold', which this SAE has not",
        ),
        (lambda s: s.update({"sae.b_dec": torch.zeros(7)}), r"'sae\.b_dec' of shape \[7\], not \[6\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage, message):
    state = fresh()
    go(state, 0, 2)
    other = fresh()
    go(other, 5, 8)
    wrong = other.state_dict()
    damage(wrong)
    before = {n: p.detach().clone() for n, p in state.sae.named_parameters()}
    with pytest.raises(UserError, match=message):
        state.load_state_dict(wrong)
    assert all(p.equal(before[n]) for n, p in state.sae.named_parameters())
    assert state.step == 2


@pytest.mark.parametrize(("architecture", "form"), FORMS)
def test_a_step_is_clipped_adam_on_the_gradient(architecture, form):
    state = fresh(architecture, form, dtype=torch.float64)
    twin = fresh(architecture, form, dtype=torch.float64).sae
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in twin.named_parameters()}
    clipped = 0
    for k in range(6):
        lr, x = 1e-2 / (k + 1), x_at(k, dtype=torch.float64)
        train_step(state, x, lr=lr, sparsity_scale=1.0, clip_grad_norm=0.5)
        twin.before_step_()
        grads = torch.autograd.grad(twin.loss(x, 1.0).total, list(twin.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm().item()
        clipped += norm > 0.5
        for (name, p), g in zip(twin.named_parameters(), grads, strict=True):
            g = g * min(1.0, 0.5 / (norm + 1e-6))
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.data -= lr * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
    assert clipped
    for (name, p), q in zip(state.sae.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)
    assert all(p.grad is None for p in state.sae.parameters())


def test_fused_and_plain_adam_agree_up_to_rounding():
    fused, plain = fresh(dtype=torch.float64), fresh(dtype=torch.float64, fused=False)
    assert go(fused, 0, 8, torch.float64) == pytest.approx(go(plain, 0, 8, torch.float64), rel=1e-12)


def test_the_paper_form_steps_from_unit_rows():
    state = fresh()
    go(state, 0, 3)
    off = (state.sae.W_dec.detach().norm(dim=1) - 1).abs().max()
    assert off > 1e-5  # Adam has moved them
    state.sae.before_step_()
    assert (state.sae.W_dec.detach().norm(dim=1) - 1).abs().max() < 1e-6


def test_what_is_counted(monkeypatch):
    monkeypatch.setattr(step, "SAMPLING_WINDOW", 3)
    state = fresh("jumprelu", "v6")
    with torch.no_grad():
        state.sae.b_enc[0] = -1e6  # never fires
    since, window = torch.zeros(24, dtype=torch.int64), []
    for k in range(7):
        losses = train_step(state, x_at(k), lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)
        assert not losses.total.requires_grad
        since = torch.where(losses.fired, 0, since + 1)
        window = [*([] if k % 3 == 0 else window), losses.firings]
        assert state.steps_since_fired.equal(since)
        assert state.firing_counts.equal(torch.stack(window).sum(0))
        assert state.window_tokens == 16 * len(window)
    assert state.step == state.steps_since_fired[0] == 7
    assert 0 < state.firing_frequency().max() <= 1
    assert state.firing_frequency()[0] == 0


def _planted(n_features: int, d_in: int, generator: torch.Generator) -> torch.Tensor:
    rows = torch.randn(n_features, d_in, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("architecture", "form", "coefficient", "floor"),
    [("standard", "paper", 0.15, 0.93), ("standard", "v6", 0.15, 0.93), ("jumprelu", "v6", 0.05, 0.93)],
)
def test_a_planted_dictionary_is_found(architecture, form, coefficient, floor):
    """Mean over planted features of the largest cosine with a decoder row (MMCS)."""
    generator = torch.Generator().manual_seed(0)
    truth = _planted(32, 24, generator)
    s = replace(
        spec(24, architecture=architecture, form=form), coefficient=coefficient, bandwidth=0.2, init_threshold=0.1
    )
    state = make_state(init_sae(s, generator))
    for k in range(800):
        codes = (torch.rand(128, 32, generator=generator) < 0.06) * (0.5 + torch.rand(128, 32, generator=generator))
        lr = 5e-3 * min(1, (800 - k) / 300)
        losses = train_step(state, codes @ truth, lr=lr, sparsity_scale=min(k / 100, 1.0), clip_grad_norm=1.0)
    rows = state.sae.W_dec.detach()
    mmcs = (truth @ (rows / rows.norm(dim=1, keepdim=True)).T).max(dim=1).values.mean().item()
    print(f"{architecture} {form}: MMCS {mmcs:.3f}, L0 {losses.l0:.2f}, mse {losses.mse:.4f}")
    assert mmcs > floor
    assert losses.l0 < 8  # 1.9 planted features are active at a time
    untrained = SAE.create(s).W_dec.new_empty(48, 24).normal_(generator=generator)
    assert (truth @ (untrained / untrained.norm(dim=1, keepdim=True)).T).max(dim=1).values.mean() < 0.7
