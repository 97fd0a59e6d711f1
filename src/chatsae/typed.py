"""Values as their types want them: conversion, bounds, and messages that say what was expected and what came.

A type is a plain one, a Literal, a tuple of them, or None beside one; `Annotated` with a `Number` bounds a number.
"""

import difflib
import math
import operator
import os
import reprlib
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from chatsae.errors import UserError

_SHOWN = 80  # characters of a value in a message
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Number:
    """Bounds of a number; `above` and `below` are not values themselves."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    finite: bool = True

    def expected(self, value: float) -> str | None:
        """What was expected in place of a value; None for one within the bounds."""
        if self.finite and math.isinf(value):
            return "a finite number"
        if self.least is not None and self.most is not None and self.most <= 1:
            return None if self.least <= value <= self.most else f"between {self.least:g} and {self.most:g}"
        edges = (
            ("at least", self.least, operator.ge),
            ("above", self.above, operator.gt),
            ("at most", self.most, operator.le),
            ("below", self.below, operator.lt),
        )
        for word, edge, holds in edges:
            if edge is not None and not holds(value, edge):
                return f"{word} {_power(edge) if isinstance(edge, int) else f'{edge:g}'}"
        return "a number" if math.isnan(value) else None


@dataclass(frozen=True, slots=True)
class Grid:
    """Marks a tuple that holds no value twice, and at least one unless it may be `empty`."""

    empty: bool = False


Count = Annotated[int, Number(least=1, most=2**53)]
Natural = Annotated[int, Number(least=0, most=2**53)]
Positive = Annotated[float, Number(above=0)]
Finite = Annotated[float, Number()]
Dollars = Annotated[float, Number(least=0)]
Share = Annotated[float, Number(least=0, most=1)]
Seed = Annotated[int, Number(least=-(2**63), most=2**64 - 1)]
"""What torch takes."""
SmallSeed = Annotated[int, Number(least=0, most=2**32 - 1)]
"""What NumPy takes too, with room to derive others from it."""
Words = Annotated[str, "filled"]
"""A text that is not empty."""
OutFile = Annotated[Path, "file"]
"""A file that can be written, in a directory that is there or can be made."""
OutDir = Annotated[Path, "directory"]
"""A directory that is there or can be made, and written to."""


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their bounds."""
    return get_type_hints(kind, include_extras=True)


def checked(record: Any, named: Callable[[str], str]) -> None:
    """Convert and check every field of a dataclass in place; messages call a field what `named` says.

    Raises:
        UserError: a value is of the wrong type or out of bounds.
    """
    hints = hints_of(type(record))
    for each in fields(record):
        object.__setattr__(record, each.name, convert(getattr(record, each.name), hints[each.name], named(each.name)))


class Flags:
    """The base of what a verb is asked: fields are checked when it is made, before any work, and named as flags.

    Raises:
        UserError: a value is of the wrong type or out of bounds.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        checked(self, lambda name: f"--{name.replace('_', '-')}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """A value as its type wants it: a tuple for a list or for one value, a float for 1 and for "7e-5".

    Raises:
        UserError: it is of another type or out of bounds; begins with `where`.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = convert(value, options[0], where)
        _check_marks(found, options[1:], where)
        return found
    if origin in (Union, types.UnionType):
        return None if value is None else convert(value, next(o for o in options if o is not type(None)), where)
    if origin is Literal:
        return _choice(value, options, where)
    if origin is tuple:
        return _tuple(value, options, where)
    return _scalar(value, hint, where)


def shown(value: Any) -> str:
    """A value for a message: short, whatever it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, _SHOWN, _SHOWN
    try:
        return short.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"{type(value).__name__} of many digits"


def near(word: Any, known: Any) -> str:
    """The known word that was perhaps meant, or nothing."""
    found = difflib.get_close_matches(str(word)[:_SHOWN], [str(one) for one in known], n=1)
    return found[0] if found else ""


def _choice(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if isinstance(value, str | int) and value in options:
        return value
    guess = near(value, options) if isinstance(value, str) else ""
    hint = f"; perhaps you meant {guess}" if guess else ""
    raise UserError(f"{where} must be one of {', '.join(map(str, options))}, not {shown(value)}{hint}")


def _tuple(value: Any, options: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if options[-1] is not Ellipsis and len(values) != len(options):
        raise UserError(f"{where} must hold {len(options)} values, not {len(values)}")
    return tuple(convert(v, options[0], f"{where}[{i}]" if len(values) > 1 else where) for i, v in enumerate(values))


def _scalar(value: Any, hint: Any, where: str) -> Any:
    if hint not in _NAMES:
        if isinstance(value, hint):
            return value
        if hint is Path and isinstance(value, str):
            return Path(value)
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hint is str and isinstance(value, str) and "\0" in value:
        raise UserError(f"{where} holds a zero character: {shown(value)}")
    plain = not isinstance(value, bool)
    try:
        if hint is float and plain and isinstance(value, Real | str):
            return float(value)  # YAML 1.1 reads 7e-5 as a string
        if hint is int and plain and isinstance(value, Integral):
            return int(value)
        if hint in (str, bool) and isinstance(value, hint):
            return value
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{where} must be {_NAMES.get(hint, f'a {hint.__name__}')}, not {shown(value)}")


def _check_marks(value: Any, marks: tuple[Any, ...], where: str) -> None:
    for mark in marks:
        if isinstance(mark, Number) and (expected := mark.expected(value)) is not None:
            raise UserError(f"{where} must be {expected}, not {shown(value)}")
        if mark == "filled" and not value.strip():
            raise UserError(f"{where} is empty")
        if mark in ("file", "directory"):
            _check_writable(value, mark, where)
        if isinstance(mark, Grid):
            if not value and not mark.empty:
                raise UserError(f"{where} is empty; at least one value is needed")
            if len(set(value)) != len(value):
                raise UserError(f"{where} holds a value twice: {shown(value)}")


def _check_writable(path: Path, kind: str, where: str) -> None:
    """Refuse what could not be written in the end, before hours of work for it; makes nothing."""
    is_dir = path.is_dir()
    if path.exists() and is_dir != (kind == "directory"):
        raise UserError(f"{where} {path} is a {'directory' if is_dir else 'file'}; a {kind} is expected")
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if there != path and not there.is_dir():
        raise UserError(f"{where} {path} cannot be written: {there} is not a directory")
    if not os.access(there, os.W_OK):
        raise UserError(f"{where} {path} cannot be written: Permission denied")


def _power(edge: int) -> str:
    """A bound as people write it: 2^53 for a large power of two, 2^64 - 1 for one less."""
    if abs(edge) < 2**32 - 1:
        return str(edge)
    sign, exponent = "-" if edge < 0 else "", (abs(edge) + 1).bit_length() - 1
    return f"{sign}2^{exponent}{' - 1' if abs(edge) != 2**exponent else ''}"
