"""A real chat model, SmolLM2-135M-Instruct, through every verb: `chatsae fetch smollm2` brings it."""

import json
from pathlib import Path

import pytest

from chatsae.batch import Dialogue, Kind, Message, Role
from chatsae.cli import main
from chatsae.data.render import render
from chatsae.data.template import template_facts
from chatsae.demo.walkthrough import best_feature
from chatsae.lm.gguf import PRESETS, _fetched
from chatsae.lm.load import LanguageModel
from chatsae.serve.model import Served
from serve_process import PATIENCE, Inside

httpx = pytest.importorskip("httpx2")

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not _fetched(PRESETS["smollm2"]).is_file(), reason="no SmolLM2 here: chatsae fetch smollm2"),
]
LAYER = 13


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel("smollm2", [LAYER], head=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 tokens of training without sinks, at a target L0."""
    root = tmp_path_factory.mktemp("real")
    recipe = {
        "model": {"name": "smollm2", "layers": [LAYER]},
        "data": {"max_length": 256, "epochs": 0, "ngram": 0},
        "harvest": {"pool": 32, "token_budget": 2048},
        "sae": {"architectures": ["standard"], "expansion_factors": [4], "target_l0": [50], "normalize": "scale"}
        | {"lrs": [1e-3], "l1_coefficients": [2]},
        "train": {"tokens": 5000, "sinks": "skip", "log_every": 10},
        "eval": {"dialogues": 6},
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert main(["train", str(root / "recipe.yaml"), "--out", str(root / "run")]) == 0
    return root / "run"


def test_special_ids_are_those_of_its_template(lm: LanguageModel) -> None:
    assert template_facts(lm.tokenizer).special_ids == (1, 2, 520, 4093, 9531)
    chat = (("user", "How deep is it?"), ("assistant", "Ten metres."), ("user", "And wide?"), ("assistant", "Four."))
    (batch,) = render([Dialogue("d", "test", tuple(Message(role, content) for role, content in chat))], lm.tokenizer)
    for role, ids in ((Role.USER, [4093]), (Role.ASSISTANT, [520, 9531])):
        names = batch.input_ids[(batch.role == role) & (batch.kind == Kind.ROLE_NAME)]
        assert names.tolist() == ids * 2
        assert batch.special[(batch.role == role) & (batch.kind == Kind.ROLE_NAME)].all()


def test_it_answers_and_stops(lm: LanguageModel) -> None:
    assert lm.chat("What is the capital of France?", max_new_tokens=12) == "The capital of France is Paris."


def test_position_0_is_found_and_left_out(run: Path) -> None:
    (norms,) = json.loads((run / "norms.json").read_text())["layers"]
    (place,) = norms["places"]
    assert (place["position"], place["token_id"], place["part"]) == (0, 1, "position_0")
    assert place["ratio"] > 100
    assert norms["norm_share"] > 0.9
    dropped = json.loads((run / "summary.json").read_text())["dropped"]
    assert dropped["sink left out (position 0)"] >= 20
    rows = [json.loads(line)["saes"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    errors = [row["mse"] for saes in rows for row in saes.values()]
    assert max(errors) < 1000  # with the sink it is over a million at the start


def test_evaluation_shows_the_sink_apart(run: Path) -> None:
    assert main(["eval", str(run)]) == 0
    ((_, row),) = json.loads((run / "report.json").read_text())["saes"].items()
    parts = row["groups"]["part"]
    assert parts["position_0"]["mse_token"] > 100 * parts["content"]["mse_token"]
    assert row["sink_norm_share"] > 0.9
    assert row["explained_variance"] < 0 < row["explained_variance_no_sinks"] < 1  # 5,000 tokens teach it a little


def test_special_tokens_have_features_and_steering_acts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens", str(run), "--dialogues", "6", "--json"]) == 0
    ((_, rows),) = json.loads(capsys.readouterr().out)["saes"].items()
    assert {row["token"] for row in rows} == {"<|im_start|>", "<|im_end|>", "user", "ass", "istant"}
    feature = str(rows[0]["features"][0]["feature"])
    asked = ["--feature", feature, "--alpha", "0", "400", "--prompt", "What is the capital of France?"]
    assert main(["steer", str(run), *asked, "--max-new-tokens", "8", "--dialogues", "6", "--json"]) == 0
    still, moved = json.loads(capsys.readouterr().out)["examples"]
    assert still["steered"] == still["base"] == "The capital of France is Paris."
    assert moved["steered"] != still["steered"]


def test_a_feature_is_scored(run: Path) -> None:
    few = ["--dialogues", "40", "--features", "16"]
    assert main(["judge", str(run), "--judge", "pattern", *few]) == 0
    best = best_feature(run)
    assert best is None or best[0] == "L13-4x-standard"


def test_it_is_served(run: Path) -> None:
    with Inside(Served(run, 2048)) as server:
        asked = {"model": server.app.served.name, "max_tokens": 12, "temperature": 0}
        asked["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
        answer = httpx.post(f"{server.url}/chat/completions", json=asked, timeout=PATIENCE).json()
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
