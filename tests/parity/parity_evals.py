"""The installed sae_lens' evaluators on the same SAE and tokens: equal where they are right, and shown where not.

Right in 6.54.12, where no token is excluded: explained variance (ExplainedVarianceCalculator), CE without and with the
SAE and with zero ablation, CE recovered, L0, L1, the l2 ratio, cosine, the summed squared error; KL over all tokens.
Not right: `explained_variance_legacy`; everything with `exclude_special_tokens`, its default, on a chat model; the mean
over batches of `relative_reconstruction_bias`.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.evals import ExplainedVarianceCalculator, get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import get_special_token_ids

from chatsae.bench import sae_lens_evals as peer
from chatsae.bench.evals import run_peer
from chatsae.evals.evaluate import evaluate_tokens
from chatsae.lm.forward import bare_tokens
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import read_residuals, splice
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae
from sae_samples import constant_sae, spec
from tiny_models import tiny_model, tiny_tokenizer

LAYER, ROWS, CONTEXT = 1, 6, 40


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> LanguageModel:
    return LanguageModel(tiny_tokenizer(tiny_model(tmp_path_factory.mktemp("model"))), [LAYER], head=True)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Random tokens, the end of a turn after every eighth."""
    ids = torch.randint(250, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(3))
    ids[:, 7::8] = 257
    return ids


def ours(sae: SAE, lm: LanguageModel, rows: torch.Tensor) -> dict[str, Any]:
    return evaluate_tokens({"sae": sae}, lm, [bare_tokens(list(rows))], resamples=5, gsnr=False).rows["sae"]


def theirs(
    sae: SAE, lm: LanguageModel, rows: torch.Tensor, path: Path, *, row_batch: int = ROWS, **options: Any
) -> dict:
    sae.save(path, metadata={"hook_name": f"blocks.{LAYER}.hook_resid_post"})
    job = {"checkpoint": lm.name, "layer": LAYER, "d_in": lm.d_in, "row_batch": row_batch}
    model = peer.load_model(job)
    model.tokenizer = lm.tokenizer
    if not options:
        return peer.evaluate(job, model, rows, str(path))["figures"]
    other = sae_lens.SAE.load_from_disk(str(path), device="cpu")
    other.cfg.metadata.hook_name = f"model.layers.{LAYER}"
    config = get_eval_everything_config(row_batch, len(rows) // row_batch, len(rows) // row_batch)
    found, _ = run_evals(other, peer.store(job, model, rows), model, ActivationScaler(), config, **options)
    return {name: value for group in found.values() for name, value in group.items()}


def an_sae(d_in: int, architecture: str = "standard") -> SAE:
    sae = init_sae(spec(d_in, architecture=architecture, factor=3), torch.Generator().manual_seed(5))
    with torch.no_grad():
        sae.W_enc.mul_(0.3)
        sae.b_enc.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(6))
    return sae


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("row_batch", [ROWS, 2])
def test_figures_agree_where_both_are_right(lm, rows, tmp_path, architecture, row_batch):
    sae = an_sae(lm.d_in, architecture)
    here, there = ours(sae, lm, rows), theirs(sae, lm, rows, tmp_path, row_batch=row_batch)
    assert 1 < here["l0"] < 0.9 * sae.spec.d_sae
    pairs = {
        "explained_variance": (there["explained_variance"], here["explained_variance"]),
        "ce without": (there["ce_loss_without_sae"], here["loss"]),
        "ce with": (there["ce_loss_with_sae"], here["loss"] + here["delta_loss"]),
        "ce zero ablation": (there["ce_loss_with_ablation"], here["loss_zero_ablation"]),
        "l0": (there["l0"], here["l0"]),
        "l1": (there["l1"], here["l1"]),
        "mse, summed": (there["mse"], here["mse_sum"]),
        "cosine": (there["cossim"], here["cosine"]),
        "l2 ratio": (there["l2_ratio"], here["l2_ratio"]),
    }
    if here["ce_recovered_zero"] is not None:
        pairs["ce recovered"] = there["ce_loss_score"], here["ce_recovered_zero"]
    for name, (a, b) in pairs.items():
        print(f"{architecture}, {row_batch} rows per batch, {name}: theirs {a:.7g}, ours {b:.7g}")
        assert a == pytest.approx(b, rel=1e-5), name


def test_their_kl_counts_last_tokens_too(lm, rows, tmp_path):
    """Ours is over tokens that have a next one; with all of them in, the two agree."""
    sae = an_sae(lm.d_in)
    with torch.no_grad():
        own = lm.model(input_ids=rows).logits.log_softmax(-1)
        with splice(lm, LAYER, sae):
            spliced = lm.model(input_ids=rows).logits.log_softmax(-1)
    kl = (own.exp() * (own - spliced)).sum(-1)
    assert theirs(sae, lm, rows, tmp_path)["kl_div_with_sae"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert ours(sae, lm, rows)["kl"] == pytest.approx(float(kl[:, :-1].mean()), rel=1e-4)


def test_explained_variance_of_a_worked_example_and_of_the_mean(lm, rows):
    calculator = ExplainedVarianceCalculator()
    calculator.add_batch(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    assert calculator.compute() == pytest.approx(0.8)  # as in tests/test_evals_figures.py
    with torch.no_grad():
        x = read_residuals(lm, rows)[0].flatten(0, 1)
    mean, calculator = constant_sae(x.mean(0), layer=LAYER), ExplainedVarianceCalculator()
    for part in x.split(50):
        with torch.no_grad():
            calculator.add_batch(mean(part), part)
    assert calculator.compute() == pytest.approx(0, abs=1e-6)
    assert ours(mean, lm, rows)["explained_variance"] == pytest.approx(0, abs=1e-6)


def test_their_legacy_explained_variance_is_not_one(lm, rows, tmp_path):
    """A mean of ratios to the variance about the mean of a batch: the batches change it, and few tokens decide it."""
    sae = an_sae(lm.d_in)
    found = {n: theirs(sae, lm, rows, tmp_path / str(n), row_batch=n) for n in (1, ROWS)}
    legacy = [one["explained_variance_legacy"] for one in found.values()]
    right = [one["explained_variance"] for one in found.values()]
    print(f"legacy {legacy}, right {right}, ours {ours(sae, lm, rows)['explained_variance']:.7g}")
    assert abs(legacy[0] - legacy[1]) > 1e-3
    assert right[0] == pytest.approx(right[1], rel=1e-5)
    assert abs(legacy[1] - right[1]) > 1e-3


def test_their_relative_bias_is_a_mean_of_batches(lm, rows, tmp_path):
    sae = an_sae(lm.d_in)
    key, here = "relative_reconstruction_bias", ours(sae, lm, rows)["relative_bias"]
    assert theirs(sae, lm, rows, tmp_path / "one")[key] == pytest.approx(here, rel=1e-5)
    parts = theirs(sae, lm, rows, tmp_path / "six", row_batch=1)[key]
    print(f"relative bias: ours {here:.7g}, theirs in one batch the same, in six {parts:.7g}")
    assert abs(parts / here - 1) > 1e-5


def test_their_default_drops_the_end_of_every_turn(lm, rows, tmp_path):
    """`exclude_special_tokens` takes <|im_end|> for a mark of structure: the tokens the paper is about do not count."""
    assert 257 in set(get_special_token_ids(lm.tokenizer))
    sae = an_sae(lm.d_in)
    there = theirs(sae, lm, rows, tmp_path, exclude_special_tokens=True)
    kept = rows != 257
    with torch.no_grad():
        x = read_residuals(lm, rows)[0][kept]
        l0 = float((sae.encode(x) != 0).sum(-1).double().mean())
    assert there["l0"] == pytest.approx(l0, rel=1e-5)
    assert abs(there["l0"] / ours(sae, lm, rows)["l0"] - 1) > 5e-4  # a token in eight


def test_the_script_of_the_benchmark_says_the_same(lm, rows, tmp_path):
    sae = an_sae(lm.d_in)
    answer = run_peer(Path(sys.executable), tmp_path, lm, [sae, sae], bare_tokens(list(rows)[:4]))
    expected = theirs(sae, lm, rows[:4], tmp_path / "again", row_batch=4)
    assert answer["versions"]["sae-lens"] == sae_lens.__version__
    for one in answer["saes"]:
        assert one["figures"]["explained_variance"] == pytest.approx(expected["explained_variance"], rel=1e-6)
        assert one["cpu_s"] > 0
