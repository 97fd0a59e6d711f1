"""The installed sae_lens reads the activations that chatsae reads, in blocks and dialogue by dialogue."""

import sys
from pathlib import Path

import pytest

from chatsae.bench import ways
from chatsae.bench.harvest import PEER_BLOCKS, PEER_PADDED, bench_harvest


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_sae_lens_reads_the_same_activations_and_tokens(family, monkeypatch):
    """The benchmark compares the activations by itself, and ends when they differ."""
    monkeypatch.setitem(ways._MATMUL, "cpu", (128, 4))
    python = Path(sys.executable)
    found = bench_harvest(64, median=60, peer=python, families=(family,), layers=3, tokens=3000, pool=64, device="cpu")
    by_way = {row["way"]: row for row in found.rows}
    assert by_way[PEER_BLOCKS]["tokens"] == by_way[PEER_PADDED]["tokens"] == by_way["padded"]["tokens"]
    assert by_way[PEER_PADDED]["padding"] > 0.9
    assert [claim.goal for claim in found.claims] == [">= 1.15", ">= 3"]


def test_a_peer_that_reads_something_else_is_refused(monkeypatch):
    """The same sae_lens, one layer off."""
    from chatsae.bench import harvest
    from chatsae.errors import UserError

    honest = harvest.Peer
    monkeypatch.setattr(
        harvest, "Peer", lambda python, scratch, rows, job: honest(python, scratch, rows, job | {"layer": 1})
    )
    with pytest.raises(UserError, match="reads other activations"):
        bench_harvest(
            64, median=60, peer=Path(sys.executable), families=("llama",), layers=2, tokens=500, pool=32, device="cpu"
        )
