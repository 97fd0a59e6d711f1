"""Scores against a true dictionary, and reconstruction, beside `sae_lens.synthetic` on the same SAE and tokens."""

import pytest
import torch
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.synthetic.evals import (
    DeadLatentsCalculator,
    L0Calculator,
    ShrinkageCalculator,
    compute_classification_metrics,
    feature_uniqueness,
    mean_correlation_coefficient,
)

from chatsae.buffer import mix
from chatsae.config import SAEConfig, TrainConfig, sae_specs
from chatsae.evals.dictionary import CoFirings, dictionary_scores, judge, mcc
from chatsae.evals.synthetic import SyntheticChat, SyntheticConfig, SyntheticStream
from chatsae.sae.grid import build_grid
from chatsae.training.loop import train

REL = 2e-5  # theirs is computed in float32
WORLD = SyntheticConfig(topics=12, words=20, d_in=32, prefix_length=12, block_size=100, seed=1)


@pytest.fixture(scope="module")
def chat():
    torch.set_num_threads(1)
    return SyntheticChat(WORLD)


@pytest.fixture(scope="module")
def saes(chat):
    config = SAEConfig(expansion_factors=(1, 4), l1_coefficients=(0.5,), l0_coefficients=(0.1,), bandwidth=0.5,
                       init_threshold=0.1, lrs=(3e-3,))  # fmt: skip
    grid = build_grid(sae_specs(config, layers=(0,), d_in=32), seed=1)
    acts = mix(SyntheticStream(chat, "bt-f", seed=1), capacity=4096, batch_size=128, seed=1)
    train(grid, acts, TrainConfig(tokens=40_000, step="plain", seed=1))
    return grid


@pytest.mark.parametrize("name", ["L0-1x-standard", "L0-1x-jumprelu", "L0-4x-standard", "L0-4x-jumprelu"])
def test_a_trained_sae_has_the_scores_of_sae_lens(chat, saes, name):
    sae, sample = saes[name].requires_grad_(False), chat.dialogues(60, 2**20)
    judged = judge(sae, sample, chat.dictionary, chat.groups)
    ours, figures = judged.groups["all"], judged.figures
    feature_acts = sae.encode(sample.acts)
    sae_out = sae.decode(feature_acts)
    theirs = compute_classification_metrics(feature_acts, sample.features(), sae.W_dec, chat.dictionary)
    assert ours["mcc"] == pytest.approx(mean_correlation_coefficient(sae.W_dec, chat.dictionary), rel=REL)
    assert ours["uniqueness"] == feature_uniqueness(sae.W_dec, chat.dictionary)
    assert ours["latent_precision"] == pytest.approx(theirs.precision, rel=REL)
    assert ours["latent_recall"] == pytest.approx(theirs.recall, rel=REL)
    assert ours["latent_f1"] == pytest.approx(theirs.f1_score, rel=REL)
    assert 0.05 < ours["latent_f1"] < 0.95

    variance, shrinkage, l0, true_l0 = (
        ExplainedVarianceCalculator(), ShrinkageCalculator(), L0Calculator(), L0Calculator()
    )  # fmt: skip
    variance.add_batch(sae_out, sample.acts)
    shrinkage.add_batch(sae_out, sample.acts)
    l0.add_batch(feature_acts)
    true_l0.add_batch(sample.features())
    dead = DeadLatentsCalculator(sae.spec.d_sae)
    dead.add_batch(feature_acts)
    assert figures["explained_variance"] == pytest.approx(variance.compute(), rel=REL)
    assert figures["l2_ratio"] == pytest.approx(shrinkage.compute(), rel=REL)
    assert figures["l0"] == pytest.approx(l0.compute(), rel=REL)
    assert figures["true_l0"] == pytest.approx(true_l0.compute(), rel=REL)
    assert figures["dead_fraction"] == pytest.approx(dead.compute() / sae.spec.d_sae)


@pytest.mark.parametrize(("n_latents", "n_features"), [(40, 25), (25, 40), (1, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_random_dictionaries_match_alike(n_latents, n_features, seed):
    generator = torch.Generator().manual_seed(seed)
    W_dec, truth = (torch.randn(n, 12, generator=generator) for n in (n_latents, n_features))
    W_dec[-1] *= 0.0 if n_latents > 1 else 1.0  # a row of zeros matches nothing
    acts = torch.rand(300, n_latents, generator=generator) * (torch.rand(300, n_latents, generator=generator) < 0.2)
    true = torch.rand(300, n_features, generator=generator) * (torch.rand(300, n_features, generator=generator) < 0.2)
    firings = CoFirings(n_latents, n_features)
    firings.add(acts, true)
    ours = dictionary_scores(W_dec, truth, firings, {})["all"]
    theirs = compute_classification_metrics(acts, true, W_dec, truth)
    assert mcc(W_dec, truth) == pytest.approx(mean_correlation_coefficient(W_dec, truth), rel=REL)
    assert ours["uniqueness"] == feature_uniqueness(W_dec, truth)
    assert ours["latent_f1"] == pytest.approx(theirs.f1_score, rel=REL)
