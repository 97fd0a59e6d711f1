"""The documentation names things that exist, and README's example runs."""

import importlib
import re
from pathlib import Path

import pytest

import chatsae
from chatsae import config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_function_named_in_method_md_exists():
    names = set(re.findall(r"`(chatsae(?:\.\w+)+)`", (ROOT / "docs" / "method.md").read_text(encoding="utf-8")))
    assert len(names) >= 20
    for name in names - {"chatsae.config"}:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_every_field_named_in_the_docs_exists():
    sections = {"model", "data", "harvest", "buffer", "sae", "train", "eval"}
    for page in PAGES:
        for section, field in re.findall(r"`(\w+)\.(\w+)`", page.read_text(encoding="utf-8")):
            if section in sections and field not in ("py", "md", "json"):
                assert hasattr(getattr(config.RunConfig(), section), field), f"{page.name}: {section}.{field}"


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_public_names_are_sorted_and_exist():
    assert chatsae.__all__ == sorted(chatsae.__all__)
    assert dir(chatsae) == chatsae.__all__
    for name in chatsae.__all__:
        assert getattr(chatsae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = chatsae.nothing


def test_the_readme_example_runs_and_is_short(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "explained" in out
    assert out.endswith("\nI am Tiny.\n")
    assert (tmp_path / "runs").exists()
