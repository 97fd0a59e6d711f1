"""GSNR in metrics.jsonl: that of the batch and the weights of its step, and no bit of the training is another."""

from dataclasses import replace

import pytest
import torch

from chatsae.config import SAESpec, TrainConfig
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.sae.grid import build_grid
from chatsae.sae.gsnr import gsnr
from chatsae.training import loop
from chatsae.training.loop import make_states, train_states

LAYERS = (0, 2)


class Batches:
    """Fixed batches [L, N, D], as the mixer gives them."""

    capacity, lm_seconds = 64, 0.0

    def __init__(self, n: int) -> None:
        self.on_fill = lambda n: None
        draw = torch.Generator().manual_seed(0)
        mixed = torch.randn(12, 12, generator=draw)
        self.all = [torch.randn(2, 32, 12, generator=draw) @ mixed for _ in range(n)]
        self._left = iter(self.all)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._left)

    def peek(self, n):
        return self.all[0]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        raise NotImplementedError


def specs() -> list[SAESpec]:
    cases = [("standard", "paper", 0), ("jumprelu", "paper", 2), ("standard", "v6", 2), ("jumprelu", "v6", 0)]
    return [
        SAESpec(
            name=f"{architecture}-{form}", architecture=architecture, form=form, layer=layer, d_in=12, d_sae=48,
            coefficient=0.3, lr=3e-3, bandwidth=0.5, init_threshold=0.1,
        )
        for architecture, form, layer in cases
    ]  # fmt: skip


def config(**changes) -> TrainConfig:
    return replace(TrainConfig(tokens=32 * 230, batch_size=32, log_every=50, lr_warmup_share=0.1), **changes)


class Log(Run):
    """A run whose records stay in memory."""

    def __init__(self) -> None:
        self.records: list[dict] = []

    def log(self, record) -> None:
        self.records.append(record)

    def save_checkpoint(self, checkpoint) -> None:
        pass


def trained(how: TrainConfig) -> tuple[dict[str, SAE], list[dict], dict[str, float]]:
    states, log = make_states(build_grid(specs(), seed=1), how), Log()
    summary = train_states(states, Batches(230), how, layers=LAYERS, run=log)
    return {name: state.sae for name, state in states.items()}, log.records, summary.shares


@pytest.mark.parametrize("step", ["plain", "fast"])
def test_it_changes_no_bit_of_the_training(step):
    if step == "fast":
        pytest.importorskip("numba")
    (one, _, shares), (other, _, none) = (trained(config(gsnr=on, step=step)) for on in (True, False))
    for name, sae in one.items():
        for parameter, value in sae.named_parameters():
            assert torch.equal(value, dict(other[name].named_parameters())[parameter]), (name, parameter)
    assert shares["gsnr"] > 0 == none["gsnr"]


def test_it_is_that_of_the_step_it_is_logged_for(monkeypatch):
    seen: dict[tuple[str, int], tuple] = {}
    real = loop.train_step

    def spied(state, x, *, lr, sparsity_scale, clip_grad_norm):
        twin = SAE.create(state.sae.spec)
        twin.load_state_dict(state.sae.state_dict())
        twin.before_step_()
        seen[state.sae.spec.name, state.step + 1] = gsnr(twin, x, sparsity_scale=sparsity_scale)
        return real(state, x, lr=lr, sparsity_scale=sparsity_scale, clip_grad_norm=clip_grad_norm)

    monkeypatch.setattr(loop, "train_step", spied)
    _, records, _ = trained(config(step="plain", sparsity_warmup_share=0.6))
    assert [record["step"] for record in records] == [50, 100, 150, 200, 230]
    measured = [record for record in records if "gsnr" in record["saes"]["standard-v6"]]
    assert [record["step"] for record in measured] == [100, 200]
    for record in measured:
        for name, own in record["saes"].items():
            expected = seen[name, record["step"]]
            assert (own["gsnr"]["n"], own["gsnr"]["unit"]) == (32, "token")
            assert own["gsnr"]["value"] == expected.value
            assert own["gsnr"]["reason"] is None
            assert own["gsnr"]["by_parameter"].keys() == expected.by_parameter.keys()
            assert own["gsnr"]["by_parameter"]["W_dec"]["median"] == expected.by_parameter["W_dec"].median


@pytest.mark.parametrize(
    ("log_every", "steps"),
    [(50, [100, 200]), (100, [100, 200]), (30, [120, 210]), (150, [150, 230]), (1000, [230]), (1, [100, 200])],
)
def test_logged_steps_at_least_a_hundred_apart_have_it(log_every, steps):
    _, records, _ = trained(config(log_every=log_every, step="plain"))
    assert [r["step"] for r in records if "gsnr" in r["saes"]["standard-paper"]] == steps


def test_it_can_be_left_out():
    _, records, shares = trained(config(gsnr=False, step="plain"))
    assert not any("gsnr" in own for record in records for own in record["saes"].values())
    assert shares["gsnr"] == 0
