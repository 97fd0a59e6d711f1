"""What a run left on the disk, file by file, and how two of them differ."""

import base64
import gzip
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MASKED_FILES = ("environment.json",)
MASKED_KEYS = ("tokens_per_second", "seconds", "shares", "predicted_seconds", "took_seconds")
"""Times; nothing else may differ."""

_DATA = re.compile(rb'(?<=id="data">)[A-Za-z0-9+/=\s]+(?=<)')


def tree(root: Path) -> dict[str, Any]:
    """Every file and directory below `root`, by path: its mode, and what it holds but for times."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        mode = oct(stat.S_IMODE(path.stat().st_mode))
        found[name] = f"directory {mode}" if path.is_dir() else {"mode": mode, "content": _content(path)}
    return found


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The files that are missing, too many or other, the values that are with them."""
    lines = [f"{name}: missing" for name in wanted if name not in found]
    lines += [f"{name}: left over" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        lines += [f"{name}: {line}" for line in _changed(wanted[name], found[name])]
    return sorted(lines)


def _content(path: Path) -> Any:
    if path.name in MASKED_FILES:
        return "masked"
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        try:
            lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            return [_masked(json.loads(line)) for line in lines]
        except ValueError:
            return f"no JSON: {data[:200]!r}"
    if path.suffix == ".html" and (packed := _DATA.search(data)):
        page = json.loads(gzip.decompress(base64.b64decode(packed[0])))
        return {"page": _masked(page), "rest": hashlib.sha256(data.replace(packed[0], b"")).hexdigest()}
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "masked" if key in MASKED_KEYS else _masked(v) for key, v in value.items()}
    return [_masked(v) for v in value] if isinstance(value, list) else value


def _changed(wanted: Any, found: Any, where: str = "") -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in {**wanted, **found}:
            yield from _changed(wanted.get(key), found.get(key), f"{where}.{key}")
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for i, (one, other) in enumerate(zip(wanted, found, strict=True)):
            yield from _changed(one, other, f"{where}[{i}]")
    elif json.dumps(wanted) != json.dumps(found):  # NaN is NaN here
        yield f"{where} is {_short(found)}, not {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
