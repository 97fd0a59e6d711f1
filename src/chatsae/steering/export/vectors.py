"""Steering vectors as files of other tools: GGUF control vectors (llama.cpp, repeng), Neuronpedia's new vector."""

import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from chatsae.errors import UserError
from chatsae.steering.export.constant import constant
from chatsae.steering.ops import unit
from chatsae.steering.spec import SteerSpec

HOOK_TYPE = "hook_resid_post"
"""Neuronpedia's name of the stream after a layer; the hook is `blocks.LAYER.hook_resid_post`."""
MOST_NUMBERS = 24_576
MOST_STRENGTH = 100.0
"""Neuronpedia's documented bound of a default strength, on either side of 0."""

_VERSION, _ALIGNMENT = 3, 32
_UINT32, _STRING, _F32 = 4, 8, 0  # GGUF's codes of types


def control_vector(directions: Mapping[int, Float[Tensor, " D"]], model_hint: str) -> bytes:
    """A GGUF control vector: `direction.N` [d_in] float32 is added to the stream after block N, counted from 0.

    llama.cpp keeps direction.N at the place N - 1 of a buffer whose first place belongs to block 1, so that N is the
    index of the block; it has no place for block 0. repeng's N is the index too, and 0 is allowed.
    """
    fields = [
        ("general.architecture", _text("controlvector"), _STRING),
        ("controlvector.model_hint", _text(model_hint), _STRING),
        ("controlvector.layer_count", struct.pack("<I", len(directions)), _UINT32),
    ]
    head = [b"GGUF", struct.pack("<IQQ", _VERSION, len(directions), len(fields))]
    head += [_text(key) + struct.pack("<I", kind) + value for key, value, kind in fields]
    data: list[bytes] = []
    for layer, vector in directions.items():
        offset = sum(map(len, data))
        head.append(_text(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(vector), _F32, offset))
        data.append(_padded(vector.float().cpu().numpy().astype("<f4").tobytes()))
    return _padded(b"".join(head)) + b"".join(data)


def check_llama_cpp(layers: Collection[int]) -> None:
    """Refuse what llama.cpp cannot steer.

    Raises:
        UserError: a layer is the first.
    """
    if 0 in layers:
        raise UserError(
            "steering: llama.cpp's control vectors begin with layer 1, it has none after layer 0; "
            "--format repeng or bias can"
        )


def neuronpedia_vector(spec: SteerSpec, model_id: str, label: str) -> dict[str, Any]:
    """The body of Neuronpedia's POST /api/vector/new: its strength times its vector is what the spec adds.

    The vector is the unit direction and the strength alpha; beyond MOST_STRENGTH the rest is in the vector's length.

    Raises:
        UserError: the spec is no constant (`constant`), or has more than MOST_NUMBERS numbers.
    """
    added = constant(spec)
    if len(added) > MOST_NUMBERS:
        raise UserError(f"steering: Neuronpedia takes vectors of {MOST_NUMBERS:,} numbers at most, not {len(added):,}")
    strength = max(-MOST_STRENGTH, min(spec.strength, MOST_STRENGTH))
    vector = unit(spec.direction()) * (spec.strength / strength)
    return {
        "modelId": model_id,
        "layerNumber": spec.place,
        "hookType": HOOK_TYPE,
        "vector": vector.tolist(),
        "vectorDefaultSteerStrength": strength,
        "vectorLabel": label,
    }


def write_control_vector(path: Path, directions: Mapping[int, Float[Tensor, " D"]], model_hint: str) -> None:
    """Write `control_vector` to a file."""
    path.write_bytes(control_vector(directions, model_hint))


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
