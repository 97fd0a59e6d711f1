"""What a cfg.json says, in any of its generations: flat keys (sae_lens 2 to 5) or nested ones (6 and chatsae)."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from chatsae.config import Architecture, Form, SAESpec
from chatsae.errors import UserError

_NOT_YET = (
    *("gated", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "matching_pursuit", "temporal"),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
)
_FLAT_METADATA = (
    *("model_name", "model_class_name", "model_from_pretrained_kwargs", "dataset_path", "context_size"),
    *("prepend_bos", "seqpos_slice", "exclude_special_tokens", "neuronpedia_id", "sae_lens_training_version"),
)
_RENAMED = {  # present name: sae_lens 2
    "hook_name": "hook_point",
    "hook_layer": "hook_point_layer",
    "hook_head_index": "hook_point_head_index",
}


_MODEL_ARGUMENTS = ("model_from_pretrained_kwargs", "model_kwargs")  # what TransformerLens was told to do to the model
_TRANSCODER = "transcoders, which predict another activation than they read, are not supported"
_TOPK = "TopK SAEs are not supported yet"
_FOREIGN = {  # fields that make another function of it, unless they are null, false or empty
    "is_transcoder": _TRANSCODER,
    "transcode": _TRANSCODER,
    "d_out": _TRANSCODER,
    "hook_name_out": _TRANSCODER,
    "hook_layer_out": _TRANSCODER,
    "hook_head_index_out": _TRANSCODER,
    "out_hook_point": _TRANSCODER,
    "k": _TOPK,
    "topk_threshold": _TOPK,
    "rescale_acts_by_decoder_norm": "activations that are rescaled by the decoder's norms are not supported",
    "center_writing_weights": "TransformerLens centred the residual stream for this SAE, and here it is read as the "
    "model has it; set it to false only for a model with RMSNorm, which TransformerLens leaves as it is",
}
_DEFAULTS = {f.name: f.default for f in fields(SAESpec)}


@dataclass(frozen=True)
class Cfg:
    """A cfg.json and where it lies, for the messages."""

    path: Path
    values: dict[str, Any]

    @property
    def generation(self) -> int:
        """Major version of the sae_lens that wrote the file; 0 where it does not say."""
        version = self.values.get("sae_lens_version") or self._nested.get("sae_lens_version") or ""
        number = re.match(r"\d+", str(version))
        return int(number[0]) if number else 0

    @property
    def own(self) -> dict[str, Any]:
        """What chatsae wrote for itself; empty for files of others."""
        own = self._nested.get("chatsae")
        return own if isinstance(own, dict) else {}

    @property
    def _nested(self) -> dict[str, Any]:
        nested = self.values.get("metadata")
        return nested if isinstance(nested, dict) else {}

    def get(self, name: str, *, training: bool = True) -> Any:
        """The value of a key wherever its generation keeps it; None where nothing does.

        `training`: whether also to look at how it was trained, which may have been as another architecture.
        """
        places = [self.own, self.values, self._nested]
        places += [p.get(key) for p in (self.values, self._nested) for key in _MODEL_ARGUMENTS]
        places += [self._nested.get("training_architecture_details")] if training else []
        for key in (name, _RENAMED.get(name, name)):
            for place in places:
                if isinstance(place, dict) and place.get(key) is not None:
                    return place[key]
        return None

    def metadata(self) -> dict[str, Any]:
        """The free-form facts of the file."""
        if self.generation >= 6:
            return {k: v for k, v in self._nested.items() if k not in ("sae_lens_version", "chatsae")}
        return {k: self.values[k] for k in _FLAT_METADATA if k in self.values}

    def wrong(self, field: str, expected: str) -> UserError:
        """The error for a field that does not hold what is needed."""
        return UserError(f"{self.path}: {field} is {self.get(field)!r}; {expected}")


def spec_of(cfg: Cfg) -> SAESpec:
    """The spec a cfg.json stands for.

    Files of others do not say everything: `layer` is -1 where the hook is not named; `form` says how training would go
    on (paper for standard SAEs from before sae_lens 6, else v6, which keeps thresholds as the file has them).

    Raises:
        UserError: an architecture, activation, normalisation or hook would be read wrongly.
    """
    if "num_latents" in cfg.values or "normalize_decoder" in cfg.values:
        raise UserError(f"{cfg.path}: a sparsify SAE (k = {cfg.get('k')}); {_TOPK}, nor are other files than sae_lens'")
    architecture = _architecture(cfg)
    _check_function(cfg)
    _check_input(cfg)
    d_in, d_sae = _size(cfg, "d_in"), _size(cfg, "d_sae")
    layer = _own(cfg, "layer", int) if cfg.own else _layer(cfg)
    form = "paper" if architecture == "standard" and cfg.generation < 6 else "v6"
    if cfg.own:
        form = _own(cfg, "form", str)
        if form not in get_args(Form):
            raise UserError(f"{cfg.path}: metadata.chatsae.form is {form!r}, not one of {', '.join(get_args(Form))}")
    # sae_lens 3 to 5 keep the L0 coefficient of a JumpReLU SAE under l1_coefficient
    coefficients = ("l0_coefficient", "l1_coefficient") if architecture == "jumprelu" else ("l1_coefficient",)
    b_dec_init = cfg.own.get("b_dec_init") or cfg.get("b_dec_init_method")
    return SAESpec(
        name=_own(cfg, "name", str) if cfg.own else f"L{layer}-{d_sae / d_in:g}x-{architecture}",
        architecture=architecture,
        form=form,
        layer=layer,
        d_in=d_in,
        d_sae=d_sae,
        coefficient=_number(cfg, *coefficients, default=0.0),
        lr=_number(cfg, "lr", default=0.0),
        bandwidth=_number(cfg, "bandwidth", "jumprelu_bandwidth", default=_DEFAULTS["bandwidth"]),
        init_threshold=_number(cfg, "init_threshold", "jumprelu_init_threshold", default=_DEFAULTS["init_threshold"]),
        b_dec_init="geometric_median" if b_dec_init == "geometric_median" else "zeros",
        apply_b_dec_to_input=_flag(cfg, "apply_b_dec_to_input", default=True),
    )


def _architecture(cfg: Cfg) -> Architecture:
    name = cfg.values.get("architecture", None if cfg.generation >= 6 else "standard")
    if name is None:
        raise UserError(f"{cfg.path}: architecture is missing")
    if name in _NOT_YET:
        raise cfg.wrong("architecture", f"not supported yet; {' and '.join(get_args(Architecture))} are")
    if name not in get_args(Architecture):
        raise cfg.wrong("architecture", f"not known; {' and '.join(get_args(Architecture))} are supported")
    for field in ("activation_fn_str", "activation_fn"):
        activation = cfg.get(field, training=False) or "relu"
        if activation == "topk":
            raise cfg.wrong(field, _TOPK)
        if activation != "relu":
            raise cfg.wrong(field, "only relu is supported; read as ReLU, its activations would be wrong")
    return name


def _check_function(cfg: Cfg) -> None:
    """Refuse SAEs that compute something else than their architecture does."""
    kwargs = cfg.get("activation_fn_kwargs", training=False)
    if kwargs:
        topk = isinstance(kwargs, dict) and "k" in kwargs
        raise cfg.wrong("activation_fn_kwargs", _TOPK if topk else "only relu, which has none, is supported")
    for field, reason in _FOREIGN.items():
        value = cfg.get(field, training=False)
        same = field == "d_out" and cfg.get("is_transcoder") is False and value == cfg.get("d_in")
        if value and not same:
            raise cfg.wrong(field, reason)


def _check_input(cfg: Cfg) -> None:
    """Refuse SAEs that want their input scaled, reshaped, or from one attention head."""
    normalize = cfg.get("normalize_activations")
    if normalize in (True, "expected_average_only_in"):
        raise cfg.wrong("normalize_activations", _SCALED[cfg.generation >= 6])
    if normalize not in (None, False, "none"):
        raise cfg.wrong("normalize_activations", 'only "none" is supported')
    if cfg.get("reshape_activations") not in (None, "none"):
        raise cfg.wrong("reshape_activations", 'only "none" is supported: SAEs here read the residual stream')
    if cfg.get("hook_head_index") is not None:
        raise cfg.wrong("hook_head_index", "SAEs of one attention head are not supported")


_FOLD = 'W_enc *= s, W_dec /= s, b_dec /= s with s = sqrt(d_in) / (mean norm of the activations), then set it to "none"'
_SCALED = {
    False: "sae_lens 3 to 5 leave this flag in place when they fold the scale into a final checkpoint, but "
    f'intermediate checkpoints are not folded. For a final one set it to "none"; for another fold: {_FOLD}',
    True: f"the weights expect scaled activations. Fold the scale into them: {_FOLD}",
}


def _layer(cfg: Cfg) -> int:
    """The block whose output the SAE reads, or -1 where the file names no hook."""
    hook = cfg.get("hook_name") or cfg.get("hf_hook_name")
    if hook is None:
        return -1
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_(?:resid_post|out)|(?:.*\.)?(?:layers|h)\.(\d+)", str(hook)):
        return int(match[1] or match[2])
    # what enters block L is what left block L - 1
    if (match := re.fullmatch(r"blocks\.(\d+)\.hook_(?:resid_pre|in)", str(hook))) and int(match[1]) > 0:
        return int(match[1]) - 1
    raise cfg.wrong("hook_name", "only the residual stream after a block is supported (blocks.L.hook_resid_post)")


def _size(cfg: Cfg, field: str) -> int:
    value = cfg.values.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{cfg.path}: {field} is {value!r}; a whole number of at least 1 was expected")
    return value


def _flag(cfg: Cfg, field: str, *, default: bool) -> bool:
    value = cfg.values.get(field, default)
    if not isinstance(value, bool):
        raise cfg.wrong(field, "true or false was expected")
    return value


def _number(cfg: Cfg, *fields: str, default: Any) -> Any:
    """The first of `fields` that the file has."""
    for field in fields:
        value = cfg.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise cfg.wrong(field, "a number was expected")
        if value is not None:
            return float(value)
    return default


def _own(cfg: Cfg, field: str, kind: type) -> Any:
    value = cfg.own.get(field)
    if not isinstance(value, kind):
        raise UserError(f"{cfg.path}: metadata.chatsae.{field} is {value!r}; {kind.__name__} was expected")
    return value
