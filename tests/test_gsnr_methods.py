"""The same tokens under every method, and what the GSNR of one SAE is on them."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatsae.batch import Dialogue, Document, Message
from chatsae.config import DataConfig, ModelConfig, RunConfig, SAEConfig, sae_specs
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.evals.gsnr import Readings, jackknife, method_gsnr, methods_table, read_methods
from chatsae.lm.forward import bare_tokens, forward
from chatsae.lm.load import LanguageModel
from chatsae.runs import Run
from chatsae.sae.grid import build_grid
from chatsae.sae.gsnr import GsnrSums
from chatsae.sae.init import init_sae
from sae_samples import spec
from tiny_models import random_tokens, tiny_model, tiny_tokenizer

BLOCK, BLOCKS = 32, 6
DIALOGUES = [
    Dialogue(str(i), "test", (Message("user", "why? " * (1 + i % 5)), Message("assistant", "because. " * (1 + i % 3))))
    for i in range(12)
]
DOCUMENTS = [Document(str(i), "test", f"text number {i}. " * 5) for i in range(6)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return LanguageModel(tiny_tokenizer(tiny_model(tmp_path_factory.mktemp("qwen2"))), [1, 3])


@pytest.fixture(scope="module")
def readings(lm) -> Readings:
    return read_methods(lm, DIALOGUES, DOCUMENTS, n_blocks=BLOCKS, block_size=BLOCK)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_every_method_reads_the_same_tokens_in_its_own_way(lm, readings):
    n = BLOCK * BLOCKS
    whole = next(render(DIALOGUES, lm.tokenizer))
    alone = torch.cat([forward(lm, whole.select([i])) for i in range(len(whole))], dim=1)[:, :n]
    assert close(readings.acts["fast"], alone)
    blocks = whole.input_ids[:n].split(BLOCK)
    assert close(readings.acts["bt-f"], torch.cat([forward(lm, bare_tokens([b])) for b in blocks], dim=1))
    isolated = next(render(DIALOGUES, lm.tokenizer, method="bt-f-isolated", block_size=BLOCK))
    kept = isolated.cu_seqlens.tolist().index(n)
    pieces = [forward(lm, isolated.select([i])) for i in range(kept)]
    assert close(readings.acts["bt-f-isolated"], torch.cat(pieces, dim=1))
    text = next(render(DOCUMENTS, lm.tokenizer, method="bt-p", block_size=BLOCK)).select(range(BLOCKS))
    assert close(readings.acts["bt-p"], torch.cat([forward(lm, text.select([i])) for i in range(BLOCKS)], dim=1))
    assert not close(readings.acts["fast"], readings.acts["bt-f"])
    assert not close(readings.acts["fast"], readings.acts["bt-f-isolated"])
    assert torch.equal(readings.sequence, whole.sequence[:n])
    assert torch.equal(readings.prefix, whole.prefix[:n])
    assert 0 < readings.prefix.sum() < n
    assert int(readings.dialogues.cu_seqlens[-2]) < n <= int(readings.dialogues.cu_seqlens[-1])


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_gsnr_by_method_is_that_of_its_tokens(readings, architecture):
    sae = init_sae(spec(32, architecture=architecture, layer=3), torch.Generator().manual_seed(0))
    found = method_gsnr(sae, readings, sparsity_scale=0.5, folds=3)
    assert list(found) == ["fast", "bt-f", "bt-f-isolated", "bt-p"]
    for method, rows in found.items():
        x = readings.acts[method][1]
        prefix = readings.prefix & (method != "bt-p")
        for name, chosen in (("token", torch.ones_like(prefix)), ("variable", ~prefix)):
            parts = []
            for fold in range(3):
                rows_of = slice(fold * 2 * BLOCK, (fold + 1) * 2 * BLOCK)
                parts.append(GsnrSums(sae, sparsity_scale=0.5))
                parts[-1].add(x[rows_of][chosen[rows_of]])
            expected = GsnrSums.across(parts)
            left = [GsnrSums.across([p for p in parts if p is not out]).value for out in parts]
            assert rows[name]["value"] == pytest.approx(expected.value, rel=1e-5)
            assert (rows[name]["n"], rows[name]["unit"]) == (int(chosen.sum()), "token")
            assert rows[name]["se"] == pytest.approx(jackknife(left), rel=1e-3)
            against = found["fast"][name]["value"]
            assert rows[name]["over_fast"] == pytest.approx(expected.value / against, rel=1e-5)
    assert found["fast"]["token"]["over_fast_se"] == 0
    assert found["bt-f"]["token"]["over_fast_se"] > 0
    assert found["bt-p"]["sequence"] is None
    pieces = sum(len(s.unique()) for s in readings.sequence.split(2 * BLOCK))
    assert (found["fast"]["sequence"]["n"], found["fast"]["sequence"]["unit"]) == (pieces, "sequence")


def test_isolated_blocks_that_cut_no_dialogue_are_fast(lm, readings):
    whole = random_tokens([BLOCK] * BLOCKS)
    acts = forward(lm, whole)
    same = replace(
        readings,
        acts={"fast": acts, "bt-f-isolated": acts.clone()},
        sequence=whole.sequence,
        prefix=whole.prefix,
        dialogues=whole,
    )
    found = method_gsnr(init_sae(spec(32, layer=1), torch.Generator().manual_seed(0)), same, folds=6)
    for name in ("token", "variable", "sequence"):
        own = found["bt-f-isolated"][name]
        assert (own["over_fast"], own["over_fast_se"]) == (1, 0)
        assert own["value"] == found["fast"][name]["value"]


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0], dtype=torch.float64)
    left_out = [float((values.sum() - v) / 4) for v in values]
    assert jackknife(left_out) == pytest.approx(float(values.std()) / 5**0.5)
    assert jackknife([1.0, None, 2.0]) is None
    assert jackknife([1.0]) is None


def test_too_few_tokens_or_blocks_are_refused(lm, readings):
    with pytest.raises(UserError, match=r"the dialogues give [\d,]+ tokens, 3,200 are needed; ask for fewer blocks"):
        read_methods(lm, DIALOGUES, n_blocks=100, block_size=BLOCK)
    with pytest.raises(UserError, match="needs 3 to 6 folds, as there are blocks, not 7"):
        method_gsnr(init_sae(spec(32), torch.Generator().manual_seed(0)), readings, folds=7)


def test_the_table_has_a_row_for_each_method(readings):
    sae = init_sae(spec(32), torch.Generator().manual_seed(0))
    found = method_gsnr(sae, readings, folds=3)
    lines = methods_table({("some-sae", "initial"): found}).splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    value = found["bt-f"]["token"]["value"]
    assert lines[3].startswith(f"| some-sae | initial | bt-f | {value * 1e3:.3g} ± ")
    assert lines[5].endswith("| – | – |")


def test_the_tool_measures_run_directories(tmp_path, capsys, monkeypatch):
    config = RunConfig(
        model=ModelConfig(layers=(3,)), data=DataConfig(block_size=64), sae=SAEConfig(expansion_factors=(1,))
    )
    run = Run.open(tmp_path / "run", config)
    for name, sae in build_grid(sae_specs(config.sae, layers=(3,), d_in=192), seed=1).items():
        sae.save(run.path / "saes" / name)
    run.close()
    path = Path(__file__).parents[1] / "tools" / "gsnr.py"
    module_spec = importlib.util.spec_from_file_location("gsnr_tool", path)
    assert module_spec is not None
    tool = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(tool)
    out = tmp_path / "gsnr.json"
    arguments = ["gsnr", str(run.path), "--blocks", "3", "--folds", "3", "--json", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    tool.main()
    written = json.loads(out.read_text())
    assert len(written["gsnr"]) == 2 * 2 * 4
    assert {row["weights"] for row in written["gsnr"]} == {"initial", "trained fast"}
    assert all(row["token"]["n"] == 192 for row in written["gsnr"])
    assert list(written["leakage"]["layers"]) == ["0", "1", "2", "3"]
    printed = capsys.readouterr().out
    assert "192 tokens per method, demo" in printed
    assert "3 blocks of 64 tokens" in printed
