"""`chatsae export` of features: every format of a run, what is refused, and what is left when it is stopped."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import chatsae
from chatsae.cli import main
from chatsae.exporting import directory, identifier
from chatsae.features.export.subject import Names
from chatsae.features.export.writing import in_batches
from chatsae.features.judging import SCHEMA_VERSION
from chatsae.features.verdict import Verdict
from chatsae.sae.base import SAE
from export_schemas import check, strict
from feature_samples import D_IN, START, TOKEN, TWICE, planted_run
from sae_samples import spec

pytest_plugins = ["feature_fixtures"]

NAME = "L1-1x-standard"


def files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file())


def test_a_run_is_exported_in_every_format(tmp_path: Path, model: Path, capsys) -> None:
    run, out = planted_run(tmp_path / "of", model), tmp_path / "out"
    (store,) = (chatsae.FeatureStore.load(run / "features" / NAME) for _ in [0] if not export_all(run, out, capsys))
    source = out / "neuronpedia" / identifier(model.name) / "1-chatsae-fast-1x-standard"
    body = check(strict((source / "batch-0.json").read_text()), "neuronpedia-upload")
    assert [f["index"] for f in body["features"]] == store.indices.tolist()
    explained = {f["index"]: f["explanations"] for f in body["features"]}
    assert explained[TOKEN] == [{"text": "ends a turn"}]
    assert [explained[i] for i in explained if i != TOKEN] == [[]] * (len(explained) - 1)
    place = out / "delphi" / NAME / "layers.1"
    config = check(strict((place / "config.json").read_text()), "delphi-config")
    with safe_open(place / "0_127.safetensors", "numpy") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert {name: str(array.dtype) for name, array in found.items()} == {
        "locations": "uint16",
        "activations": "float16",
        "tokens": "int64",
    }
    assert found["tokens"].shape[1] == config["cache_ctx_len"] == 256
    assert config["n_tokens"] == store.facts["n_tokens"]
    counts = np.bincount(found["locations"][:, 2], minlength=128)
    assert counts[store.indices].tolist() == store.columns["n_active"][store.indices].tolist()
    assert counts.sum() == len(found["activations"])
    assert np.isfinite(found["activations"]).all()
    for file in files(out):  # paths of this machine stay here, but for delphi's, which has to find the model
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert "delphi" in file.parts or str(tmp_path).encode() not in data, file


def export_all(run: Path, out: Path, capsys) -> int:
    """Features, then verdicts on one of them, then every export."""
    assert main(["features", str(run), "--contexts", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)[NAME]["facts"]
    verdicts = [
        asdict(Verdict(TOKEN, "someone", 4, 0, 5.0, explanation="ends a turn")),
        asdict(Verdict(START, "someone", 4, 0, None, reason="no answer")),
        asdict(Verdict(TWICE, "someone", 4, 0, 1.5, explanation="no pattern")),
    ]
    folder = run / "judge" / NAME
    folder.mkdir(parents=True)
    for name, sha256 in (("a", facts["sae_sha256"]), ("b", facts["sae_sha256"]), ("c", "of other weights")):
        found = {"schema_version": SCHEMA_VERSION, "judge": name, "store": {"sae_sha256": sha256}, "verdicts": verdicts}
        (folder / f"{name}-4.json").write_text(json.dumps(found))
    for form in ("neuronpedia", "neuronpedia-bulk", "saedashboard", "delphi"):
        for _ in range(2):  # once more over what is there
            assert main(["export", str(run), "--format", form, "--out", str(out / form), "--json"]) == 0
            (written,) = json.loads(capsys.readouterr().out)
        folder = Path(written["directory"])
        there = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files(folder)}
        assert there.pop("export.json") > 0
        assert written["files"] == there != {}
        assert written["left_out"] == {
            "judgements of other weights than the SAE has now (c)": 1,
            "explanations without a score of at least 2, left out": 2,
        }
    return 0


def test_an_export_never_replaces_other_files(tmp_path: Path, model: Path, capsys) -> None:
    run = planted_run(tmp_path / "of", model)
    assert main(["features", str(run), "--contexts", "4", "--dialogues", "9"]) == 0
    weights = (run / "saes" / NAME / "sae_weights.safetensors").read_bytes()
    assert main(["export", str(run), "--format", "delphi", "--out", str(run / "saes")]) == 2
    assert "holds other files than an export" in capsys.readouterr().err
    assert (run / "saes" / NAME / "sae_weights.safetensors").read_bytes() == weights
    for flags, message in (
        (["--features", "500"], "500 asked for, but"),
        (["--features", "-1"], "at least 0, not -1"),
        (["--model-id", "Qwen"], "lower-case"),
        (["--set-name", "a__b"], "single '_'"),
        (["--sae", "L9"], "has no SAE 'L9'"),
    ):
        assert main(["export", str(run), "--format", "neuronpedia", *flags]) == 2
        assert message in capsys.readouterr().err
    assert (
        main(["export", str(run), "--format", "saedashboard", "--features", "2", "--set-name", "mine", "--json"]) == 0
    )
    (written,) = json.loads(capsys.readouterr().out)
    assert written["features"] == 2
    assert written["directory"].endswith("1-mine")


def test_a_directory_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with directory(tmp_path / "a", {"n": 1}) as folder:
        (folder / "old").write_text("")
    with pytest.raises(ZeroDivisionError), directory(tmp_path / "a", {"n": 2}) as folder:
        (folder / "new").write_text(str(1 // 0))
    assert [p.name for p in files(tmp_path)] == ["export.json", "old"]
    with directory(tmp_path / "a", {"n": 3}) as folder:
        (folder / "new").write_text("")
    assert [p.name for p in files(tmp_path)] == ["export.json", "new"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert [list(b) for b in in_batches(range(5), 2)] == [[0, 1], [2, 3], [4]]


def test_what_cannot_be_written_is_refused_before_anything_is_computed(tmp_path: Path, model: Path, capsys) -> None:
    run = planted_run(tmp_path / "of", model)
    (tmp_path / "file").write_text("mine")
    for form, place in (("delphi", NAME), ("saebench", NAME), ("bias", f"{NAME}-f0-a2")):
        taken = tmp_path / form
        (taken / place).mkdir(parents=True)
        (taken / place / "notes.txt").write_text("mine")
        steering = ["--feature", "0", "--alpha", "2"] if form == "bias" else []
        for out, message in ((taken, "holds other files than an export"), (tmp_path / "file", "file is a file")):
            assert main(["export", str(run), "--format", form, "--out", str(out), *steering]) == 2
            assert message in capsys.readouterr().err
        assert [p.name for p in files(taken)] == ["notes.txt"]
    assert not (run / "features").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_without_features_and_with_odd_names_and_a_dead_sae(tmp_path: Path, model: Path, capsys) -> None:
    """Features are found first; an SAE of which nothing fires is said to be left out, and refused alone."""
    odd = shutil.copytree(model, tmp_path / "Ünï cödé__№1 (x)")
    run = planted_run(tmp_path / "of", odd, architectures=("standard", "jumprelu"))
    dead = SAE.create(spec(D_IN, factor=1, name="L1-1x-jumprelu"))
    with torch.no_grad():
        dead.b_enc.fill_(-1000)
    dead.save(run / "saes" / "L1-1x-jumprelu")
    out = tmp_path / "out"
    for form in ("neuronpedia", "neuronpedia-bulk", "saedashboard", "delphi"):
        assert main(["export", str(run), "--format", form, "--out", str(out / form), "--json"]) == 0
        told = capsys.readouterr()
        (written,) = json.loads(told.out)
        assert (written["sae"], written["features"] > 0) == (NAME, True)
        assert "left out, since none of their features fired on the dialogues: L1-1x-jumprelu" in told.err
        assert main(["export", str(run), "--format", form, "--out", str(out / form), "--sae", "L1-1x-jumprelu"]) == 2
        assert "no feature of L1-1x-jumprelu has contexts" in capsys.readouterr().err
        place = (NAME,) if form == "delphi" else ("n-c-d-_-1-x", "1-chatsae-fast-1x-standard")
        assert Path(written["directory"]) == out.joinpath(form, *place)
    assert {p.relative_to(out).parts[1] for p in files(out)} == {NAME, "n-c-d-_-1-x"}


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_leaves_a_whole_export_or_none(tmp_path: Path, before: bool) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from chatsae import exporting\n"
        "exporting.write_json = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with exporting.directory(Path(sys.argv[1]), {}) as folder:\n"
        "    (folder / 'new').write_text('new')\n"
    )
    if before:
        with directory(tmp_path / "a", {}) as folder:
            (folder / "old").write_text("old")
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in files(tmp_path / "a")] == (["export.json", "old"] if before else [])
    with directory(tmp_path / "a", {}) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in files(tmp_path)] == ["export.json", "new"]  # what the kill left is gone


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"), ("a b/C__d", "a-b-c_d"), ("é", "unnamed"), ("-x.", "x")],
)
def test_identifiers_are_lower_case(text: str, expected: str) -> None:
    assert identifier(text) == expected
    assert Names(identifier(text), expected).source(3) == f"3-{expected}"
