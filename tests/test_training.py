import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import chatsae as cs
from chatsae.batch import Dialogue, Message
from chatsae.cli import main
from chatsae.config import DataConfig, RunConfig, sae_specs
from chatsae.errors import UserError
from chatsae.files import read_object
from chatsae.lm.facts import planning_config
from chatsae.lm.harvest import Harvest
from chatsae.lm.load import LanguageModel, load_model, load_tokenizer
from chatsae.lm.stand_in import stand_in
from chatsae.recipe import load_recipe
from chatsae.runs import Checkpoint, Run
from chatsae.sae.grid import build_grid
from chatsae.sae.init import set_b_dec_
from chatsae.sae.interop import read_sparsity
from chatsae.sae.step import make_state, train_step
from chatsae.training import loop
from chatsae.training.loop import make_states, train, train_states
from chatsae.training.overlap import lm_share, overlaps, shared_threads
from chatsae.training.pipeline import activations, token_batches
from chatsae.training.schedule import lr_at
from chatsae.training.session import train_run
from chatsae.training.state import snapshot
from tiny_models import tiny_model, tiny_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def write_dialogues(path: Path, n: int = 120) -> Path:
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(n):
            turns = [
                {"role": role, "content": f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))}
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model, a dialogue file and a recipe of 4 SAEs over two layers."""
    root = tmp_path_factory.mktemp("world")
    tiny_tokenizer(tiny_model(root / "model"))
    write_dialogues(root / "chat.jsonl")
    (root / "recipe.yaml").write_text(
        f"""
model: {{name: {root / "model"}, layers: [0, 2]}}
data: {{sources: [{root / "chat.jsonl"}], text_sources: [{root / "chat.jsonl"}], block_size: 64, epochs: 0}}
harvest: {{token_budget: 256, pool: 32}}
buffer: {{capacity: 600}}
sae: {{architectures: [standard, jumprelu], expansion_factors: [2], lrs: [1.0e-3]}}
train: {{tokens: 6000, batch_size: 50, log_every: 5, checkpoint_every: 7}}
eval: {{dialogues: 5}}
"""
    )
    return root


def config_of(world: Path) -> RunConfig:
    return load_recipe(world / "recipe.yaml")


def start(config: RunConfig, checkpoint: Checkpoint | None = None):
    lm = LanguageModel(config.model.name, config.model.layers)
    acts = activations(config, lm, skip=0 if checkpoint is None else checkpoint.facts["buffer/harvest_batches"])
    return lm, build_grid(sae_specs(config.sae, layers=lm.layers, d_in=lm.d_in), config.train.seed), acts


def test_every_sae_learns_and_the_run_directory_explains_itself(world, tmp_path):
    config = config_of(world)
    config = replace(config, train=replace(config.train, log_every=1))
    summary = train_run(config, tmp_path / "run")
    assert (summary.ending, summary.steps, summary.tokens) == ("done", 120, 6000)
    run = Run.read(tmp_path / "run")
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["step"] == 120
    names = ["L0-2x-standard", "L0-2x-jumprelu", "L2-2x-standard", "L2-2x-jumprelu"]
    assert list(last["saes"]) == names
    for name in names:
        assert last["saes"][name]["mse"] < first["saes"][name]["mse"]
    assert [p.name for p in run.sae_directories()] == names
    for directory in run.sae_directories():
        sparsity = read_sparsity(directory)  # firing frequencies
        assert sparsity is not None
        l0 = sum(record["saes"][directory.name]["l0"] for record in run.metrics()) / 120  # a window holds 2,000 steps
        assert float(sparsity.double().sum()) == pytest.approx(l0, rel=1e-4)
    assert sum(summary.shares.values()) == pytest.approx(1)
    assert not list((run.path / "checkpoints").iterdir())
    again = train_run(config, tmp_path / "run")
    assert again == summary


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(world, tmp_path):
    config = config_of(world)
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_run(replace(config, train=replace(config.train, seed=seed)), tmp_path / name)
        weights.append(load_file(tmp_path / name / "saes" / "L2-2x-standard" / "sae_weights.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["W_dec"], weights[2]["W_dec"])


def test_the_loop_equals_the_obvious_one(world):
    """Bit for bit: where b_dec starts, which layer each SAE reads, both schedules, what follows the last step."""
    config = config_of(world)
    _, saes, acts = start(config)
    train(saes, acts, config.train)

    _, twins, acts = start(config)
    sample, layers = acts.peek(8192), (0, 2)
    states = [make_state(sae, betas=(0.9, 0.999)) for sae in twins.values()]
    for state in states:
        set_b_dec_(state.sae, sample[layers.index(state.sae.spec.layer)])
    for step in range(120):
        batch = next(acts)
        lr = lr_at(step, total_steps=120, lr=1e-3, lr_end=1e-4, warmup_steps=6, decay_steps=24)
        for state in states:
            x = batch[layers.index(state.sae.spec.layer)]
            train_step(state, x, lr=lr, sparsity_scale=min(step / 4, 1.0), clip_grad_norm=1.0)
    for name, twin in twins.items():
        twin.before_step_()
        ours = dict(saes[name].named_parameters())
        assert all(torch.equal(ours[k], value) for k, value in twin.named_parameters()), name


@pytest.mark.parametrize(("kind", "step"), [("plain", 5), ("fast", 1)])  # autograd's losses are looked at in log lines
def test_a_loss_that_is_not_finite_names_the_sae_and_the_step(world, kind, step):
    config = config_of(world)
    config = replace(config, train=replace(config.train, step=kind))
    _, saes, acts = start(config)
    with torch.no_grad():
        saes["L2-2x-standard"].W_enc.fill_(float("nan"))
    with pytest.raises(UserError, match=rf"the loss of L2-2x-standard is nan at step {step}"):
        train(saes, acts, config.train)


def test_a_model_whose_sequences_leak_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr("chatsae.lm.probe.isolation", lambda lm, way, prefix=False: "they differ by 0.5")
    config = config_of(world)
    with pytest.raises(UserError, match=r"cannot be read padded: they differ by 0.5"):
        train_run(replace(config, harvest=replace(config.harvest, way="padded")), tmp_path)


def test_how_the_model_is_read_is_measured_once_and_kept(world, tmp_path, monkeypatch, capsys):
    config = config_of(world)
    config = replace(config, harvest=replace(config.harvest, token_budget=0))
    real, calls = loop.train_step, 0

    def fails(*args, **options):
        nonlocal calls
        calls += 1
        if calls > 400:  # past the first checkpoint
            raise RuntimeError("stop")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", fails)
        with pytest.raises(RuntimeError, match="stop"):
            train_run(config, tmp_path / "run")
    how = read_object(tmp_path / "run" / "harvest.json")
    assert (how["way"], how["token_budget"], how["prefix"]) == ("padded", 1024, True)
    assert 0 <= how["median"] <= how["p90"] < 1e-5
    assert "is read padded, 1,024 tokens per forward, the template's prefix once" in capsys.readouterr().err
    monkeypatch.setattr("chatsae.training.pipeline.choose_budget", lambda *_: 7)  # another machine, say
    assert train_run(config, tmp_path / "run").ending == "done"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["harvest"] == how
    whole = train_run(replace(config, harvest=replace(config.harvest, token_budget=1024)), tmp_path / "whole")
    assert whole.ending == "done"
    for name in ("L0-2x-standard", "L2-2x-jumprelu"):
        one, other = (load_file(tmp_path / d / "saes" / name / "sae_weights.safetensors") for d in ("run", "whole"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_prefix_that_cannot_be_shared_is_refused(world, tmp_path, monkeypatch):
    config = config_of(world)
    config = replace(config, harvest=replace(config.harvest, way="single", prefix="on"))
    with pytest.raises(UserError, match=r"harvest\.prefix: .*the way is not padded; set it to auto"):
        train_run(config, tmp_path)


def test_every_pass_has_its_own_seed(world, monkeypatch):
    seeds = []

    def read(*sources, seed, order, revisions, tally, split="train"):
        seeds.append((sources, split, seed))
        return iter([Dialogue("a", "test", (Message("user", "Hi"), Message("assistant", "Ho")))])

    monkeypatch.setattr("chatsae.training.pipeline.read", read)
    tokenizer = load_tokenizer(config_of(world).model.name)
    assert len(list(token_batches(DataConfig(epochs=3), tokenizer, seed=7))) == 3
    assert seeds == [(("pydocs",), "train", s) for s in (7, 8, 9)]


def test_dialogues_are_deduplicated_unless_told_otherwise(world, tmp_path):
    tokenizer = load_tokenizer(config_of(world).model.name)
    turns = [{"role": r, "content": f"{r} " + " ".join(WORDS * 3)} for r in ("user", "assistant")]
    rows = [[{**turns[0], "content": f"{i} {turns[0]['content']}"}, turns[1]] for i in range(30)]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    counts = {}
    for ngram in (20, 0):
        data = DataConfig(sources=(str(tmp_path / "same.jsonl"),), ngram=ngram)
        counts[ngram] = sum(len(batch) for batch in token_batches(data, tokenizer, seed=0))
    assert counts[20] == 1
    assert counts[0] > 20


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_stopped_and_resumed_equals_uninterrupted_in_every_tensor(world, tmp_path, overlap, monkeypatch):
    """Weights, moments, counts, buffer, generator: all of the state, not only what is saved at the end.

    The uninterrupted run reads its model between steps; the other one may do so in a thread, both at random speeds.
    """
    config = config_of(world)
    _, saes, acts = start(config)
    states = []

    class Whole(Run):
        def save_checkpoint(self, checkpoint):
            states.append({k: v.clone() for k, v in checkpoint.tensors.items()} | checkpoint.facts)

    recorder = Whole.open(tmp_path / "whole", config)
    train_states(make_states(saes, config.train), acts, config.train, run=recorder)
    recorder.close()
    uninterrupted = {s["sae/L0-2x-standard/step"]: s for s in states}

    config = replace(config, harvest=replace(config.harvest, overlap=overlap))
    if overlap == "on":
        stumble(monkeypatch)
    run = Run.open(tmp_path / "parts", config)
    for until in (21, 49, 119):
        before = run.load_checkpoint()
        _, saes, acts = start(config, before)

        class Stop(Run):
            def save_checkpoint(self, checkpoint, until=until):
                super().save_checkpoint(checkpoint)
                if checkpoint.step >= until:
                    raise KeyboardInterrupt

        part = Stop(run.path, config)
        with pytest.raises(KeyboardInterrupt):
            train_states(make_states(saes, config.train), acts, config.train, run=part, checkpoint=before)
        acts.close()
        checkpoint = run.load_checkpoint()
        assert checkpoint is not None
        assert checkpoint.step == until
        resumed, whole = checkpoint.tensors | checkpoint.facts, uninterrupted[until]
        assert resumed.keys() == whole.keys()
        for key, value in whole.items():
            same = torch.equal(resumed[key], value) if isinstance(value, torch.Tensor) else resumed[key] == value
            assert same, key
    run.close()


def stumble(monkeypatch) -> None:
    """Random delays in the model and in the steps."""
    rng = random.Random(time.time_ns())

    def slowed(real):
        def slow(*args, **options):
            time.sleep(max(rng.random() - 0.7, 0.0) * 1e-2)
            return real(*args, **options)

        return slow

    monkeypatch.setattr(loop, "train_step", slowed(loop.train_step))
    monkeypatch.setattr(Harvest, "__next__", slowed(Harvest.__next__))


def harvest_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "chatsae-harvest-ahead"]


def test_a_run_that_reads_ahead_is_the_same_run(world, tmp_path, monkeypatch):
    """Weights, metrics and what was left out; and no thread stays behind."""
    config = config_of(world)
    config = replace(
        config, data=replace(config.data, epochs=2, max_length=20), train=replace(config.train, tokens=3000)
    )
    summaries = {}
    for overlap in ("off", "on"):
        if overlap == "on":
            stumble(monkeypatch)
        train_run(replace(config, harvest=replace(config.harvest, overlap=overlap)), tmp_path / overlap)
        summaries[overlap] = json.loads((tmp_path / overlap / "summary.json").read_text())
        assert not harvest_threads()
    assert summaries["on"]["dropped"] == summaries["off"]["dropped"] != {}
    assert summaries["on"]["steps"] == summaries["off"]["steps"] == 60
    on, off = (Run.read(tmp_path / name).metrics() for name in ("on", "off"))
    assert [(r["step"], r["saes"]) for r in on] == [(r["step"], r["saes"]) for r in off]
    for file in sorted((tmp_path / "off" / "saes").rglob("*.safetensors")):
        other = load_file(tmp_path / "on" / file.relative_to(tmp_path / "off"))
        assert all(torch.equal(value, other[key]) for key, value in load_file(file).items()), file


def test_an_error_of_the_model_ends_a_run_that_reads_ahead(world, tmp_path, monkeypatch):
    config = config_of(world)
    real, calls = Harvest.__next__, 0

    def fails(harvest):
        nonlocal calls
        calls += 1
        if calls > 12:  # the buffer is full by then
            raise RuntimeError("the model is gone")
        return real(harvest)

    monkeypatch.setattr(Harvest, "__next__", fails)
    with pytest.raises(RuntimeError, match="the model is gone") as caught:
        train_run(replace(config, harvest=replace(config.harvest, overlap="on")), tmp_path)
    assert "fails" in [entry.name for entry in caught.traceback]
    assert not harvest_threads()


def command(world: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "chatsae.cli", "train", str(world / "recipe.yaml"), "--out", str(out), *flags]


def test_kill_9_at_a_random_step_then_resume_gives_the_same_bits(world, tmp_path):
    train_run(config_of(world), tmp_path / "whole")
    step = random.Random(time.time_ns()).randrange(10, 100)
    killed = command(world, tmp_path / "killed", "--harvest.overlap", "on")
    process = subprocess.Popen(killed, stderr=subprocess.PIPE)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if len(lines) * 5 >= step:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "summary.json").exists()
    done = subprocess.run(killed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in sorted((tmp_path / "whole" / "saes").rglob("*.safetensors")):
        other = load_file(tmp_path / "killed" / file.relative_to(tmp_path / "whole"))
        for key, value in load_file(file).items():
            assert torch.equal(value, other[key]), (file, key)
    whole, killed = Run.read(tmp_path / "whole").metrics(), Run.read(tmp_path / "killed").metrics()
    assert [(r["step"], r["saes"]) for r in whole] == [(r["step"], r["saes"]) for r in killed]


def test_a_kill_before_the_first_checkpoint_leaves_no_doubled_metrics(world, tmp_path):
    train_run(config_of(world), tmp_path / "whole")
    run = Run.open(tmp_path / "killed", config_of(world))
    run.log({"step": 5, "saes": {}})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    run.close()
    train_run(config_of(world), run.path)
    whole, killed = Run.read(tmp_path / "whole").metrics(), Run.read(run.path).metrics()
    assert [(r["step"], r["saes"]) for r in whole] == [(r["step"], r["saes"]) for r in killed]


def test_a_damaged_summary_is_named(world, tmp_path):
    run = Run.open(tmp_path, config_of(world))
    (tmp_path / "summary.json").write_text("{")
    run.close()
    with pytest.raises(UserError, match=r"summary.json is damaged"):
        train_run(config_of(world), tmp_path)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_ctrl_c_saves_and_says_how_to_go_on(world, tmp_path, overlap):
    flags = ["--train.tokens", "60000000", "--harvest.overlap", overlap]
    process = subprocess.Popen(command(world, tmp_path / "run", *flags), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=600)
    assert process.returncode == 130, text
    assert "the same command goes on where it stopped" in text
    assert "Traceback" not in text
    checkpoint = Run.read(tmp_path / "run").load_checkpoint()
    assert checkpoint is not None


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(world, tmp_path, capsys):
    config = config_of(world)
    run = Run.open(tmp_path / "run", config)
    _, saes, acts = start(config)

    class Stop(Run):
        def save_checkpoint(self, checkpoint):
            super().save_checkpoint(checkpoint)
            if checkpoint.step == 21:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_states(make_states(saes, config.train), acts, config.train, run=Stop(run.path, config))
    run.close()
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    data = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(data[: len(data) // 2])
    train_run(config, tmp_path / "run")
    text = capsys.readouterr().err
    assert "step-000000021 is damaged" in text
    assert "resuming at step 14," in text
    train_run(config, tmp_path / "whole")
    for name in ("L0-2x-standard", "L2-2x-jumprelu"):
        ours, theirs = (load_file(tmp_path / r / "saes" / name / "sae_weights.safetensors") for r in ("run", "whole"))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_data_that_ends_early_is_said_and_saved(world, tmp_path, capsys):
    config = config_of(world)
    config = replace(config, data=replace(config.data, epochs=1), train=replace(config.train, tokens=10**6))
    summary = train_run(config, tmp_path / "run")
    assert f"the data gave {summary.tokens:,} of 1,000,000 tokens" in capsys.readouterr().err
    assert summary.ending == "data ended"
    assert 0 < summary.tokens < 10**6
    assert Run.read(tmp_path / "run").sae_directories()


def test_training_without_a_run_directory(world):
    config = config_of(world)
    _, saes, acts = start(config)
    before = {name: sae.W_enc.detach().clone() for name, sae in saes.items()}
    summary = train(saes, acts, cs.TrainConfig(tokens=500, batch_size=50))
    assert summary.steps == 10
    assert all(not torch.equal(before[name], sae.W_enc) for name, sae in saes.items())


def test_nan_weights_of_the_model_name_layer_and_dialogue(world, tmp_path):
    config = config_of(world)
    lm, saes, _ = start(config)
    with torch.no_grad():
        next(lm.blocks[2].parameters()).fill_(float("nan"))
    acts = activations(config, lm)
    with pytest.raises(UserError, match=r"layer 2, dialogue .*NaN"):
        train(saes, acts, config.train)


def test_a_model_without_a_chat_template_trains_on_text_and_is_refused_for_dialogues(world, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(world / "model", base)
    (base / "chat_template.jinja").unlink()
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(WORDS * 9)}) + "\n" for _ in range(40)))
    flags = ["--model.name", str(base), "--data.text-sources", str(tmp_path / "text.jsonl"), "--train.tokens", "1000"]
    recipe = ["train", str(world / "recipe.yaml"), *flags]
    assert main([*recipe, "--out", str(tmp_path / "fast")]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main([*recipe, "--out", str(tmp_path / "bt-p"), "--data.method", "bt-p"]) == 0
    assert len(Run.read(tmp_path / "bt-p").sae_directories()) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.layers", "9"], "layer 9 does not exist"),
        (["--model.name", "/no/such/model"], "/no/such/model"),
        (["--data.sources", "/no/such/file.jsonl"], "/no/such/file.jsonl"),
        (["--train.tokens", "10"], "train.tokens is 10, less than one batch"),
        (["--buffer.capacity", "60"], "capacity"),
        (["--buffer.device", "cuda", "--model.device", "cpu"], "buffer.device: cuda given, but the activations"),
        (["--train.lr-warmup-share", "2"], "lr_warmup_share must be between 0 and 1"),
        (["--harvest.pool", "0"], "harvest.pool must be at least 1"),
        (["--data.method", "bt-p"], "text"),
    ],
)
def test_bad_values_exit_with_2_and_one_clear_line(world, tmp_path, flags, message, capsys):
    code = main(["train", str(world / "recipe.yaml"), "--out", str(tmp_path / "run"), *flags])
    text = capsys.readouterr().err
    assert code == 2
    assert message in text
    assert text.startswith("error: ") or "\nerror: " in text


def test_a_snapshot_holds_every_parameter_and_the_buffer(world):
    config = config_of(world)
    _, saes, acts = start(config)
    states = make_states(saes, config.train)
    next(acts)
    checkpoint = snapshot(3, states, acts)
    for name, sae in saes.items():
        for parameter, value in sae.named_parameters():
            assert torch.equal(checkpoint.tensors[f"sae/{name}/sae.{parameter}"], value)
    assert any(k.startswith("buffer/") for k in checkpoint.tensors)
    assert os.path.basename(config.model.name) == "model"


def test_reading_ahead_is_for_models_and_saes_of_like_size(world):
    config = config_of(world)
    lm = load_model(config.model)
    before = torch.get_num_threads()

    def one_of(factor: int, overlap: str = "auto") -> RunConfig:
        sae = replace(config.sae, expansion_factors=(factor,))
        return replace(config, sae=sae, harvest=replace(config.harvest, overlap=overlap))

    shares = {factor: lm_share(one_of(factor), lm) for factor in (1, 8, 64, 512)}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    weights = sum(p.numel() for block in list(lm.blocks)[: max(lm.layers) + 1] for p in block.parameters())
    d_in, saes = lm.d_in, len(sae_specs(one_of(8).sae, layers=lm.layers, d_in=lm.d_in))
    step = saes * d_in * 8 * d_in * (4 + 600 / config.train.batch_size)
    assert shares[8] == pytest.approx(4 * weights / (4 * weights + step))
    plain = replace(one_of(8), train=replace(config.train, step="plain"))
    assert lm_share(plain, lm) == pytest.approx(4 * weights / (4 * weights + 3 * step))
    with pytest.MonkeyPatch.context() as patch:  # what a run without numba takes
        patch.setattr("chatsae.training.overlap.find_spec", lambda name: None)
        assert lm_share(one_of(8), lm) == lm_share(plain, lm)
    first = stand_in(planning_config(config.model.name), 0, name="first", device=lm.device, dtype=torch.float32)
    assert lm_share(one_of(8), first) == pytest.approx(shares[8])  # one block in place of all, as `plan` times them
    try:
        torch.set_num_threads(4)
        assert {factor for factor in shares if overlaps(one_of(factor), lm)} == {
            factor for factor, share in shares.items() if 0.3 < share < 0.65
        }
        assert overlaps(one_of(512, "on"), lm)
        with shared_threads(True, lm.device):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
        torch.set_num_threads(1)
        assert not any(overlaps(one_of(factor), lm) for factor in shares)
    finally:
        torch.set_num_threads(before)
    assert not overlaps(one_of(8, "off"), lm)
