"""Every JSON file that is read from disk: whatever stands in it, one message that names it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from chatsae.config import RunConfig
from chatsae.data.store.manifest import Manifest
from chatsae.data.store.prepare import _before
from chatsae.errors import UserError
from chatsae.evals.held_out import _training_sources
from chatsae.evals.report import Report
from chatsae.features.collect import load_state
from chatsae.features.export.saebench import read_report
from chatsae.features.judging import read_judgements
from chatsae.features.store import FeatureStore
from chatsae.files import read_json, read_object
from chatsae.lm.checkpoint import Source, check_shards
from chatsae.page.special import _read as read_special_tokens
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.steering.spec import load_specs
from chatsae.training.session import _finished, _remembered

DAMAGE = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "latin-1": '{"é": 1}'.encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "cut": b'{"a": ',
    "empty": b"",
    "long number": b'{"step": ' + b"1" * 6000 + b"}",
    "list": b"[1]",
    "null": b"null",
    "text": b'"x"',
    "no keys": b"{}",
}
READERS: dict[str, Callable[[Path], object]] = {
    "data.json": lambda path: _remembered(Run(path.parent, RunConfig()), path.name, True, lambda before: before["n"]),
    "data.json ": lambda path: _training_sources(Run(path.parent, RunConfig())),
    "summary.json": lambda path: _finished(Run(path.parent, RunConfig())),
    "report.json": Report.load,
    "report.json ": read_report,
    "manifest.json": lambda path: Manifest.read(path.parent),
    "state/state.json": lambda path: _before(path.parent.parent),
    "facts.json": lambda path: FeatureStore.load(path.parent),
    "judge/S/rubric.json": lambda path: read_judgements(path.parents[2], "S"),
    "cfg.json": lambda path: SAE.load(path.parent),
    "model.safetensors.index.json": lambda path: check_shards(Source("m", str(path.parent))),
    "special_tokens.json": read_special_tokens,
    "steering.json": load_specs,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, reader: str, damage: str) -> None:
    path = tmp_path / reader.strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(DAMAGE[damage])
    if reader == "data.json" and damage == "no keys":
        return  # facts of a run have no keys that all versions wrote
    with pytest.raises(UserError) as error:
        READERS[reader](path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d not in ("no keys",)])
def test_a_state_that_is_damaged_is_begun_anew(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.json").write_bytes(DAMAGE[damage])
    assert load_state(tmp_path, {}, {}) is None
    assert "state.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "facts",
    [
        {"splits": {}},
        {"recipe": {"format": 1}, "splits": {}},
        {"recipe": {"format": 1, "tokenizer": {}, "sources": {}}, "splits": {}},
        {"recipe": {"format": 1, "tokenizer": {}, "sources": []}, "splits": {"train": {}}},
        {"recipe": {"format": 1, "tokenizer": {}, "sources": []}, "splits": {"train": {"shards": [{"file": "x"}]}}},
    ],
    ids=str,
)
def test_a_manifest_that_lacks_something_is_refused(tmp_path: Path, facts: dict[str, object]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*delete .* and prepare the data again"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n": 1}', "'splits' is missing"),
        ('{"splits": []}', "'splits' is a list, an object was expected"),
        ('{"splits": null}', "'splits' is null, an object was expected"),
        ("[]", "an object was expected, not a list"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_object(path, "delete it", {"splits": dict})
    assert str(error.value) == f"{path} is damaged ({message}); delete it"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.json cannot be read: No such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
    (tmp_path / "x.json").write_text('[1, {"a": null}]')
    assert read_json(tmp_path / "x.json") == [1, {"a": None}]
