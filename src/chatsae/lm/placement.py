"""Where the weights of a language model go, and in which precision."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.quantizers import AutoHfQuantizer

from chatsae.errors import UserError
from chatsae.lm.hf import LOAD_ERRORS, one_line, quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
QUANTIZATIONS = ("checkpoint", "dequantize", "bnb-8bit", "bnb-4bit")


@dataclass(frozen=True, slots=True)
class Placement:
    """A device, or a `device_map` over all GPUs, and the precision of the weights.

    `quantization`: "checkpoint" takes the weights as they are, quantised or not; "dequantize" turns quantised ones
    into `dtype`; "bnb-8bit" and "bnb-4bit" quantise on loading (bitsandbytes).
    """

    device: torch.device
    dtype: torch.dtype
    device_map: str | None = None
    quantization: str = "checkpoint"

    def load_options(self, config: PreTrainedConfig, name: str) -> dict[str, Any]:
        """Arguments of `from_pretrained`; the configuration is changed where a checkpoint is to be dequantised.

        Raises:
            UserError: the quantisation is unknown, needs a package or a device that is not there, or would be undone
                without having been asked for.
        """
        options: dict[str, Any] = {"dtype": self.dtype}
        quantised = self._quantisation(config, name)
        if quantised is not None:
            options["quantization_config"] = quantised
        if self.device_map is not None:
            options["device_map"] = self.device_map
        elif quantised is not None or quantization_of(config) is not None:
            options["device_map"] = {"": self.device}  # quantised weights cannot be moved after loading
        if "device_map" in options and importlib.util.find_spec("accelerate") is None:
            field = "model.device_map" if self.device_map else "a quantised model"
            raise UserError(f"{name}: {field} needs the package accelerate: pip install accelerate")
        return options

    def _quantisation(self, config: PreTrainedConfig, name: str) -> Any:
        """The quantisation to do on loading, if any; that of the checkpoint is checked against this machine."""
        found = quantization_of(config)
        if found is None:
            if self.quantization == "dequantize":
                raise UserError(f"{name}: model.quantization is dequantize, but the checkpoint is not quantised")
            if self.quantization == "checkpoint":
                return None
            bits = {f"load_in_{self.quantization.removeprefix('bnb-')}": True}
            wanted = transformers.BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=self.dtype)
            _check_quantizer(wanted, name, pre_quantized=False, device_map={"": self.device})
            return wanted
        if self.quantization not in ("checkpoint", "dequantize"):
            raise UserError(f"{name}: already quantised ({_method(found)}); model.quantization cannot do it again")
        settings = _parse(found, name)
        if self.quantization == "dequantize":
            if not hasattr(settings, "dequantize"):
                raise UserError(f"{name}: transformers cannot dequantise {_method(found)} weights on loading")
            config.quantization_config = {**found, "dequantize": True}
            settings = _parse(config.quantization_config, name)
        _check_quantizer(settings, name, pre_quantized=True, device_map={"": self.device})
        if getattr(settings, "dequantize", False) and self.quantization != "dequantize":
            raise UserError(
                f"{name}: its {_method(settings)} weights cannot be used as they are here (device, driver or kernels); "
                f"model.quantization dequantize turns them into {str(self.dtype).removeprefix('torch.')}"
            )
        return None


def pick_placement(
    device: str | torch.device = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    quantization: str = "checkpoint",
) -> Placement:
    """Check what was asked for against what is there; auto: a GPU if there is one, in bfloat16, else float32.

    Raises:
        UserError: a value is unknown, the device is not there, or a device and a map of devices are given.
    """
    if device_map is not None and device_map not in DEVICE_MAPS:
        raise UserError(f"model.device_map: {device_map!r} is not one of {', '.join(DEVICE_MAPS)}")
    if device_map is not None and device != "auto":
        raise UserError(
            f"model.device is {device}, model.device_map {device_map}: only one of them can place the model"
        )
    if quantization not in QUANTIZATIONS:
        raise UserError(f"model.quantization: {quantization!r} is not one of {', '.join(QUANTIZATIONS)}")
    picked = pick_device(device)
    return Placement(picked, _pick_dtype(dtype, picked), device_map, quantization)


def pick_device(device: str | torch.device) -> torch.device:
    """A device by name; auto is a GPU when there is one.

    Raises:
        UserError: it is unknown or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"model.device: {device} is not available here: {one_line(error)}") from None
    return picked


def refuse_offload(device_map: dict[str, Any], name: str) -> None:
    """Refuse a map of modules to devices that leaves some in CPU memory or on disk beside a GPU.

    Offloaded weights are fetched and dropped by hooks round a whole forward, which stops early here.

    Raises:
        UserError: names how many modules, and the first.
    """
    places = {module: str(device) for module, device in device_map.items()}
    offloaded = [m for m, device in places.items() if device in ("cpu", "disk", "meta")]
    if "disk" in places.values() or (offloaded and len(offloaded) < len(places)):
        raise UserError(
            f"{name}: does not fit into the memory of the devices: {len(offloaded)} modules, {offloaded[0] or 'all'} "
            "first, would be offloaded; use more or larger GPUs, a quantised checkpoint, or a layer nearer the input"
        )


def quantization_of(config: PreTrainedConfig) -> Any:
    """What a checkpoint's config.json says about quantisation; None where it has none."""
    own = getattr(config, "quantization_config", None)
    return own or getattr(config.get_text_config(decoder=True), "quantization_config", None)


def _parse(found: Any, name: str) -> Any:
    try:
        return AutoHfQuantizer.from_config(found, pre_quantized=True).quantization_config
    except LOAD_ERRORS as error:
        raise UserError(f"{name}: its quantisation ({_method(found)}) cannot be used: {one_line(error)}") from None


def _check_quantizer(settings: Any, name: str, *, pre_quantized: bool, device_map: Any) -> None:
    try:
        with quiet():
            quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=pre_quantized)
            quantizer.validate_environment(device_map=device_map, weights_only=True)
    except LOAD_ERRORS as error:
        raise UserError(f"{name}: {_method(settings)} quantisation cannot be used: {one_line(error)}") from None


def _method(settings: Any) -> str:
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def _pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UserError(f"model.dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
