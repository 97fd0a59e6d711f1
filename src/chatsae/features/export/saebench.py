"""SAEBench: the result of its core evaluation, from a run's report.json and the weights of the SAE."""

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from chatsae.errors import UserError
from chatsae.exporting import public
from chatsae.features.directions import decoder_neighbours
from chatsae.files import damaged, read_object
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.sae.interop import cfg_of

SCHEMA = 3
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
        "normalized_freq_over_1_percent": None,
        "normalized_freq_over_10_percent": None,
        "average_max_encoder_cosine_sim": "encoder_cosine",
        "average_max_decoder_cosine_sim": "duplicate_cosine",
        "frac_alive": "frac_alive",
    },
}
"""SAEBench's metrics, by group, and our figure for each; None: neither report.json nor the weights have it."""

_COMPARED = 8192
UNKNOWN = -1
"""What SAEBench writes for a figure that it has not; its reader takes numbers alone."""


def result(
    report: Mapping[str, Any], run: Run, directory: Path, *, release: str, dataset: str, when: datetime
) -> dict[str, Any]:
    """The result of the SAE in a directory of the run, as SAEBench's `CoreEvalOutput`.

    Raises:
        UserError: the report does not hold the SAE, or its directory cannot be read.
    """
    rows, name = report["saes"], directory.name
    if name not in rows:
        raise UserError(
            f"{run.path / 'report.json'} holds no SAE {name!r}; it has {', '.join(rows)}. "
            f"`chatsae eval {run.path}` writes it anew"
        )
    sae = SAE.load(directory)
    row, facts = finite(rows[name]), finite(report["facts"])
    figures = row | {
        "loss_with_sae": _sum(row.get("loss"), row.get("delta_loss"), 1),
        "frac_alive": _sum(1.0, row.get("dead_fraction"), -1),
        "encoder_cosine": _encoder_cosine(sae),
    }
    metrics = {group: {key: figures.get(name or "") for key, name in keys.items()} for group, keys in METRICS.items()}
    unknown = [key for found in metrics.values() for key, value in found.items() if value is None]
    identity = json.dumps([str(run.path), name, facts, row], sort_keys=True)
    facts |= {"model": public(run.config.model.name), "sources": public(facts.get("sources") or dataset)}
    return {
        "eval_type_id": "core",
        "eval_config": _config(run, facts, row),
        "eval_id": hashlib.sha256(identity.encode()).hexdigest()[:32],
        "datetime_epoch_millis": int(when.timestamp() * 1000),
        "eval_result_metrics": {
            group: {key: _known(v) for key, v in found.items()} for group, found in metrics.items()
        },
        "eval_result_details": [],
        "sae_bench_commit_hash": "",
        "sae_lens_id": name,
        "sae_lens_release_id": release,
        "sae_lens_version": "",
        "sae_cfg_dict": _cfg(sae),
        "eval_result_unstructured": {"chatsae": row, "facts": facts, "unknown": unknown},
    }


def _config(run: Run, facts: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """How it was evaluated, in SAEBench's words; a key that is left out would be read as its default there.

    Dialogues are its prompts, each read by itself and whole.
    """
    n_dialogues = _known(facts.get("n_dialogues"))
    return {
        "model_name": facts["model"],
        "llm_dtype": run.config.model.dtype,
        "batch_size_prompts": 1,
        "n_eval_reconstruction_batches": n_dialogues,
        "n_eval_sparsity_variance_batches": n_dialogues,
        "dataset": facts["sources"],
        "context_size": _known(facts.get("max_length")),
        "compute_kl": row.get("kl") is not None,
        "compute_ce_loss": row.get("loss") is not None,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": False,
        "compute_featurewise_weight_based_metrics": False,
        "exclude_special_tokens_from_reconstruction": False,
        "verbose": False,
    }


def _encoder_cosine(sae: SAE) -> float | None:
    """Mean over features of the largest cosine with another's encoder; of many features so many at even distances."""
    if sae.spec.d_sae < 2:
        return None
    chosen = np.linspace(0, sae.spec.d_sae - 1, min(sae.spec.d_sae, _COMPARED)).round().astype(np.int64)
    return float(decoder_neighbours(sae.W_enc.T, chosen, k=1)[1].mean(dtype=np.float64))


def _cfg(sae: SAE) -> dict[str, Any]:
    """Its cfg.json, which is in sae_lens' format, without paths of this machine."""
    names = {key: public(sae.metadata[key]) for key in ("model_name", "dataset_path") if sae.metadata.get(key)}
    return finite(cfg_of(sae.spec, dtype=sae.W_enc.dtype, metadata=sae.metadata | names))


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


def _known(value: Any) -> Any:
    return UNKNOWN if value is None else value


def _sum(a: float | None, b: float | None, sign: int) -> float | None:
    return None if a is None or b is None else a + sign * b
