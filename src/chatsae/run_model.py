"""The model of a run, guarded as its data are: another one than the run was trained on is refused."""

from dataclasses import replace
from typing import Any

from chatsae.config import ModelConfig
from chatsae.errors import UserError
from chatsae.files import damaged, read_object, with_checksum, write_json
from chatsae.lm.checkpoint import locate
from chatsae.lm.identity import model_identity
from chatsae.runs import Run

FILE = "model.json"


def remember_model(run: Run, *, resumes: bool) -> ModelConfig:
    """The model to train on, kept in RUN/model.json; a training that goes on does so with the same one.

    Raises:
        UserError: the model cannot be found, or is not the one that the training began with.
    """
    if resumes and (run.path / FILE).exists():
        return _same(run, "delete the run directory to begin again")
    model = run.config.model
    source = locate(model.name, model.revision, model.trust_remote_code)
    write_json(run.path / FILE, with_checksum(model_identity(source)))
    return model if source.local else replace(model, revision=source.revision)


def trained_model(run: Run) -> ModelConfig:
    """The model that a run was trained on; one of the hub at the same commit.

    Runs from before models were recorded have the one that is there.

    Raises:
        UserError: the model cannot be found, or one of its files has changed since; names it.
    """
    if not (run.path / FILE).exists():
        return run.config.model
    return _same(run, f"delete {run.path / FILE} to use the one that is there")


def _same(run: Run, otherwise: str) -> ModelConfig:
    path, model = run.path / FILE, run.config.model
    before = read_object(path, "delete it to use the model that is there")
    if not isinstance(before.get("files", {}), dict) or not isinstance(before.get("commit"), str | None):
        raise damaged(path, "'files' is no object, or 'commit' no string", "delete it to use the model that is there")
    commit = before.get("commit")
    source = locate(model.name, commit or model.revision, model.trust_remote_code)
    changed = _changes(before, model_identity(source))
    if changed:
        raise UserError(
            f"run {run.path}: {model.name} is not the model that it was trained on: {', '.join(changed)}; "
            f"put the files of the training back, or {otherwise}"
        )
    return model if source.local else replace(model, revision=source.revision)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The files that differ, or what else does."""
    if before.get("commit") != now.get("commit"):
        was, is_now = (f"commit {f['commit']} of the hub" if "commit" in f else "a directory" for f in (before, now))
        return [f"it was {was} and is {is_now}"]
    old, new = before.get("files", {}), now.get("files", {})
    words = {(True, True): "has changed", (True, False): "is missing", (False, True): "is new"}
    differ = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    more = [f"and {len(differ) - 5} more"] if len(differ) > 5 else []
    return [f"{name} {words[name in old, name in new]}" for name in differ[:5]] + more
