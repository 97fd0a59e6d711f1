"""The benchmarks: the made corpus, the engines against each other, claims that fail."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatsae import cli
from chatsae.batch import Dialogue
from chatsae.bench import dedup, engines, result
from chatsae.bench.result import BenchResult, Claim
from chatsae.bench.samples import BaseFile, Samples, perturbed, rewritten, verbatim_turn, windows, write_base
from chatsae.console import Column
from chatsae.data.dedup import dedup_reference, ngrams
from chatsae.errors import UserError

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba (the extra `fast`)")


@pytest.fixture(scope="module")
def base() -> list[Dialogue]:
    return dedup.base_dialogues(("pydocs",), 120)


def test_seven_of_ten_copies_share_nothing_and_three_share_a_turn(base):
    long = [dialogue for dialogue in base if windows(dialogue)]
    copies = [(dialogue, copy) for dialogue in long for copy in range(1, 11)]
    shared = []
    for dialogue, copy in copies:
        made = perturbed(dialogue, copy)
        shared.append(not ngrams(dialogue, 20).isdisjoint(ngrams(made, 20)))
        assert shared[-1] == (verbatim_turn(dialogue, copy) is not None)
        assert windows(made) == windows(dialogue)
        if not shared[-1]:
            assert ngrams(made, 20).isdisjoint(ngrams(perturbed(dialogue, copy + 1), 20))
    assert len(copies) > 500
    assert sum(shared) / len(copies) == pytest.approx(0.3, abs=0.06)


@given(st.text("ab \n\t\u00a0\u3000\x1c", max_size=300))
def test_rewriting_changes_every_twenty_words_and_no_white_space(text):
    before, after = text.split(), rewritten(text, "~1").split()
    assert [word.removesuffix("~1") for word in after] == before
    assert rewritten(text, "").split() == before
    assert [i for i, word in enumerate(after) if word.endswith("~1")] == list(range(9, len(before), 10))


def test_samples_are_the_same_in_every_reading_and_every_process(base, tmp_path):
    samples = Samples(base, 300)
    once = [dialogue for batch in samples.batches() for dialogue in batch]
    assert once == [dialogue for batch in samples.batches() for dialogue in batch]
    assert once[35:] == [dialogue for batch in samples.batches(35) for dialogue in batch]
    assert len(once) == 300
    assert once[:120] == base
    assert samples.windows() == sum(map(windows, once))
    assert samples.seconds > 0
    write_base(base, tmp_path / "base.jsonl")
    file = BaseFile(tmp_path / "base.jsonl")
    again = [dialogue for batch in Samples(file, 300).batches() for dialogue in batch]
    assert [d.messages for d in again[:120]] == [d.messages for d in base]
    assert again[40:] == [dialogue for batch in Samples(file, 300).batches(40) for dialogue in batch]
    assert len(again) == 300


@pytest.mark.parametrize("engine", ["sets", "hash sets", "numpy"])
def test_an_engine_reports_what_it_kept(base, engine):
    row = engines.measured(base, engine, 200)
    made = [dialogue for batch in Samples(base, 200).batches() for dialogue in batch]
    keep = dedup_reference(made, 20)
    found = set().union(*(ngrams(d, 20) for d, kept in zip(made, keep, strict=True) if kept))
    assert 0 < row["kept"] == sum(keep) < 200
    assert row["kept_ngrams"] == len(found)
    assert row["cpu_s"] > 0
    assert row["peak_mb"] >= row["start_mb"] > 1


def test_a_python_set_stops_at_its_bound_and_says_so(base, monkeypatch):
    monkeypatch.setattr(engines, "resident_bytes", lambda: 9e9)
    row = engines.measured(base, "sets", 200)
    assert row["samples"] == 0
    assert "stopped after 0 samples at 8 GB" in row["note"]


def run(monkeypatch, capsys, *argv: str) -> tuple[int, dict]:
    """The exit code and the JSON of `chatsae bench`."""
    try:
        code = cli.main(["bench", *argv, "--json"])
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(capsys.readouterr().out)


@needs_numba
def test_dedup_prints_its_rows_and_judges_them(monkeypatch, capsys):
    code, facts = run(monkeypatch, capsys, "dedup", "--size", "300")
    assert list(facts) == ["bench", "machine", "conditions", "rows", "claims"]
    assert facts["bench"] == "dedup"
    assert facts["machine"]["cpu_count"] >= 1
    assert facts["conditions"] | {"sources": ["pydocs"], "samples": 300, "reference": "sets"} == facts["conditions"]
    rows = {row["engine"]: row for row in facts["rows"]}
    assert list(rows) == ["sets", "hash sets", "numpy", "numba", "bit maps", "duckdb", "datatrove"]
    same = {row["digest"] for name, row in rows.items() if "digest" in row and name != "datatrove"}
    assert len(same) == 1
    assert rows["bit maps"]["remembered"] < rows["numba"]["remembered"] == rows["sets"]["kept_ngrams"]
    for peer in ("duckdb", "datatrove"):
        if find_spec(peer) is None:
            assert rows[peer]["note"] == "skipped: pip install -r bench/requirements.txt"
        else:
            assert rows[peer]["samples"] == 300
    claims = facts["claims"]
    assert all(list(claim) == ["claim", "value", "goal", "holds"] for claim in claims)
    exact = sum("digest" in rows[name] for name in dedup.EXACT)
    assert claims[0] | {"value": exact, "goal": f">= {exact}", "holds": True} == claims[0]
    assert claims[1]["value"] == pytest.approx(rows["numba"]["samples_per_cpu_s"] / rows["sets"]["samples_per_cpu_s"])
    assert [claim["holds"] for claim in claims[2:]] == [True] * 3  # memory; speed depends on the load at this size
    assert code == (0 if claims[1]["holds"] else 1)


def measured(engine: str, keep: list[int], rate: int = 100, **facts) -> tuple[dict, np.ndarray]:
    row = {"engine": engine, "samples": len(keep), "kept": sum(keep), "samples_per_cpu_s": rate, "digest": "d"}
    return row | {"start_mb": 100.0, "peak_mb": 110.0} | facts, np.array(keep, np.bool_)


@pytest.fixture
def recorded(monkeypatch):
    """Rows in place of the processes; a test changes one of them."""
    memory = {"kept_ngrams": 1_000_000, "table_bytes": 12_000_000, "narrowed": 0}
    narrow = {"memory_gb": 0.006, "largest_batch_mb": 0.1, "narrowed": 1}
    rows = {
        "sets": measured("sets", [1, 0, 1], kept_ngrams=1_000_000),
        "hash sets": measured("hash sets", [1, 0, 1], kept_ngrams=1_000_000),
        "numpy": measured("numpy", [1, 0, 1]),
        "numba": measured("numba", [1, 0, 1], rate=600, **memory),
        "bit maps": measured("bit maps", [1, 0, 1], **narrow),
        "duckdb": measured("duckdb", [1, 0, 1]),
        "datatrove": measured("datatrove", [0, 1, 1]),
    }
    monkeypatch.setattr(dedup, "find_spec", lambda name: object())
    monkeypatch.setattr(dedup, "_conditions", lambda *arguments: {})
    asked = {}

    def measure(engine, path, count, memory_gb=None):
        asked[engine] = memory_gb
        if isinstance(rows[engine], Exception):
            raise rows[engine]
        return rows[engine]

    monkeypatch.setattr(dedup, "measure", measure)
    return rows, asked


def failing(found: BenchResult) -> list[str]:
    return [claim.claim.split(":")[0] for claim in found.claims if not claim.holds]


def test_the_claims_hold_on_good_rows(recorded):
    rows, asked = recorded
    found = dedup.bench_dedup(("pydocs",), 3)
    assert found.holds
    assert asked["bit maps"] == 0.008  # too little for a table of a million n-grams
    assert set(asked) == set(rows)
    datatrove = found.rows[-1]
    assert (datatrove["wrongly_dropped"], datatrove["wrongly_kept"]) == (1, 1)
    assert "kept_ngrams" not in datatrove
    assert found.rows[2]["kept_ngrams"] == 1_000_000  # the same dialogues have the same n-grams
    assert found.rows[2]["bytes_per_kept_ngram"] == 10
    assert "datatrove: drops 1 that the rule keeps, keeps 1 that it drops" in found.table()


@pytest.mark.parametrize(
    ("engine", "change", "wrong"),
    [
        ("duckdb", {"keep": [1, 1, 1]}, ["exact engines that keep what `sets` keeps"]),
        ("numba", {"samples_per_cpu_s": 499}, ["numba"]),
        ("numba", {"peak_mb": 425.5}, ["numba"]),  # 25 bytes a million times and 300 MB, above 100
        ("bit maps", {"peak_mb": 135.5}, ["bit maps"]),  # 6 MB of memory_gb, ten times 0.1 MB, and 28, above 100
        ("bit maps", {"narrowed": 0}, ["bit maps"]),
    ],
)
def test_each_claim_fails_on_a_bad_row(recorded, capsys, engine, change, wrong):
    rows, _ = recorded
    row, keep = rows[engine]
    keep = np.array(change.pop("keep", keep), np.bool_)
    rows[engine] = row | change, keep
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "dedup", "--size", "3"])
    assert stop.value.code == 1
    assert "NO" in capsys.readouterr().out
    assert failing(dedup.bench_dedup(("pydocs",), 3)) == wrong


def test_the_whole_process_is_judged_where_the_table_outweighs_the_libraries(recorded):
    rows, _ = recorded
    for engine in ("sets", "numba"):
        rows[engine][0]["kept_ngrams"] = 10_000_000
    rows["numba"][0]["peak_mb"] = 551.0  # 25 bytes ten million times and 300 MB make 550
    assert failing(dedup.bench_dedup(("pydocs",), 3)) == ["numba"]


def test_a_reference_that_stopped_is_held_to_its_beginning(recorded):
    rows, _ = recorded
    rows["sets"] = measured("sets", [1, 0], kept_ngrams=700_000)
    found = dedup.bench_dedup(("pydocs",), 3)
    assert found.conditions["reference"] == "hash sets"
    assert found.holds
    rows["sets"] = measured("sets", [1, 1], kept_ngrams=700_000)
    assert failing(dedup.bench_dedup(("pydocs",), 3)) == ["exact engines that keep what `hash sets` keeps"]
    rows["hash sets"] = rows["sets"]
    with pytest.raises(UserError, match="no Python set of 3 samples fits"):
        dedup.bench_dedup(("pydocs",), 3)


def test_bit_maps_get_more_memory_where_most_ngrams_occur_twice(recorded, monkeypatch):
    _, asked = recorded
    measure = dedup.measure

    def tight(engine, path, count, memory_gb=None):
        if memory_gb is not None and memory_gb < least:
            raise UserError("memory_gb is used up")
        return measure(engine, path, count, memory_gb)

    monkeypatch.setattr(dedup, "measure", tight)
    for least in (0.012, 0.019):
        dedup.bench_dedup(("pydocs",), 3)
        assert asked["bit maps"] == least
    least = 0.02
    with pytest.raises(UserError, match="memory_gb is used up"):
        dedup.bench_dedup(("pydocs",), 3)


def test_a_peer_that_fails_is_a_row_and_an_engine_of_ours_is_not(recorded, capsys):
    rows, _ = recorded
    rows["duckdb"] = UserError("no disk")
    found = dedup.bench_dedup(("pydocs",), 3)
    assert found.rows[5] == {"engine": "duckdb", "note": "failed: no disk"}
    assert found.claims[0].goal == ">= 5"
    rows["numpy"] = UserError("out of memory")
    assert cli.main(["bench", "dedup", "--size", "3"]) == 2
    assert "out of memory" in capsys.readouterr().err


def test_what_is_not_installed_is_named_with_its_remedy(recorded, monkeypatch, capsys):
    monkeypatch.setattr(dedup, "find_spec", lambda name: None)
    found = dedup.bench_dedup(("pydocs",), 3)
    notes = {row["engine"]: row.get("note") for row in found.rows}
    assert notes["numba"] == notes["bit maps"] == "skipped: pip install 'chatsae[fast]'"
    assert notes["duckdb"] == notes["datatrove"] == "skipped: pip install -r bench/requirements.txt"
    assert [claim.goal for claim in found.claims] == [">= 3"]
    assert "datatrove: skipped: pip install -r bench/requirements.txt" in capsys.readouterr().err


def test_mistakes_are_one_line(capsys, tmp_path):
    assert cli.main(["bench", "dedup", "--size", "-1"]) == 2
    assert "--size must be at least 0, not -1" in capsys.readouterr().err
    assert cli.main(["bench", "dedup", "--source", "pydoc"]) == 2
    assert "perhaps you meant pydocs" in capsys.readouterr().err
    (tmp_path / "base.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="engine sorted: KeyError: 'sorted'"):
        dedup.measure("sorted", tmp_path / "base.jsonl", 3)


def test_claims_and_results_as_text():
    assert Claim.at_least("a", 5, 5).holds
    assert Claim.at_least("a", 4.99, 5) == Claim("a", 4.99, ">= 5", False)
    assert Claim.at_most("a", 5.01, 5) == Claim("a", 5.01, "<= 5", False)
    assert Claim.at_most("a", 1, 1234.5).goal == "<= 1,234"
    found = result.BenchResult("b", [Column("engine")], {}, [{"engine": "x"}], [Claim("c", 1, ">= 2", False)])
    assert not found.holds
    assert found.facts()["claims"] == [{"claim": "c", "value": 1, "goal": ">= 2", "holds": False}]
    assert "NO" in found.table()
