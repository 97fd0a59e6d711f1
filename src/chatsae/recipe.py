"""YAML recipes <-> configuration. A recipe sets the defaults; flags on the command line come later and win."""

from collections import Counter
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from chatsae.config import RunConfig
from chatsae.errors import UserError
from chatsae.files import read_text
from chatsae.typed import hints_of, near, shown

_MERGED = 10_000  # pairs of one mapping after its merges (<<), of which a few lines can make billions

SHIPPED = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")
"""Where the recipes of an installed chatsae are, and those of a checkout."""


def find_recipe(path: Path | str) -> Path:
    """The file of a recipe: this file, if it is there, else the shipped recipe of that name or path.

    `qwen2.5-0.5b`, `paper/llama-3.1-8b` and `recipes/qwen2.5-0.5b.yaml` are shipped ones.

    Raises:
        UserError: there is neither.
    """
    if Path(path).exists() and not Path(path).is_dir():
        return Path(path)
    names = {}
    for folder in SHIPPED:
        for file in sorted(folder.rglob("*.yaml")):
            names.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    wanted = Path(path).as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if wanted not in names and Path(path).exists():
        return Path(path)  # a directory, which whoever reads it refuses by name
    if wanted not in names:
        raise UserError(f"recipe {path} does not exist; recipes that come with chatsae: {', '.join(names)}")
    return names[wanted]


def load_recipe(path: Path | str, base: RunConfig | None = None) -> RunConfig:
    """The configuration in a YAML file; fields it does not name keep the value of `base` (default: the paper's).

    `path` is a file, or the name of a recipe that comes with chatsae (`find_recipe`).

    Raises:
        UserError: the file is missing or no mapping, a key is unknown, or a value has the wrong type.
    """
    data = load_yaml(find_recipe(path), "recipe")
    return _fill(base or RunConfig(), {} if data is None else data, where=str(path))


def run_recipe(path: Path) -> Path:
    """The recipe of a run, where a path is a run directory."""
    return path / "config.yaml" if path.is_dir() else path


def load_yaml(path: Path | str, what: str) -> Any:
    """The value in a YAML file; `what` names the file in messages.

    Raises:
        UserError: it cannot be read, is not valid YAML, or holds a key twice.
    """
    text = read_text(path, what)
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{what} {path} is not valid YAML: nested too deeply") from None
    except ValueError as error:  # a date that is none, an integer of thousands of digits
        raise UserError(f"{what} {path} holds a value that cannot be: {error}") from None


class _Loader(yaml.SafeLoader):
    """Of plain values; refuses what YAML takes without a word: a key that is there twice, merges without end."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._looked_at: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if id(node) in self._looked_at:  # its merges are resolved already
            return
        self._looked_at.add(id(node))
        own = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, n in own.items() if n > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{shown(twice[0])} is there twice", node.start_mark)
        super().flatten_mapping(node)
        if len(node.value) > _MERGED:
            raise yaml.constructor.ConstructorError(None, None, "merges (<<) of too many keys", node.start_mark)


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
    hints, changes = hints_of(type(config)), {}
    for key, value in data.items():
        if key not in hints:
            guess = near(key, hints)
            hint = f"perhaps you meant {prefix}{guess}" if guess else f"known keys: {', '.join(hints)}"
            raise UserError(f"{where}: unknown key {prefix}{key if isinstance(key, str) else shown(key)}; {hint}")
        section = is_dataclass(hints[key])
        changes[key] = _fill(getattr(config, key), value, where, f"{prefix}{key}.") if section else value
    try:
        return replace(config, **changes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
