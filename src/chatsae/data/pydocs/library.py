"""The documented objects of the Python standard library, read with `ast`: nothing is imported or run."""

import ast
import copy
import functools
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatsae.batch import SPLITS, Split
from chatsae.errors import UserError

ObjectKind = Literal["module", "class", "function", "method", "topic"]

SHARES = {"train": 80, "eval": 12, "interpret": 5, "steer": 3}
_NOT_THE_LIBRARY = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo", "ensurepip"}
_CONTROL = re.compile(r"<\|[^|>\n]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>|\[/?INST\]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as its signature spells it; `default` is empty when there is none."""

    name: str
    default: str


@dataclass(frozen=True, slots=True)
class PyObject:
    """One object and its documentation; `doc` is empty when it has none.

    `name` is the qualified name and `unit` the name whose hash decides the split: an object's own, or that of its
    outermost class.
    """

    name: str
    kind: ObjectKind
    module: str
    unit: str
    doc: str
    signature: str = ""
    parameters: tuple[Parameter, ...] = ()
    bases: tuple[str, ...] = ()
    flavour: str = ""

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name if self.kind == "module" else self.name.rpartition(".")[2]

    @property
    def owner(self) -> str:
        """The name without its last part: a method's class."""
        return self.name.rpartition(".")[0]


def split_of(unit: str) -> Split:
    """The split of a unit: of 100, 80 train, 12 eval, 5 interpret, 3 steer; by a hash that never changes."""
    bucket = int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "big") % 100
    for name in SPLITS:
        if bucket < SHARES[name]:
            return name
        bucket -= SHARES[name]
    raise AssertionError("the shares add up to 100")


@functools.cache
def objects(split: Split) -> tuple[PyObject, ...]:
    """Every object of a split, in the order of modules and, in a module, of the source.

    Raises:
        UserError: the split is unknown, or this Python has no standard library in source form.
    """
    if split not in SPLITS:
        raise UserError(f"pydocs: split is {split!r}; expected one of {', '.join(SPLITS)}")
    return tuple(o for o in _library()[0] if split_of(o.unit) == split)


def dropped() -> Counter[str]:
    """How many files and objects were left out, by reason."""
    return Counter(_library()[1])


@functools.cache
def _library() -> tuple[tuple[PyObject, ...], dict[str, int]]:
    root = Path(sysconfig.get_path("stdlib"))
    tally: Counter[str] = Counter()
    found = [o for path in _sources(root) for o in _read(path, root, tally)]
    if not found:
        raise UserError(f"pydocs: no Python sources in {root}; the built-in corpus needs the standard library's files")
    return tuple(_without_repeats(found, tally)), dict(tally)


def _sources(root: Path) -> list[Path]:
    """The library's files, by module name."""
    paths = [
        p
        for p in root.rglob("*.py")
        if not any(part in _NOT_THE_LIBRARY or "-" in part for part in p.parts[len(root.parts) : -1])
    ]
    return sorted(paths, key=lambda p: _module_name(p, root))


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(path: Path, root: Path, tally: Counter[str]) -> Iterator[PyObject]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        tally["unreadable file"] += 1
        return
    module = _module_name(path, root)
    if module == "pydoc_data.topics":
        yield from _topics(tree)
        return
    yield PyObject(module, "module", module, module, _doc(tree, tally))
    yield from _members(tree, module, module, "", tally)


def _topics(tree: ast.Module) -> Iterator[PyObject]:
    """The pages behind `help("if")`: one dict literal."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield PyObject(f"topics.{name}", "topic", "pydoc_data.topics", f"topics.{name}", text.strip())


def _members(body: ast.AST, module: str, prefix: str, unit: str, tally: Counter[str]) -> Iterator[PyObject]:
    """Classes and functions of a module or class body, also those under `if` and `try`; not those in functions."""
    for node in ast.iter_child_nodes(body):
        name = f"{prefix}.{getattr(node, 'name', '')}"
        if isinstance(node, ast.ClassDef):
            yield _class(node, name, module, unit or name, tally)
            yield from _members(node, module, name, unit or name, tally)
        elif isinstance(node, _FunctionNode):
            yield _function(node, name, module, unit, tally)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _members(node, module, prefix, unit, tally)


def _class(node: ast.ClassDef, name: str, module: str, unit: str, tally: Counter[str]) -> PyObject:
    init = next((n for n in node.body if isinstance(n, _FunctionNode) and n.name == "__init__"), None)
    signature, parameters = _signature(init, bound=True) if init else ("", ())
    bases = tuple(ast.unparse(b) for b in node.bases)
    return PyObject(name, "class", module, unit, _doc(node, tally), signature, parameters, bases)


def _function(node: _FunctionNode, name: str, module: str, unit: str, tally: Counter[str]) -> PyObject:
    marks = {ast.unparse(d).split("(")[0] for d in node.decorator_list}
    flavour = next((m for m in ("classmethod", "staticmethod", "property") if m in marks), "")
    flavour = "async" if isinstance(node, ast.AsyncFunctionDef) else flavour
    kind: ObjectKind = "method" if unit else "function"
    signature, parameters = _signature(node, bound=kind == "method" and flavour != "staticmethod")
    return PyObject(name, kind, module, unit or name, _doc(node, tally), signature, parameters, (), flavour)


def _signature(node: _FunctionNode, *, bound: bool) -> tuple[str, tuple[Parameter, ...]]:
    """The signature in parentheses, with the return annotation; `self` and `cls` are left out when `bound`."""
    args = copy.copy(node.args)
    args.posonlyargs, args.args = list(args.posonlyargs), list(args.args)
    first = args.posonlyargs or args.args
    if bound and first:
        del first[0]
    positional = [*args.posonlyargs, *args.args]
    defaults = [*[None] * (len(positional) - len(args.defaults)), *args.defaults][-len(positional) or len(positional) :]
    pairs = [*zip(positional, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    parameters = [Parameter(a.arg, ast.unparse(d) if d else "") for a, d in pairs]
    arrow = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(args)}){arrow}", tuple(parameters)


def _doc(node: ast.Module | ast.ClassDef | _FunctionNode, tally: Counter[str]) -> str:
    text = (ast.get_docstring(node) or "").strip()
    text = "\n".join(line.rstrip() for line in text.splitlines())
    if _CONTROL.search(text) or _UNPRINTABLE.search(text):
        tally["control string in the text"] += 1
        return ""
    return text


def _without_repeats(found: list[PyObject], tally: Counter[str]) -> Iterator[PyObject]:
    """Each name once, and a long docstring in one unit only, so that no split holds another's text."""
    names: set[str] = set()
    owner: dict[str, str] = {}
    for o in found:
        if o.name in names or _CONTROL.search(o.doc):
            tally["name seen before" if o.name in names else "control string in the text"] += 1
            continue
        names.add(o.name)
        if len(o.doc) > 60 and owner.setdefault(o.doc, o.unit) != o.unit:
            tally["same docstring elsewhere"] += 1
            o = PyObject(o.name, o.kind, o.module, o.unit, "", o.signature, o.parameters, o.bases, o.flavour)
        yield o
