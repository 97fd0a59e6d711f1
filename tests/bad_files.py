"""More rows for test_bad_input.py: files of a run that are damaged, templates, models, sets, specs, flags of verbs."""

import json
from collections.abc import Callable
from pathlib import Path

from bad_inputs import Place, Row, row, values
from chatsae.lm.checkpoint import demo_model_path
from chatsae.runs import Checkpoint, Run


def damaged(verb: str, file: str, content: str | bytes, *words: str, flags: tuple[str, ...] = ()) -> Row:
    """A copy of the run in which one file holds something else."""

    def make(at: Place) -> list[str | Path]:
        run = at.own_run()
        path = run / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [verb, run, *flags]

    return Row(f"{verb}: {file} {content[:30]!r}", make, words)


def model(name: str, change: Callable[[Path], object], *words: str) -> Row:
    """A training on a copy of the bundled model that was changed."""

    def make(at: Place) -> list[str | Path]:
        folder = at.path / "model"
        folder.mkdir()
        for file in demo_model_path().iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
        return ["train", at.recipe(f"model: {{name: {folder}}}"), "--out", at.path / "out"]

    return Row(f"model: {name}", make, words)


def template(text: str | None, *words: str) -> Row:
    """The bundled model with another chat template, or none."""

    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if text is not None:
            (folder / "chat_template.jinja").write_text(text)

    return model(f"template {text!r}"[:60], change, *words)


def pairs(name: str, lines: list[object], *words: str) -> Row:
    """An audit of a set of pairs in a file."""
    return row(f"audit: {name}", lambda at: ["audit", at.run, "--sets", at.rows(*lines, name="pairs.jsonl")], *words)


def spec(text: str, *words: str) -> Row:
    """An export of a steering spec."""
    return row(
        f"spec {text[:60]!r}",
        lambda at: ["export", at.run, "--format", "gguf", "--recipe", at.file("calm.yaml", text)],
        *words,
    )


FEATURES = "features/L3-2x-standard/facts.json"

DAMAGED = (
    damaged("compare", "report.json", "{", "is damaged", "writes it anew"),
    damaged("compare", "report.json", "[]", "is damaged", "an object was expected"),
    damaged("compare", "report.json", '{"saes": [], "facts": {}}', "'saes' is a list"),
    damaged("compare", "report.json", '{"saes": {"a": 3}, "facts": {}}', "an object was expected for each SAE"),
    damaged("compare", "report.json", '{"saes": {}, "facts": {}, "schema": 99}', "schema is 99"),
    damaged("compare", "report.json", b"\xff", "is damaged", "utf-8"),
    damaged("report", "metrics.jsonl", '{"step": "one"}\n', "line 1", "whole number 'step'", flags=("--no-build",)),
    damaged("report", "metrics.jsonl", "{\n", "line 1", "is damaged", flags=("--no-build",)),
    damaged(
        "report",
        "report.json",
        '{"saes": {"a": 3}, "facts": {}}',
        "an object was expected for each SAE",
        flags=("--no-build",),
    ),
    damaged("report", "special_tokens.json", '{"saes": 3}', "'saes' is a whole number", flags=("--no-build",)),
    damaged("report", FEATURES, "{}", "'schema_version' is missing", flags=("--no-build",)),
    damaged("features", FEATURES, "{}", "'schema_version' is missing"),
    damaged("features", FEATURES, '{"schema_version": 9999}', "was written with schema 9999"),
    damaged("features", "model.json", "no", "is damaged"),
    damaged("features", "model.json", '{"files": 3}', "'files' is no object"),
    damaged("judge", FEATURES, "[1]", "not a list"),
    damaged("judge", "model.json", "", "is damaged"),
    damaged("show", "config.yaml", "train: [", "not valid YAML"),
    damaged("show", "report.json", "3", "not a whole number"),
    damaged("eval", "saes/L3-2x-standard/cfg.json", "[]", "an object was expected, not a list"),
    damaged("eval", "saes/L3-2x-standard/sae_weights.safetensors", b"\x00" * 100, "truncated or corrupt"),
    damaged("eval", "data.json", "{", "is damaged", flags=("--sources", "pydocs")),
    damaged("eval", "data.json", '{"sources": 3}', "'sources' is a whole number", flags=("--sources", "pydocs")),
    damaged("eval", "model.json", "{", "is damaged"),
    damaged("tokens", "model.json", "[1]", "not a list"),
    damaged("tokens", "saes/L3-2x-standard/cfg.json", '{"d_in": "wide"}', "d_in is 'wide'"),
    damaged("serve", "model.json", "[1]", "not a list"),
    damaged(
        "steer",
        "model.json",
        '{"commit": 3, "files": {}}',
        "'commit' no string",
        flags=("--feature", "0", "--sae", "L3-2x-standard"),
    ),
)


def on_again(file: str, content: str, *words: str) -> Row:
    """`train` once more in the run's directory."""

    def make(at: Place) -> list[str | Path]:
        run = at.own_run()
        Run.read(run).save_checkpoint(Checkpoint(step=1, tensors={}, facts={"buffer/harvest_batches": 1}))
        (run / file).write_text(content)
        return ["train", run / "config.yaml", "--out", run]

    return Row(f"train: {file} {content[:30]!r}", make, (file, *words))


RESUMED = (
    on_again("summary.json", "{", "is damaged"),
    on_again("summary.json", '{"ending": 3}', "'ending' is a whole number"),
    on_again("data.json", "[1]", "not a list"),
    on_again("harvest.json", "{", "is damaged"),
    on_again("harvest.json", '{"way": "quantum"}', "way must be one of"),
    on_again("model.json", "{", "is damaged"),
    on_again("metrics.jsonl", '{"loss": 1}\n', "whole number 'step'"),
)


def prepared(content: str | None, *words: str) -> Row:
    """A recipe of prepared data whose manifest is damaged."""

    def make(at: Place) -> list[str | Path]:
        folder = at.path / "data"
        folder.mkdir()
        if content is not None:
            (folder / "manifest.json").write_text(content)
        return ["train", at.recipe(f"data: {{prepared: {folder}}}"), "--out", at.path / "out"]

    return Row(f"prepared {content!r}"[:60], make, words)


PREPARED = (
    prepared(None, "holds no prepared data"),
    prepared("{", "manifest.json is damaged"),
    prepared('{"recipe": {"format": 1}, "splits": {}}', "recipe or splits lacks something"),
    row("norms: no such source", lambda at: ["norms", at.recipe("data: {sources: [no.jsonl]}")], "no.jsonl"),
    row("norms: no token", lambda at: ["norms", at.recipe(), "--tokens", "0"], "--tokens must be at least 1"),
    row("norms: a figure of no kind", lambda at: ["norms", at.recipe(), "--figure", at.path / "a.pdf"], "only .png"),
    row(
        "prepare: a source that is missing",
        lambda at: ["prepare", at.recipe("data: {sources: [no.jsonl]}"), "--out", at.path / "d"],
        "no.jsonl does not exist",
    ),
    row(
        "prepare: an output that is a file",
        lambda at: ["prepare", at.recipe(), "--out", at.file("d")],
        "--out",
        "is a file",
    ),
    row(
        "prepare: rows that are no dialogues",
        lambda at: ["prepare", at.recipe(f"data: {{sources: [{at.rows({'a': 1})}]}}"), "--out", at.path / "d"],
        "row 1",
        "no chat field",
    ),
    row(
        "prepare: a damaged manifest",
        lambda at: ["prepare", at.recipe(), "--out", at.file("manifest.json", "{").parent],
        "manifest.json is damaged",
    ),
    row(
        "show: a damaged manifest",
        lambda at: ["show", at.file("manifest.json", "{").parent],
        "manifest.json is damaged",
    ),
    row("show: an empty directory", lambda at: ["show", at.path], "holds no SAE"),
)

MODELS = (
    template("{{ 1 // 0 }}", "refuses a plain dialogue", "modulo by zero"),
    template("{% for m in messages %}{{ m.content", "refuses a plain dialogue", "unexpected end of template"),
    template("{{ raise_exception('no') }}", "refuses a plain dialogue", "no"),
    template(
        "{% for m in messages %}{% if m.role == 'user' %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}",
        "refuses a plain dialogue",
        "unknown role",
    ),
    template("", "refuses a plain dialogue", "left out"),
    template(None, "has no chat template", "data.method bt-p"),
    template("{% for i in range(10 ** 9) %}x{% endfor %}", "refuses a plain dialogue", "Range too big"),
    model(
        "config.json is no JSON", lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be used"
    ),
    model(
        "config.json is a list", lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be used"
    ),
    model("no tokenizer", lambda folder: [f.unlink() for f in folder.glob("*token*")], "no tokenizer"),
    model(
        "tokenizer.json is no JSON",
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "the tokenizer cannot be read",
    ),
    model("no weights", lambda folder: [f.unlink() for f in folder.glob("*.safetensors*")], "no model.safetensors"),
    model(
        "weights cut short",
        lambda folder: [f.write_bytes(f.read_bytes()[:1000]) for f in folder.glob("*.safetensors")],
        "model.safetensors: truncated or corrupt",
    ),
    values("model: {name: none.gguf}", "none.gguf: there is no such file"),
    row(
        "model: a text named .gguf",
        lambda at: ["train", at.recipe(f"model: {{name: {at.file('a.gguf', 'hello')}}}"), "--out", at.path / "out"],
        "a.gguf: not a GGUF file",
    ),
    row(
        "model: an empty .gguf",
        lambda at: ["train", at.recipe(f"model: {{name: {at.file('a.gguf')}}}"), "--out", at.path / "out"],
        "a.gguf: not a GGUF file",
    ),
    row(
        "model: a .gguf of its first bytes",
        lambda at: ["train", at.recipe(f"model: {{name: {at.file('a.gguf', b'GGUF')}}}"), "--out", at.path / "out"],
        "a.gguf",
    ),
    row(
        "model: a .gguf that is a directory",
        lambda at: [
            "train",
            at.recipe(f"model: {{name: {at.path}/a.gguf}}"),
            "--out",
            (at.path / "a.gguf").mkdir() or at.path / "out",
        ],
        "a.gguf: no config.json",
    ),
    values("model: {name: 'demo', chat_template: other}", "model.chat_template"),
    values("model: {name: /no/such/model}", "/no/such/model"),
)

SETS = (
    pairs("no pair", [], "holds no pair of prompts"),
    pairs("a list", [[1]], "pairs.jsonl, line 1", "expected an object"),
    pairs("half a pair", [{"positive": "a"}], "negative is missing"),
    pairs("a number for a prompt", [{"positive": 3, "negative": "b"}], "positive: expected a text"),
    pairs("an unknown key", [{"positive": "a", "negative": "b", "catgory": "c"}], "perhaps category"),
    pairs("an unknown split", [{"positive": "a", "negative": "b", "split": "dev"}], "split: expected one of"),
    pairs("too few", [{"positive": f"a{i}", "negative": f"b{i}"} for i in range(3)], "8 of each are needed"),
    row("audit: an unknown set", lambda at: ["audit", at.run, "--sets", "refusl"], "'refusl' is no set"),
    row(
        "audit: a set that is missing",
        lambda at: ["audit", at.run, "--sets", at.path / "no.jsonl"],
        "no.jsonl cannot be read",
    ),
    row(
        "audit: no JSON",
        lambda at: ["audit", at.run, "--sets", at.file("p.jsonl", "{\n")],
        "p.jsonl, line 1 is no JSON",
    ),
    row(
        "audit: halves that are missing",
        lambda at: ["audit", at.run, "--sets", f"{at.path}/a.json:{at.path}/b.json"],
        "a.json cannot be read",
    ),
    row("audit: an unknown SAE", lambda at: ["audit", at.run, "--sae", "L9"], "has no SAE 'L9'"),
)

SPECS = (
    spec("feature: 1\nfeature: 2\nsae: x\n", "calm.yaml", "'feature' is there twice"),
    spec("[" * 3000, "calm.yaml", "nested too deeply"),
    spec("", "calm.yaml", "must be a mapping"),
    spec("steering: []", "calm.yaml", "holds no entry"),
    spec("strenght: 3", "calm.yaml", "perhaps strength"),
    spec("vector: [.nan]\nlayer: 3\nstrength: 1", "the vector is no direction"),
    spec("vector: [1.0]\nlayer: 3\nstrength: 1", "the direction has 1 numbers"),
    spec("vector: [1.0]\nlayer: 3\nstrength: .inf", "calm.yaml", "strength must be a finite number"),
    spec("feature: 1\nsae: nowhere\n", "nowhere does not exist"),
    spec("op: shout", "calm.yaml", "op must be one of"),
)

FLAGS = (
    row("demo: an output that is a file", lambda at: ["demo", "--out", at.file("out")], "--out", "is a file"),
    row(
        "demo: a recipe that is missing",
        lambda at: ["demo", "--recipe", at.path / "no.yaml", "--out", at.path / "out"],
        "no.yaml does not exist",
    ),
    row("fetch: an unknown model", lambda at: ["fetch", "gpt"], "invalid choice 'gpt'", "smollm2"),
    row("bench: an unknown part", lambda at: ["bench", "all"], "invalid choice 'all'", "dedup"),
    row("bench: size", lambda at: ["bench", "dedup", "--size", "-1"], "--size must be at least 0"),
    row(
        "bench: a source that is missing",
        lambda at: ["bench", "dedup", "--source", at.path / "no.jsonl"],
        "no.jsonl does not exist",
    ),
    row(
        "bench: a recipe that is missing",
        lambda at: ["bench", "overlap", "--recipe", at.path / "no.yaml"],
        "no.yaml does not exist",
    ),
    row("bench: median", lambda at: ["bench", "harvest", "--median", "0"], "--median must be at least 1"),
    row(
        "bench: a peer that is missing",
        lambda at: ["bench", "harvest", "--peer", at.path / "python"],
        "peer:",
        "is no file",
    ),
    row("bench: l0", lambda at: ["bench", "sae-step", "--l0", "many"], "l0: expected numbers"),
    row(
        "bench: an architecture",
        lambda at: ["bench", "sae-step", "--architectures", "topk"],
        "expected standard or jumprelu",
    ),
    row("compare: nothing", lambda at: ["compare"], "at least one run"),
    row("judge: nothing", lambda at: ["judge"], "at least one run"),
    row("report: nothing", lambda at: ["report"], "at least one run"),
    row("compare: no run", lambda at: ["compare", at.path], "holds no run"),
    row("compare: not evaluated", lambda at: ["compare", at.run], "chatsae eval"),
    row("eval: no run", lambda at: ["eval", at.path / "no"], "does not exist"),
    row(
        "judge: a replay that is missing",
        lambda at: ["judge", at.run, "--judge", "replay:no.sqlite"],
        "no.sqlite does not exist",
    ),
    row("steer: an unknown SAE", lambda at: ["steer", at.run, "--feature", "0", "--sae", "L9"], "has no SAE 'L9'"),
    row("steer: two SAEs", lambda at: ["steer", at.run, "--feature", "0"], "choose one with --sae"),
    row(
        "steer: a feature that is not there",
        lambda at: ["steer", at.run, "--sae", "L3-2x-standard", "--feature", "99999"],
        "feature 99999 does not exist",
    ),
    row("steer: a flag of the sweep", lambda at: ["steer", at.run, "--feature", "0", "--concept", "x"], "give --sweep"),
    row("tokens: an unknown SAE", lambda at: ["tokens", at.run, "--sae", "L9"], "has no SAE 'L9'"),
    row("features: an unknown SAE", lambda at: ["features", at.run, "--sae", "L9"], "has no SAE 'L9'"),
    row("report: an unknown SAE", lambda at: ["report", at.run, "--no-build", "--sae", "L9"], "has no SAE 'L9'"),
    row(
        "export: an unknown SAE",
        lambda at: ["export", at.run, "--format", "gguf", "--sae", "L9", "--feature", "0", "--alpha", "1"],
        "has no SAE 'L9'",
    ),
    row(
        "export: a flag of the other kind",
        lambda at: ["export", at.run, "--format", "gguf", "--features", "3"],
        "leave it out with --format gguf",
    ),
    row("serve: no key", lambda at: ["serve", at.run, "--host", "0.0.0.0"], "--api-key-env VAR is needed"),
    row(
        "serve: a variable that is not set", lambda at: ["serve", at.run, "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"
    ),
)

FILE_ROWS = (*DAMAGED, *RESUMED, *PREPARED, *MODELS, *SETS, *SPECS, *FLAGS)
