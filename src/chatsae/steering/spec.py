"""What to do to the residual stream, and where: one record, from Python or from a recipe file."""

import difflib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.batch import Kind, Role
from chatsae.errors import UserError
from chatsae.files import read_json
from chatsae.recipe import load_yaml
from chatsae.sae.base import SAE
from chatsae.steering.ops import OPS, Op

Unit = Literal["absolute", "rel_norm", "rel_maxact", "auto"]
Phase = Literal["prompt", "generated", "both"]
Schedule = Literal["const", "decay", "first_n"]

ROLES = {role.name.lower(): role for role in Role}
KINDS = {kind.name.lower(): kind for kind in Kind}


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Tokens that are steered: those that every field allows. Empty: no restriction."""

    phase: Phase = "both"
    """prompt: up to and with the generation prompt; generated: what the model wrote, as it is read again. The first
    new token is predicted at the last token of the prompt."""
    roles: tuple[str, ...] = ()
    """Names of `chatsae.batch.Role`; generated tokens are the assistant's."""
    kinds: tuple[str, ...] = ()
    """Names of `chatsae.batch.Kind`; generated special tokens are control, or end_of_turn, by their id."""
    positions: tuple[int, ...] = ()
    """Absolute positions; those below 0 count back from the end of the prompt, -1 its last token."""
    exclude: tuple[int, ...] = ()
    """Positions that are left alone, counted likewise."""

    def __post_init__(self) -> None:
        _one_of("where.phase", self.phase, get_args(Phase))
        for name, known in (("roles", ROLES), ("kinds", KINDS)):
            for value in getattr(self, name):
                _one_of(f"where.{name}", value, tuple(known))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SteerSpec:
    """One operation on the residual stream after one layer, along a vector or a feature's decoder row."""

    op: Op = "add"
    """What is done along the unit direction (`chatsae.steering.ops`)."""
    strength: float = 0.0
    """Alpha of add, the projection of set, min_clamp and cap, the factor of scale; ablate has none."""
    unit: Unit = "absolute"
    """absolute; rel_norm: in median norms of the layer's stream; rel_maxact: in the feature's largest activation;
    auto: chosen by `chatsae.steering.strength.auto_alpha`."""
    layer: int | None = None
    """Layer after which it is done; by default that of the SAE."""
    feature: int | None = None
    """Feature of `sae` whose decoder row is the direction."""
    sae: SAE | str | None = None
    """An SAE, or the directory of one."""
    vector: tuple[float, ...] | Tensor | None = None
    """The direction [d_in], in place of a feature."""
    where: Where = field(default_factory=Where)
    schedule: Schedule = "const"
    """Of generated tokens: const; decay: halved every `schedule_tokens`; first_n: only the first `schedule_tokens`."""
    schedule_tokens: int = 16

    def __post_init__(self) -> None:
        for name, known in (("op", OPS), ("unit", get_args(Unit)), ("schedule", get_args(Schedule))):
            _one_of(name, getattr(self, name), known)
        if (self.vector is None) == (self.feature is None):
            raise UserError("steering: give either a vector, or a feature and its sae")
        if self.feature is not None and self.sae is None:
            raise UserError(f"steering: feature {self.feature} of which sae?")
        if self.vector is not None and self.layer is None:
            raise UserError("steering: layer is missing; a vector does not say where it belongs")
        if self.schedule_tokens < 1:
            raise UserError(f"steering: schedule_tokens must be at least 1, not {self.schedule_tokens}")
        if not abs(self.strength) < float("inf"):
            raise UserError(f"steering: strength must be a finite number, not {self.strength}")
        if self.unit != "absolute" and self.op in ("scale", "ablate"):
            raise UserError(f"steering: {self.op} has no strength in units of activations; unit must be absolute")

    def loaded(self) -> "SteerSpec":
        """The same with its SAE in memory."""
        return self._with(sae=SAE.load(self.sae)) if isinstance(self.sae, str) else self

    def at(self, strength: float) -> "SteerSpec":
        """The same at an absolute strength."""
        return self._with(strength=strength, unit="absolute")

    def _with(self, **changes: Any) -> "SteerSpec":
        return SteerSpec(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)

    @property
    def place(self) -> int:
        """The layer it acts after; of a spec whose SAE is loaded."""
        if self.layer is not None:
            return self.layer
        assert isinstance(self.sae, SAE)
        return self.sae.spec.layer

    def direction(self) -> Float[Tensor, " D"]:
        """The vector, or the feature's decoder row; of a spec whose SAE is loaded.

        Raises:
            UserError: the feature does not exist, or the direction is zero or not finite.
        """
        if self.feature is None:
            found = torch.as_tensor(self.vector).double()
            what = "vector"
        else:
            assert isinstance(self.sae, SAE)
            spec = self.sae.spec
            if not 0 <= self.feature < spec.d_sae:
                raise UserError(f"steering: feature {self.feature} does not exist: {spec.name} has 0..{spec.d_sae - 1}")
            found = self.sae.W_dec[self.feature].detach().double()
            what = f"decoder row of feature {self.feature}"
        if found.ndim != 1 or not bool(torch.isfinite(found).all()) or not bool(found.any()):
            raise UserError(f"steering: the {what} is no direction: it must be one row of finite numbers, not all zero")
        return found

    def label(self) -> str:
        """A few words, for tables."""
        what = "vector" if self.feature is None else f"feature {self.feature}"
        value = "" if self.op == "ablate" else f" {self.strength:g}"
        return f"{self.op}{value}{'' if self.unit == 'absolute' else ' ' + self.unit} {what}"


def load_specs(path: Path | str) -> tuple[SteerSpec, ...]:
    """The specs of a YAML or JSON file: one mapping, or a list of them under `steering`.

    A directory in `sae` is relative to the file.

    Raises:
        UserError: names the file and the field.
    """
    path = Path(path)
    data: Any = read_json(path) if path.suffix == ".json" else load_yaml(path, "steering recipe")
    if isinstance(data, dict) and set(data) == {"steering"}:
        data = data["steering"]
    entries: list[Any] = data if isinstance(data, list) else [data]
    if not entries:
        raise UserError(f"steering recipe {path} holds no entry")
    return tuple(
        spec_of(entry, f"{path}, entry {i}", lambda name: str(path.parent / name)) for i, entry in enumerate(entries)
    )


def spec_of(entry: Any, at: str, sae: Callable[[str], SAE | str]) -> SteerSpec:
    """A spec from a mapping of its fields, as JSON and YAML hold it; `sae`: what the name of one stands for.

    Raises:
        UserError: says where (`at`) and which field.
    """
    values = _typed(entry, SteerSpec, at)
    if "where" in values:
        values["where"] = _built(Where, _typed(values["where"], Where, f"{at}: where"), at)
    if isinstance(values.get("sae"), str):
        values["sae"] = sae(values["sae"])
    return _built(SteerSpec, values, at)


def _built(kind: Any, values: dict[str, Any], at: str) -> Any:
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{at}: {error}") from None


def _typed(entry: Any, kind: Any, at: str) -> dict[str, Any]:
    hints = get_type_hints(kind)
    if not isinstance(entry, Mapping):
        raise UserError(f"{at} must be a mapping with keys of {', '.join(hints)}, not {entry!r}")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"perhaps {near[0]}" if near else f"known: {', '.join(hints)}"
            raise UserError(f"{at}: unknown key {key!r}; {hint}")
        try:
            values[key] = value if key == "where" else _value(value, hints[key], f"{at}: {key}")
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(at) else f"{at}: {error}") from None
    return values


def _value(value: Any, hint: Any, at: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        origin = get_origin(option)
        if option in (int, float) and isinstance(value, (int, float) if option is float else int):
            if not isinstance(value, bool):
                return option(value)
        elif option is str and isinstance(value, str):
            return value
        elif origin is Literal:
            _one_of(at.rpartition(": ")[2], value, get_args(option))
            return value
        elif origin is tuple and isinstance(value, list):
            return tuple(_value(v, get_args(option)[0], f"{at}[{i}]") for i, v in enumerate(value))
    words = {int: "a whole number", float: "a number", str: "a text"}
    wanted = " or ".join(words.get(o, "a list") for o in options if o in words or get_origin(o) is tuple)
    raise UserError(f"{at} must be {wanted}, not {value!r}")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; perhaps {near[0]}" if near else ""
        raise UserError(f"steering: {name} must be one of {', '.join(known)}, not {value!r}{hint}")
