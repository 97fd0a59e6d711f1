"""The page as one HTML file: markup, style and script of this folder, and the data compressed in it."""

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from chatsae.files import write_text
from chatsae.page.data import Wanted, find_runs, page_data

SCRIPTS = ("base.js", "charts.js", "judge.js", "special.js", "steer.js", "overview.js", "explorer.js", "page.js")


def default_out(paths: Sequence[Path]) -> Path:
    """Where the page goes: into the one directory that is given, or the working directory."""
    return paths[0] / "report.html" if len(paths) == 1 else Path("report.html")


def report(paths: Sequence[Path], out: Path, wanted: Wanted | None = None) -> dict[str, Any]:
    """Write the page of some runs; says where it is, and how large.

    Raises:
        UserError: see `page_data`; or the file cannot be written.
    """
    data = page_data(find_runs(paths), wanted)
    html = page(data)
    write_text(out, html)
    explored = [sae for sae in data["saes"] if sae["features"] is not None]
    return {
        "page": str(out),
        "bytes": len(html.encode()),
        "runs": [run["path"] for run in data["runs"]],
        "saes": len(data["saes"]),
        "features": sum(len(sae["features"]) for sae in explored),
    }


def summary(facts: dict[str, Any]) -> str:
    """What `report` says, for people."""
    return (
        f"{facts['page']} ({facts['bytes'] / 2**20:.1f} MB): {len(facts['runs'])} runs, {facts['saes']} SAEs, "
        f"{facts['features']:,} features with contexts"
    )


def page(data: dict[str, Any]) -> str:
    """The HTML file; the policy in it lets this script and this style run, and nothing load."""
    style, script = _part("page.css"), "\n".join(_part(name) for name in SCRIPTS)
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    parts = {"policy": policy, "style": style, "data": _packed(data), "script": script}
    html = _part("page.html")
    before, *pieces = html.split("{{")  # one pass, so that no part is searched for places of another
    found = [before]
    for piece in pieces:
        name, rest = piece.split("}}", 1)
        found += [parts[name], rest]
    return "".join(found)


def _packed(data: dict[str, Any]) -> str:
    """JSON, gzip, base64: characters that mean nothing in HTML. Equal data give equal bytes."""
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError:  # rare: a pass over everything only then
        text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


def _finite(value: Any) -> Any:
    """The same with null in the place of numbers that JSON does not have; the page shows a dash there."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _part(name: str) -> str:
    return resources.files("chatsae.page").joinpath(name).read_text(encoding="utf-8")
