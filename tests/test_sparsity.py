"""A coefficient is steered until its SAE has the L0 that was asked for."""

import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from chatsae.config import SAEConfig, TrainConfig, check_sae, sae_specs
from chatsae.errors import UserError
from chatsae.sae.base import Losses
from chatsae.sae.grid import build_grid
from chatsae.sae.init import init_sae, set_l0_
from chatsae.training.loop import make_states, train_states
from chatsae.training.sparsity import EVERY, Steered
from sae_samples import spec

D = 32


def losses(l0: float) -> dict[str, Losses]:
    zero = torch.zeros(())
    return {"a": Losses(zero, zero, zero, torch.tensor(l0), torch.zeros(1))}


def test_the_coefficient_follows_the_error_and_is_held_at_the_end() -> None:
    steered = Steered({"a": 10.0}, total_steps=1000)
    assert (steered.factor("a"), steered.factor("another")) == (1, 1)
    for step in range(EVERY):
        steered.see(step, losses(20.0))
    found, damped = 0.2 * math.log(2), math.log(2)
    assert steered.factor("a") == pytest.approx(math.exp(found + damped))
    again = Steered({"a": 10.0}, total_steps=1000)
    again.load_state_dict(json.loads(json.dumps(steered.state_dict())))
    assert again.factor("a") == steered.factor("a")
    for step in range(EVERY, 800):
        steered.see(step, losses(10.0))
    held = steered.factor("a")
    assert held == pytest.approx(math.exp(found))
    for step in range(800, 1000):
        steered.see(step, losses(1000.0))
    assert [step for step in range(1000) if steered.settles(step)] == [800, 900, 970, 999]
    assert steered.factor("a") == held


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("inner", [False, True])
def test_the_l0_that_an_sae_begins_with_is_set(architecture: str, inner: bool) -> None:
    sae = init_sae(spec(D, architecture=architecture, factor=4), torch.Generator().manual_seed(0))
    object.__setattr__(sae.spec, "apply_b_dec_to_input", inner)
    with torch.no_grad():
        sae.b_dec.fill_(0.3)
    x = 5 * torch.randn(600, D, generator=torch.Generator().manual_seed(1))
    set_l0_(sae, x, 7.0)
    assert (sae.encode(x) > 0).double().sum(1).mean().item() == pytest.approx(7, abs=0.05)


class Sparse:
    """Batches of vectors of norm √d that are sums of a few of 64 directions."""

    capacity, lm_seconds = 1, 0.0

    def __init__(self, batch_size: int) -> None:
        self.on_fill = lambda n: None
        self._generator = torch.Generator().manual_seed(0)
        self._directions = torch.nn.functional.normalize(torch.randn(64, D, generator=self._generator))
        self._n = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return self.peek(self._n)

    def peek(self, n: int) -> Tensor:
        active = torch.rand(n, 64, generator=self._generator) < 0.06
        x = (active * torch.rand(n, 64, generator=self._generator)) @ self._directions
        x += 0.02 * torch.randn(n, D, generator=self._generator)
        return (x / x.norm(dim=1).mean() * D**0.5)[None]

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


@pytest.mark.parametrize("coefficient", [0.1, 10.0])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_the_target_is_reached_from_coefficients_a_hundred_times_apart(architecture: str, coefficient: float) -> None:
    given = {"l1_coefficients": (coefficient,)} if architecture == "standard" else {"l0_coefficients": (coefficient,)}
    given |= {} if architecture == "standard" else {"bandwidth": 1.0}
    config = SAEConfig(architectures=(architecture,), expansion_factors=(4,), target_l0=(8,), lrs=(1e-3,), **given)
    saes = build_grid(sae_specs(config, layers=(0,), d_in=D), seed=0)
    ((name, sae),) = saes.items()
    train = TrainConfig(tokens=128 * 1500, batch_size=128, gsnr=False)
    train_states(make_states(saes, train), Sparse(128), train)
    l0 = (sae.encode(Sparse(4096).peek(4096)[0]) > 0).double().sum(1).mean().item()
    assert l0 == pytest.approx(8, rel=0.05)
    assert sae.spec.coefficient != coefficient  # it ends with the one that gave this
    assert sae.spec.name == name


def test_several_targets_are_a_grid_and_several_coefficients_beside_them_are_refused() -> None:
    names = [s.name for s in sae_specs(SAEConfig(target_l0=(25, 50)), layers=(3,), d_in=8)]
    assert names[:2] == ["L3-8x-standard-target_25", "L3-8x-standard-target_50"]
    assert [s.target_l0 for s in sae_specs(SAEConfig(), layers=(3,), d_in=8)] == [None, None]
    with pytest.raises(UserError, match=r"sae.target_l0 is set, so that sae.l1_coefficients is where it begins"):
        check_sae(SAEConfig(target_l0=(25,), l1_coefficients=(1, 2)))
    with pytest.raises(UserError, match=r"sae.target_l0"):
        SAEConfig(target_l0=(25, 25))
    with pytest.raises(UserError, match=r"sae.target_l0"):
        SAEConfig(target_l0=(0,))
