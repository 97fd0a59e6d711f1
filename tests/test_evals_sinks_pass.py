"""`chatsae eval --sinks-pass yes`: norm sinks keep the model's activation where an SAE is spliced in."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import chatsae.config as cs
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.evals.evaluate import evaluate, evaluate_tokens
from chatsae.evals.report import Report, compare
from chatsae.lm.load import LanguageModel
from chatsae.lm.norms import SINK_RATIO, read_norms
from chatsae.lm.tap import splice
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae
from sae_samples import spec
from sink_samples import SAID, with_sinks

LAYER = 1


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return with_sinks(tmp_path_factory.mktemp("qwen2"), [LAYER])


@pytest.fixture(scope="module")
def saes(lm: LanguageModel) -> dict[str, SAE]:
    return {"sae": init_sae(spec(lm.d_in), torch.Generator().manual_seed(3))}


def by_hand(lm: LanguageModel, sae: SAE) -> tuple[float, float, int]:
    """One dialogue at a time: the norm of a sink, the Delta Loss in nats with sinks put back, and how many."""
    full, found, losses = lm.with_head(), [], []
    sequences = [ids for batch in render(SAID, lm.tokenizer) for ids in batch.input_ids.split(batch.lengths.tolist())]

    def loss(ids: torch.Tensor) -> torch.Tensor:
        logits = full.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double()

    with torch.no_grad():
        for ids in sequences:
            with splice(full, LAYER, lambda x: found.append(x[0]) or x):
                losses.append(loss(ids))
        norms = torch.cat(found).norm(dim=1)
        bound = 10 * float(norms.median())
        spliced = []
        for ids in sequences:
            with splice(full, LAYER, lambda x: torch.where(x.norm(dim=-1, keepdim=True) > bound, x, sae(x))):
                spliced.append(loss(ids))
    return bound, float((torch.cat(spliced) - torch.cat(losses)).mean()), int((norms > bound).sum())


def test_passing_sinks_equals_putting_them_back_by_hand(lm: LanguageModel, saes: dict[str, SAE]) -> None:
    bound, delta, n_sinks = by_hand(lm, saes["sae"])
    assert n_sinks == 1
    plain = evaluate(saes, lm, SAID, resamples=20)
    assert "sinks_pass" not in plain.facts
    for budget in (0, 1, 50):
        passed = evaluate(saes, lm, SAID[::-1], resamples=20, token_budget=budget, sinks_pass=True)
        assert passed.facts["sinks_pass"][str(LAYER)] == pytest.approx(bound, rel=1e-5)
        assert passed.rows["sae"]["delta_loss"] == pytest.approx(delta, rel=1e-4)
    assert abs(plain.rows["sae"]["delta_loss"] - delta) > 1e-3
    same = evaluate(saes, lm, SAID, resamples=20, sinks_pass=True).rows["sae"]
    for figure in ("mse", "explained_variance", "explained_variance_no_sinks", "l0", "loss", "loss_zero_ablation"):
        assert same[figure] == plain.rows["sae"][figure], figure
    assert "sinks keep the model's own activation" in passed.table()
    assert "sinks keep" not in plain.table()


def test_norms_that_are_known_are_not_measured(lm: LanguageModel, saes: dict[str, SAE], tmp_path: Path) -> None:
    place = {"layer": LAYER, "n_tokens": 9, "median": 1e6, "mean": 1.0, "n_sinks": 0, "norm_share": 0.0}
    file = tmp_path / "norms.json"
    file.write_text(json.dumps({"layers": [place | {"by_position": [], "places": []}]}))
    norms = read_norms(file)
    tokens = list(render(SAID, lm.tokenizer))
    plain = evaluate_tokens(saes, lm, tokens, resamples=20)
    passed = evaluate_tokens(saes, lm, tokens, resamples=20, sinks_pass=True, norms=norms)
    assert passed.facts["sinks_pass"] == {str(LAYER): SINK_RATIO * 1e6}
    assert passed.rows == plain.rows  # no token is that long
    other = [replace(norms[0], layer=LAYER + 1)]
    measured = evaluate_tokens(saes, lm, tokens, resamples=20, sinks_pass=True, norms=other)
    assert 0 < measured.facts["sinks_pass"][str(LAYER)] < SINK_RATIO * 1e6
    assert evaluate_tokens(saes, lm, tokens, resamples=20, norms=norms).facts == plain.facts
    file.write_text(json.dumps({"layers": [{"layer": 1}]}))
    with pytest.raises(UserError, match="damaged"):
        read_norms(file)


def test_runs_with_and_without_are_not_compared(lm: LanguageModel, saes: dict[str, SAE], tmp_path: Path) -> None:
    plain = evaluate(saes, lm, SAID, resamples=20)
    passed = evaluate(saes, lm, SAID, resamples=20, sinks_pass=True)
    near = Report(passed.rows, passed.facts | {"sinks_pass": {str(LAYER): 1.0}})  # of a run with norms of its own
    runs = {}
    for name, report in (("plain", plain), ("passed", passed), ("near", near)):
        runs[name] = Run.open(tmp_path / name, cs.RunConfig())
        report.save(runs[name].path / "report.json")
    assert "sinks keep" in compare([runs["passed"], runs["near"]]).table()
    with pytest.raises(UserError, match="or otherwise"):
        compare([runs["plain"], runs["passed"]])
    for run in runs.values():
        run.close()
