"""JSON schemas (draft 2020-12) of what is exported: every key and no other, and the limits of the other side."""

from typing import Any

from chatsae.features.export.saebench import METRICS
from chatsae.features.export.subject import MAX_LOGITS, MAX_TEXT, MAX_TOKENS

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
AT_LEAST_1: Schema = {"type": "integer", "minimum": 1}
FLAG: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
LOWER: Schema = {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]*$"}
SOURCE: Schema = {"type": "string", "pattern": "^[0-9]+-[a-z0-9][a-z0-9._-]*$"}
INDEX: Schema = {"type": "string", "pattern": "^[0-9]+$"}
TIME: Schema = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}(Z|[+-]\d\d:\d\d)$"}
EMPTY: Schema = {"type": "array", "maxItems": 0}


def listed(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """An array."""
    found: Schema = {"type": "array", "items": items, "minItems": least}
    return found if most is None else found | {"maxItems": most}


def maybe(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, NULL]}


def keyed(properties: Schema, *optional: str) -> Schema:
    """An object with these keys and no other."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_TOKENS = listed(TEXT, 1, MAX_TOKENS)
_VALUES = listed(NUMBER, 1, MAX_TOKENS)
_BIN = {"anyOf": [{"const": -1}, SHARE]}
_LOGITS = maybe(listed(keyed({"token": TEXT, "value": NUMBER}), 1, MAX_LOGITS))
_DESCRIPTION: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT}
_QUANTILE: Schema = {"quantileMin": NUMBER, "quantileMax": NUMBER, "quantileFraction": SHARE}

_TABLES: Schema = {
    **{f"neuron_alignment_{column}": EMPTY for column in ("indices", "values", "l1")},
    **{f"correlated_neurons_{column}": EMPTY for column in ("indices", "pearson", "l1")},
    **{f"correlated_features_{column}": EMPTY for column in ("indices", "pearson", "l1")},
    "neg_str": listed(TEXT, 0, MAX_LOGITS),
    "neg_values": listed(NUMBER, 0, MAX_LOGITS),
    "pos_str": listed(TEXT, 0, MAX_LOGITS),
    "pos_values": listed(NUMBER, 0, MAX_LOGITS),
    "frac_nonzero": SHARE,
    "freq_hist_data_bar_heights": listed(SHARE),
    "freq_hist_data_bar_values": listed(NUMBER),
    "logits_hist_data_bar_heights": EMPTY,
    "logits_hist_data_bar_values": EMPTY,
    "decoder_weights_dist": EMPTY,
}

UPLOAD = keyed(
    {
        "modelId": LOWER,
        "source": SOURCE,
        "features": listed(
            keyed(
                {
                    "index": COUNT,
                    "density": maybe(SHARE),
                    "topLogits": _LOGITS,
                    "bottomLogits": _LOGITS,
                    "explanations": listed(keyed({"text": _DESCRIPTION})),
                    "activations": listed(keyed({"tokens": _TOKENS, "values": _VALUES, **_QUANTILE}, *_QUANTILE), 1),
                }
            ),
            1,
            128,
        ),
    }
)
"""The body of an upload to Neuronpedia."""

BULK_FEATURE = keyed(
    {
        "modelId": LOWER,
        "layer": SOURCE,
        "index": INDEX,
        "creatorId": TEXT,
        "createdAt": TIME,
        "maxActApprox": NUMBER,
        "hasVector": FLAG,
        "vector": listed(NUMBER, 1),
        "vectorLabel": NULL,
        "vectorDefaultSteerStrength": NULL,
        "hookName": TEXT,
        "topkCosSimIndices": listed(COUNT),
        "topkCosSimValues": listed({"type": "number", "minimum": -1.001, "maximum": 1.001}),
        **_TABLES,
        "sourceSetName": LOWER,
    }
)
BULK_ACTIVATION = keyed(
    {
        "id": TEXT,
        "tokens": _TOKENS,
        "index": INDEX,
        "layer": SOURCE,
        "modelId": LOWER,
        "maxValue": NUMBER,
        "maxValueTokenIndex": COUNT,
        "minValue": NUMBER,
        "values": _VALUES,
        "creatorId": TEXT,
        "dataSource": TEXT,
        "dataIndex": TEXT,
        "dfaValues": EMPTY,
        "dfaTargetIndex": NULL,
        "dfaMaxValue": NULL,
        "createdAt": TIME,
        "lossValues": EMPTY,
        "logitContributions": NULL,
        "binMin": NUMBER,
        "binMax": NUMBER,
        "binContains": _BIN,
        "qualifyingTokenIndex": COUNT,
        "zIndices": EMPTY,
        "zValues": EMPTY,
    }
)
BULK_EXPLANATION = keyed(
    {
        "id": TEXT,
        "modelId": LOWER,
        "layer": SOURCE,
        "index": INDEX,
        "description": _DESCRIPTION,
        "authorId": TEXT,
        "embedding": NULL,
        "triggeredById": NULL,
        "typeName": NULL,
        "explanationModelName": NULL,
        "notes": TEXT,
        "createdAt": TIME,
    }
)
BULK_MODEL = keyed(
    {
        **dict.fromkeys(("id", "defaultSourceSetName"), LOWER),
        **dict.fromkeys(("creatorId", "displayNameShort", "displayName", "visibility", "owner"), TEXT),
        **dict.fromkeys(("instruct", "inferenceEnabled"), FLAG),
        **dict.fromkeys(("tlensId", "neuronsPerLayer", "website"), NULL),
        **dict.fromkeys(("createdAt", "updatedAt"), TIME),
        "defaultSourceId": SOURCE,
        "dimension": COUNT,
        "layers": maybe(COUNT),
    }
)
BULK_SOURCE_SET = keyed(
    {
        **dict.fromkeys(("modelId", "name", "releaseName"), LOWER),
        **dict.fromkeys(("creatorId", "visibility", "description", "type", "creatorName"), TEXT),
        **dict.fromkeys(("hasDashboards", "defaultShowBreaks", "showDfa", "showCorrelated"), FLAG),
        **dict.fromkeys(("showHeadAttribution", "showUmap"), FLAG),
        **dict.fromkeys(("creatorEmail", "defaultOfModelId"), NULL),
        "urls": EMPTY,
        "defaultRange": COUNT,
        "createdAt": TIME,
    }
)
_UNKNOWN = ("saelensConfig", "saelensRelease", "saelensSaeId", "hfRepoId", "hfFolderId", "defaultOfModelId")
BULK_SOURCE = keyed(
    {
        **dict.fromkeys(("modelId", "setName"), LOWER),
        **dict.fromkeys(("creatorId", "visibility", "dataset", "notes"), TEXT),
        **dict.fromkeys(("hasDashboards", "inferenceEnabled", "hasUmap"), FLAG),
        **dict.fromkeys(("hasUmapLogSparsity", "hasUmapClusters"), FLAG),
        **dict.fromkeys((*_UNKNOWN, "num_tokens_in_prompt"), NULL),
        "id": SOURCE,
        "inferenceHosts": EMPTY,
        "num_prompts": COUNT,
        "createdAt": TIME,
    }
)
BULK_RELEASE = keyed(
    {
        **dict.fromkeys(("name", "defaultSourceSetName"), LOWER),
        **dict.fromkeys(("description", "creatorName", "creatorId", "visibility"), TEXT),
        **dict.fromkeys(("descriptionShort", "creatorNameShort"), TEXT),
        **dict.fromkeys(("isNewUi", "featured"), FLAG),
        **dict.fromkeys(("urls", "defaultUmapSourceIds"), EMPTY),
        "creatorEmail": NULL,
        "defaultSourceId": SOURCE,
        "createdAt": TIME,
    }
)

SAEDASHBOARD = keyed(
    {
        "model_id": LOWER,
        "layer": COUNT,
        "sae_set": LOWER,
        "sae_id_suffix": NULL,
        "features": listed(
            keyed(
                {
                    "feature_index": COUNT,
                    **_TABLES,
                    "n_prompts_total": COUNT,
                    "n_tokens_in_prompt": NULL,
                    "dataset": TEXT,
                    "activations": listed(
                        keyed(
                            {
                                "bin_min": NUMBER,
                                "bin_max": NUMBER,
                                "bin_contains": _BIN,
                                "tokens": _TOKENS,
                                "values": _VALUES,
                                "qualifying_token_index": COUNT,
                            }
                        )
                    ),
                    "vector": listed(NUMBER, 1),
                }
            ),
            1,
        ),
    }
)

DELPHI_CONFIG = keyed(
    {
        **dict.fromkeys(("dataset_repo", "dataset_split", "dataset_name", "dataset_column", "model_name"), TEXT),
        **dict.fromkeys(("cache_ctx_len", "n_tokens", "n_splits"), AT_LEAST_1),
        "batch_size": NULL,
    }
)

SAEBENCH = keyed(
    {
        "eval_type_id": {"const": "core"},
        "eval_config": {"type": "object"},
        "eval_id": TEXT,
        "datetime_epoch_millis": COUNT,
        "eval_result_metrics": keyed(
            {group: keyed(dict.fromkeys(keys, maybe(NUMBER))) for group, keys in METRICS.items()}
        ),
        "eval_result_details": EMPTY,
        "sae_bench_commit_hash": TEXT,
        "sae_lens_id": TEXT,
        "sae_lens_release_id": TEXT,
        "sae_lens_version": TEXT,
        "eval_result_unstructured": {"type": "object"},
    }
)
