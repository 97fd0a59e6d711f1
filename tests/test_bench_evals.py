"""`chatsae bench eval` at a tiny size: forwards as the formula says, claims from rows, sae_lens where it is."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from chatsae import cli
from chatsae.bench import evals, peer
from chatsae.bench.evals import OURS, PEER, WHOLE, bench_eval, claims_of, formula
from chatsae.errors import UserError

TINY = {"many": (1, 3), "rows": 8, "context": 48, "layers": 4}


@pytest.fixture(autouse=True)
def no_peer(monkeypatch, tmp_path):
    monkeypatch.setattr(peer, "_BESIDE", tmp_path / "absent")


def run(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(evals, "bench_eval", partial(bench_eval, **TINY))
    try:
        return cli.main(["bench", "eval", "--size", "32", *flags])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_forwards_are_counted_and_the_claims_follow(monkeypatch, capsys):
    code = run(monkeypatch, "--json")
    facts = json.loads(capsys.readouterr().out)
    rows = {(row["way"], row["saes"]): row for row in facts["rows"]}
    assert set(rows) == {(way, m) for way in (OURS, WHOLE, PEER) for m in (1, 3)}
    assert facts["conditions"]["layer"] == 1
    # each more SAE runs the blocks after the layer once, or all of them; what probes cost is the same for both counts
    for way, each in ((OURS, 0.5), (WHOLE, 1.0)):
        assert rows[way, 3]["forwards"] - rows[way, 1]["forwards"] == pytest.approx(2 * each, abs=2e-3)
        assert rows[way, 1]["forwards"] > 1 + each
    assert [rows[OURS, m]["formula"] for m in (1, 3)] == [2, 3]
    assert [rows[PEER, m]["note"] for m in (1, 3)] == [f"skipped: {peer.HOW}"] * 2
    ours, whole = rows[OURS, 3], rows[WHOLE, 3]
    assert whole["over_ours"] == pytest.approx(whole["cpu_s"] / ours["cpu_s"], rel=0.01)
    assert ours["cpu_forwards"] == pytest.approx(ours["cpu_s"] / facts["conditions"]["forward_cpu_s"], rel=0.2)
    assert ours["figures"] == pytest.approx(whole["figures"], rel=1e-4)
    assert [claim["goal"] for claim in facts["claims"]] == ["<= 3", ">= 1.4"]
    assert facts["claims"][0]["value"] == ours["forwards"]
    assert code == (0 if all(claim["holds"] for claim in facts["claims"]) else 1)


def row(way: str, saes: int, cpu_s: float, **more: float) -> dict:
    return {"way": way, "saes": saes, "cpu_s": cpu_s, **more}


def test_each_claim_is_computed_from_its_row():
    rows = [row(OURS, 16, 2.0, forwards=9.4, formula=9.5), row(WHOLE, 16, 2.8), row(PEER, 16, 7.9), row(OURS, 4, 0.1)]
    claims = claims_of(rows)
    assert [(c.value, c.goal, c.holds) for c in claims] == [
        (9.4, "<= 9.5", True),
        (1.4, ">= 1.4", True),
        (3.95, ">= 4", False),
    ]
    rows[2] = {"way": PEER, "saes": 16, "note": "skipped"}
    assert len(claims_of(rows)) == 2


def test_the_formula_is_that_of_the_note():
    assert formula(OURS, 16, 0.5) == 9.5
    assert formula(WHOLE, 16, 0.5) == 18
    assert formula(PEER, 16, 0.5) == 56  # about 4 M: the forward that reads activations ends at the layer
    assert formula(PEER, 1, 1.0) == 3


def test_a_peer_that_fails_or_finds_other_figures_is_told(monkeypatch):
    monkeypatch.setattr(evals, "find_interpreter", lambda asked: Path(sys.executable))
    least = {"many": (1,), "rows": 4, "context": 8, "layers": 2}
    found = bench_eval(32, **least)
    assert found.rows[2]["note"] == "failed: bench eval: sae_lens: ModuleNotFoundError: No module named 'sae_lens'"
    assert len(found.claims) == 2
    with pytest.raises(UserError, match="sae_lens: ModuleNotFoundError"):
        bench_eval(32, peer=Path(sys.executable), **least)

    def other(python, scratch, lm, saes, tokens):
        figures = {"explained_variance": 0.1, "l0": 1.0, "ce_loss_without_sae": 9.0, "ce_loss_with_sae": 9.1}
        return {"versions": {}, "saes": [{"figures": figures, "cpu_s": 1.0, "wall_s": 1.0}]}

    monkeypatch.setattr(evals, "run_peer", other)
    assert "sae_lens has another explained_variance: 0.1, ours is" in bench_eval(32, **least).rows[2]["note"]


def test_a_peer_that_agrees_gets_its_rows(monkeypatch):
    monkeypatch.setattr(evals, "find_interpreter", lambda asked: Path(sys.executable))
    monkeypatch.setattr(evals, "_compare", lambda theirs, ours: None)
    answer = {"versions": {"sae-lens": "6"}, "saes": [{"figures": {}, "cpu_s": 2.0, "wall_s": 3.0}]}
    monkeypatch.setattr(evals, "run_peer", lambda *_: answer)
    found = bench_eval(32, many=(1, 2), rows=4, context=8, layers=2)
    assert [(r["saes"], r["cpu_s"]) for r in found.rows if r["way"] == PEER] == [(1, 2.0), (2, 4.0)]
    assert found.claims[2].claim == f"CPU time of {PEER} over ours, 2 SAEs"
