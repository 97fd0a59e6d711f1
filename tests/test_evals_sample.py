"""GSNR in an evaluation, and the controls that an SAE is judged beside."""

from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from chatsae.batch import ActivationBatch, Dialogue, Message
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.evals import sample
from chatsae.evals.controls import Controls, fit_moments, pca_sae, random_sae
from chatsae.evals.evaluate import evaluate, evaluate_tokens
from chatsae.evals.report import paired_test
from chatsae.evals.sample import TokenSample
from chatsae.lm.forward import forward
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.sae.gsnr import GsnrSums, gsnr
from chatsae.sae.init import init_sae
from sae_samples import spec
from tiny_models import random_tokens, tiny_model, tiny_tokenizer


def dialogues(n: int = 12) -> list[Dialogue]:
    return [
        Dialogue(str(i), "t", (Message("user", "why? " * (1 + i % 3)), Message("assistant", f"{i} " * (1 + i % 2))))
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(tiny_tokenizer(tiny_model(tmp_path_factory.mktemp("qwen2"))), [1, 2])


def some_saes(d_in: int) -> dict[str, SAE]:
    made = [spec(d_in, layer=layer, architecture=kind, factor=3) for layer, kind in ((1, "standard"), (2, "jumprelu"))]
    return {s.name: init_sae(s, torch.Generator().manual_seed(i)) for i, s in enumerate(made)}


def test_gsnr_of_a_report_is_that_of_its_tokens_by_stretches_of_dialogues(lm: LanguageModel) -> None:
    saes = some_saes(lm.d_in)
    report = evaluate(saes, lm, dialogues(), resamples=20)
    assert report.dialogues is not None
    tokens = next(render(dialogues(), lm.tokenizer))
    alone = {}  # by the key of the dialogue, in whose order the stretches are
    for i in range(len(tokens)):
        one = tokens.select([i])
        alone[blake2b(one.input_ids.numpy().tobytes(), digest_size=8).hexdigest()] = forward(lm, one)
    for name, sae in saes.items():
        rows = [alone[key][lm.layers.index(sae.spec.layer)] for key in report.dialogues.keys]
        edges = [round(i * 12 / 8) for i in range(9)]
        parts = []
        for start, stop in pairwise(edges):
            parts.append(GsnrSums(sae))
            parts[-1].add(torch.cat(rows[start:stop]))
        expected = GsnrSums.across(parts)
        found = report.rows[name]["gsnr"]
        assert found["value"] == pytest.approx(expected.value, rel=1e-4)
        assert (found["n"], found["unit"]) == (report.rows[name]["n_tokens"], "token")
        for parameter, own in expected.by_parameter.items():
            assert found["by_parameter"][parameter]["median"] == pytest.approx(own.median, rel=1e-3)
        assert "gsnr" not in report.rows[name]["reasons"]
        plain = gsnr(sae, torch.cat(rows)).value
        assert plain is not None
        assert abs(plain / expected.value - 1) > 0.003, "the test would not tell the two estimates apart"


def test_without_it_gsnr_is_null_with_a_reason(lm: LanguageModel) -> None:
    row = next(iter(evaluate(some_saes(lm.d_in), lm, dialogues(3), gsnr=False, resamples=5).rows.values()))
    assert row["gsnr"] is None
    assert row["reasons"]["gsnr"] == "not measured"
    row = next(iter(evaluate(some_saes(lm.d_in), lm, dialogues(1), resamples=5).rows.values()))
    assert row["gsnr"] is None
    assert row["reasons"]["gsnr"] == "1 independent parts; two are needed"


def test_a_sample_is_of_all_dialogues_and_the_same_in_any_order() -> None:
    tokens = random_tokens([5, 1, 90, 30])
    x = torch.arange(126.0)[:, None]
    parts = x.split([5, 1, 90, 30])
    found = []
    for order in ([[0, 1, 2, 3]], [[3], [2, 0], [1]]):
        drawn = TokenSample(tokens, 60)
        for chosen in order:
            drawn.add(7, chosen, torch.cat([parts[i] for i in chosen]))
        found.append(drawn.acts(7))
    assert torch.equal(*found)
    assert len(found[0]) == len(found[0].unique()) == 60
    assert torch.equal(found[0], found[0].sort(0).values)
    assert float((found[0] > 5).float().mean()) > 0.8
    everything = TokenSample(tokens, 1000)
    everything.add(7, [1, 0, 3, 2], torch.cat([parts[i] for i in (1, 0, 3, 2)]))
    assert torch.equal(everything.acts(7), x)


def moments_of(x: torch.Tensor, *, parts: int = 3) -> dict:
    batches = [ActivationBatch(part[None], random_tokens([len(part)])) for part in x.chunk(parts)]
    return fit_moments(batches, [1])


def correlated(n: int = 400, d: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + 5


def test_moments_are_those_of_all_tokens() -> None:
    x = correlated().double()
    found = moments_of(x)[1]
    assert found.n == 400
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="the training split gives no token"):
        fit_moments([], [1])


@pytest.mark.parametrize("k", [1, 5, 12])
def test_pca_leaves_the_variance_of_the_components_after_the_first_k(k: int) -> None:
    x = correlated()
    sae = init_sae(spec(12), torch.Generator().manual_seed(1))
    made, how = pca_sae(sae, moments_of(x)[1], k + 0.3)
    with torch.no_grad():
        acts = made.encode(x)
        error = float((made.decode(acts) - x).square().sum() / 400)
    values = torch.linalg.eigvalsh(torch.cov(x.double().T, correction=0))
    assert error == pytest.approx(float(values[: 12 - k].sum()), rel=1e-3, abs=1e-3)
    assert ((acts != 0).sum(1) == k).all()
    assert how.startswith(f"{k} principal components of 400 tokens of the training split")
    assert (made.spec.layer, made.spec.d_sae) == (sae.spec.layer, 2 * k)


@pytest.mark.parametrize("l0", [0.0, 0.01, 3.0, 30.5, 36.0])
def test_random_directions_fire_as_often_as_the_sae_and_reconstruct_as_well_as_one_gain_lets_them(l0: float) -> None:
    x = correlated()
    sae = init_sae(spec(12, factor=3, architecture="jumprelu"), torch.Generator().manual_seed(1))
    made, how = random_sae(sae, moments_of(x)[1], l0, x)
    assert "36 random directions (seed 0); threshold and gain fitted on 400 of the tokens" in how
    with torch.no_grad():
        acts = made.encode(x)
        assert float((acts > 0).sum()) == pytest.approx(round(l0 * 400), abs=2)  # ties in rounding
        torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(36))
        assert torch.nn.functional.cosine_similarity(made.W_enc.T, made.W_dec).min() > 0.9999

        def error(gain: float) -> float:
            return float((gain * acts @ made.W_dec + made.b_dec - x).square().sum())

        if l0 > 0:
            assert error(1.0) < min(error(0.95), error(1.05), error(0.0))
    again, _ = random_sae(sae, moments_of(x)[1], l0, x)
    other, _ = random_sae(sae, moments_of(x)[1], l0, x, seed=1)
    assert torch.equal(made.W_enc, again.W_enc)
    assert not torch.equal(made.W_dec, other.W_dec)


def test_the_threshold_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sae = correlated(), init_sae(spec(12, factor=3), torch.Generator().manual_seed(1))
    whole, _ = random_sae(sae, moments_of(x)[1], 4.0, x)
    monkeypatch.setattr("chatsae.evals.controls._CELLS", 36 * 7)
    parts, _ = random_sae(sae, moments_of(x)[1], 4.0, x)
    torch.testing.assert_close(parts.b_enc, whole.b_enc, rtol=1e-5, atol=1e-6)


def test_controls_are_rows_of_the_report_at_the_l0_of_their_sae(lm: LanguageModel) -> None:
    saes = some_saes(lm.d_in)
    fitted = fit_moments(lm.harvest(render(dialogues(), lm.tokenizer)), lm.layers)
    kinds = Controls(("random-sae", "pca"), fitted)
    tokens = list(render(dialogues(), lm.tokenizer))
    report = evaluate_tokens(saes, lm, tokens, controls=kinds, resamples=20)
    plain = evaluate_tokens(saes, lm, tokens, resamples=20)
    names = [f"{name}~{kind}" for name in saes for kind in ("random-sae", "pca")]
    assert list(report.rows) == [*saes, *names]
    assert report.dialogues is not None
    assert list(report.dialogues.tables) == [*saes, *names]
    for name, sae in saes.items():
        assert report.rows[name] == plain.rows[name]
        l0 = report.rows[name]["l0"]
        random, pca = (report.rows[f"{name}~{kind}"] for kind in ("random-sae", "pca"))
        assert random["l0"] == pytest.approx(l0, rel=1e-3)
        assert pca["l0"] == pytest.approx(min(round(l0), lm.d_in), rel=1e-3)
        assert random["fvu"] > pca["fvu"]
        assert pca["control"] == {"kind": "pca", "of": name, "made": pca["control"]["made"]}
        assert pca["gsnr"] is None
        assert pca["reasons"]["gsnr"] == "a control is not trained"
        assert set(pca) == set(report.rows[name]) | {"control"}
        for figure in ("mse", "delta_loss"):
            low, high = pca["intervals"][figure]
            assert low <= pca[figure] <= high
        test = paired_test(report, report, name, "mse", other=f"{name}~random-sae")
        assert test is not None
        assert test.difference == pytest.approx(report.rows[name]["mse"] - random["mse"], rel=1e-9)
        assert sae.spec.name == name


def test_a_control_knows_the_layer_it_is_for(lm: LanguageModel) -> None:
    saes = some_saes(lm.d_in)
    fitted = fit_moments(lm.harvest(render(dialogues(), lm.tokenizer)), lm.layers)
    made = Controls(("pca",), fitted).make(saes, dict.fromkeys(saes, 4.0), {})
    for (sae, _), own in zip(made.values(), saes.values(), strict=True):
        torch.testing.assert_close(sae.b_dec.double(), fitted[own.spec.layer].mean, rtol=1e-5, atol=1e-6)
    assert not torch.equal(fitted[1].mean, fitted[2].mean)


def test_few_tokens_suffice_for_gsnr(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TOKENS", 40)
    row = evaluate(some_saes(lm.d_in), lm, dialogues(), resamples=5).rows["L1-3x-standard"]
    assert row["gsnr"]["n"] == 40 < row["n_tokens"]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_tokens_of_the_constant_prefix_are_the_same_vectors_in_every_dialogue(tmp_path: Path, family: str) -> None:
    lm = LanguageModel(tiny_tokenizer(tiny_model(tmp_path, family)), [1, 3])
    tokens = next(render(dialogues(), lm.tokenizer))
    lengths = {int(tokens.select([i]).prefix.sum()) for i in range(len(tokens))}
    (n,) = lengths
    assert n >= 3
    found = [forward(lm, tokens.select([i])) for i in range(len(tokens))]
    for acts in found[1:]:
        torch.testing.assert_close(acts[:, :n], found[0][:, :n], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1][:, n + 12 : n + 14], found[0][:, n + 12 : n + 14], rtol=1e-2)
