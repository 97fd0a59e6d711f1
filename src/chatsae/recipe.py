"""YAML recipes <-> configuration. A recipe sets the defaults; flags on the command line come later and win."""

import difflib
import types
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from chatsae.config import RunConfig
from chatsae.errors import UserError


def load_recipe(path: Path | str, base: RunConfig | None = None) -> RunConfig:
    """The configuration in a YAML file; fields it does not name keep the value of `base` (default: the paper's).

    Raises:
        UserError: the file is missing or no mapping, a key is unknown, or a value has the wrong type.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    return _fill(base or RunConfig(), data or {}, where=str(path))


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every field written out."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False)


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """The fields in which two configurations differ, as `field: a -> b` lines."""
    lines = []
    for section in fields(RunConfig):
        left, right = asdict(getattr(a, section.name)), asdict(getattr(b, section.name))
        lines += [f"{section.name}.{k}: {left[k]} -> {right[k]}" for k in left if left[k] != right[k]]
    return lines


def _fill(config: Any, data: Any, where: str, prefix: str = "") -> Any:
    if not isinstance(data, dict):
        expected = ", ".join(f.name for f in fields(config))
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping with the keys {expected}")
    hints = get_type_hints(type(config))
    changes = {}
    for key, value in data.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"perhaps you meant {prefix}{near[0]}" if near else f"known keys: {', '.join(hints)}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        if is_dataclass(hints[key]):
            changes[key] = _fill(getattr(config, key), value, where, f"{prefix}{key}.")
        else:
            changes[key] = _convert(value, hints[key], f"{where}: {prefix}{key}")
    return replace(config, **changes)


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(value, next(o for o in options if o is not type(None)), where)
    if origin is Literal:
        if value not in options:
            near = difflib.get_close_matches(str(value), options, n=1)
            raise UserError(
                f"{where} must be one of {', '.join(options)}, not {value!r}"
                + (f"; perhaps you meant {near[0]}" if near else "")
            )
        return value
    if origin is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        if options[-1] is not Ellipsis and len(values) != len(options):
            raise UserError(f"{where} must hold {len(options)} values, not {len(values)}")
        return tuple(_convert(v, options[0], f"{where}[{i}]") for i, v in enumerate(values))
    return _scalar(value, hint, where)


def _scalar(value: Any, hint: type, where: str) -> Any:
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 7e-5 as a string
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where} must be {_NAMES[hint]}, not {value!r}")


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
