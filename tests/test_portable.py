"""What is made on one machine tells nobody about its folders, and older files that do are still read."""

import base64
import gzip
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from chatsae.cli import main
from chatsae.data.reading import read
from chatsae.data.store.manifest import changes
from chatsae.errors import UserError
from chatsae.files import shared_name, shared_names
from feature_samples import plain_model, said

FORMATS = ("neuronpedia", "saedashboard", "delphi", "saebench")
STEERED = ("gguf", "repeng", "neuronpedia-vector", "bias")


def write_rows(path: Path, n: int, offset: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in d.messages]} for d in said(n, offset)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": "none"}]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the verbs make of data, a model and a recipe in it."""
    folder = tmp_path_factory.mktemp("secret-folder")
    source, model = write_rows(folder / "data" / "chats.jsonl", 400), plain_model(folder / "model")
    recipe, runs, prepared, pairs = folder / "small.yaml", folder / "runs", folder / "prepared", folder / "pairs.jsonl"
    recipe.write_text(
        f"model: {{name: {model}, layers: [1]}}\n"
        f"data: {{sources: [{source}], text_sources: [], epochs: 0, max_length: 64}}\n"
        "harvest: {token_budget: 400}\n"
        "buffer: {capacity: 512}\n"
        "sae: {architectures: [standard], expansion_factors: [1], lrs: [1e-3], l1_coefficients: [0.01]}\n"
        "train: {tokens: 1280, batch_size: 64, log_every: 5}\n",
        encoding="utf-8",
    )
    asked = [{"positive": f"Zap {i} Z", "negative": f"No {i}"} for i in range(16)]
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in asked), encoding="utf-8")
    run, other = str(runs / "small"), str(runs / "prepared")
    feature = ["--feature", "0", "--alpha", "1"]
    few = ["--max-new-tokens", "2", "--dialogues", "32"]
    for command in (
        ["prepare", str(recipe), "--out", str(prepared), "--data.held-out", "20", "40", "20", "--data.max-tokens", "0"],
        ["train", str(recipe), "--out", other, "--data.prepared", str(prepared)],
        ["train", str(recipe), "--out", run],
        ["eval", run, "--dialogues", "6"],
        ["eval", other, "--dialogues", "6", "--sources", str(source), "--allow-overlap"],
        ["features", run, "--dialogues", "30", "--features", "4"],
        ["judge", run, "--contexts", "5"],
        ["tokens", run, "--dialogues", "10"],
        ["steer", run, *feature, "--prompt", "Hi", *few],
        ["steer", run, *feature, "--sweep", "--relative", "0.1", "--prompt", "Hi", *few],
        ["audit", run, "--sets", str(pairs), "--prefixes", "Z", *few, "--ablate", "1", "--controls", "0"],
        ["report", run, "--features", "4", "--out", str(folder / "report.html")],
        ["compare", run, run, "--out", str(folder / "compare.json")],
        *(["export", run, "--format", name] for name in FORMATS),
        *(["export", run, "--format", name, *feature, "--out", str(folder / name)] for name in STEERED),
    ):
        assert main(command) == 0, command
    return folder


def told(path: Path) -> bytes:
    """The bytes of a file, and what is compressed in it."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        data += str(pq.read_table(path).to_pydict()).encode()
    if path.suffix == ".gz":
        data += gzip.decompress(data)
    if path.suffix == ".html":
        (packed,) = re.findall(rb"<script[^>]*application/[^>]*>([^<]+)<", data)
        data += gzip.decompress(base64.b64decode(packed))
    return data


def test_no_file_tells_the_folder_it_was_made_in(secret: Path) -> None:
    made = {p.relative_to(secret).as_posix(): p for p in secret.rglob("*") if p.is_file() and p.parent.name != "model"}
    names = {p.name for p in made.values()}
    assert {"manifest.json", "rejects.jsonl", "data.json", "cfg.json", "report.json", "facts.json"} <= names
    assert {"pattern-5.json", "audit.json", "special_tokens.json", "report.html", "compare.json"} <= names
    # a recipe names what it reads as it was typed: a run could not go on without
    recipes = ("small.yaml", "config.yaml")
    assert [name for name, p in made.items() if p.name not in recipes and secret.name.encode() in told(p)] == []
    assert b"chats.jsonl:" in told(made["runs/small/features/L1-1x-standard/contexts.parquet"])


def test_dialogues_are_named_by_their_file_and_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a" / "chats.jsonl", 40)
    assert {d.id for d in read(str(path))} <= {f"chats.jsonl:{i}" for i in range(1, 41)}
    assert {d.source for d in read(str(path))} == {"chats.jsonl"}
    write_rows(tmp_path / "a" / "deep" / "more.jsonl", 40, 100)
    assert {d.id.split(":")[0] for d in read(str(tmp_path / "a"))} == {"a/chats.jsonl", "a/deep/more.jsonl"}
    monkeypatch.chdir(tmp_path)
    assert {d.id.split(":")[0] for d in read("a/chats.jsonl")} == {"a/chats.jsonl"}


def test_files_of_one_name_have_dialogues_of_different_names(tmp_path: Path) -> None:
    paths = [str(write_rows(tmp_path / folder / "chats.jsonl", 40, i)) for i, folder in enumerate(("a", "b"))]
    both, alone = list(read(*paths)), [d for path in paths for d in read(path)]
    assert [d.messages for d in both] == [d.messages for d in alone]
    assert len({d.id for d in both}) == len(both)
    assert all(re.fullmatch(r"chats\.jsonl~[0-9a-f]{8}:\d+", d.id) for d in both)
    assert shared_names(["wildchat", "/x/wildchat"])[0] == "wildchat"


def test_an_error_names_the_folder(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", 0)
    with pytest.raises(UserError, match=re.escape(str(path))):
        list(read(str(path)))


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("org/model", "org/model"),
        ("demo", "demo"),
        ("models/tiny", "models/tiny"),
        ("/home/me/models/tiny/", "tiny"),
        ("~/tiny", "tiny"),
        ("../elsewhere/tiny", "tiny"),
        ("/", "/"),
    ],
)
def test_a_name_keeps_what_is_no_folder_of_this_machine(name: str, shared: str) -> None:
    assert shared_name(name) == shared
    assert shared_name(shared) == shared


def test_facts_with_paths_are_those_of_today() -> None:
    paths = ["/here/a.jsonl", "/there/a.jsonl", "/b.jsonl", "c.jsonl"]
    before, after = ({"sources": [{"name": name} for name in names]} for names in (paths, shared_names(paths)))
    assert changes(before, after) == []
    assert changes({"name": "/here/a.jsonl"}, {"name": "b.jsonl"}) == ['name: "/here/a.jsonl" -> "b.jsonl"']


def test_older_runs_data_and_stores_are_taken_up_and_shown_without_paths(secret: Path, capsys) -> None:
    run, path = secret / "runs" / "small", secret / "data" / "chats.jsonl"
    store = run / "features" / "L1-1x-standard"
    contexts = pq.read_table(store / "contexts.parquet")
    place = contexts.schema.get_field_index("dialogue")
    old = [f"{secret / 'data'}/{name}" for name in contexts.column("dialogue").to_pylist()]
    pq.write_table(
        contexts.set_column(place, contexts.schema.field(place), [old]), store / "contexts.parquet", compression="zstd"
    )
    for file in (secret / "prepared" / "manifest.json", store / "facts.json"):
        text = file.read_text(encoding="utf-8").replace('"name": "chats.jsonl"', f'"name": "{path}"')
        file.write_text(text.replace('"model": "model"', f'"model": "{secret / "model"}"'), encoding="utf-8")
        assert str(secret) in file.read_text(encoding="utf-8")
    flags = ["--data.held-out", "20", "40", "20", "--data.max-tokens", "0"]
    assert main(["prepare", str(secret / "small.yaml"), "--out", str(secret / "prepared"), *flags]) == 0
    assert "is prepared already" in capsys.readouterr().err
    page = secret / "older.html"
    assert main(["report", str(run), "--features", "4", "--out", str(page)]) == 0
    assert secret.name.encode() not in told(page)
    assert b"chats.jsonl:" in told(page)
