"""What tells one model from another: the digests of its files, or the commit of its repository on the hub."""

import hashlib
import os
from pathlib import Path
from typing import Any

from chatsae.files import parse_json, read_object, sha256
from chatsae.lm.checkpoint import Source, check_shards, weight_files
from chatsae.lm.gguf import ORIGIN

_WHOLE = 1 << 28  # bytes; larger weight files are read in part
_PIECE = 1 << 12  # bytes of each tensor
_OTHERS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)


def model_identity(source: Source) -> dict[str, Any]:
    """`commit` of a model from the hub; of a directory `files`, digests of all that decides what the model computes.

    Those are its configuration, weights, tokenizer and chat templates, and its code where it may run; of a GGUF file
    that file alone.

    Raises:
        UserError: a weight file is missing, truncated or corrupt.
    """
    if not source.local:
        return {"commit": source.revision}
    check_shards(source)
    directory = Path(source.path)
    if (directory / ORIGIN).is_file():  # the checkpoint is made again where the cache was cleared, perhaps by another
        origin = read_object(directory / ORIGIN)  # transformers, whose config.json differs
        return {"files": {origin["file"]: origin["sha256"]}, "quantization": origin["quantization"]}
    patterns = (*_OTHERS, *(["**/*.py"] if source.trust_remote_code else []))
    others = sorted(path for pattern in patterns for path in directory.glob(pattern) if path.is_file())
    digests = {path.relative_to(directory).as_posix(): sha256(path) for path in others}
    return {"files": digests | {file: weights_digest(directory / file) for file in weight_files(source)}}


def weights_digest(path: Path) -> str:
    """The digest of a safetensors file; of a large one that of its size, header and 4 KiB in the middle of each tensor.

    Reading all of a large checkpoint takes minutes, and every command would. Training, merging and quantising change
    whole tensors, so that a piece of each tells; a change of single numbers elsewhere is not seen.
    """
    size = path.stat().st_size
    if size <= _WHOLE:
        return sha256(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        digest = hashlib.sha256(f"{size}\n".encode() + header)
        tensors = parse_json(header.decode())
        tensors.pop("__metadata__", None)
        for start, stop in sorted(tuple(tensor["data_offsets"]) for tensor in tensors.values()):
            begin = max(start, (start + stop - _PIECE) // 2)
            digest.update(os.pread(file.fileno(), min(_PIECE, stop - begin), 8 + length + begin))
    return digest.hexdigest()
