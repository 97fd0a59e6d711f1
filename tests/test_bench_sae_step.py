"""`chatsae bench sae-step` at tiny sizes: the L0 asked for, equal work, claims from rows, the peers where they are."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae import cli
from chatsae.bench import sae_step, step_limits, step_peers
from chatsae.bench.sae_step import bench_sae_step, claims_of
from chatsae.bench.step_cases import LR, Case, Matrix, make_start
from chatsae.bench.step_limits import Limits
from chatsae.bench.step_peers import DICTIONARY_LEARNING, FAST, PLAIN, SAE_LENS, SIMPLE, SPARSIFY, Own, Simple
from chatsae.errors import UserError
from chatsae.sae.base import SAE
from chatsae.sae.jumprelu import JumpReLUSAE

ONE_DNN = step_peers.FASTER["cpu"]
OWN = [PLAIN, FAST, SIMPLE, ONE_DNN]
TINY = ["--d-in", "32", "--batch-sizes", "64", "--rounds", "2"]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Small matrices, short turns, and no peers unless a test brings them."""
    monkeypatch.setitem(step_limits._MATRIX, "cpu", 256)
    monkeypatch.setattr(sae_step, "_TURN", 0.005)
    monkeypatch.setattr(sae_step, "_BESIDE", tmp_path / "absent")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(*flags: str) -> int:
    """The exit code of the command."""
    try:
        return cli.main(["bench", "sae-step", *flags])
    except SystemExit as stop:
        return int(stop.code or 0)


@settings(max_examples=15, deadline=None)
@given(
    architecture=st.sampled_from(["standard", "jumprelu"]),
    d_in=st.sampled_from([8, 24, 40]),
    factor=st.sampled_from([2, 4, 8]),
    batch_size=st.sampled_from([16, 100, 1024]),
    share=st.floats(0.001, 0.5),
)
def test_the_l0_is_the_one_asked_for(architecture, d_in, factor, batch_size, share):
    case = Case(architecture, d_in, factor, batch_size, max(round(share * d_in * factor), 1))
    start = make_start(case, "cpu")
    tokens = torch.cat(start.batches)
    assert {len(batch) for batch in start.batches} == {batch_size}
    assert tokens.norm(dim=1).allclose(torch.tensor(float(d_in)).sqrt())
    sae = SAE.create(start.spec)
    sae.load_file_tensors_(start.tensors)
    firings = (sae.encode(tokens) > 0).sum(0)
    assert firings.sum().item() / len(tokens) == pytest.approx(case.active, abs=0.01)
    assert firings.max() - firings.min() <= 2


def test_a_dense_case_is_one_of_which_half_fires():
    case = Case("jumprelu", 32, 8, 64, "dense")
    assert case.active == 128
    start = make_start(case, "cpu")
    own = Own(start, "cpu")
    assert sum(map(own.l0, start.batches)) / len(start.batches) == pytest.approx(128, abs=0.1)
    own.step(start.batches[0])
    assert own.took == "dense"


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_everyone_here_takes_the_same_step(architecture, monkeypatch):
    """With a learning rate that shows, the weights agree; plain PyTorch simplifies the gradient of θ."""
    monkeypatch.setattr(step_peers, "LR", 1e-4)
    start = make_start(Case(architecture, 32, 8, 64, 8), "cpu")
    plain, fast, simple = Own(start, "cpu", "plain"), Own(start, "cpu"), Simple(start, "cpu", "high")
    saes = [plain._state.sae, fast._state.sae]
    assert simple.loss(start.batches[0]).item() == pytest.approx(saes[0].loss(start.batches[0], 1.0).total.item(), 1e-5)
    for batch in start.batches[:3]:
        for contender in (plain, fast, simple):
            contender.step(batch)
    assert (plain.took, fast.took, simple.took) == ("dense", "sparse", "dense")
    weights = [sae.file_tensors() for sae in saes] + [{name: p.detach() for name, p in simple.p.items()}]
    assert (weights[0]["W_dec"] - start.tensors["W_dec"]).abs().max() > 1e-4
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=5e-6)
        torch.testing.assert_close(weights[2][name], weights[0][name], rtol=0, atol=5e-6)
    if isinstance(saes[0], JumpReLUSAE):
        assert not weights[2]["threshold"].equal(start.tensors["threshold"])


def test_the_learning_rate_leaves_the_l0_alone():
    start = make_start(Case("standard", 32, 8, 64, 16), "cpu")
    own = Own(start, "cpu")
    for i in range(200):
        own.step(start.batches[i % len(start.batches)])
    assert sum(map(own.l0, start.batches)) / len(start.batches) == pytest.approx(16, abs=0.05)
    assert 0 < LR < 1e-8


def test_what_is_measured_by_default_and_with_flags():
    few = Matrix().cases("cpu")
    assert len(few) == len(set(few)) == 8
    assert {(case.d_in, case.batch_size, case.l0) for case in few if case.architecture == "standard"} == {
        (256, 128, 64),
        (256, 128, "dense"),
        (256, 1024, 64),
        (256, 1024, "dense"),
        (896, 128, 64),
    }
    every = Matrix(full=True)
    assert (len(every.cases("cpu")), len(every.cases("cuda"))) == (96, 144)
    assert (Matrix().turns(), every.turns(), Matrix(rounds=3).turns()) == (9, 5, 3)
    one = Matrix(l0=("dense", "16"), architectures=("jumprelu",)).cases("cpu")
    assert one == [Case("jumprelu", 256, 8, 128, "dense"), Case("jumprelu", 256, 8, 128, 16)]
    assert Matrix(full=True, d_in=(8,)).cases("cpu")[-1] == Case("jumprelu", 8, 16, 4096, "dense")
    assert {case.l0 for case in Matrix(full=True, d_in=(8,)).cases("cpu")} == {16, 64, "dense"}  # 256 is too many


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--l0", "many"], "l0: expected numbers of active features or dense, got 'many'"),
        (["--l0", "0"], "l0: expected numbers of active features or dense, got '0'"),
        (["--d-in", "4", "--l0", "17"], "l0: expected at most half of the features of an SAE, got 17"),
        (["--d-in", "0"], "--d-in must be at least 1, not 0"),
        (["--batch-sizes", "-1"], "--batch-sizes must be at least 1, not -1"),
        (["--architectures", "topk"], "architectures: expected standard or jumprelu, got 'topk'"),
        (["--rounds", "-1"], "--rounds must be at least 0, not -1"),
        (["--peer", "no/python"], "peer: no/python is no file; a Python interpreter that has one of the peers"),
        (
            ["--peer", sys.executable],
            f"peer: {sys.executable} is no Python interpreter that has one of the peers: it has none of sae_lens",
        ),
    ],
)
def test_a_bad_flag_is_one_line(capsys, flags, message):
    assert run(*flags) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_peers(capsys):
    code = run(*TINY, "--l0", "16", "dense", "--json")
    printed = capsys.readouterr()
    assert f"peers: skipped: {sae_step.HOW}" in printed.err
    facts = json.loads(printed.out)
    assert (facts["bench"], facts["claims"], code) == ("sae-step", [], 0)
    conditions = facts["conditions"]
    assert (conditions["device"], conditions["rounds"], conditions["threads"]) == ("cpu", 2, torch.get_num_threads())
    assert len(conditions["limits"]) == 4
    assert all(limit["matrix_gflops"] > 0 < limit["memory_gb_per_s"] for limit in conditions["limits"])
    skipped = {row["what"]: row["note"] for row in facts["rows"][16:]}
    assert skipped == dict.fromkeys([SAE_LENS, DICTIONARY_LEARNING, SPARSIFY], "skipped: not installed")
    for i in range(4):
        rows = facts["rows"][4 * i : 4 * i + 4]
        assert [row["what"] for row in rows] == OWN
        assert len({row["case"] for row in rows}) == 1
        assert [row["took"] for row in rows] == ["dense", "dense" if i % 2 else "sparse", "dense", "dense"]
        for row in rows:
            assert row["l0_measured"] == pytest.approx(128 if i % 2 else 16, abs=0.1)
            assert row["tokens_per_s"] == pytest.approx(64 / (row["ms"] / 1e3), rel=0.01)
            assert 0 < row["roofline_share"] < 1
            assert row["over_sae_lens"] is None


def row(what: str, ms: float, **other: object) -> dict:
    facts = {"what": what, "ms": ms, "clock": "CPU", "float32": True} | other
    shape = {"architecture": "standard", "d_in": 256, "batch_size": 128, "l0": 64}
    facts = shape | facts
    return facts | {"case": " ".join(str(facts[key]) for key in shape)}


def judged(*rows: dict) -> list[tuple[str, float, bool]]:
    return [(claim.goal, claim.value, claim.holds) for claim in claims_of(rows)]


def test_each_claim_is_computed_from_its_rows():
    rows = [row(PLAIN, 5.0), row(FAST, 2.0), row(SIMPLE, 4.5), row(ONE_DNN, 3.9), row(SAE_LENS, 6.0)]
    rows += [row(DICTIONARY_LEARNING, 5.9), row(SPARSIFY, 0.1)]
    assert judged(*rows) == [(">= 3", 3.0, True), (">= 3", 2.95, False), (">= 2", 1.95, False)]
    rows[3]["float32"] = False  # then it is not of the float32 steps
    assert judged(*rows)[2] == (">= 2", 2.25, True)
    assert judged(*rows[:4]) == [(">= 2", 2.25, True)]
    assert judged(row(SAE_LENS, 8.0), {"what": FAST, "note": "skipped: numba is not installed"}) == []


def test_the_goals_are_those_of_the_case():
    def goals(**shape: object) -> list[str]:
        rows = [row(what, 1.0, **shape) for what in (FAST, PLAIN, SAE_LENS, DICTIONARY_LEARNING)]
        return [claim.goal for claim in claims_of(rows)]

    assert goals() == goals(architecture="jumprelu") == goals(l0=16) == [">= 3", ">= 3", ">= 2"]
    assert goals(d_in=896) == [">= 4", ">= 4", ">= 2"]
    assert goals(batch_size=1024) == goals(batch_size=4096, architecture="jumprelu") == [">= 1", ">= 4.5"]
    assert goals(l0="dense") == goals(l0="dense", batch_size=1024) == [">= 1", ">= 1.5"]
    assert goals(l0=256) == goals(d_in=512) == goals(l0="dense", architecture="jumprelu") == [">= 1"]
    assert goals(clock="device") == goals(d_in=64) == goals(d_in=512, batch_size=64) == []


@pytest.mark.parametrize(("goal", "code", "said"), [(1e9, 1, "NO"), (0.0, 0, "yes")])
def test_the_exit_code_is_that_of_the_claims(monkeypatch, capsys, goal, code, said):
    monkeypatch.setattr(sae_step, "OVER_LIBRARIES", {32: goal})
    monkeypatch.setattr(sae_step, "OVER_SIMPLE", goal)
    flags = [*TINY, "--batch-sizes", "128", "--architectures", "standard", "--l0", "8"]
    assert run(*flags) == code
    claims = capsys.readouterr().out.split("claims")[1]
    assert f"standard 32 x 256, B 128, L0 8: times `{sae_step._BEST_SIMPLE}`" in claims
    assert said in claims


def test_products_that_are_not_float32_are_said_and_not_counted(monkeypatch, capsys):
    monkeypatch.setattr(sae_step, "_EXACT", -1.0)
    assert run(*TINY, "--architectures", "standard", "--json") == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert "not float32" in rows[ONE_DNN]["note"]
    assert [rows[name]["float32"] for name in OWN] == [True, True, True, False]


def test_a_peer_that_fails_is_a_row_and_our_own_step_an_error(monkeypatch):
    def broken(start, device):
        raise RuntimeError("no such luck\nat all")

    small = Matrix(d_in=(32,), batch_sizes=(64,), rounds=1, architectures=("standard",), l0=("8",))
    monkeypatch.setattr(sae_step, "contenders", lambda case, device: {PLAIN: Own, SAE_LENS: broken})
    found = bench_sae_step(small)
    assert [row.get("note") for row in found.rows[:2]] == [None, "failed: RuntimeError: no such luck"]
    assert "sae_lens: failed: RuntimeError: no such luck" in found.table()
    monkeypatch.setattr(sae_step, "contenders", lambda case, device: {PLAIN: broken})
    with pytest.raises(RuntimeError, match="no such luck"):
        bench_sae_step(small)


def test_the_roofline_counts_what_it_says():
    case = Case("standard", 32, 8, 64, 16)
    limits = Limits(case, "cpu")
    limits.measure()
    limits._product, limits._adam = 1.0, 3.0
    of_one_product = 2 * 256**3
    assert limits.least(16) == pytest.approx(3 + (2 * 64 * 32 * 256 + 8 * 64 * 16 * 32) / of_one_product)
    assert limits.facts() == {"matrix_gflops": 0.0, "memory_gb_per_s": 0.0}
    assert limits.error < 1e-2


def test_another_interpreter_that_ends_or_objects_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sae_step, "_interpreter", lambda asked: Path(sys.executable))
    monkeypatch.setattr(sae_step, "_SCRIPT", tmp_path / "script.py")
    for script, message in (
        ("raise SystemExit(3)", "ended with code 3"),
        ('print(\'{"error": "d_in: x"}\')', "d_in: x"),
    ):
        (tmp_path / "script.py").write_text(script, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            bench_sae_step(Matrix())


def test_the_peers_take_part(monkeypatch, capsys):
    beside = Path(sae_step.__file__).parents[3] / ".venv-peers" / "bin" / "python"
    if not beside.is_file():
        pytest.skip("no .venv-peers: make .venv-peers/.done")
    monkeypatch.setattr(sae_step, "_BESIDE", beside)
    code = run(*TINY, "--rounds", "1", "--l0", "16", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert code == 0
    assert facts["conditions"]["versions"]["sae-lens"] == "6.54.12"
    for architecture in ("standard", "jumprelu"):
        rows = {row["what"]: row for row in facts["rows"] if row["architecture"] == architecture}
        assert list(rows) == [*OWN, SAE_LENS, DICTIONARY_LEARNING, SPARSIFY]
        assert not any("note" in row for row in rows.values())
        for name, found in rows.items():
            assert found["ms"] > 0
            assert found["over_sae_lens"] == pytest.approx(rows[SAE_LENS]["ms"] / found["ms"])
            most = 16 if name == SPARSIFY else 16.1  # TopK of what is positive
            assert 12 < found["l0_measured"] <= most
