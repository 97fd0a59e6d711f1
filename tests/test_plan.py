"""What is planned, how long it is predicted to take, and what a run says afterwards."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from chatsae.batch import ActivationBatch
from chatsae.buffer import mix
from chatsae.cli import main
from chatsae.config import BufferConfig, HarvestConfig, ModelConfig, RunConfig, SAEConfig, TrainConfig, sae_specs
from chatsae.lm import stand_in as stand_ins
from chatsae.lm.checkpoint import locate, model_facts, read_config
from chatsae.lm.facts import planning_config, planning_facts
from chatsae.lm.forward import bare_tokens, forward
from chatsae.lm.load import LanguageModel
from chatsae.lm.stand_in import stand_in
from chatsae.recipe import load_recipe
from chatsae.training import calibrate as calibrating
from chatsae.training import timing
from chatsae.training.calibrate import Calibration, calibrate, duration, harvested, predict_run
from chatsae.training.plan import plan_recipes, plan_table
from chatsae.training.session import train_run
from tiny_models import random_tokens, tiny_config, tiny_model, tiny_tokenizer

RECIPES = Path(__file__).parents[1] / "recipes"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model, a dialogue file and a recipe of 2 SAEs on the last of three layers."""
    root = tmp_path_factory.mktemp("world")
    tiny_tokenizer(tiny_model(root / "model"))
    with (root / "chat.jsonl").open("w") as file:
        for i in range(60):
            turns = [{"role": role, "content": f"alpha {i} beta gamma delta"} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")
    (root / "recipe.yaml").write_text(
        f"""
model: {{name: {root / "model"}, layers: [2]}}
data: {{sources: [{root / "chat.jsonl"}], block_size: 64, epochs: 0, ngram: 0}}
harvest: {{token_budget: 256, pool: 32}}
buffer: {{capacity: 600}}
sae: {{expansion_factors: [2], lrs: [1.0e-3]}}
train: {{tokens: 2000, batch_size: 50}}
"""
    )
    return root


def config_of(world: Path) -> RunConfig:
    return load_recipe(world / "recipe.yaml")


def specs_of(config: RunConfig, d_in: int = 32):
    return sae_specs(config.sae, layers=config.model.layers, d_in=d_in)


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_plan_counts_the_240_saes_in_21_passes_without_weights(capsys):
    recipes = [str(p) for p in sorted((RECIPES / "paper").glob("*.yaml"))]
    assert main(["plan", *recipes, "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    assert "21 passes train 240 SAEs" in out
    assert "L18-8x-jumprelu" in out
    assert "time" not in out.lower()
    assert main(["plan", *recipes, "--seconds", "0", "--json"]) == 0
    passes = json.loads(capsys.readouterr().out)
    assert sum(len(p["saes"]) for p in passes) == 240
    assert {p["predicted_seconds"] for p in passes} == {None}
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


def test_plan_takes_the_layer_path(world, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{name: {world / 'model'}, layers: [2], layer_path: model.layers}}")
    assert main(["plan", str(recipe), "--seconds", "0"]) == 0
    recipe.write_text(f"model: {{name: {world / 'model'}, layers: [2], layer_path: model.nothing}}")
    assert main(["plan", str(recipe), "--seconds", "0"]) == 2
    assert "model.layer_path: no list of blocks at 'model.nothing'" in capsys.readouterr().err


def test_plan_predicts_every_method_of_a_recipe(world, capsys):
    methods = ["fast", "bt-f", "bt-f-isolated"]
    command = ["plan", str(world / "recipe.yaml"), "--methods", *methods, "--seconds", "0.3"]
    assert main([*command, "--json"]) == 0
    passes = json.loads(capsys.readouterr().out)
    assert [p["method"] for p in passes] == methods
    for p in passes:
        assert min(p["predicted_lm_seconds"], p["predicted_sae_seconds"]) > 0
        assert p["predicted_seconds"] == pytest.approx(p["predicted_lm_seconds"] + p["predicted_sae_seconds"])
    # dialogues, whole or in parts, are timed once; blocks apart from them
    assert passes[0]["predicted_lm_seconds"] == passes[2]["predicted_lm_seconds"] != passes[1]["predicted_lm_seconds"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "LM time" in out
    assert "reading and tokenising are not counted" in out


def test_what_cannot_be_measured_is_a_dash_with_its_reason(world, monkeypatch):
    recipe = world / "recipe.yaml"
    monkeypatch.setattr(stand_ins, "free_bytes", lambda device: 1000)
    (planned,) = plan_recipes([recipe], ["fast"], 0.05)
    assert planned.predicted_seconds is planned.predicted_lm_seconds is None
    assert planned.predicted_sae_seconds > 0
    assert " - " in plan_table([planned])
    assert "was not timed: one block takes" in plan_table([planned])
    monkeypatch.undo()

    monkeypatch.setattr(timing, "build_grid", lambda specs, seed: (_ for _ in ()).throw(MemoryError("no room")))
    (planned,) = plan_recipes([recipe], ["fast"], 0.05)
    assert planned.predicted_seconds is planned.predicted_sae_seconds is None
    assert planned.predicted_lm_seconds > 0
    assert "the SAEs were not timed: no room" in plan_table([planned])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"device": "cuda:77"}, "cuda:77 is not available"), ({"quantization": "bnb-4bit"}, "quantised weights")],
)
def test_a_model_that_cannot_be_placed_here_has_no_time(world, changed, reason):
    config = config_of(world)
    config = replace(config, model=replace(config.model, **changed))
    found = calibrate(config, specs_of(config), 0.05)
    assert found.predict(config).lm_seconds is None
    assert any(reason in line for line in found.missing)


def test_a_plan_knows_that_the_model_reads_ahead(world, monkeypatch):
    """And times either side on the threads that it will have."""
    seen = []
    monkeypatch.setattr(calibrating, "lm_rate", lambda *args, **options: seen.append(torch.get_num_threads()) or 2e-3)
    monkeypatch.setattr(calibrating, "sae_rate", lambda *args, **options: seen.append(torch.get_num_threads()) or 1e-3)
    config, before = config_of(world), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for overlap, threads in (("on", 2), ("off", 4)):
            config = replace(config, harvest=replace(config.harvest, overlap=overlap))
            found = calibrate(config, specs_of(config), 0.05).predict(config)
            assert {threads} == set(seen)
            assert found.seconds == (max if overlap == "on" else sum)([found.lm_seconds, found.sae_seconds])
            seen.clear()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_calibrating_draws_nothing_from_the_global_generator(world):
    config = config_of(world)
    before = torch.get_rng_state()
    calibrate(config, specs_of(config), 0.05)
    predict_run(config, specs_of(config), lm=LanguageModel(world / "model", [2]), way="padded", token_budget=64)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prediction_scales_with_tokens_and_layers(world, monkeypatch):
    monkeypatch.setattr(calibrating, "lm_rate", lambda lm, *args, **options: 1e-3 * len(lm.blocks))
    monkeypatch.setattr(calibrating, "sae_rate", lambda *args, **options: 1e-4)
    config = config_of(world)
    for most in (0, 2**30):  # one block is timed, or all up to the deepest
        monkeypatch.setitem(stand_ins._MOST, "cpu", most)
        for layer in (0, 3):
            deep = replace(config, model=replace(config.model, layers=(layer,)))
            found = calibrate(deep, specs_of(deep), 1.0)
            assert found.lm == {"fast": pytest.approx(1e-3 * (layer + 1))}
    short = found.predict(config)
    assert short.seconds == pytest.approx(4e-3 * harvested(config, 40) + 1e-4 * 2000)
    longer = replace(config, train=replace(config.train, tokens=2000 + 6000))
    more = found.predict(longer)
    assert more.sae_seconds == pytest.approx(4 * short.sae_seconds)
    assert more.lm_seconds - short.lm_seconds == pytest.approx(4e-3 * 6000)  # the buffer is filled once
    rest = found.predict(longer, done=40)
    assert rest.seconds == pytest.approx(more.seconds - short.seconds)


@settings(max_examples=40, deadline=None)
@given(batch_size=st.integers(1, 9), over=st.integers(0, 30), steps=st.integers(1, 40))
def test_harvested_is_what_the_buffer_reads(batch_size, over, steps):
    capacity = 2 * batch_size + over
    config = RunConfig(buffer=BufferConfig(capacity=capacity), train=TrainConfig(batch_size=batch_size))
    one = random_tokens([1])
    mixer = mix(
        (ActivationBatch(torch.zeros(1, 1, 2), one) for _ in range(10**6)),
        capacity=capacity,
        batch_size=batch_size,
        needed=steps * batch_size,
    )
    for _ in range(steps):
        next(mixer)
    assert mixer.state_dict()["harvest_batches"] == harvested(config, steps)
    assert harvested(config, 0) == 0


def test_the_model_is_timed_in_forwards_of_a_run(world, monkeypatch):
    """A clock that a forward moves by its tokens, padding counted: the rate is that of real tokens."""
    clock, seen = Clock(), []
    lm = stand_in(planning_config(str(world / "model")), 2, name="tiny", device=CPU, dtype=torch.float32)
    lm.max_positions = 4096

    def unchecked(lm, tokens, way):
        lengths = tokens.lengths.tolist()
        seen.append((way, lengths))
        clock.now += 1e-3 * len(lengths) * max(lengths)
        return torch.zeros(1, len(tokens.input_ids), 32)

    monkeypatch.setattr(timing, "unchecked", unchecked)
    monkeypatch.setattr(timing, "time", clock)
    config = replace(config_of(world), harvest=HarvestConfig(token_budget=1024, pool=1024))
    notes: list[str] = []
    rate = timing.lm_rate(lm, config, 400.0, blocks=False, notes=notes)
    assert 1e-3 <= rate < 1.08e-3  # a sorted pool leaves little padding
    assert all(way == "padded" and (len(n) == 1 or len(n) * max(n) <= 1024) for way, n in seen)
    lengths = torch.tensor([n for _, batch in seen[2:] for n in batch], dtype=torch.float64)
    assert lengths.median().item() == pytest.approx(timing.DIALOGUE, rel=0.1)
    assert not notes

    seen.clear()
    blocks = replace(config, data=replace(config.data, block_size=2048))
    assert timing.lm_rate(lm, blocks, 30.0, blocks=True, notes=notes) == pytest.approx(1e-3)
    assert {tuple(n) for _, n in seen[2:]} == {(2048,)}

    before = clock.now
    timing.lm_rate(lm, config, 1.0, blocks=False, notes=notes)  # 1,000 tokens a second
    assert len(notes) == 1
    assert re.fullmatch(r"tiny: forwards of 21[78] tokens were timed; the run has up to 1,024", notes[0])
    assert clock.now - before < 1.25


@pytest.mark.parametrize("most", [2**40, 300_000, 1])
def test_the_time_of_saes_is_scaled_to_their_number_and_width(most, monkeypatch):
    """A clock that a step moves by d_sae: whatever has memory is timed, the rate is that of the whole grid."""
    clock = Clock()

    def step(ready, clip_grad_norm):
        state, _ = ready
        clock.now += 1e-3 * state.sae.spec.d_sae
        return 1e-3 * state.sae.spec.d_sae

    monkeypatch.setattr(timing, "_step_seconds", step)
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(timing, "free_bytes", lambda device: 4 * most)
    config = RunConfig(
        model=ModelConfig(layers=(0, 1)), sae=SAEConfig(expansion_factors=(2, 8)), train=TrainConfig(batch_size=50)
    )
    notes: list[str] = []
    rate = timing.sae_rate(specs_of(config), config, 5.0, device=CPU, notes=notes)
    assert rate == pytest.approx(1e-3 * 4 * (64 + 256) / 50)
    wide = "SAEs of 256 features: 64 were timed, and the time scaled with the width"
    assert notes == ([] if most == 2**40 else [wide])


def test_saes_that_train_side_by_side_are_timed_so(monkeypatch):
    """Two threads: steps of a fifth of a second, which sleep."""
    monkeypatch.setattr(timing, "_step_seconds", lambda ready, clip_grad_norm: time.sleep(0.2) or 0.2)
    config = RunConfig(sae=SAEConfig(expansion_factors=(2,)), train=TrainConfig(batch_size=50))
    specs, rates = specs_of(config), {}
    assert len(specs) == 2
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            rates[threads] = timing.sae_rate(specs, config, 0.5, device=CPU, notes=[])
        finally:
            torch.set_num_threads(before)
    assert rates[1] == pytest.approx(0.4 / 50, rel=0.2)
    assert rates[2] == pytest.approx(0.2 / 50, rel=0.2)


def test_the_saes_that_are_timed_are_as_sparse_as_trained_ones(monkeypatch):
    config = load_recipe(Path(timing.__file__).parents[1] / "demo" / "recipe.yaml")  # wide bandwidth, high threshold
    for changed in (config, RunConfig(), replace(RunConfig(), sae=SAEConfig(form="v6"))):
        for spec in specs_of(changed, d_in=64):
            state, x = timing._ready(spec, changed, CPU)
            assert x.shape == (changed.train.batch_size, 64)
            assert (state.sae.encode(x) > 0).float().mean().item() == pytest.approx(timing.ACTIVE, rel=0.2)
            before = {name: p.detach().clone() for name, p in state.sae.named_parameters()}
            timing._step_seconds((state, x), 1.0)
            after = dict(state.sae.named_parameters())
            assert all(torch.allclose(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "family",
    ["qwen2", "llama-dynamic", "phi3-longrope", "gemma3", "mixtral", "qwen2-moe", "minicpm3", "gpt2",
     "gpt-oss", "bloom", "mamba", "gemma3-vl", "qwen2-vl"],
)  # fmt: skip
def test_a_stand_in_has_the_blocks_of_the_model_and_runs(family, tmp_path):
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    lm = stand_in(read_config(locate(tmp_path)), 2, name=family, device=CPU, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    facts = model_facts(tmp_path)
    assert (lm.layers, lm.n_layers, lm.d_in) == ((2,), facts.n_layers, facts.d_in)
    assert tuple(sum(p.numel() for p in block.parameters()) for block in lm.blocks) == facts.block_parameters[:3]
    acts = forward(lm, bare_tokens([torch.arange(n) for n in (5, 70, 9)]))  # refuses what is not finite
    assert acts.shape == (1, 84, 32)
    assert acts.std() > 0


def test_the_papers_models_have_a_configuration_without_network():
    config = planning_config("Qwen/Qwen2.5-0.5B-Instruct")
    lm = stand_in(config, 23, name="q", device=CPU, dtype=torch.float32)
    facts = planning_facts("Qwen/Qwen2.5-0.5B-Instruct")
    assert sum(p.numel() for p in lm.blocks[0].parameters()) == facts.block_parameters[0]
    assert 1 < len(lm.blocks) < 6  # 60 MB each


def test_a_run_says_what_was_predicted_and_what_it_took(world, tmp_path, monkeypatch, capsys):
    train_run(config_of(world), tmp_path / "short")
    assert "predicted" not in capsys.readouterr().err
    assert json.loads((tmp_path / "short" / "summary.json").read_text())["predicted_seconds"] is None

    monkeypatch.setattr(calibrating, "WORTH_PREDICTING", 0.0)
    train_run(config_of(world), tmp_path / "long")
    text = capsys.readouterr().err
    facts = json.loads((tmp_path / "long" / "summary.json").read_text())
    assert f"predicted: {duration(facts['predicted_seconds'])} (language model" in text
    assert f"predicted {duration(facts['predicted_seconds'])}, took {duration(facts['took_seconds'])}" in text
    assert facts["predicted_seconds"] > 0
    assert facts["took_seconds"] >= facts["seconds"]
    for short in (tmp_path / "short" / "saes").rglob("*.safetensors"):
        long = load_file(tmp_path / "long" / short.relative_to(tmp_path / "short"))
        assert all(torch.equal(long[key], value) for key, value in load_file(short).items())


def test_a_run_that_cannot_be_timed_says_so_and_goes_on(world, tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(calibrating, "sae_rate", fail)
    assert train_run(config_of(world), tmp_path / "run").ending == "done"
    assert "no time is predicted: the SAEs were not timed: out of memory\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (42.4, "42 s"), (59.6, "1 min 0 s"), (80, "1 min 20 s"), (3599.8, "1 h 0 min"),
     (11_100, "3 h 5 min"), (183_600, "2 d 3 h"), (86_399, "1 d 0 h")],
)  # fmt: skip
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_nothing_is_predicted_from_nothing():
    prediction = Calibration().predict(RunConfig())
    assert prediction.seconds is prediction.lm_share is None
