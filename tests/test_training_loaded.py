"""Training goes on from the weights of an SAE that was loaded, or trained before: it never begins by ruining them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import chatsae as cs
from chatsae.config import TrainConfig
from chatsae.errors import UserError
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae
from sae_samples import spec

D = 8
CONFIG = TrainConfig(tokens=64, batch_size=32, gsnr=False)
TINY = 1e-30  # a learning rate that moves no weight: what remains is what training does before its first step


class Stream:
    """Activations around a point away from zero, where b_dec matters."""

    capacity = 512
    lm_seconds = 0.0
    on_fill: Callable[[int], object] = staticmethod(lambda n: None)

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return 3 + torch.randn(1, 32, D, generator=self._generator)

    def peek(self, n: int) -> Tensor:
        return 3 + torch.randn(1, n, D, generator=torch.Generator().manual_seed(1))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


X = Stream().peek(200)[0]


@torch.no_grad()
def trained(architecture: str, form: str, b_dec_init: str = "geometric_median") -> SAE:
    """An SAE with a b_dec of its own, neither zero nor the median of the stream."""
    sae = init_sae(replace(spec(D, architecture=architecture, form=form), b_dec_init=b_dec_init))  # type: ignore[arg-type]
    sae.b_dec.copy_(torch.arange(D) + 1)
    sae.b_enc.add_(0.1)
    return sae


def still(sae: SAE) -> SAE:
    """Trained with a learning rate that moves nothing."""
    sae.spec = replace(sae.spec, lr=TINY)
    cs.train({"x": sae}, Stream(), CONFIG)
    return sae


@pytest.mark.parametrize("b_dec_init", ["zeros", "geometric_median"])
@pytest.mark.parametrize("form", ["paper", "v6"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_a_loaded_sae_keeps_what_it_computes(tmp_path: Path, architecture: str, form: str, b_dec_init: str) -> None:
    before = trained(architecture, form, b_dec_init)
    before.save(tmp_path)
    after = still(SAE.load(tmp_path))
    assert after.b_dec.equal(before.b_dec)
    torch.testing.assert_close(after(X), before(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_decoder_rows_of_any_norm_are_taken_up(tmp_path: Path, architecture: str) -> None:
    """As a scale of the activations leaves them that was folded into the weights."""
    trained(architecture, "paper").save(tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    scale = torch.linspace(0.2, 3, 2 * D)[:, None]
    save_file({k: v * scale if k == "W_dec" else v for k, v in load_file(file).items()}, file)
    before, after = SAE.load(tmp_path), still(SAE.load(tmp_path))
    norms = after.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2 * D))
    torch.testing.assert_close(after(X), before(X), rtol=1e-5, atol=1e-5)


def test_zeros_that_were_loaded_are_kept(tmp_path: Path) -> None:
    init_sae(spec(D)).save(tmp_path)
    assert float(still(SAE.load(tmp_path)).b_dec.detach().abs().max()) < 1e-20


def test_a_fresh_sae_begins_at_the_median_and_a_second_training_goes_on(tmp_path: Path) -> None:
    sae = still(init_sae(spec(D)))
    median = sae.b_dec.detach().clone()
    assert float((median - 3).abs().max()) < 0.3
    with torch.no_grad():
        sae.b_dec.add_(1)
    assert still(sae).b_dec.equal(median + 1)


def test_training_a_loaded_sae_makes_it_better(tmp_path: Path) -> None:
    sae = init_sae(spec(D))
    cs.train({"x": sae}, Stream(), replace(CONFIG, tokens=6400))
    sae.save(tmp_path)
    loaded = SAE.load(tmp_path)
    cs.train({"x": loaded}, Stream(), replace(CONFIG, tokens=6400))
    with torch.no_grad():
        assert float((loaded(X) - X).square().mean()) < float((sae(X) - X).square().mean())


@pytest.mark.parametrize("lr", [0.0, -1e-3, float("nan"), float("inf")])
def test_a_learning_rate_that_cannot_be_is_refused(lr: float) -> None:
    sae = init_sae(replace(spec(D), lr=lr))
    with pytest.raises(UserError, match=r"^x: its learning rate is .*, a number above 0 was expected"):
        cs.train({"x": sae}, Stream(), CONFIG)


def test_a_file_that_says_no_learning_rate_and_no_coefficient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained("standard", "v6").save(tmp_path)
    cfg = {"architecture": "standard", "d_in": D, "d_sae": 2 * D, "metadata": {"sae_lens_version": "6.54.12"}}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    loaded = SAE.load(tmp_path)
    with pytest.raises(UserError, match=r"learning rate is 0, .*dataclasses.replace\(sae.spec, lr="):
        cs.train({"x": loaded}, Stream(), CONFIG)
    still(loaded)
    assert "x: its sparsity coefficient is 0" in capsys.readouterr().err
