"""From sums to the row of an SAE in a report: figures, groups, intervals, and the reason for each that is missing."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.evals import reconstruction
from chatsae.evals.features import duplicate_figures, firing_figures, l0_quantiles
from chatsae.evals.groups import NAMES, VARIANTS, WHOLE, first_sink_bin
from chatsae.evals.reconstruction import Reconstruction, Stream
from chatsae.statistics import Ratio, bootstrap, ratio, wilson

Table = dict[str, Float[np.ndarray, " S"]]
"""Sums of one SAE by dialogue; the columns are those of `COLUMNS`."""

ABLATIONS = ("zero", "mean")
COLUMNS = (
    *("n_tokens", "mse", *VARIANTS, "squared_error", "variance", *reconstruction.TOKEN_SUMS[3:]),
    *(
        f"{name}{suffix}"
        for suffix in ("", "_assistant")
        for name in ("n_scored", "loss", "loss_sae", "kl", "top1", *(f"loss_{a}" for a in ABLATIONS))
    ),
)
"""Per dialogue: its tokens; its mean squared error (eq. 7), on all tokens and on special ones, NaN without any; the
sum of |sae_out - x|^2 / d_in and of |x - mean x|^2 / d_in; the sums of `TOKEN_SUMS`; and for the tokens that have a
loss, all and those of assistant turns: how many, their loss as the model is, with the SAE, KL, equal top-1, their loss
with zero or the mean in place of the residual stream."""

_LOG2 = ("mse", *VARIANTS)
_ABSENT = {
    "mse_st": "no token of the evaluation set has the id of a special token",
    "mse_st_template": "the evaluation set has no special token",
    "mse_st_no_first": "the evaluation set has no special token after position 0",
    "mse_st_no_prefix": "the evaluation set has no special token outside the constant prefix",
}
_NO_LOSS = {"": "no token has a loss: every dialogue is one token long", "_assistant": "no assistant token has a loss"}
_NOT_CONSTANT = "the model's states depend on more than position once its residual stream is constant"
_SINKS = "which tokens are sinks is known only at the end, when dialogues are no longer apart"


def ratios(table: Table) -> dict[str, Ratio]:
    """The figures that are ratios of sums over dialogues, by their parts."""
    n, one = table["n_tokens"], np.ones_like(table["n_tokens"])
    found: dict[str, Ratio] = {"mse": (table["mse"], one)}
    for name in VARIANTS:
        found[name] = (np.nan_to_num(table[name]), (~np.isnan(table[name])).astype(np.float64))
    found |= {"mse_token": (table["squared_error"], n), "fvu": (table["squared_error"], table["variance"])}
    found |= {"l0": (table["l0"], n), "l1": (table["l1"], n)}
    found |= {name: (table[name], table["n_ratio"]) for name in ("normalized_mse", "l2_ratio")}
    found["cosine"] = (table["cosine"], table["n_cosine"])
    for suffix in ("", "_assistant"):
        scored, loss, spliced = (table[f"{name}{suffix}"] for name in ("n_scored", "loss", "loss_sae"))
        found[f"loss{suffix}"] = (loss, scored)
        found[f"delta_loss{suffix}"] = (spliced - loss, scored)
        found[f"delta_loss_percent{suffix}"] = (100 * (spliced - loss), loss)
        found[f"kl{suffix}"] = (table[f"kl{suffix}"], scored)
        found[f"top1_agreement{suffix}"] = (table[f"top1{suffix}"], scored)
        for name in ABLATIONS:
            ablated = table[f"loss_{name}{suffix}"]
            found[f"loss_{name}_ablation{suffix}"] = (ablated, scored)
            found[f"ce_recovered_{name}{suffix}"] = (ablated - spliced, ablated - loss)
    return found


def sae_row(
    sums: Reconstruction, stream: Stream, table: Table, W_dec: Float[Tensor, "F D"], *, constant: bool
) -> dict[str, Any]:
    """Figures, `groups` and `reasons` of an SAE; `intervals` are those that need no bootstrap (`add_intervals`).

    `constant`: ablations could be measured (`Trunk.constant`).
    """
    n_tokens = int(sums.n[NAMES.index((WHOLE, ""))])
    values, reasons = _by_dialogue(table, constant)
    groups, whole, lacking = _groups(sums, stream)
    values |= whole  # from sums over tokens, which are exact where those over dialogues were rounded
    reasons |= {name: lacking[f"{WHOLE}//{name}"] for name in whole if f"{WHOLE}//{name}" in lacking}
    reasons |= {key: reason for key, reason in lacking.items() if not key.startswith(f"{WHOLE}/")}
    values |= l0_quantiles(sums.l0_counts)
    shares, intervals = firing_figures(sums.firings, n_tokens)
    duplicates, missing = duplicate_figures(W_dec)
    sinks, no_sinks, why = _sink_figures(stream, groups)
    values |= shares | duplicates | sinks
    reasons |= missing | why
    intervals["sink_share"] = wilson(no_sinks, n_tokens)
    for name in _LOG2:
        value = values[name]
        values[f"log2_{name}"] = math.log2(value) if value else None
        if not value:
            reasons[f"log2_{name}"] = reasons.get(name, "the error is exactly 0")
    values |= {"n_tokens": n_tokens, "n_dialogues": len(table["n_tokens"]), "gsnr": None}
    reasons["gsnr"] = "not measured"
    kept = {name: None if pair is None else list(pair) for name, pair in intervals.items()}
    return {**dict(sorted(values.items())), "groups": groups, "intervals": kept, "reasons": reasons}


def add_intervals(
    rows: Mapping[str, dict[str, Any]], tables: Mapping[str, Table], *, resamples: int, seed: int
) -> None:
    """Put 95 % bootstrap intervals over dialogues into the rows; the same draws serve all SAEs."""
    parts = {(name, figure): pair for name, table in tables.items() for figure, pair in ratios(table).items()}
    keys = {"\n".join(key): key for key in parts}
    found = bootstrap({text: parts[key] for text, key in keys.items()}, resamples=resamples, seed=seed)
    few = "fewer than two dialogues" if any(len(t["n_tokens"]) < 2 for t in tables.values()) else "too few dialogues"
    for text, (name, figure) in keys.items():
        row, interval = rows[name], found[text]
        if row[figure] is None:
            interval = None
        elif interval is None:
            row["reasons"][f"intervals/{figure}"] = few
        row["intervals"][figure] = None if interval is None else list(interval)
        if figure == "fvu":
            row["intervals"]["explained_variance"] = None if interval is None else [1 - interval[1], 1 - interval[0]]
            if f"intervals/{figure}" in row["reasons"]:
                row["reasons"]["intervals/explained_variance"] = few


def _by_dialogue(table: Table, constant: bool) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, parts in ratios(table).items():
        suffix = "_assistant" if name.endswith("_assistant") else ""
        ablated = "ablation" in name or "recovered" in name
        values[name] = None if ablated and not constant else ratio(parts)
        if "recovered" in name and values[name] is not None and parts[1].sum() < 0:
            values[name] = None
        if values[name] is None:
            reasons[name] = _why_absent(name, suffix, bool(table[f"n_scored{suffix}"].sum()), ablated and not constant)
    return values, reasons


def _why_absent(name: str, suffix: str, scored: bool, dependent: bool) -> str:
    if name in _ABSENT:
        return _ABSENT[name]
    if not scored:
        return _NO_LOSS[suffix]
    if dependent:
        return _NOT_CONSTANT
    return "the ablation does not raise the loss" if "recovered" in name else "the loss is 0"


def _groups(sums: Reconstruction, stream: Stream) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Groups that have tokens, by partition and part; the figures of all tokens; reasons by "partition/part/figure"."""
    groups: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for i, (partition, part) in enumerate(NAMES):
        n = int(sums.n[i])
        if n == 0:
            continue
        values, lacking = reconstruction.figures(n, float(stream.x2[i]), stream.x[i], sums.sums[i])
        if partition == WHOLE:
            whole = values
        else:
            counts = {"n_tokens": n, "n_dialogues": int(sums.eq7_n[i])}
            groups.setdefault(partition, {})[part] = counts | {"mse": float(sums.eq7[i] / sums.eq7_n[i])} | values
        reasons |= {f"{partition}/{part}/{name}": reason for name, reason in lacking.items()}
    groups["sink"] = {}
    least = first_sink_bin(stream.median_bin())
    for part, below in (("no", True), ("yes", False)):
        totals, own = stream.bins.total(least, below=below), sums.bins.total(least, below=below)
        n = int(totals[0])
        if n == 0:
            continue
        values, lacking = reconstruction.figures(n, float(totals[1]), totals[2:], own)
        groups["sink"][part] = {"n_tokens": n, "n_dialogues": None, "mse": None} | values
        reasons |= {f"sink/{part}/{name}": reason for name, reason in lacking.items()}
        reasons |= {f"sink/{part}/{name}": _SINKS for name in ("n_dialogues", "mse")}
    return groups, whole, reasons


def _sink_figures(stream: Stream, groups: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Share of norm sinks among tokens and in the squared norm, how many, gamma, and figures without them."""
    totals = stream.bins.total(first_sink_bin(stream.median_bin()), below=False)
    i = NAMES.index((WHOLE, ""))
    n = sum(part["n_tokens"] for part in groups["sink"].values())
    x2, mean2 = float(stream.x2[i]) / n, float((stream.x[i] / n).square().sum())
    rest = groups["sink"].get("no", {})
    values = {
        "sink_share": float(totals[0]) / n,
        "sink_norm_share": float(totals[1]) / (x2 * n) if x2 else None,
        "gamma": math.sqrt(mean2 / (x2 - mean2)) if x2 - mean2 > 1e-10 * x2 else None,
        "fvu_no_sinks": rest.get("fvu"),
        "explained_variance_no_sinks": rest.get("explained_variance"),
        "mse_no_sinks": rest.get("mse_token"),
        "l0_no_sinks": rest.get("l0"),
    }
    still = ("gamma", "fvu_no_sinks", "explained_variance_no_sinks")
    why = {"sink_norm_share": "all activations are zero"} | dict.fromkeys(still, "the activations do not vary")
    reasons = {name: reason for name, reason in why.items() if values[name] is None}
    return values, int(totals[0]), reasons


def dialogue_table(columns: Mapping[str, Tensor], stream: Stream, d_in: int) -> Table:
    """The table of an SAE, with the variance of each dialogue about the mean of all."""
    i = NAMES.index((WHOLE, ""))
    n = columns["n_tokens"]
    mean = stream.x[i] / n.sum()
    variance = stream.dialogue_variance(mean) + n * mean.square().sum()
    whole = dict(columns) | {"variance": variance.clamp_min(0.0) / d_in}
    return {name: torch.as_tensor(whole[name]).numpy() for name in COLUMNS}
