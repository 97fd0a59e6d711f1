"""The fast step against its twin, the plain step: the same numbers, in another order of summation."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytest.importorskip("numba", reason="the fast step needs numba: pip install 'chatsae[fast]'")

from chatsae.errors import UserError
from chatsae.sae import SAE, JumpReLUSAE, Losses, StepState, choose, init_sae, make_state, step_numba, train_step
from chatsae.sae.crew import share
from sae_samples import spec

CASES = [(a, f, b) for a in ("standard", "jumprelu") for f in ("paper", "v6") for b in (False, True)]


def fresh(
    architecture="standard",
    form="paper",
    apply_b_dec=False,
    *,
    d_in=12,
    factor=4,
    step="fast",
    dtype=torch.float64,
    shift=-0.1,
    bandwidth=0.2,
) -> StepState:
    """An SAE a few features of which are active on random inputs, and some inside the bandwidth of their threshold."""
    s = replace(
        spec(d_in, architecture=architecture, form=form, factor=factor),
        apply_b_dec_to_input=apply_b_dec,
        bandwidth=bandwidth,
        init_threshold=0.15,
        coefficient=0.3,
    )
    sae = init_sae(s, torch.Generator().manual_seed(0), dtype)
    with torch.no_grad():
        sae.b_enc.fill_(shift)
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    return make_state(sae, step=step)


def x_at(k: int, n: int = 24, d_in: int = 12, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(k), dtype=dtype)


def go(state: StepState, first: int, last: int, n: int = 24) -> list[Losses]:
    d_in, dtype = state.sae.spec.d_in, state.sae.W_enc.dtype
    return [
        train_step(
            state,
            x_at(k, n, d_in, dtype),
            lr=3e-3 * min(1.0, (k + 1) / 20),
            sparsity_scale=min(k / 30, 1.0),
            clip_grad_norm=1.0,
        )
        for k in range(first, last)
    ]


def assert_same_state(a: StepState, b: StepState, tolerance: float) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert {*left} - {"dense"} == {*right} - {"dense"}
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            off = (value - right[key]).abs().max().item()
            assert off <= tolerance * max(1.0, value.abs().max().item()), f"{key}: {off}"


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


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(CASES),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 19),
    st.sampled_from([-50.0, -1.0, 0.0, 50.0]),
)
def test_any_shape_and_any_density(case, d_in, factor, n, shift):
    """A shift of -50 leaves no feature active, one of 50 all of them."""
    plain, fast = (fresh(*case, d_in=d_in, factor=factor, step=step, shift=shift) for step in ("plain", "fast"))
    for k in range(3):
        (a,), (b,) = go(plain, k, k + 1, n), go(fast, k, k + 1, n)
        if abs(shift) == 50:
            assert b.l0.item() == (plain.sae.spec.d_sae if shift > 0 else 0)
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-11)
        assert b.firings.equal(a.firings)
    assert_same_state(plain, fast, 1e-10)


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), CASES)
def test_switching_back_and_forth_changes_nothing(architecture, form, apply_b_dec, monkeypatch):
    monkeypatch.setattr(choose, "_PROBE_EVERY", 1)
    plain = fresh(architecture, form, apply_b_dec, step="plain")
    both = fresh(architecture, form, apply_b_dec, step="auto")
    for k in range(60):
        monkeypatch.setattr(choose, "CROSSOVER", 2.0 if k // 7 % 2 else 0.0)
        (a,), (b,) = go(plain, k, k + 1), go(both, k, k + 1)
        assert both.switch is not None
        assert both.switch.dense == (k // 7 % 2 == 0)
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-12)
        assert all(p.grad is None for p in both.sae.parameters())
    assert_same_state(plain, both, 1e-12)


def test_density_decides_with_a_margin():
    state = fresh(step="auto", shift=0.0)
    kinds = []

    class Watch(step_numba.FastStep):
        def __call__(self, x, *, limit, **numbers):
            losses = super().__call__(x, limit=limit, **numbers)
            kinds.append((state.step, round(limit, 3), losses is not None))
            return losses

    assert state.switch is not None
    state.switch.fast = Watch(state.sae, state.optimizer)
    go(state, 0, 20)  # half of all features are active: dense, probed at every 16th step
    assert kinds == [(0, 0.096, False), (16, 0.096, False)]
    with torch.no_grad():
        state.sae.b_enc.fill_(-1.5)
    go(state, 20, 35)
    assert kinds[2:] == [(32, 0.096, True), (33, 0.12, True), (34, 0.12, True)]
    with torch.no_grad():
        state.sae.b_enc.fill_(0.0)
    go(state, 35, 37)
    assert kinds[5:] == [(35, 0.12, False)]
    assert state.switch.dense


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
@pytest.mark.parametrize("step", ["fast", "auto"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_input_that_is_not_a_number_is_reported_by_sae_and_step(case, step, bad):
    state = fresh(*case, step=step, shift=-1.5)
    go(state, 0, 2)
    before = {k: v.clone() for k, v in state.state_dict().items() if isinstance(v, torch.Tensor)}
    sparse = state.switch is not None and not state.switch.dense
    assert sparse
    x = x_at(2)
    x[3, 5] = bad
    with pytest.raises(UserError, match=rf"the loss of {state.sae.spec.name} is (nan|inf) at step 3"):
        train_step(state, x, lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)
    for key, value in before.items():
        torch.testing.assert_close(state.state_dict()[key], value, rtol=0, atol=0, msg=key)


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


def test_memory_grows_with_the_active_pairs_and_not_with_all():
    n, state = 400, fresh(d_in=4, factor=100, shift=-0.3)
    arrays = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_numba, "_spaces", step_numba._Spaces())
        (losses,) = go(state, 0, 1, n)
        arrays = dict(step_numba._spaces.arrays)
    pairs = losses.l0.item() * n
    assert 400 < pairs < 0.05 * n * 400
    most = 1.25 * max(pairs + n, n * 4, 400 * 4) + 5
    for (name, _), array in arrays.items():
        assert array.size <= (1.25 * n * 400 if name == "hidden_pre" else most), name
    assert {"hidden_pre", "features", "g_W_enc"} <= {name for name, _ in arrays}


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
