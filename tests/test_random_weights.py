"""A model with random weights: the same however deep it is loaded, and nothing left of what was learned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatsae.cli import main
from chatsae.data.reading import read
from chatsae.errors import UserError
from chatsae.evals.evaluate import evaluate
from chatsae.evals.report import Report, compare
from chatsae.lm.load import LanguageModel, load_model
from chatsae.lm.random_weights import randomise_
from chatsae.lm.tap import read_residuals
from chatsae.runs import Run
from chatsae.sae.base import SAE
from tiny_models import tiny_model, tiny_tokenizer

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "gemma3", "bloom", "mixtral", "qwen2-vl"])
def test_a_cut_model_has_the_random_weights_of_the_whole_one(family: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path, family)
    cut, own = LanguageModel(path, [1], random_weights=5), LanguageModel(path, [1])
    whole = LanguageModel(path, [1], random_weights=5, head=True)
    with torch.inference_mode():
        a, b, c = (read_residuals(lm, IDS)[0] for lm in (cut, whole, own))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, rtol=0.1)
    with torch.inference_mode():
        assert torch.equal(read_residuals(cut.with_head(), IDS)[0], a)
    assert (cut.random_weights, cut.with_head().random_weights, own.random_weights) == (5, 5, None)


def test_every_tensor_keeps_its_mean_and_variance_and_the_seed_decides(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    own, first, again, other = (
        dict(LanguageModel(path, random_weights=seed).model.named_parameters()) for seed in (None, 1, 1, 2)
    )
    assert len(own) > 20
    for name, before in own.items():
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        n = before.numel()
        spread = float(before.std())
        assert float(first[name].mean()) == pytest.approx(float(before.mean()), abs=5 * spread / n**0.5)
        assert float(first[name].std()) == pytest.approx(spread, rel=5 / n**0.5)
        if n > 1000:
            together = torch.corrcoef(torch.stack([before.flatten(), first[name].flatten()]))[0, 1]
            assert abs(float(together)) < 5 / n**0.5


def test_quantised_weights_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"model.random_weights: m: decoder.0.weight is quantised"):
        randomise_(model, model, torch.nn.ModuleList(), 0, "m")


def test_the_control_is_a_run_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer(tiny_model(tmp_path / "model"))
    said = [[{"role": r, "content": f"{i} {r} says"} for r in ("user", "assistant")] for i in range(300)]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in said))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{name: {tmp_path / "model"}, layers: [1]}}
data: {{sources: [{chat}]}}
harvest: {{pool: 32}}
buffer: {{capacity: 600}}
sae: {{architectures: [standard], expansion_factors: [2], lrs: [1.0e-3]}}
train: {{tokens: 2000, batch_size: 50}}
eval: {{dialogues: 5}}
"""
    )
    for name, flags in (("own", []), ("random", ["--model.random-weights", "7"])):
        assert main(["train", str(recipe), "--out", str(tmp_path / name), *flags]) == 0
        assert main(["eval", str(tmp_path / name)]) == 0
    runs = [Run.read(tmp_path / name) for name in ("own", "random")]
    own, random = (Report.load(run.path / "report.json") for run in runs)
    assert random.facts == own.facts | {"random_weights": 7}
    assert random.rows["L1-2x-standard"]["loss"] != own.rows["L1-2x-standard"]["loss"]
    assert [row["method"] for row in compare(runs).rows] == ["fast", "fast~random-model"]
    sae = SAE.load(tmp_path / "random" / "saes" / "L1-2x-standard")
    assert sae.metadata["random_weights"] == 7
    capsys.readouterr()
    for seed, told in ((None, True), (7, False)):
        lm = load_model(replace(runs[0].config.model, random_weights=seed))
        evaluate({"sae": sae}, lm, read(str(chat), split="eval"), limit=2, resamples=5)
        warned = "with random weights (seed 7) and is evaluated with its own weights" in capsys.readouterr().err
        assert warned == told
