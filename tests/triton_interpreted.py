"""The GPU step against its twin, the plain step, in Triton's interpreter; run by test_sae_step_triton.py."""

import os
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from chatsae.sae import SAE, Losses, StepState, choose_gpu, make_state, step_triton, train_step
from chatsae.sae.base import normalize_rows_
from chatsae.sae.choose_gpu import GpuSwitch
from chatsae.sae.cuda import Outputs, Reading
from chatsae.sae.step_triton import GpuStep, Route, Tiles
from step_samples import assert_same_state, half_active, x_at
from step_samples import go as steps

assert os.environ.get("TRITON_INTERPRET") == "1", "triton reads it when it is imported"

CASES = [("standard", "paper", False), ("standard", "v6", True), ("jumprelu", "paper", True), ("jumprelu", "v6", False)]
ROUTES: tuple[Route, ...] = ("dense", "stored", "folded")
TILES = Tiles(elements=4096, tokens=16, strip=32, n=16, f=128)  # few programs: each costs milliseconds here


class Fixed:
    """Takes one route only."""

    waits = False
    dense = False

    def __init__(self, gpu: GpuStep, route: Route) -> None:
        self.gpu, self.route = gpu, route

    def __call__(self, step: int, x: torch.Tensor, **numbers: float) -> Losses:
        return self.gpu(self.route, step + 1, x, **numbers)

    def saved(self) -> int:
        return 1

    def load(self, saved: int) -> None:
        self.gpu.reset()


def fresh(
    architecture="standard",
    form="paper",
    apply_b_dec=False,
    route: Route | None = None,
    *,
    d_in=17,
    factor=4,
    dtype=torch.float64,
    shift=-0.7,
    tiles=TILES,
    **options,
) -> StepState:
    """An SAE a few features of which are active on random inputs; without a route, in the plain step."""
    b_enc = shift if form == "paper" else 0.08 if architecture == "jumprelu" else shift / 4
    sae = half_active(architecture, form, apply_b_dec, d_in=d_in, factor=factor, dtype=dtype, shift=b_enc)
    state = make_state(sae, step="plain")
    if route is not None:
        state.switch = Fixed(GpuStep(sae, state.optimizer, tiles=tiles, **options), route)
    return state


def go(state: StepState, first: int, last: int, n: int = 8) -> list[Losses]:
    return steps(state, first, last, n, lr_warmup=10, sparsity_warmup=10)


@pytest.fixture
def roomy(monkeypatch):
    monkeypatch.setattr(step_triton, "CROSSOVER", 0.7)


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), CASES)
def test_12_steps_in_float64_are_those_of_the_plain_step(architecture, form, apply_b_dec, monkeypatch):
    """The routes take turns, and in every fourth step the lists of pairs overflow: each of the three once."""
    plain, fast = fresh(architecture, form, apply_b_dec), fresh(architecture, form, apply_b_dec, "dense")
    assert isinstance(fast.switch, Fixed)
    active, clipped = 0.0, 0
    for k in range(12):
        monkeypatch.setattr(step_triton, "CROSSOVER", 0.01 if k % 4 == 3 else 0.7)
        fast.switch.route = ROUTES[k % 3]
        (a,), (b,) = go(plain, k, k + 1), go(fast, k, k + 1)
        for name in ("total", "mse", "sparsity", "l0"):
            assert getattr(b, name).item() == pytest.approx(getattr(a, name).item(), rel=1e-12, abs=1e-15), (k, name)
        assert b.firings.equal(a.firings)
        active += a.l0.item() / 12
        clipped += a.mse.item() > 1
    assert 0.5 < active < 20
    assert clipped
    assert_same_state(plain, fast, 1e-12)
    assert plain.steps_since_fired.equal(fast.steps_since_fired)
    assert plain.firing_counts.equal(fast.firing_counts)


@pytest.mark.parametrize("route", ROUTES)
def test_float32(route, roomy):
    plain, fast = (fresh("jumprelu", "paper", True, r, dtype=torch.float32) for r in (None, route))
    for a, b in zip(go(plain, 0, 2), go(fast, 0, 2), strict=True):
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-5)
        assert b.total.dtype == b.firings.dtype == torch.float32
    assert_same_state(plain, fast, 1e-5)


@pytest.mark.parametrize(("architecture", "form", "apply_b_dec"), CASES[1:3])
@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_no_feature_active_and_all_of_them_more_than_there_is_room_for(architecture, form, apply_b_dec, shift):
    plain, fast = (fresh(architecture, form, apply_b_dec, r, d_in=5) for r in (None, "dense"))
    assert isinstance(fast.switch, Fixed)
    for state in (plain, fast):
        state.sae.b_enc.data.fill_(shift)
    for k, (route, n) in enumerate((("folded", 3), ("stored", 1), ("dense", 2))):
        fast.switch.route = route
        (a,), (b,) = go(plain, k, k + 1, n), go(fast, k, k + 1, n)
        assert b.l0.item() == (20 if shift > 0 else 0)
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-12)
        assert b.firings.equal(a.firings)
    assert_same_state(plain, fast, 1e-12)


@pytest.mark.parametrize(
    ("n", "d_in", "factor", "route"),
    [(1, 33, 2, "stored"), (1, 33, 2, "folded"), (19, 16, 8, "dense"), (19, 16, 8, "stored"), (20, 1, 70, "folded")],
)
def test_shapes_that_fill_no_block(route, n, d_in, factor, roomy):
    tiles = Tiles(elements=1024, tokens=8, strip=16, n=16, f=64)  # several programs of everything
    plain, fast = (fresh("jumprelu", "v6", True, r, d_in=d_in, factor=factor, tiles=tiles) for r in (None, route))
    (a,), (b,) = go(plain, 0, 1, n), go(fast, 0, 1, n)
    assert b.total.item() == pytest.approx(a.total.item(), rel=1e-12)
    assert b.firings.equal(a.firings)
    assert a.firings.sum() > 0
    assert_same_state(plain, fast, 1e-12)


def test_weights_that_someone_else_moves_are_noticed():
    """Norms of rows and a bfloat16 copy are kept beside the weights between steps."""
    changes: list[Callable[[SAE], object]] = [
        lambda sae: normalize_rows_(sae.W_dec),
        lambda sae: sae.W_dec.mul_(3.0),
        lambda sae: sae.W_enc.mul_(1.5),
        lambda sae: setattr(sae.W_enc, "data", sae.W_enc.data.clone(memory_format=torch.contiguous_format) * 0.5),
    ]
    states = [fresh("standard", "v6", False, "dense", precision="bf16") for _ in range(2)]
    kept, made = states
    for k, change in enumerate(changes):
        for state in states:
            with torch.no_grad():
                change(state.sae)
        again = GpuStep(made.sae, made.optimizer, tiles=TILES, precision="bf16")  # knows nothing of before
        made.switch = Fixed(again, "dense")
        (a,), (b,) = go(kept, k, k + 1), go(made, k, k + 1)
        assert a.total.equal(b.total), k
    assert_same_state(kept, made, 0.0)


def test_a_bfloat16_encoder_rounds_values_and_not_gradients(roomy):
    plain, fast = fresh(*CASES[2]), fresh(*CASES[2], "stored", precision="bf16")

    def hidden_pre(x: torch.Tensor) -> torch.Tensor:
        sae = plain.sae
        exact = SAE._hidden_pre(sae, x)
        sae_in = x - sae.b_dec if sae.spec.apply_b_dec_to_input else x
        rounded = sae_in.bfloat16().double() @ sae.W_enc.bfloat16().double() + sae.b_enc
        assert not rounded.equal(exact)
        return exact + (rounded - exact).detach()

    plain.sae._hidden_pre = hidden_pre
    for a, b in zip(go(plain, 0, 4), go(fast, 0, 4), strict=True):
        assert b.total.item() == pytest.approx(a.total.item(), rel=1e-9)
        assert b.firings.equal(a.firings)
    assert_same_state(plain, fast, 1e-9)


@pytest.mark.parametrize(("route", "bad"), [("dense", float("inf")), ("folded", float("nan"))])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in place of the GPU
def test_input_that_is_not_a_number_is_reported_and_changes_nothing_from_then_on(route, bad, roomy):
    state = fresh("jumprelu", "paper", True, route)
    go(state, 0, 1)
    names = ("sae.", "adam.")
    before = {k: v.clone() for k, v in state.state_dict().items() if k.startswith(names)}
    x = x_at(1, 8, 17)
    x[3, 5] = bad
    numbers = {"lr": 1e-3, "sparsity_scale": 1.0, "clip_grad_norm": 1.0}
    for batch in (x, x_at(2, 8, 17)):
        assert train_step(state, batch, **numbers).total.isnan()
        for key, value in before.items():
            torch.testing.assert_close(state.state_dict()[key], value, rtol=0, atol=0, msg=key)
    state.load_state_dict({**state.state_dict(), "step": 1})
    assert train_step(state, x_at(2, 8, 17), **numbers).total.isfinite()
    assert not state.sae.b_enc.equal(before["sae.b_enc"])


def test_states_go_between_the_plain_step_and_this_one(tmp_path, roomy):
    plain, fast = fresh(*CASES[2]), fresh(*CASES[2], "stored")

    def move(a: StepState, b: StepState) -> None:
        saved = a.state_dict()
        tensors = {k: v.contiguous() for k, v in saved.items() if isinstance(v, torch.Tensor)}
        save_file(tensors, tmp_path / "state.safetensors")
        b.load_state_dict({**load_file(tmp_path / "state.safetensors"), "step": a.step, "window_tokens": 24})

    go(plain, 0, 3)
    move(plain, fast)
    go(plain, 3, 6)
    go(fast, 3, 6)  # three steps on moments that the plain one made
    assert_same_state(plain, fast, 1e-12)
    back = fresh(*CASES[2])
    move(fast, back)
    go(back, 6, 8)
    go(plain, 6, 8)
    assert_same_state(plain, back, 1e-12)


class Asks(TorchDispatchMode):
    """Fails where the host would have to wait for a GPU; copies to the device and within it are counted."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.copied_to: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the GPU"
        if name in ("index", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask has a size that the host must know"
        if name == "copy_" and args[0].data_ptr() != args[1].data_ptr():  # the interpreter copies tensors to themselves
            self.copied_to.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("architecture", "form", "apply_b_dec", "route"),
    [("standard", "v6", True, "dense"), ("jumprelu", "paper", True, "stored"), ("standard", "paper", False, "folded")],
)
def test_the_host_waits_for_nothing(architecture, form, apply_b_dec, route, monkeypatch, roomy):
    state = fresh(architecture, form, apply_b_dec, "dense")
    assert isinstance(state.switch, Fixed)
    gpu = state.switch.gpu
    state.switch = switch = GpuSwitch(gpu)
    switch.load(int(route == "dense"))
    monkeypatch.setattr(choose_gpu, "FOLD_UP_TO", 0 if route == "stored" else 100)
    monkeypatch.setattr(choose_gpu, "_EVERY", 2)
    monkeypatch.setattr(GpuSwitch, "_coming", lambda self: self.dense)
    go(state, 0, 1)  # makes the moments

    def waits(*args, **kwargs):
        raise AssertionError("the host looks at a tensor")

    taken = Reading.take
    for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, waits)
    with Asks() as asks:
        go(state, 1, 3)
    host = switch._reading._host.data_ptr()
    assert [to for to in asks.copied_to if to in (host, gpu.numbers.data_ptr())] == asks.copied_to
    assert asks.copied_to.count(gpu.numbers.data_ptr()) == 2
    assert asks.copied_to.count(host) == 1
    monkeypatch.undo()
    assert taken(switch._reading) > 0
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the GPU"), Asks():
        bool(x.sum() > 0)


def recorded(run: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
    """A stand-in for a CUDA graph: nothing runs now; each replay runs the same function and fills the same outputs."""
    outputs = (torch.empty(4, dtype=torch.float64), torch.empty(68, dtype=torch.float64))

    def replay() -> None:
        for place, value in zip(outputs, run(), strict=True):
            place.copy_(value)

    return replay, outputs


def test_a_graph_sees_new_inputs_rates_and_coefficients_through_tensors_alone(roomy):
    states = [fresh(*CASES[2], "dense", capture=capture) for capture in (None, recorded)]
    eager, graphed = states
    first = [go(state, 0, 5) for state in states]
    assert isinstance(graphed.switch, Fixed)
    assert len(graphed.switch.gpu._graphs._made) == 1
    second = [go(state, 5, 6, n=5) for state in states]  # another shape: eager until it has a graph of its own
    for a, b in zip(first[0] + second[0], first[1] + second[1], strict=True):
        assert all(p.equal(q) for p, q in zip(a, b, strict=True))
    assert_same_state(eager, graphed, 0.0)
    graphed.load_state_dict({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in eager.state_dict().items()})
    (a,), (b,) = (go(state, 6, 7) for state in states)
    assert a.total.equal(b.total)
    assert_same_state(eager, graphed, 0.0)
    assert not graphed.switch.gpu._graphs._made, "the moments lie elsewhere now"


def test_without_graphs_where_they_cannot_be_made(capsys):
    def refuses(run):
        raise RuntimeError("capture is not permitted\nmore")

    state, plain = fresh(*CASES[0], "dense", capture=refuses), fresh(*CASES[0])
    go(state, 0, 5)
    go(plain, 0, 5)
    assert capsys.readouterr().err.count("without CUDA graphs: capture is not permitted") == 1
    assert_same_state(plain, state, 1e-12)
