import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatsae.cli import main

RECIPES = Path(__file__).parents[1] / "recipes"


def best_seconds(code: list[str], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, *code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_help_answers_in_under_0_3_seconds():
    assert best_seconds(["-m", "chatsae.cli", "--help"]) < 0.3


def test_the_import_costs_under_0_15_seconds():
    assert best_seconds(["-c", "import chatsae as cs"]) - best_seconds(["-c", "pass"]) < 0.15


def test_no_verb_prints_the_help_and_wrong_verbs_are_told_the_right_ones(capsys):
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 0
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        main(["trian"])
    assert raised.value.code == 2
    assert "demo, prepare, train, eval, compare" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_plan_counts_the_240_saes_in_21_passes_without_weights(capsys):
    recipes = [str(p) for p in sorted((RECIPES / "paper").glob("*.yaml"))]
    assert main(["plan", *recipes]) == 0
    out = capsys.readouterr().out
    assert "21 passes train 240 SAEs" in out
    assert "L18-8x-jumprelu" in out
    assert main(["plan", *recipes, "--json"]) == 0
    passes = json.loads(capsys.readouterr().out)
    assert sum(len(p["saes"]) for p in passes) == 240
    seven = next(p for p in passes if p["model"] == "Qwen/Qwen2.5-7B-Instruct")
    # d_in 3584, d_sae 28672, 10 SAEs: weights, gradients and two moments of W_enc and W_dec in float32
    assert seven["sae_bytes"] == 4 * 4 * 2 * 3584 * 28672 * 10
    # 7.07 G multiplied weights of 28 blocks (Qwen2.5-7B's own card: 6.53 B non-embedding parameters)
    assert seven["lm_flops"] / seven["tokens"] == pytest.approx(2 * 6.53e9 * 26 / 28, rel=0.01)


def test_plan_refuses_a_layer_that_the_model_does_not_have(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {name: Qwen/Qwen2.5-0.5B-Instruct, layers: [24]}")
    assert main(["plan", str(recipe)]) == 2
    assert "has layers 0 to 23, not 24" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "nothing.yaml"], "recipe nothing.yaml does not exist"),
        (["eval", "nothing"], "run directory nothing does not exist"),
        (["compare", "nothing"], "run directory nothing does not exist"),
        (["show", "nothing"], "nothing does not exist"),
        (["plan", "nothing.yaml"], "recipe nothing.yaml does not exist"),
    ],
)
def test_what_does_not_exist_is_named(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_show_says_what_an_empty_directory_is_not(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2
    assert "holds no SAE (cfg.json), run (config.yaml)" in capsys.readouterr().err
