"""SAEBench's result of its core evaluation (tests/parity opens it with sae-bench, and records its schema)."""

import json
import math
from pathlib import Path

import pytest

from chatsae.cli import main
from chatsae.errors import UserError
from chatsae.evals.report import Report
from chatsae.evals.schema import FIGURES, VERSION
from chatsae.features.export import saebench
from chatsae.features.export.command import Wanted, export
from export_schemas import SCHEMAS, check, strict
from feature_samples import planted_run

pytest_plugins = ["feature_fixtures"]

NAME = "L1-1x-standard"


def test_every_metric_of_saebench_is_a_figure_of_the_report() -> None:
    named = {name for keys in saebench.METRICS.values() for name in keys.values() if name}
    assert named - set(FIGURES) == {"loss_with_sae", "frac_alive", "encoder_cosine"}
    assert saebench.SCHEMA == VERSION


def report(path: Path) -> None:
    """A report.json with figures that are null and one that is not finite."""
    figures = dict.fromkeys(FIGURES) | {"loss": 3.0, "delta_loss": 0.5, "dead_fraction": 0.25, "kl": 0.1, "n_tokens": 9}
    figures |= {"mse_sum": 8.0, "mse": 1.0, "dense_1pct": math.nan, "l0": 4.5}
    facts = {"model": "plain", "n_dialogues": 3, "max_length": 64, "tokens_sha256": "0"}
    Report({NAME: figures | {"groups": {}, "intervals": {}, "reasons": {}}}, facts).save(path)


def test_an_evaluation_is_written_as_saebench_has_it(tmp_path: Path, model: Path, capsys) -> None:
    run = planted_run(tmp_path / "of", model)
    assert main(["export", str(run), "--format", "saebench"]) == 2
    assert f"chatsae eval {run}" in capsys.readouterr().err
    report(run / "report.json")
    assert main(["export", str(run), "--format", "saebench", "--json"]) == 0
    (written,) = json.loads(capsys.readouterr().out)
    assert list(written["files"]) == [f"{NAME}_eval_results.json"]
    file = Path(written["directory"]) / f"{NAME}_eval_results.json"
    assert file.parent.parent == run / "exports" / "saebench"
    result = check(strict(file.read_text()), "saebench")
    metrics = result["eval_result_metrics"]
    assert metrics["model_performance_preservation"] == {
        "ce_loss_score": -1,
        "ce_loss_with_ablation": -1,
        "ce_loss_with_sae": 3.5,
        "ce_loss_without_sae": 3.0,
    }
    assert metrics["misc_metrics"]["frac_alive"] == 0.75
    assert metrics["misc_metrics"]["freq_over_1_percent"] == -1
    assert metrics["reconstruction_quality"]["mse"] == 8
    assert metrics["sparsity"]["l0"] == 4.5
    unknown = [key for group in metrics.values() for key, value in group.items() if value == -1]
    assert result["eval_result_unstructured"]["unknown"] == unknown
    assert written["left_out"] == {"figures that the report does not hold, written as -1": len(unknown)}
    config = result["eval_config"]
    assert config.keys() == SCHEMAS["saebench"]["$defs"]["CoreEvalConfig"]["properties"].keys()
    assert (config["model_name"], config["dataset"]) == (model.name, "chat.jsonl")
    assert (config["n_eval_reconstruction_batches"], config["context_size"]) == (3, 64)
    assert result["sae_cfg_dict"]["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert str(tmp_path) not in file.read_text()
    assert (result["sae_lens_id"], result["sae_lens_release_id"]) == (NAME, "chatsae-fast-1x-standard")
    assert main(["export", str(run), "--format", "saebench", "--features", "3"]) == 2
    assert "--features: an evaluation has none" in capsys.readouterr().err
    for text, message in (
        ("{", "damaged"),
        ('{"facts": {}, "saes": {}}', "holds no SAE"),
        ('{"schema": 9}', "damaged"),
    ):
        (run / "report.json").write_text(text)
        with pytest.raises(UserError, match=message):
            export(run, Wanted(format="saebench"))
