"""Steering that is a constant: one vector per layer, added to the stream of every token by whatever runs the model."""

from collections.abc import Sequence
from dataclasses import fields

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.errors import UserError
from chatsae.steering.ops import unit
from chatsae.steering.spec import SteerSpec, Where


def constants(specs: Sequence[SteerSpec]) -> dict[int, Float[Tensor, " D"]]:
    """What the specs add after each layer, in float64: the sum of strength times unit direction, the layers in order.

    Raises:
        UserError: there is no spec, one is more than a constant at every token, or they differ in width.
    """
    if not specs:
        raise UserError("steering: nothing to export; give a feature and its strength, or a recipe")
    found: dict[int, Tensor] = {}
    for spec in specs:
        added = constant(spec)
        before = found.get(spec.place)
        if any(len(other) != len(added) for other in found.values()):
            widths = sorted({len(added), *map(len, found.values())})
            raise UserError(
                f"steering: the directions have {' and '.join(map(str, widths))} numbers; one width is needed"
            )
        found[spec.place] = added if before is None else before + added
    for layer, vector in found.items():
        if not bool(torch.isfinite(vector.float()).all()) or not bool(vector.any()):
            raise UserError(f"steering: what is added after layer {layer} is zero, or too large for float32")
    return dict(sorted(found.items()))


def constant(spec: SteerSpec) -> Float[Tensor, " D"]:
    """What one spec adds at every token, in float64; of a spec whose SAE is loaded.

    Raises:
        UserError: it is not the same everywhere; the message names the field.
    """
    everywhere = "an export adds one constant to every token of the prompt and of the answer, position 0 included"
    if spec.op != "add":
        raise UserError(f"steering: op is {spec.op}, which depends on the stream; {everywhere}: op add is needed")
    for field in fields(Where):
        value, wanted = getattr(spec.where, field.name), getattr(Where(), field.name)
        if value != wanted:
            shown = "" if wanted == () else f", as it is with {wanted!r}"
            raise UserError(f"steering: where.{field.name} is {value!r}, but {everywhere}; leave it out{shown}")
    if spec.schedule != "const":
        raise UserError(f"steering: schedule is {spec.schedule}, but {everywhere}: schedule const is needed")
    if spec.unit != "absolute":
        raise UserError(
            f"steering: a strength in {spec.unit} must be made absolute first; `chatsae steer` shows it in all units"
        )
    if not spec.strength:
        raise UserError("steering: strength is 0, which changes nothing; give one that does")
    return spec.strength * unit(spec.direction())
