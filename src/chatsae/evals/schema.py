"""What a report.json holds: every figure with its meaning, as a JSON schema (docs/report-schema.json)."""

from typing import Any

from chatsae.evals.groups import PARTITIONS, SPECIAL, VARIANTS

VERSION = 3

_GROUP = {
    "mse": "mean squared error (eq. 7): over dimensions, then tokens of a dialogue, then dialogues that have one",
    "mse_token": "mean over tokens of |sae_out - x|^2 / d_in",
    "mse_sum": "mean over tokens of |sae_out - x|^2",
    "fvu": "sum |sae_out - x|^2 / sum |x - mean x|^2, with the mean of these tokens",
    "explained_variance": "1 - fvu",
    "normalized_mse": "mean over tokens of |sae_out - x|^2 / |x|^2",
    "cosine": "mean over tokens of the cosine of x and sae_out",
    "l0": "active features per token, mean",
    "l1": "sum of the feature activations of a token, mean",
    "l2_ratio": "mean over tokens of |sae_out| / |x|; below 1 for shrinkage",
    "relative_bias": "sum |sae_out|^2 / sum x.sae_out (arXiv 2404.16014, eq. 10); below 1 for shrinkage",
}
_LOSSES = {
    "loss": "cross-entropy of the model as it is, nats per token",
    "delta_loss": "cross-entropy with the SAE spliced in, minus loss",
    "delta_loss_percent": "100 delta_loss / loss",
    "kl": "KL(model || model with the SAE spliced in), nats per token, where there is a next token",
    "top1_agreement": "share of tokens whose most likely next token stays the same",
    "loss_zero_ablation": "cross-entropy with zero in place of the residual stream",
    "loss_mean_ablation": "cross-entropy with the mean activation of the evaluation set in its place",
    "ce_recovered_zero": "(loss_zero_ablation - loss with the SAE) / (loss_zero_ablation - loss)",
    "ce_recovered_mean": "(loss_mean_ablation - loss with the SAE) / (loss_mean_ablation - loss)",
}
_SPECIAL = {
    "mse_st": "mse on special tokens by token id, as the paper",
    "mse_st_template": "mse on special tokens by template position",
    "mse_st_no_first": "the same without position 0",
    "mse_st_no_prefix": "the same without position 0 and the constant prefix of the template",
}

FIGURES: dict[str, str] = {
    **_GROUP,
    **_SPECIAL,
    **{f"log2_{name}": f"log2 of {name}, as the paper's tables print it" for name in ("mse", *VARIANTS)},
    "l0_median": "active features per token, median",
    "l0_p95": "active features per token, 95 % quantile",
    "fvu_no_sinks": "fvu without norm sinks",
    "explained_variance_no_sinks": "1 - fvu_no_sinks",
    "mse_no_sinks": "mse_token without norm sinks",
    "l0_no_sinks": "l0 without norm sinks",
    "sink_share": "share of tokens that are norm sinks: longer than 10 times the median norm",
    "sink_norm_share": "share of the squared norm of all tokens that norm sinks carry",
    "gamma": "|mean x| / sqrt(mean |x - mean x|^2)",
    "dead_fraction": "share of features that no token of the evaluation fired",
    "dead_tokens": "tokens in which a firing was looked for",
    "rare_1e-6": "share of features firing on less than 1e-6 of the tokens",
    "rare_1e-5": "share of features firing on less than 1e-5 of the tokens",
    "dense_1pct": "share of features firing on more than 1 % of the tokens",
    "dense_10pct": "share of features firing on more than 10 % of the tokens",
    "duplicate_cosine": "mean over features of the largest cosine with another feature's decoder row",
    "duplicate_fraction": "share of features whose largest such cosine is above 0.9",
    **_LOSSES,
    **{f"{name}_assistant": f"{text}; tokens of assistant turns" for name, text in _LOSSES.items()},
    "n_tokens": "tokens evaluated",
    "n_dialogues": "dialogues evaluated",
    "gsnr": "gradient signal-to-noise ratio of the training loss: an object with unit and number of samples",
}
"""Every figure of an SAE, and what it is."""

_GSNR = {
    "value": "mean over the entries of all parameters whose gradient varies",
    "total": "squared norm of the mean gradient over the trace of its covariance, all parameters together",
}
_GSNR_PARAMETER = {
    "mean": "over the entries of the parameter whose gradient varies",
    "median": "over the same entries",
    "total": "squared norm of its mean gradient over the trace of its covariance",
}
_GSNR_COUNTS = {
    "n_varying": "entries whose gradient varies from sample to sample",
    "n_silent": "entries without any gradient",
    "n_constant": "entries with the same gradient, not zero, on every sample",
}


def report_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of report.json."""
    number, text, count = {"type": ["number", "null"]}, {"type": "string"}, {"type": ["integer", "null"]}
    figures: dict[str, Any] = {name: number | {"description": meaning} for name, meaning in FIGURES.items()}
    figures["gsnr"] = _gsnr()
    for name in ("n_tokens", "n_dialogues", "dead_tokens", "l0_median", "l0_p95"):
        figures[name] = count | {"description": FIGURES[name]}
    group = _object(
        {"n_tokens": count, "n_dialogues": count, **{n: number | {"description": _GROUP[n]} for n in _GROUP}}
    )
    parts = {SPECIAL: VARIANTS, **PARTITIONS, "sink": ("no", "yes")}
    one = {"$ref": "#/$defs/group"}
    groups = _object({p: _object(dict.fromkeys(names, one), required=()) for p, names in parts.items()}, required=())
    interval = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    row = {
        **figures,
        "groups": groups | {"description": "figures of each group that has tokens; null ones have a reason as below"},
        "intervals": {
            "type": "object",
            "description": "95 %: bootstrap over dialogues, of shares of features or tokens Wilson",
            "additionalProperties": interval,
        },
        "reasons": {
            "type": "object",
            "description": "why a figure is null, by its name, partition/part/name, intervals/name or gsnr/...",
            "additionalProperties": text,
        },
    }
    control = {
        "kind": text,
        "of": text | {"description": "the SAE whose l0 it has"},
        "made": text | {"description": "what it is and what it was fitted on"},
    }
    extra = {"control": _object(control) | {"description": "of rows that are controls, not SAEs that were trained"}}
    facts = {
        "model": text,
        "n_dialogues": {"type": "integer"},
        "max_length": {"type": "integer"},
        "tokens_sha256": text | {"description": "of the token ids, int64, in the order of the dialogues"},
    }
    asked = {
        "random_weights": {"type": "integer", "description": "seed of the model's random weights, where it has them"},
        "sources": text | {"description": "corpora evaluated on, where they are not those of training"},
        "overlap": count | {"description": "dialogues of these that were read for training, and were allowed"},
        "sinks_pass": {
            "type": "object",
            "description": "where sinks kept the model's activation with SAEs spliced in: the norm of a sink, by layer",
            "additionalProperties": {"type": "number"},
        },
    }
    whole = {
        "schema": {"const": VERSION},
        "facts": _object(facts | asked, required=tuple(facts)),
        "saes": {"type": "object", "additionalProperties": _object(row | extra, required=tuple(row))},
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "report.json of chatsae"}
    return head | {"$defs": {"group": group}} | _object(whole)


def _gsnr() -> dict[str, Any]:
    number, count = {"type": ["number", "null"]}, {"type": "integer"}
    parameter = {name: number | {"description": meaning} for name, meaning in _GSNR_PARAMETER.items()}
    parameter |= {name: count | {"description": meaning} for name, meaning in _GSNR_COUNTS.items()}
    values: dict[str, Any] = {name: number | {"description": meaning} for name, meaning in _GSNR.items()}
    values["n"] = count | {"description": "samples"}
    values["unit"] = {"type": "string", "description": "what a sample is: token, drawn at random from the dialogues"}
    values["by_parameter"] = {"type": "object", "additionalProperties": _object(parameter)}
    return _object(values) | {"type": ["object", "null"], "description": FIGURES["gsnr"]}


def _object(properties: dict[str, Any], required: tuple[str, ...] | None = None) -> dict[str, Any]:
    needed = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}
