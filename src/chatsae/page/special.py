"""The features of the chat template's tokens: what `chatsae tokens` writes, as the page reads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.errors import UserError
from chatsae.files import damaged, read_object
from chatsae.page.pack import short
from chatsae.runs import Run
from chatsae.steering.command import tokens_run

DIALOGUES = 1000
"""Of the steering split, where the table is made for the page and no other number is asked for."""


def special_tokens(run: Run, saes: Sequence[str], *, dialogues: int | None, build: bool) -> dict[str, dict[str, Any]]:
    """The table of each SAE that has one; with `build`, RUN/special_tokens.json is written where an SAE is not in it.

    A table that cannot be made (no dialogue is held out for steering, no chat template) is left out with a warning.

    Raises:
        UserError: the file is damaged.
    """
    path = run.path / "special_tokens.json"
    facts = _read(path)
    known = [] if facts is None else [name for name in facts["saes"] if (run.path / "saes" / name).is_dir()]
    if build and not set(saes) <= set(known):
        chosen = list(dict.fromkeys([*known, *saes]))
        try:
            facts, _ = tokens_run(run.path, saes=chosen, dialogues=dialogues or DIALOGUES)
        except UserError as error:
            console.warn(f"{run.path}: the page has no table of special tokens: {error}")
    return {} if facts is None else {name: _packed(facts, name, path) for name in saes if name in facts["saes"]}


def _packed(facts: Mapping[str, Any], sae: str, path: Path) -> dict[str, Any]:
    """[feature, mean, mean elsewhere, share of the token's places, exclusiveness] of each feature of a row."""
    keys = ("mean", "elsewhere", "density", "exclusivity")
    try:
        rows = [
            {"token": str(row["token"]), "id": int(row["token_id"]), "place": str(row["place"])}
            | {"n": int(row["occurrences"])}
            | {"features": [[int(f["feature"]), *(_short(f[key]) for key in keys)] for f in row["features"]]}
            for row in facts["saes"][sae]
        ]
        return {"split": str(facts["split"]), "n_dialogues": facts["n_dialogues"], "n_tokens": facts["n_tokens"]} | {
            "rows": rows
        }
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, repr(error), _advice(path)) from None


def _short(value: float | None) -> float | None:
    return None if value is None else short(value)


def _read(path: Path) -> dict[str, Any] | None:
    return read_object(path, _advice(path), {"saes": dict}) if path.exists() else None


def _advice(path: Path) -> str:
    return f"delete it, `chatsae tokens {path.parent}` writes it anew"
