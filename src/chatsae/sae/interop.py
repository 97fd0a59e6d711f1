"""Reading and writing SAE directories that both generations of sae_lens understand.

A directory holds `cfg.json`, `sae_weights.safetensors` and, if wanted, `sparsity.safetensors`. Our cfg.json carries the
nested keys of sae_lens 6 beside the flat ones of sae_lens 3 to 5; what only chatsae knows stands in `metadata.chatsae`.
"""

import json
from collections.abc import Mapping
from importlib import metadata as distribution
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatsae.config import SAESpec
from chatsae.errors import UserError
from chatsae.files import read_object, whole, write_text
from chatsae.sae.cfg import Cfg, spec_of

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"

_FORMAT_VERSION = "6.54.12"  # of sae_lens; without a version of 6 or later sae_lens 6 drops the metadata, silently
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SPARSITY_EPS = 1e-10
_NEGATIVE_SLACK = 0.01  # of a threshold
_OWN = ("name", "form", "layer", "b_dec_init", "bandwidth", "init_threshold")


def write(
    directory: str | Path,
    spec: SAESpec,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, Any],
    sparsity: Float[Tensor, " F"] | None = None,
) -> None:
    """Write an SAE's files, each as a whole or not at all, cfg.json last.

    Raises:
        UserError: the directory cannot be written, or `metadata` is not JSON.
    """
    directory = Path(directory)
    cfg = cfg_of(spec, dtype=tensors["W_enc"].dtype, metadata=metadata)
    try:
        text = json.dumps(cfg, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"the metadata of {spec.name} cannot be written as JSON: {error}") from None
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(directory / WEIGHTS) as new:
        save_file(weights, new)
    if sparsity is not None:
        log_sparsity = (sparsity.detach().cpu().float() + _SPARSITY_EPS).log10()
        with whole(directory / SPARSITY) as new:
            save_file({"sparsity": log_sparsity}, new)
    write_text(directory / CFG, text)


def read(directory: str | Path) -> tuple[SAESpec, dict[str, Tensor], dict[str, Any]]:
    """The spec, tensors and metadata of an SAE; tensors are named as in `SAE.file_tensors`, float32 or float64.

    Raises:
        UserError: a file is missing or damaged, or says something that would be read wrongly.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(
            f"{directory} does not exist or is no directory; an SAE is a directory with {CFG} and {WEIGHTS}"
        )
    cfg = Cfg(directory / CFG, _read_json(directory / CFG))
    spec = spec_of(cfg)
    tensors = tensors_of(_read_tensors(directory / WEIGHTS), spec, cfg, directory / WEIGHTS)
    return spec, tensors, cfg.metadata()


def read_sparsity(directory: str | Path) -> Float[Tensor, " F"] | None:
    """How often each feature fires, 0 to 1, or None where no such file was saved.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(directory) / SPARSITY
    if not path.exists():
        return None
    tensors = _read_tensors(path)
    if "sparsity" not in tensors:
        raise UserError(f"{path}: the tensor 'sparsity' is missing")
    return (torch.pow(10.0, tensors["sparsity"].double()) - _SPARSITY_EPS).clamp_min(0).float()


def cfg_of(spec: SAESpec, *, dtype: torch.dtype, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a cfg.json that sae_lens 5 and 6 both read; `metadata` goes over its defaults."""
    jumprelu = spec.architecture == "jumprelu"
    details = {"l0_coefficient" if jumprelu else "l1_coefficient": spec.coefficient, "lr": spec.lr}
    if jumprelu:
        details |= {"jumprelu_bandwidth": spec.bandwidth, "jumprelu_init_threshold": spec.init_threshold}
    own = {name: getattr(spec, name) for name in _OWN}
    known = spec.layer >= 0
    nested = {
        "sae_lens_training_version": None,
        "model_name": "",
        "model_from_pretrained_kwargs": {},
        "hook_head_index": None,
        "context_size": None,
        "seqpos_slice": [None],
        "prepend_bos": False,
        "dataset_path": "",
        **metadata,
        "hook_name": f"blocks.{spec.layer}.hook_resid_post" if known else None,
        "hf_hook_name": f"model.layers.{spec.layer}" if known else None,
        "sae_lens_version": _FORMAT_VERSION,
        "training_architecture": spec.architecture,
        "training_architecture_details": details,
        "chatsae": {"version": _version(), **own},
    }
    flat = ("model_name", "model_from_pretrained_kwargs", "hook_head_index", "context_size", "seqpos_slice")
    flat += ("prepend_bos", "dataset_path", "sae_lens_training_version")
    return {
        "architecture": spec.architecture,
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": spec.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": dict(sorted(nested.items())),
        # sae_lens 3 to 5
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "finetuning_scaling_factor": False,
        "hook_name": nested["hook_name"] or "",
        "hook_layer": spec.layer,
        "dataset_trust_remote_code": False,
        "neuronpedia_id": None,
        **{key: nested[key] for key in flat},
    }


def tensors_of(raw: Mapping[str, Tensor], spec: SAESpec, cfg: Cfg, path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file after every older form has been brought to the present one.

    Raises:
        UserError: a tensor is missing, unknown, of a wrong shape, not finite, or contradicts cfg.json.
    """
    tensors = dict(raw)
    if "log_threshold" in tensors:
        if "threshold" in tensors:
            raise UserError(f"{path}: holds both threshold and log_threshold; one of them must go")
        tensors["threshold"] = tensors.pop("log_threshold").double().exp()
    scaling = _finetuning_scaling(tensors, spec, cfg, path)
    shapes = {"W_enc": (spec.d_in, spec.d_sae), "b_enc": (spec.d_sae,)}
    shapes |= {"W_dec": (spec.d_sae, spec.d_in), "b_dec": (spec.d_in,)}
    if spec.architecture == "jumprelu":
        shapes["threshold"] = (spec.d_sae,)
    if missing := [name for name in shapes if name not in tensors]:
        raise UserError(f"{path}: the tensor {missing[0]!r} of a {spec.architecture} SAE is missing")
    if unknown := [name for name in tensors if name not in shapes]:
        raise UserError(
            f"{path}: holds {unknown[0]!r}, which a {spec.architecture} SAE has not (its tensors: {_listed(shapes)})"
        )
    for name, shape in shapes.items():
        _check_tensor(name, tensors[name], shape, path)
    if "threshold" in tensors:
        tensors["threshold"] = _not_negative(tensors["threshold"], cfg, path)
    dtype = torch.float64 if tensors["W_enc"].dtype == torch.float64 else torch.float32
    tensors = {name: tensors[name].to(dtype) for name in shapes}
    if scaling is not None:
        tensors["W_dec"] = tensors["W_dec"] * scaling.to(dtype)[:, None]
    return tensors


def _finetuning_scaling(tensors: dict[str, Tensor], spec: SAESpec, cfg: Cfg, path: Path) -> Tensor | None:
    """Take the factor of finetuned SAEs out of `tensors`; it multiplies activations, so it belongs to rows of W_dec."""
    found = [name for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors]
    for name in found:
        scaling = tensors.pop(name)
        _check_tensor(name, scaling, (spec.d_sae,), path)
        if bool((scaling == 1).all()):
            continue
        flag = cfg.get("finetuning_scaling_factor")
        if flag is False or (name == "scaling_factor" and flag is None):
            raise UserError(
                f"{path}: {name} is not all ones, but {cfg.path.name} does not say finetuning_scaling_factor: true; "
                "set it to true if the SAE was finetuned, or remove the tensor"
            )
        return scaling
    if not found and cfg.get("finetuning_scaling_factor"):
        raise cfg.wrong("finetuning_scaling_factor", f"{path.name} holds no such tensor")
    return None


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], path: Path) -> None:
    if tuple(tensor.shape) != shape:
        hint = ""
        if tensor.dim() == 2 and tuple(tensor.T.shape) == shape:
            hint = "; it is transposed: W_enc is [d_in, d_sae] and W_dec is [d_sae, d_in]"
        raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, cfg.json says {list(shape)}{hint}")
    if tensor.dtype not in _DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise UserError(f"{path}: {name} has dtype {tensor.dtype}; a floating-point dtype was expected: {dtypes}")
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{path}: {name} holds NaN or inf")


def _not_negative(threshold: Tensor, cfg: Cfg, path: Path) -> Tensor:
    """sae_lens 6 clamps thresholds before a step, so its files may be one step below 0, where it computes as with 0."""
    lowest = threshold.min().item()
    if lowest < (-_NEGATIVE_SLACK if cfg.generation >= 6 else 0):
        raise UserError(f"{path}: threshold holds {lowest:g}; thresholds are never negative. Are these logarithms?")
    return threshold.clamp_min(0)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path.parent} holds no {path.name}")
    return read_object(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a whole safetensors file (truncated or corrupt): {error}") from None


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names)


def _version() -> str:
    try:
        return distribution.version("chatsae")
    except distribution.PackageNotFoundError:  # run from a source tree
        return "unknown"
