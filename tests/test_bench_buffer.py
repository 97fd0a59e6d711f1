"""`chatsae bench buffer` and `chatsae bench overlap` at tiny sizes: what is counted, and that the claims are judged."""

import json
from dataclasses import replace
from functools import partial
from itertools import count, islice

import pytest
import torch

from chatsae import cli
from chatsae.batch import ActivationBatch
from chatsae.bench import buffer, overlap
from chatsae.bench.buffer import FORWARD, Written, bench_buffer, shuffled_whole
from chatsae.bench.overlap import bench_overlap, demo_config
from chatsae.buffer import mix
from chatsae.config import SAEConfig
from chatsae.errors import UserError
from chatsae.lm.forward import bare_tokens


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(buffer, "RING_BYTES", 2**19)
    monkeypatch.setattr(buffer, "_SOURCE_BYTES", 2**17)
    monkeypatch.setattr(buffer, "ROUNDS", 1)


def run(*argv: str) -> int:
    try:
        return cli.main(["bench", *argv])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_what_torch_writes_is_counted():
    a, index = torch.rand(4, 6, 8), torch.tensor([3, 1])
    for work, activations, indices in (
        (lambda: a[1:].view(-1, 8).T, 0, 0),
        (lambda: torch.empty(9), 0, 0),
        (lambda: a.clone(), 4 * 6 * 8 * 4, 0),
        (lambda: torch.cat([a, a]), 2 * 4 * 6 * 8 * 4, 0),
        (lambda: a.index_select(1, index), 4 * 2 * 8 * 4, 0),
        (lambda: torch.index_select(a, 1, index, out=torch.empty(4, 2, 8)), 4 * 2 * 8 * 4, 0),
        (lambda: a.index_copy_(1, index, torch.ones(1).expand(4, 2, 8)), 4 + 4 * 2 * 8 * 4, 0),
        (lambda: a.view(torch.complex64)[0].index_copy_(0, index, a[1, :2].view(torch.complex64)), 2 * 8 * 4, 0),
        (lambda: a.bfloat16(), 4 * 6 * 8 * 2, 0),
        (lambda: torch.randperm(5), 0, 5 * 8),
        (lambda: index.sort(), 0, 2 * 2 * 8),
        (lambda: a.split(2), 0, 0),
    ):
        written = Written()
        with written:
            work()
        assert (written.activations, written.indices) == (activations, indices)


def test_the_two_buffers_serve_the_same_and_the_numbers_follow(capsys):
    assert run("buffer", "--size", "64", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bench"] == "buffer"
    assert [(r["dtype"], r["layers"]) for r in facts["rows"]] == [
        (t, n) for t in ("float32", "bfloat16") for n in (1, 3)
    ]
    for row in facts["rows"]:
        assert row["capacity"] % (2 * FORWARD) == 0
        assert row["copies"] == 2
        # per activation served: a permutation of two slots, drawn, joined and applied; no other index is made
        row_bytes = row["layers"] * 64 * (4 if row["dtype"] == "float32" else 2)
        assert row["index_share"] == pytest.approx(6 * 8 / row_bytes, rel=0.01)
        assert row["over_copy"] == pytest.approx(row["ns"] / row["copy_ns"], rel=0.05)
        assert row["differ"] == 0
    assert [(c["value"], c["goal"], c["holds"]) for c in facts["claims"]] == [(2, "<= 2", True), (0, "<= 0", True)]


def test_a_buffer_that_copies_more_or_serves_others_does_not_hold(monkeypatch, capsys):
    def wasteful(source, **sizes):
        return (batch.clone() for batch in mix(source, **sizes, seed=1))

    monkeypatch.setattr(buffer, "mix", wasteful)
    result = bench_buffer(64)
    assert [claim.holds for claim in result.claims] == [False, False]
    assert result.claims[0].value == 3
    monkeypatch.setattr(buffer, "bench_buffer", lambda size: result)
    assert run("buffer") == 1
    assert "NO" in capsys.readouterr().out


def test_the_obvious_buffer_holds_every_activation_once():
    def numbered():
        for n in count(0, FORWARD):
            acts = torch.arange(n, n + FORWARD, dtype=torch.float32).view(1, -1, 1)
            yield ActivationBatch(acts, bare_tokens([torch.arange(FORWARD)]))

    size = 4 * FORWARD
    batches = islice(shuffled_whole(numbered(), capacity=size, batch_size=128), 3 * size // 2 // 128)
    rows = [int(k) for batch in batches for k in batch[0, :, 0]]
    assert len(set(rows)) == len(rows) == 3 * size // 2
    assert max(rows[: size // 2]) < size <= max(rows) < 2 * size


def test_a_negative_size_is_one_line(capsys):
    assert run("buffer", "--size", "-3") == 2
    assert "--size must be at least 0, not -3" in capsys.readouterr().err


def test_trainings_of_every_way_take_turns(monkeypatch, capsys, tmp_path):
    assert demo_config().model.name == "demo"
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "data: {ngram: 0, max_length: 64}\n"
        "harvest: {pool: 64, token_budget: 512, way: padded, prefix: 'off'}\n"
        "buffer: {capacity: 1024}\n"
        "sae: {architectures: [standard], expansion_factors: [2]}\n"
        "train: {batch_size: 64, step: plain}\n"
    )
    before = torch.get_num_threads()
    monkeypatch.setattr(overlap, "bench_overlap", partial(bench_overlap, rounds=2))
    assert run("overlap", "--size", "12", "--recipe", str(recipe), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    ways = [(row["way"], row["threads"]) for row in facts["rows"]]
    threads = sorted({before, 1}, reverse=True)
    assert ways == [(way, n) for n in threads for way in ("in turn", "side by side", "ahead")]
    for row in facts["rows"]:
        assert len(row["wall_s"]) == 2
        assert row["tokens_per_s"] == pytest.approx(12 * 64 / (sum(row["wall_s"]) / 2), rel=0.01)
        least = 0 if row["way"] == "ahead" else 1e-3  # the others wait for every forward
        assert least <= row["waited"] < 1
    assert facts["rows"][0]["over_first"] == 1
    assert facts["claims"][0]["value"] == 0
    assert torch.get_num_threads() == before
    assert facts["conditions"]["threads_change_bits"] in (True, False)


def test_weights_that_differ_are_counted(monkeypatch):
    real = overlap.Training.part

    def other(training, steps):
        real(training, steps)
        if training.way == "ahead":
            with torch.no_grad():
                next(iter(training.states.values())).sae.b_dec[:3] += 1

    monkeypatch.setattr(overlap.Training, "part", other)
    config = demo_config()
    config = replace(
        config,
        data=replace(config.data, max_length=64),
        harvest=replace(config.harvest, pool=64, token_budget=512, prefix="off"),
        buffer=replace(config.buffer, capacity=1024),
        sae=SAEConfig(architectures=("standard",), expansion_factors=(2,)),
    )
    result = bench_overlap(config, steps=2, rounds=1)
    assert result.claims[0].value >= 3
    assert not result.holds


def test_a_recipe_that_is_missing_is_one_line(capsys, tmp_path):
    assert run("overlap", "--recipe", str(tmp_path / "none.yaml")) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err
    with pytest.raises(UserError, match="size: expected"):
        bench_buffer(-1)
