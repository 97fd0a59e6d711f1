"""SAEBench: the result of its core evaluation, from a run's report.json."""

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from chatsae.errors import UserError
from chatsae.files import damaged, read_object

SCHEMA = 2
"""Of report.json; the latest that is read."""

METRICS: dict[str, dict[str, str | None]] = {
    "model_behavior_preservation": {
        "kl_div_score": None,
        "kl_div_with_ablation": None,
        "kl_div_with_sae": "kl",
    },
    "model_performance_preservation": {
        "ce_loss_score": "ce_recovered_zero",
        "ce_loss_with_ablation": "loss_zero_ablation",
        "ce_loss_with_sae": "loss_with_sae",
        "ce_loss_without_sae": "loss",
    },
    "reconstruction_quality": {
        "explained_variance": "explained_variance",
        "explained_variance_legacy": None,
        "mse": "mse_sum",
        "cossim": "cosine",
    },
    "shrinkage": {
        "l2_norm_in": None,
        "l2_norm_out": None,
        "l2_ratio": "l2_ratio",
        "relative_reconstruction_bias": "relative_bias",
    },
    "sparsity": {"l0": "l0", "l1": "l1"},
    "token_stats": {
        "total_tokens_eval_reconstruction": "n_tokens",
        "total_tokens_eval_sparsity_variance": "n_tokens",
    },
    "misc_metrics": {
        "freq_over_1_percent": "dense_1pct",
        "freq_over_10_percent": "dense_10pct",
        "average_max_decoder_cosine_sim": "duplicate_cosine",
        "frac_alive": "frac_alive",
    },
}
"""SAEBench's metrics, by group, and our figure for each; None: report.json has none."""


def result(
    report: Mapping[str, Any], sae: str, *, run: str, release: str, when: datetime, source: str = "report.json"
) -> dict[str, Any]:
    """The result of an SAE; figures that the report does not have are null.

    Raises:
        UserError: the report does not hold the SAE.
    """
    rows = report["saes"]
    if sae not in rows:
        raise UserError(f"{source} holds no SAE {sae!r}; it has {', '.join(rows)}. `chatsae eval {run}` writes it anew")
    row = finite(rows[sae])
    figures = row | {
        "loss_with_sae": _sum(row.get("loss"), row.get("delta_loss"), 1),
        "frac_alive": _sum(1.0, row.get("dead_fraction"), -1),
    }
    metrics = {
        group: {key: None if name is None else figures.get(name) for key, name in keys.items()}
        for group, keys in METRICS.items()
    }
    facts = finite(report["facts"])
    return {
        "eval_type_id": "core",
        "eval_config": facts,
        "eval_id": hashlib.sha256(json.dumps([run, sae, facts, row], sort_keys=True).encode()).hexdigest()[:32],
        "datetime_epoch_millis": int(when.timestamp() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": [],
        "sae_bench_commit_hash": "",
        "sae_lens_id": sae,
        "sae_lens_release_id": release,
        "sae_lens_version": "",
        "eval_result_unstructured": {"chatsae": row},
    }


def read_report(path: Path) -> dict[str, Any]:
    """A run's report.json.

    Raises:
        UserError: it is missing, damaged, or of a later version.
    """
    anew = f"`chatsae eval {path.parent}` writes it"
    if not path.exists():
        raise UserError(f"{path} does not exist; {anew}")
    report = read_object(path, f"{anew} anew", {"facts": dict, "saes": dict})
    if not all(isinstance(row, dict) for row in report["saes"].values()):
        raise damaged(path, "saes must hold objects", f"{anew} anew")
    version = report.get("schema", 0)
    if version not in range(SCHEMA + 1):
        raise UserError(f"{path}: schema is {version!r}; this chatsae reads up to {SCHEMA}; {anew} anew")
    return report


def finite(value: Any) -> Any:
    """JSON with null for numbers that are NaN or infinite."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sum(a: float | None, b: float | None, sign: int) -> float | None:
    return None if a is None or b is None else a + sign * b
