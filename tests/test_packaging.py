"""What an installed chatsae has, and what a package index shows of it."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from chatsae import recipe
from chatsae.cli import main
from chatsae.errors import UserError

ROOT = Path(__file__).parents[1]
HATCH = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
NAMES = sorted(p.relative_to(ROOT / "recipes").with_suffix("").as_posix() for p in (ROOT / "recipes").rglob("*.yaml"))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipes where the wheel's configuration puts them, and no checkout; the working directory is empty."""
    for source, place in HATCH["build"]["targets"]["wheel"]["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / "site" / place)
    folders = [
        tmp_path / "site" / folder.relative_to(Path(recipe.__file__).parents[1]) for folder in recipe.SHIPPED[:1]
    ]
    monkeypatch.setattr(recipe, "SHIPPED", tuple(folders))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "site"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_found_by_its_name_after_an_installation(installed: Path, name: str) -> None:
    for wanted in (name, f"{name}.yaml", f"recipes/{name}.yaml"):
        assert recipe.find_recipe(wanted) == installed / "chatsae" / "recipes" / f"{name}.yaml"
        assert recipe.load_recipe(wanted) == recipe.load_recipe(ROOT / "recipes" / f"{name}.yaml")


def test_the_first_command_of_the_readme_runs_after_an_installation(installed: Path, capsys) -> None:
    (command,) = re.findall(r"^chatsae (plan \S+) .*loads no weights$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert main([*command.split(), "--seconds", "0"]) == 0
    assert "L12-8x-standard" in capsys.readouterr().out


def test_a_local_file_comes_before_a_shipped_recipe(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "work" / "recipes").mkdir()
    (tmp_path / "work" / "qwen2.5-0.5b").mkdir()  # a directory is no recipe
    for local in (Path("recipes/tiny.yaml"), Path("tiny")):
        local.write_text("train: {seed: 7}\n", encoding="utf-8")
        assert recipe.find_recipe(str(local)) == local
        assert recipe.load_recipe(local).train.seed == 7
    assert recipe.find_recipe("qwen2.5-0.5b").parent == installed / "chatsae" / "recipes"
    with pytest.raises(UserError, match=r"recipe tin does not exist; recipes that come with chatsae: .*qwen2.5-0.5b"):
        recipe.find_recipe("tin")


def test_a_checkout_has_the_same_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe.find_recipe("tiny") == ROOT / "recipes" / "tiny.yaml"
    assert main(["train", "tin.yaml"]) == 2


def test_nothing_breaks_where_the_readme_stands_alone() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in HATCH["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text, n = re.subn(rule["pattern"], rule["replacement"], text)
        assert n
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", text))
    assert "![" not in text
    assert "Drawn by" not in text


def test_the_wheel_is_what_its_configuration_says(tmp_path: Path) -> None:
    if missing := [n for n in ("hatchling", "hatch_fancy_pypi_readme") if importlib.util.find_spec(n) is None]:
        pytest.skip(f"building a wheel offline needs {' and '.join(missing)}")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {f"chatsae/recipes/{name}.yaml" for name in NAMES} <= set(names)
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert "](docs/" not in metadata
