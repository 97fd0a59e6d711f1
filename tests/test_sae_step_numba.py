"""The fast step against its twin, the plain step: the same numbers, in another order of summation."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytest.importorskip("numba", reason="the fast step needs numba: pip install 'chatsae[fast]'")

from chatsae.errors import UserError
from chatsae.sae import (
    SAE,
    JumpReLUSAE,
    choose,
    init_sae,
    make_state,
    pairs,
    step_numba,
    train_step,
)
from chatsae.sae.crew import share
from step_samples import CASES, assert_same_state, fresh, go, x_at


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), CASES)
def test_200_steps_in_float64_are_those_of_the_plain_step(architecture, form, apply_b_dec):
    plain = fresh(architecture, form, apply_b_dec, step="plain")
    fast = fresh(architecture, form, apply_b_dec)
    active = clipped = 0
    for k in range(200):
        (a,), (b,) = go(plain, k, k + 1), go(fast, k, k + 1)
        for name in ("total", "mse", "sparsity", "l0"):
            assert getattr(b, name).item() == pytest.approx(getattr(a, name).item(), rel=1e-12, abs=1e-15), (k, name)
        assert b.firings.equal(a.firings)
        active += a.l0.item() / 200
        clipped += a.mse.item() > 1
    assert 0.5 < active < 0.6 * plain.sae.spec.d_sae
    assert clipped
    assert_same_state(plain, fast, 1e-12)
    assert plain.steps_since_fired.equal(fast.steps_since_fired)
    assert plain.firing_counts.equal(fast.firing_counts)


@pytest.mark.parametrize(
    ("architecture", "form", "tolerance"),
    [("standard", "paper", 1e-4), ("standard", "v6", 1e-4), ("jumprelu", "v6", 1e-4), ("jumprelu", "paper", 5e-4)],
)
def test_the_loss_in_float32_is_that_of_the_plain_step(architecture, form, tolerance):
    bandwidth = 0.001 if form == "paper" else 0.2  # the paper's own is the harder one
    made = [
        fresh(architecture, form, step=step, dtype=torch.float32, bandwidth=bandwidth) for step in ("plain", "fast")
    ]
    plain, fast = (go(state, 0, 200) for state in made)
    for a, b in zip(plain, fast, strict=True):
        assert b.total.item() == pytest.approx(a.total.item(), rel=tolerance)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(CASES),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 19),
    st.sampled_from([-50.0, -1.0, 0.0, 50.0]),
    st.sampled_from(["stored", "summed twice", "products of tokens", "dense"]),
    st.sampled_from([1, 7, 1000]),
)
def test_any_shape_and_any_density(case, d_in, factor, n, shift, way, block):
    """A shift of -50 leaves no feature active, one of 50 all of them; blocks of features need not divide d_sae."""
    step = "auto" if way == "dense" else "fast"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "CROSSOVER", -1.0)  # auto: always dense
        patch.setattr(step_numba, "_ROOM", 3)
        patch.setattr(step_numba, "_ROOM_BEYOND", 0 if way == "stored" else 2)
        patch.setattr(step_numba, "_GRAM", 512 if way == "products of tokens" else 0)
        patch.setattr(pairs, "_BLOCK", block * d_in)
        patch.setattr(pairs, "_LEAST", block)
        plain, fast = (fresh(*case, d_in=d_in, factor=factor, step=kind, shift=shift) for kind in ("plain", step))
        for k in range(3):
            (a,), (b,) = go(plain, k, k + 1, n), go(fast, k, k + 1, n)
            if abs(shift) == 50:
                assert b.l0.item() == (plain.sae.spec.d_sae if shift > 0 else 0)
            assert b.total.item() == pytest.approx(a.total.item(), rel=1e-11)
            assert b.firings.equal(a.firings)
        assert_same_state(plain, fast, 1e-10)


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), CASES)
def test_switching_back_and_forth_changes_nothing(architecture, form, apply_b_dec, monkeypatch):
    plain = fresh(architecture, form, apply_b_dec, step="plain")
    both = fresh(architecture, form, apply_b_dec, step="auto")
    for k in range(60):
        monkeypatch.setattr(choose, "CROSSOVER", 2.0 if k // 7 % 2 else 0.0)
        (a,), (b,) = go(plain, k, k + 1), go(both, k, k + 1)
        assert both.switch is not None
        assert both.switch.dense == (k // 7 % 2 == 0)  # a dense step before the next sparse one
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-12)
        assert all(p.grad is None for p in both.sae.parameters())
    assert_same_state(plain, both, 1e-12)


@pytest.mark.parametrize("form", ["paper", "v6"])
@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
@pytest.mark.parametrize("replaced", [False, True])
def test_weights_that_others_change_between_steps_are_read_again(form, name, replaced):
    """The step keeps norms of the decoder's rows beside the weights."""
    like = {"d_in": 64, "dtype": torch.float32, "shift": -1.0 if form == "paper" else -0.2}
    plain, fast = (fresh("standard", form, True, step=step, **like) for step in ("plain", "fast"))
    for k in range(0, 15, 3):
        for state in (plain, fast):
            weight, noise = getattr(state.sae, name), torch.randn(64, 256, generator=torch.Generator().manual_seed(k))
            changed = 1.5 * weight.detach() + 0.02 * noise.view(weight.shape)
            if replaced:
                weight.data = changed
            else:
                with torch.no_grad():
                    weight.copy_(changed)
        for a, b in zip(go(plain, k, k + 3, n=48), go(fast, k, k + 3, n=48), strict=True):
            assert 1 < a.l0.item() < 120
            assert b.total.item() == pytest.approx(a.total.item(), rel=2e-5)
            assert (a.firings - b.firings).abs().sum() <= 2  # a product that is rounded the other way


@pytest.mark.parametrize("form", ["paper", "v6"])
def test_dense_steps_leave_nothing_stale_to_the_sparse_ones(form, monkeypatch):
    like = {"d_in": 64, "dtype": torch.float32, "shift": -1.0 if form == "paper" else -0.2}
    plain, both = (fresh("standard", form, True, step=step, **like) for step in ("plain", "auto"))
    for k in range(0, 60, 10):
        monkeypatch.setattr(choose, "CROSSOVER", 2.0 if k % 20 else 0.0)
        for a, b in zip(go(plain, k, k + 10, n=48), go(both, k, k + 10, n=48), strict=True):
            assert a.l0.item() > 1
            assert b.total.item() == pytest.approx(a.total.item(), rel=1e-4)
            assert (a.firings - b.firings).abs().sum() <= 3  # products that are rounded the other way


def test_density_decides_with_a_margin(monkeypatch):
    monkeypatch.setattr(choose, "CROSSOVER", 0.1)
    state, took = fresh(step="auto"), []

    class Watch(step_numba.FastStep):
        def __call__(self, x, **numbers):
            losses = super().__call__(x, **numbers)
            took.append("too dense" if losses is None else "sparse")
            return losses

        def dense(self, x, **numbers):
            losses, density = super().dense(x, **numbers)
            assert density == pytest.approx(losses.l0.item() / 48)
            took.append("dense")
            return losses, density

    assert isinstance(state.switch, choose.Switch)
    state.switch.fast = Watch(state.sae, state.optimizer)
    for density, expected in (
        (0.5, ["dense", "dense"]),
        (0.09, ["dense", "dense"]),  # below the crossover is not enough to go over
        (0.07, ["dense", "sparse"]),
        (0.09, ["sparse", "sparse"]),  # but to stay
        (0.5, ["too dense", "dense", "dense"]),
    ):
        took.clear()
        for k in range(state.step, state.step + 2):
            with torch.no_grad():  # so that this share of the pairs is active
                state.sae.b_enc.fill_(-torch.quantile(x_at(k) @ state.sae.W_enc, 1 - density).item())
            (losses,) = go(state, k, k + 1)
            assert losses.l0.item() / 48 == pytest.approx(density, abs=0.003)
        assert took == expected


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), CASES)
def test_200_dense_steps_in_float64_are_those_of_the_plain_step(architecture, form, apply_b_dec, monkeypatch):
    monkeypatch.setattr(choose, "CROSSOVER", 0.0)
    plain = fresh(architecture, form, apply_b_dec, step="plain", shift=0.0)
    dense = fresh(architecture, form, apply_b_dec, step="auto", shift=0.0)
    for k in range(200):
        (a,), (b,) = go(plain, k, k + 1), go(dense, k, k + 1)
        for name in ("total", "mse", "sparsity", "l0"):
            assert getattr(b, name).item() == pytest.approx(getattr(a, name).item(), rel=1e-12, abs=1e-15), (k, name)
        assert b.firings.equal(a.firings)
    assert dense.switch is not None
    assert dense.switch.dense
    assert_same_state(plain, dense, 1e-12)


@pytest.mark.parametrize("cut", [3, 18, 25])
def test_a_checkpoint_goes_on_bit_for_bit_in_either_phase(cut, tmp_path):
    whole = fresh("jumprelu", "v6", step="auto", dtype=torch.float32, shift=0.0)
    for k in range(40):
        if k == 10:
            with torch.no_grad():
                whole.sae.b_enc.fill_(-1.5)
        if k == cut:
            saved = whole.state_dict()
            numbers = {k: v for k, v in saved.items() if isinstance(v, int)}
            tensors = {k: v.contiguous() for k, v in saved.items() if isinstance(v, torch.Tensor)}
            save_file(tensors, tmp_path / "state.safetensors")
            assert numbers["dense"] == (cut < 16)
        go(whole, k, k + 1)
    resumed = fresh("jumprelu", "v6", step="auto", dtype=torch.float32)
    resumed.load_state_dict({**load_file(tmp_path / "state.safetensors"), **numbers})
    for k in range(cut, 40):
        if k == 10:
            with torch.no_grad():
                resumed.sae.b_enc.fill_(-1.5)
        go(resumed, k, k + 1)
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.equal(b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def test_a_state_of_the_plain_step_loads_into_the_fast_one_and_back():
    plain, fast = fresh(step="plain"), fresh()
    go(plain, 0, 5)
    fast.load_state_dict({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in plain.state_dict().items()})
    go(plain, 5, 10)
    go(fast, 5, 10)
    assert_same_state(plain, fast, 1e-13)
    back = fresh(step="plain")
    back.load_state_dict({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in fast.state_dict().items()})
    go(plain, 10, 15)
    go(back, 10, 15)
    assert_same_state(plain, back, 1e-13)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", ["fast", "auto", "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_input_that_is_not_a_number_is_reported_by_sae_and_step(case, step, bad):
    state = fresh(*case, step="auto" if step == "dense" else step, shift=0.5 if step == "dense" else -1.5)
    go(state, 0, 2)
    state.sae.before_step_()
    before = {k: v.clone() for k, v in state.state_dict().items() if isinstance(v, torch.Tensor)}
    assert state.switch is not None
    assert state.switch.dense == (step == "dense")
    x = x_at(2)
    x[3, 5] = bad
    with pytest.raises(UserError, match=rf"the loss of {state.sae.spec.name} is (nan|inf) at step 3"):
        train_step(state, x, lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)
    for key, value in before.items():
        # the dense step restores the norm of decoder rows first, which they had but for rounding
        rtol = 1e-15 if step == "dense" and key == "sae.W_dec" else 0
        torch.testing.assert_close(state.state_dict()[key], value, rtol=rtol, atol=0, msg=key)


def test_a_weight_that_is_not_a_number_reaches_the_loss():
    state = fresh(shift=-50.0)
    with torch.no_grad():
        state.sae.W_enc[0, 7] = float("nan")
    with pytest.raises(UserError, match="is nan at step 1"):
        go(state, 0, 1)


@pytest.mark.parametrize("case", CASES)
def test_threads_change_no_bit(case, monkeypatch):
    results = []
    for threads in (1, 3):
        monkeypatch.setattr("chatsae.sae.crew.torch.get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr("chatsae.sae.crew._WORTH_A_THREAD", 1)
        state = fresh(*case, dtype=torch.float32)
        losses = go(state, 0, 12)
        results.append([state.state_dict(), losses[-1].total])
    (a, loss_a), (b, loss_b) = results
    assert loss_a.equal(loss_b)
    for key, value in a.items():
        assert value.equal(b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def test_saes_may_step_side_by_side(monkeypatch):
    monkeypatch.setattr("chatsae.sae.crew.torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("chatsae.sae.crew._WORTH_A_THREAD", 1)

    def train(case: tuple[str, str, bool]) -> dict[str, torch.Tensor]:
        state = fresh(*case, dtype=torch.float32)
        go(state, 0, 15)
        return dict(state.sae.named_parameters())

    alone = [train(case) for case in CASES]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, CASES))
    for a, b in zip(alone, together, strict=True):
        assert all(p.equal(b[name]) for name, p in a.items())


@given(st.integers(0, 30), st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_every_row_is_shared_once(rows, threads, weighted):
    ends = torch.randint(0, 5, (rows,)).cumsum(0).numpy() if weighted and rows else None
    seen = [0] * rows

    def kernel(first, last):
        for i in range(first, last):
            seen[i] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatsae.sae.crew.torch.get_num_threads", lambda: threads)
        share(kernel, rows, 1 << 30, ends=ends)
    assert seen == [1] * rows


def test_long_silent_features_stop_and_wake_as_adam_has_it():
    """float32 moments die away after some 800 silent steps; then the feature fires again."""
    plain, fast = (fresh(step=step, dtype=torch.float32, shift=-0.5) for step in ("plain", "fast"))
    silent = torch.arange(48) % 2 == 0
    for first, last, bias in ((0, 3, -0.1), (3, 1203, -1e6), (1203, 1206, -0.1)):
        for state in (plain, fast):
            with torch.no_grad():
                state.sae.b_enc[silent] = bias
        a, b = go(plain, first, last, n=6)[-1], go(fast, first, last, n=6)[-1]
        assert (a.firings[silent].sum() > 0) == (bias > -1)
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-3)
        moment = fast.optimizer.state[fast.sae.W_enc]["exp_avg"][:, silent]
        assert bool((moment == 0).all()) == (last == 1203)
        torch.testing.assert_close(fast.sae.W_dec[silent], plain.sae.W_dec[silent], rtol=1e-3, atol=1e-4)


def test_one_batch_shape_after_another_and_strided_input():
    plain, fast = fresh(step="plain"), fresh()
    for k, n in enumerate((5, 40, 1, 17)):
        x = x_at(k, n, 24)[:, ::2]
        assert n == 1 or not x.is_contiguous()
        for state in (plain, fast):
            train_step(state, x, lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)
    assert_same_state(plain, fast, 1e-13)


def test_what_is_saved_is_what_the_plain_step_saves(tmp_path):
    plain, fast = fresh("jumprelu", step="plain"), fresh("jumprelu")
    for state, name in ((plain, "plain"), (fast, "fast")):
        go(state, 0, 4)
        state.sae.before_step_()
        state.sae.save(tmp_path / name)
    a, b = SAE.load(tmp_path / "plain"), SAE.load(tmp_path / "fast")
    assert isinstance(b, JumpReLUSAE)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13, msg=name)


def test_who_gets_the_fast_step(monkeypatch):
    sae = fresh(step="plain").sae
    assert make_state(sae, step="plain").switch is None
    assert make_state(sae, fused=False).switch is None
    assert make_state(sae).switch is not None
    half = init_sae(sae.spec, dtype=torch.bfloat16)
    assert make_state(half).switch is None
    with pytest.raises(UserError, match=r"train\.step is fast, but L1-4x-standard is of torch\.bfloat16"):
        make_state(half, step="fast")
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    assert make_state(sae).switch is None
    with pytest.raises(UserError, match=r"numba is not installed: pip install 'chatsae\[fast\]'"):
        make_state(sae, step="fast")


@pytest.mark.parametrize(("n", "took"), [(512, "dense"), (513, "sparse"), (2049, "dense")])
def test_middling_batches_go_sparse_at_more_active_features(n, took, monkeypatch):
    monkeypatch.setattr(choose, "_CACHED", 12 * 2048)
    state = fresh(step="auto")
    for k in range(2):
        with torch.no_grad():  # so that 13 % of the pairs are active
            state.sae.b_enc.fill_(-torch.quantile(x_at(k, n) @ state.sae.W_enc, 0.87).item())
        go(state, k, k + 1, n)
    assert state.switch is not None
    assert state.switch.dense == (took == "dense")
