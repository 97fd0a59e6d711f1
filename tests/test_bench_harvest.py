"""`chatsae bench harvest` at a tiny size: equal work for every way, claims from rows, sae_lens where it is."""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from chatsae import cli
from chatsae.bench import harvest, models, peer, ways
from chatsae.bench.harvest import PEER_BLOCKS, PEER_PADDED, bench_harvest, claims_of
from chatsae.bench.ways import ARRIVAL, BLOCK, BLOCKS, PARTS, SINGLE, Spent, own_readers, peer_rows, sample_dialogues
from chatsae.errors import UserError
from chatsae.lm.forward import bare_tokens, forward, plan
from chatsae.lm.load import LanguageModel

OWN = [BLOCKS, SINGLE, ARRIVAL, "padded", "packed"]
TINY = {"layers": 2, "tokens": 6000, "pool": 256, "device": "cpu"}
LEAST = {"families": ("llama",), "layers": 1, "tokens": 500, "pool": 32, "device": "cpu"}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Small matrices, and no sae_lens unless a test brings it."""
    monkeypatch.setitem(ways._MATMUL, "cpu", (128, 4))
    monkeypatch.setattr(peer, "_BESIDE", tmp_path / "absent")


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("model")
    models.random_checkpoint("qwen2", 64, 3, directory)
    return LanguageModel(directory, [1], device="cpu")


def run(monkeypatch, scale: dict[str, object], *flags: str) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(harvest, "bench_harvest", partial(bench_harvest, **scale))
    try:
        return cli.main(["bench", "harvest", "--size", "32", "--median", "40", *flags])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_every_way_reads_the_same_tokens_and_the_claims_follow(monkeypatch, capsys):
    code = run(monkeypatch, TINY, "--json")
    printed = capsys.readouterr()
    assert f"sae_lens: skipped: {peer.HOW}" in printed.err
    facts = json.loads(printed.out)
    assert list(facts) == ["bench", "machine", "conditions", "rows", "claims"]
    conditions = facts["conditions"]
    assert (facts["bench"], conditions["median"], conditions["judged_by"]) == ("harvest", 40, "cpu_s")
    assert [model["layers"] for model in conditions["models"]] == [2, 2]
    assert all(model["way"].startswith("padded (relative error") for model in conditions["models"])
    assert all(model["matrix_peak_gflops"] > 0 for model in conditions["models"])
    for model in conditions["models"]:
        rows = [row for row in facts["rows"] if row["model"] == model["model"]]
        assert [row["way"] for row in rows] == [*OWN, PEER_BLOCKS, PEER_PADDED]
        assert [row["note"] for row in rows[5:]] == [f"skipped: {peer.HOW}"] * 2
        measured = {row["way"]: row for row in rows[:5]}
        assert {row["tokens"] for row in rows[:5]} == {model["tokens"]}
        assert [way for way, row in measured.items() if row["chosen"]] == ["padded"]
        assert measured[BLOCKS]["over_blocks_cpu"] == measured[BLOCKS]["over_blocks_wall"] == 1
        assert measured[SINGLE]["padding"] == measured["packed"]["padding"] == 0
        assert 0 < measured["padded"]["padding"] < 0.1 < measured[ARRIVAL]["padding"]
        for row in measured.values():
            assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["wall_s"], rel=0.01)
            assert row["over_blocks_cpu"] == pytest.approx(measured[BLOCKS]["cpu_s"] / row["cpu_s"], rel=0.01)
            assert row["peak_share"] < 1
    assert facts["claims"] == [
        {
            "claim": f"{model['model']}: padded (chosen), times `{BLOCKS}`",
            "value": rows[0]["cpu_s"] / rows[3]["cpu_s"],
            "goal": ">= 1.15",
            "holds": rows[0]["cpu_s"] / rows[3]["cpu_s"] >= 1.15,
        }
        for model in conditions["models"]
        for rows in [[row for row in facts["rows"] if row["model"] == model["model"]]]
    ]
    assert code == (0 if all(claim["holds"] for claim in facts["claims"]) else 1)


@pytest.mark.parametrize(("goal", "code", "said"), [(1e9, 1, "NO"), (0.0, 0, "yes")])
def test_the_exit_code_is_that_of_the_claims(monkeypatch, capsys, goal, code, said):
    monkeypatch.setattr(harvest, "OVER_BLOCKS", goal)
    assert run(monkeypatch, LEAST) == code
    table = capsys.readouterr().out
    assert said in table.split("claims")[1]
    assert f"{PEER_PADDED}: skipped: {peer.HOW}" in table


def measured(way: str, cpu_s: float, wall_s: float, *, chosen: bool = False) -> dict:
    return {"way": way, "model": "m", "chosen": chosen, "tokens": 100, "cpu_s": cpu_s, "wall_s": wall_s}


def test_each_claim_is_computed_from_its_row():
    rows = [
        measured(BLOCKS, 1.2, 1.0),
        measured(ARRIVAL, 2.5, 1.0),
        measured("padded", 1.0, 2.0, chosen=True),
        measured("packed", 0.1, 9.0),
        measured(PEER_PADDED, 2.9, 9.0),
    ]
    claims = claims_of(rows, "cpu_s", 300)
    assert [(claim.value, claim.goal, claim.holds) for claim in claims] == [
        (1.2, ">= 1.15", True),
        (2.5, ">= 2.5", True),
        (2.9, ">= 3", False),
    ]
    rows[-1]["cpu_s"] = 3.0
    assert all(claim.holds for claim in claims_of(rows, "cpu_s", 300))
    rows[0]["cpu_s"], rows[1]["cpu_s"] = 1.14, 2.49
    assert [claim.holds for claim in claims_of(rows, "cpu_s", 300)] == [False, False, True]
    assert [claim.goal for claim in claims_of(rows, "cpu_s", 40)] == [">= 1.15", ">= 3"]  # 2.5 is of the median 300
    on_gpu = claims_of(rows, "wall_s", 300)
    assert [(claim.value, claim.goal, claim.holds) for claim in on_gpu] == [(0.5, ">= 1", False)]
    rows[-1] = {"way": PEER_PADDED, "model": "m", "note": "skipped"}
    assert [claim.goal for claim in claims_of(rows, "cpu_s", 300)] == [">= 1.15", ">= 2.5"]


def test_a_wrong_interpreter_is_one_line(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, LEAST, "--peer", str(tmp_path / "python")) == 2
    assert "python is no file; a Python interpreter that has sae_lens is expected" in capsys.readouterr().err
    other = tmp_path / "notes.txt"
    other.write_text("hello", encoding="utf-8")
    for path, why in ((other, "Permission denied"), (Path(sys.executable), "No package metadata was found")):
        assert run(monkeypatch, LEAST, "--peer", str(path)) == 2
        assert f"peer: {path} is no Python interpreter that has sae_lens: " in (said := capsys.readouterr().err)
        assert why in said


def test_wrong_arguments_are_one_line():
    with pytest.raises(
        UserError, match="size: expected d_in of the model, 32 or a multiple of 64, or 0 for the default, got 100"
    ):
        bench_harvest(100, device="cpu")
    with pytest.raises(UserError, match="median: expected the tokens of a dialogue, 1 to 2,048, got 0"):
        bench_harvest(median=0, device="cpu")


def test_a_peer_that_fails_ends_the_run_only_when_it_was_asked_for(monkeypatch):
    """The interpreter of the tests has no sae_lens."""
    monkeypatch.setattr(harvest, "find_interpreter", lambda asked: Path(sys.executable))
    found = bench_harvest(32, median=40, **LEAST)
    assert [row["note"] for row in found.rows[5:]] == [
        "failed: bench harvest: sae_lens: ModuleNotFoundError: No module named 'sae_lens'"
    ] * 2
    assert len(found.claims) == 1
    with pytest.raises(UserError, match="sae_lens: ModuleNotFoundError: No module named 'sae_lens'"):
        bench_harvest(32, median=40, peer=Path(sys.executable), **LEAST)


def test_each_way_reads_each_dialogue_once_and_exactly(lm):
    sample = sample_dialogues(100, 40, 256, 1024, 4000)
    readers = own_readers(lm, sample, 1024)
    assert [reader.name for reader in readers] == OWN
    blocks, *others = readers
    assert torch.equal(blocks.tokens.input_ids, sample.dialogues.input_ids)
    assert blocks.lengths == [BLOCK] * (sample.tokens // BLOCK) + [sample.tokens % BLOCK]
    alone = forward(lm, sample.dialogues, "single")
    for reader in readers:
        assert sorted(i for batch in reader.batches for i in batch) == list(range(len(reader.tokens)))
        assert sum(reader.read(part).tokens for part in range(PARTS)) == sample.tokens
    for reader in others:
        for batch in reader.batches:
            acts = forward(lm, reader.tokens.select(batch), reader.way)
            taken = torch.isin(sample.dialogues.sequence, torch.tensor(batch))
            order = torch.argsort(torch.argsort(torch.tensor(batch)))
            wanted = alone[:, taken].split(sample.dialogues.lengths[sorted(batch)].tolist(), dim=1)
            torch.testing.assert_close(acts, torch.cat([wanted[i] for i in order], dim=1), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(median=st.integers(1, 400), pool=st.integers(1, 300), budget=st.integers(1, 5000), tokens=st.integers(0, 20_000))
def test_a_sample_is_whole_batches_of_the_pool(median, pool, budget, tokens):
    sample = sample_dialogues(50, median, pool, budget, tokens)
    whole = sample_dialogues(50, median, pool, budget, 0)
    assert len(whole.dialogues) == pool
    assert sorted(i for batch in sample.padded for i in batch) == list(range(len(sample.dialogues)))
    planned = {tuple(sorted(whole.dialogues.names[i] for i in batch)) for batch in whole.padded}
    assert {tuple(sorted(sample.dialogues.names[i] for i in batch)) for batch in sample.padded} <= planned
    assert len(planned) == len(plan(whole.dialogues.lengths.tolist(), token_budget=budget))
    assert int(sample.dialogues.input_ids.max()) < 50


def test_a_sample_has_the_lengths_and_the_padding_of_its_pool():
    whole, sample = (sample_dialogues(50, 300, 4096, 1024, tokens) for tokens in (0, 65_536))
    assert sample.tokens == pytest.approx(65_536, rel=0.05)
    for share in (0.25, 0.5, 0.75):
        wanted, got = (float(s.dialogues.lengths.float().quantile(share)) for s in (whole, sample))
        assert got == pytest.approx(wanted, rel=0.05)
    padding = [1 - s.tokens / forwarded(s.dialogues.lengths.tolist(), s.padded) for s in (whole, sample)]
    assert padding[1] == pytest.approx(padding[0], abs=0.005)
    assert whole.dialogues.lengths.max() == BLOCK


def forwarded(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(bare_tokens([torch.zeros(lengths[i]).long() for i in batch]).padded().numel() for batch in batches)


def test_padding_is_counted_as_it_is_forwarded(lm):
    sample = sample_dialogues(100, 40, 64, 512, 0)
    lengths = sample.dialogues.lengths.tolist()
    by_name = {reader.name: reader for reader in own_readers(lm, sample, 512)}
    assert by_name[ARRIVAL].forwarded == forwarded(lengths, by_name[ARRIVAL].batches)
    assert by_name["padded"].forwarded == forwarded(lengths, by_name["padded"].batches)
    assert by_name["packed"].forwarded == by_name[SINGLE].forwarded == sample.tokens


def test_operations_are_those_that_torch_counts(lm):
    """Torch counts the products of linear layers, not attention on a CPU: 2 products over n (n + 1) / 2 pairs."""
    tokens = bare_tokens([torch.arange(50) % 32])
    with FlopCounterMode(display=False) as counted:
        forward(lm, tokens, "single")
    layers, pairs = 2, 50 * 51 / 2
    assert models.flops(lm, [50]) == counted.get_total_flops() + layers * 2 * (2 * lm.d_in) * pairs
    assert models.flops(lm, [50, 50]) == 2 * models.flops(lm, [50])


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_default_models_are_of_the_size_that_the_goals_name(family, tmp_path):
    parameters, layers = models.random_checkpoint(family, 256, 0, tmp_path)
    assert 10e6 < parameters < 14e6
    assert layers >= 8


def test_rows_of_sae_lens_hold_every_token_and_padding(lm):
    rows = peer_rows(bare_tokens([torch.arange(3), torch.arange(BLOCK), torch.arange(1)]), 7000, 4)
    assert rows.shape == (4, BLOCK)
    assert rows[0].tolist() == [0, 1, 2] + [7000] * (BLOCK - 3)
    assert rows[1].tolist() == list(range(BLOCK))
    assert (rows[3] == 7000).all()


@dataclass
class Recorder:
    name: str
    log: list[tuple[str, int]]
    lengths: list[int] = field(default_factory=list)
    forwarded: int = 16

    def read(self, part: int) -> Spent:
        self.log.append((self.name, part))
        return Spent(part, 1.0, 2.0)


def test_the_ways_take_turns_and_the_order_turns_too(lm):
    log: list[tuple[str, int]] = []
    advanced: list[tuple[float, str]] = []
    matmul = ways.Matmul(lm)
    spent = ways.take_turns(
        [Recorder("a", log), Recorder("b", log)], matmul, lambda n, note: advanced.append((n, note))
    )
    assert log[:4] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert sorted(log) == [(name, part) for name in "ab" for part in range(PARTS)]
    assert spent["a"] == Spent(sum(range(PARTS)), PARTS, 2 * PARTS)
    assert sum(n for n, _ in advanced) == 32
    assert min(matmul.rates.values()) > 0
