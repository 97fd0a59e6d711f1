"""The import layers of docs/architecture.md hold, lazy imports included, and nothing imports in a circle."""

import ast
from pathlib import Path

import pytest

import chatsae

ROOT = Path(chatsae.__file__).parent
LAYERS = {
    "errors": -2,
    "config": 0,
    "files": -1,
    "typed": -1,
    "exporting": 2,
    "recipe": 1,
    "statistics": 1,
    "console": 1,
    "batch": 1,
    "data": 2,
    "lm": 3,
    "sae": 2,
    "runs": 2,
    "buffer": 3,
    "run_model": 4,
    "training": 5,
    "evals": 5,
    "features": 5,
    "steering": 5,
    "demo": 7,
    "bench": 6,
    "sweep": 6,
    "page": 6,
    "steersweep": 6,
    "cli_features": 7,
    "serve": 6,
    "cli_models": 7,
    "norms": 6,
    "cli_serve": 7,
    "audit": 6,
    "cli_audit": 7,
    "cli_steer": 7,
    "cli": 8,
    "__init__": 6,
}


def _module(path: Path) -> str:
    return ".".join(["chatsae", *path.relative_to(ROOT).with_suffix("").parts])


def _part(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _type_only(tree: ast.Module) -> set[ast.AST]:
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {inner for block in blocks for inner in ast.walk(block)}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = _type_only(tree)
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "chatsae":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if (ROOT / Path(*n.split(".")[1:])).with_suffix(".py").exists() else node.module for n in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "chatsae"}
    return found


FILES = sorted(p for p in ROOT.rglob("*.py"))


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """What each module imports."""
    return {_module(path): _imports(path) for path in FILES}


def test_every_part_has_a_layer(graph):
    assert {_part(m) for m in graph} == set(LAYERS)


def test_imports_point_down(graph):
    wrong = []
    for module, imported in graph.items():
        for target in imported:
            here, there = _part(module), _part(target)
            if here != there and LAYERS[there] >= LAYERS[here]:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_no_cycles_inside_a_part(graph):
    def reach(module: str, seen: tuple[str, ...]) -> None:
        assert module not in seen, " -> ".join((*seen, module))
        for target in graph.get(module, ()):
            reach(target, (*seen, module))

    for module in graph:
        reach(module, ())


def test_an_sae_needs_no_transformers(graph):
    for module, imported in graph.items():
        if _part(module) == "sae":
            path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
            assert "transformers" not in path.read_text(encoding="utf-8").replace("transformers' ", "")
            assert not any(_part(t) in ("lm", "data", "runs") for t in imported)


def test_templates_are_rendered_in_one_place():
    calls = [p for p in FILES if "apply_chat_template" in p.read_text(encoding="utf-8")]
    assert [p.relative_to(ROOT).as_posix() for p in calls] == ["data/template.py"]


def test_files_and_functions_stay_short():
    long = []
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        if len(source.splitlines()) > 420:
            long.append(f"{path.name}: {len(source.splitlines())} lines")
        functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        long += [f"{path.name}: {f.name}" for f in functions if f.end_lineno - f.lineno > 70]
    assert not long
