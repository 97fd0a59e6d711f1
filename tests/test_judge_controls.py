"""Random directions and random weights beside an SAE: thresholds, one pass for all, and what `chatsae judge` does."""

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatsae.batch import TokenBatch
from chatsae.cli import main
from chatsae.features import collect as collect_module
from chatsae.features import random_directions as module
from chatsae.features.collect import Reading
from chatsae.features.random_directions import DIRECTIONS, fit_sample, random_directions, spread_counts, threshold
from chatsae.features.score_tables import judgement_table
from chatsae.features.session import Ask, RunFeatures
from chatsae.lm.load import LanguageModel
from chatsae.runs import Run
from chatsae.sae.base import SAE
from feature_samples import RARE, plain_model, planted, planted_run, rendered
from judge_server import rated, serve

NAME = "L1-1x-standard"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return plain_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(model: Path) -> LanguageModel:
    return LanguageModel(model, [1], head=True)


@pytest.fixture(scope="module")
def tokens(lm: LanguageModel) -> TokenBatch:
    return rendered(lm)


def acts_alone(lm: LanguageModel, tokens: TokenBatch) -> torch.Tensor:
    """The stream after block 1, each dialogue by itself."""
    bounds, found = tokens.cu_seqlens.tolist(), []
    with torch.no_grad():
        for first, last in pairwise(bounds):
            ids = tokens.input_ids[first:last].long()[None]
            found.append(lm.with_head().model(ids, output_hidden_states=True).hidden_states[2][0])
    return torch.cat(found)


# directions


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40), st.integers(1, 45))
def test_a_threshold_lets_as_many_through_as_it_should_and_never_parts_equals(values, count):
    array = np.array(values, dtype=np.float32)
    limit = threshold(array, count)
    active = int((array > limit).sum())
    assert active >= min(count, len(values))
    weakest = min(v for v in values if v > limit)
    assert sum(v > weakest for v in values) < count  # no more than the equals of the last one
    noisy = array * (1 + 1e-6 * np.arange(len(values)))
    assert ((noisy > limit) == (array > limit)).all()


def test_counts_are_those_at_evenly_spaced_ranks():
    counts = np.random.default_rng(0).permutation(np.concatenate([np.zeros(300), np.arange(1, 1001)])).astype(np.int64)
    found = spread_counts(counts, 50)
    assert sorted(found.tolist()) == list(range(11, 1000, 20))
    assert found.tolist() != sorted(found.tolist())
    assert abs(np.median(found[:20]) - 500) < 250  # the first of them are a sample, not the rarest
    assert spread_counts(np.zeros(4, np.int64), 3).tolist() == [1, 1, 1]
    assert spread_counts(np.array([0, 7]), 3).tolist() == [7, 7, 7]


def test_directions_fire_as_often_as_features(lm, tokens):
    sae = planted(lm)
    made = random_directions({NAME: sae}, lm, tokens, reading=Reading.of(lm, 100), n=12)[NAME]
    x = acts_alone(lm, tokens)
    features = (sae.encode(x) > 0).sum(0)
    wanted = spread_counts(features.numpy(), 12)
    fires = (made.encode(x) > 0).sum(0).numpy()
    assert torch.linalg.vector_norm(made.W_dec, dim=1).detach() == pytest.approx(1)
    assert torch.equal(made.W_enc, made.W_dec.T)
    projections = (x @ made.W_enc).detach().numpy()
    for i, count in enumerate(wanted.tolist()):
        edge = np.sort(projections[:, i])[-count]
        assert fires[i] == (projections[:, i] >= edge - 1e-4 * abs(edge)).sum() >= count
    assert (np.sort(fires) <= 1.5 * np.sort(wanted) + len(tokens)).all()  # a constant prefix fires in every dialogue
    assert made.encode(x).detach().numpy() == pytest.approx(np.maximum(projections + made.b_enc.detach().numpy(), 0))
    again = random_directions({NAME: sae}, lm, tokens, reading=Reading.of(lm, 1000), n=12)[NAME]
    assert torch.equal(again.W_enc, made.W_enc)
    assert torch.allclose(again.b_enc, made.b_enc, atol=1e-5)
    other = random_directions({NAME: sae}, lm, tokens, reading=Reading.of(lm, 100), n=12, seed=1)[NAME]
    assert not torch.equal(other.W_enc, made.W_enc)


def test_thresholds_are_fitted_on_a_part_of_many_dialogues(tokens, monkeypatch):
    assert len(fit_sample(tokens, 0)) == len(tokens)
    monkeypatch.setattr(module, "FIT_TOKENS", (10, 100_000))
    part, n_tokens = fit_sample(tokens, 0), len(tokens.input_ids)
    assert n_tokens / 4 <= len(part.input_ids) < n_tokens / 2
    assert set(part.names) < set(tokens.names)
    assert fit_sample(tokens, 1).names != part.names
    monkeypatch.setattr(module, "FIT_TOKENS", (10, 20))
    assert 20 <= len(fit_sample(tokens, 0).input_ids) < 20 + max(np.diff(tokens.cu_seqlens.numpy()))


# in a run


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    return planted_run(tmp_path / "here", model)


def test_one_pass_reads_features_and_directions(run, monkeypatch):
    session = RunFeatures(run)
    stores = session.stores(Ask(only=(RARE,)))
    passes = []
    monkeypatch.setattr("chatsae.features.session.build", lambda *args, **named: passes.append(args))
    found = session.random_stores(stores)[NAME]
    assert not passes
    assert (len(found), len(found.table)) == (DIRECTIONS, DIRECTIONS)
    assert found.facts["tokens_sha256"] == stores[NAME].facts["tokens_sha256"]
    tokens = session.tokens(10_000)
    directions = SAE.load(run / "features" / "random" / NAME / "sae")
    x = acts_alone(session.lm, tokens)
    acts = directions.encode(x).detach().numpy()
    assert found.columns["n_active"].tolist() == (acts > 0).sum(0).tolist()
    for i in (0, 17, DIRECTIONS - 1):
        best = found.feature(i).contexts[0]
        start = int(tokens.cu_seqlens[best.index]) + best.start
        assert best.value == pytest.approx(acts[:, i].max(), rel=1e-3)
        assert best.acts == pytest.approx(acts[start : start + len(best), i].tolist(), rel=1e-3, abs=1e-4)
        assert best.input_ids == tuple(tokens.input_ids[start : start + len(best)].tolist())
    assert len({c.dialogue for c in found.feature(0).contexts}) == len(found.feature(0).contexts)


def test_directions_follow_their_sae_and_its_windows(run, lm, monkeypatch):
    session = RunFeatures(run)
    stores = session.stores(Ask(directions=0))
    assert not (run / "features" / "random").exists()
    first = session.random_stores(stores, 8)[NAME]  # a pass of their own
    assert len(first) == 8
    assert not (run / "features" / ".pass").exists()
    narrow = session.stores(Ask(window=8))
    with monkeypatch.context() as patched:
        patched.setattr("chatsae.features.session.build", None)  # no further pass
        same = session.random_stores(stores, 8)[NAME]
        shown = session.random_stores(narrow, 4)[NAME]
    assert same.table.equals(first.table)
    assert same.context_table.equals(first.context_table)
    assert {len(c) for i in range(8) for c in shown.contexts(i)} == {8}
    assert all((shown.kept[name] == array).all() for name, array in first.kept.items())
    assert len(session.random_stores(narrow, 12)[NAME]) == 12
    changed = planted(lm)
    with torch.no_grad():
        changed.W_enc.normal_(generator=torch.Generator().manual_seed(0))
        changed.b_enc.zero_()
    changed.save(run / "saes" / NAME)
    session = RunFeatures(run)
    dense = session.random_stores(session.stores(Ask(rebuild=True, directions=12)), 12)[NAME]
    assert np.median(dense.columns["density"]) > 0.4  # as the features of the SAE as it is now


def test_an_interrupted_pass_goes_on_with_the_same_directions(run, monkeypatch):
    saved = []

    def stop_after_two(*args):
        original(*args)
        saved.append(args[3])
        if len(saved) == 2:
            raise KeyboardInterrupt

    original = collect_module.save_state
    monkeypatch.setattr("chatsae.features.build.collect", partial(collect_module.collect, seconds=0.0))
    monkeypatch.setattr(collect_module, "save_state", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        RunFeatures(run).stores()
    assert (saved, (run / "features" / NAME).exists()) == ([1, 2], False)
    monkeypatch.setattr(collect_module, "save_state", lambda *args: saved.append(args[3]))
    session = RunFeatures(run)
    resumed = session.random_stores(session.stores())[NAME]
    assert saved[2] == 3  # the first two batches are not read again
    shutil.rmtree(run / "features")
    session = RunFeatures(run)
    whole = session.random_stores(session.stores())[NAME]
    for name, array in whole.kept.items():
        assert (resumed.kept[name] == array).all(), name
    assert whole.table.equals(resumed.table)


# chatsae judge


def null_beside(run: Path, folder: Path, **data) -> Path:
    """A run of the same recipe on the same model with random weights, with a random SAE."""
    config = Run.read(run).config
    model = replace(config.model, random_weights=3)
    null = Run.open(folder, replace(config, model=model, data=replace(config.data, **data)))
    sae = SAE.load(run / "saes" / NAME)
    with torch.no_grad():
        sae.W_enc.normal_(generator=torch.Generator().manual_seed(0))
        sae.b_enc.zero_()
    sae.save(null.path / "saes" / NAME)
    null.close()
    return null.path


def test_controls_stand_beside_the_scores(run, capsys):
    null = null_beside(run, run.parent / "null")
    assert main(["judge", str(run), "--contexts", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[NAME]
    controls = found["calibration"]["controls"]
    assert controls["random_weights"]["run"] == null.name
    assert "random weights (seed 3)" in controls["random_weights"]["what"]
    assert len(controls["random_directions"]["verdicts"]) == DIRECTIONS
    assert set(found["summary"]["above"]) == {"random", "shuffled", "random_directions", "random_weights"}
    own = [v["score"] for v in controls["random_weights"]["verdicts"] if v["score"] is not None]
    above = found["summary"]["above"]["random_weights"]["mean"]
    assert above["difference"] == pytest.approx(found["summary"]["mean"] - np.mean(own))
    live = len(RunFeatures(null).stores()[NAME])
    assert 0 < len(controls["random_weights"]["verdicts"]) == min(DIRECTIONS, live)
    text = judgement_table({NAME: found})
    assert "random directions" in text
    assert "SAE of a model with random weights" in text
    assert f"{100 * found['summary']['above']['random_weights']['high']['difference']:+.1f} [" in text
    assert main(["judge", str(run), "--contexts", "5", "--controls", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[NAME]["calibration"]["controls"] == {}


def test_a_null_that_is_none_is_refused(run, capsys):
    other = null_beside(run, run.parent / "elsewhere", max_length=40)
    assert main(["judge", str(run), "--contexts", "5", "--null-run", str(run)]) == 2
    assert "has no model.random_weights; it is no null" in capsys.readouterr().err
    assert main(["judge", str(run), "--contexts", "5", "--null-run", str(other)]) == 2
    error = capsys.readouterr().err
    assert "data.max_length" in error  # a warning
    assert "is of other dialogues than" in error
    assert main(["judge", str(run), str(other), "--null-run", str(other)]) == 2
    assert "--null-run stands beside one run" in capsys.readouterr().err
    damaged = null_beside(run, run.parent / "null") / "features" / NAME / "facts.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    assert main(["judge", str(run), "--contexts", "5", "--json"]) == 0  # it was not asked for
    captured = capsys.readouterr()
    assert "is left out as a null" in captured.err
    assert set(json.loads(captured.out)[NAME]["calibration"]["controls"]) == {"random_directions"}
    assert main(["judge", str(run), "--controls", "-1"]) == 2
    assert "--controls must be at least 0" in capsys.readouterr().err
    assert main(["judge"]) == 2
    assert "at least one run" in capsys.readouterr().err


def test_several_runs_are_judged_and_compared_under_one_budget(run, model, capsys):
    second = run.parent / "second"
    config = Run.read(run).config
    twin = Run.open(second, replace(config, data=replace(config.data, method="bt-f")))
    shutil.copytree(run / "saes" / NAME, twin.path / "saes" / NAME)
    twin.close()
    calls = 3 + 2 * 16 + 2 * 20 + 2  # features, planted twice, two kinds of nulls, random directions
    with serve(lambda body, n: rated(4)) as served:
        asked = ["--judge", "openai", "--model", "tiny", "--base-url", served.url, "--json"]
        asked += ["--contexts", "5", "--features", "3", "--controls", "2"]
        prices = ["--price-in", "1", "--price-out", "1", "--concurrency", "1"]
        budget = ["--budget", f"{110e-6 * calls + 0.004:.6f}"]  # 110 tokens a call, some 800 at most
        assert main(["judge", str(run), str(second), *asked, *prices, *budget]) == 2
        assert "the budget of" in capsys.readouterr().err
        assert calls < len(served.bodies) < 2 * calls
        assert main(["judge", str(run.parent), *asked]) == 0  # the directory of both
        assert len(served.bodies) == 2 * calls
    found = json.loads(capsys.readouterr().out)
    assert set(found["runs"]) == {str(run), str(second)}
    (compared,) = found["comparison"]
    assert (compared["judge"], [m["label"] for m in compared["methods"]]) == ("tiny", ["fast", "bt-f"])
    assert compared["pairs"][0]["high"]["difference"] == 0
