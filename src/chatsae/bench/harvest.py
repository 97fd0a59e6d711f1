"""`chatsae bench harvest`: the ways to read activations, beside block training and sae_lens' ActivationsStore."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from chatsae import console
from chatsae.bench.models import FAMILIES, VOCAB, check_size, flops, random_checkpoint
from chatsae.bench.peer import HOW, Peer, find_interpreter
from chatsae.bench.result import BenchResult, Claim
from chatsae.bench.ways import (
    ARRIVAL,
    BLOCK,
    BLOCKS,
    Matmul,
    PeerRows,
    Reader,
    Sample,
    Spent,
    own_readers,
    peer_rows,
    sample_dialogues,
    take_turns,
)
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.lm.budget import choose_budget
from chatsae.lm.forward import forward
from chatsae.lm.load import LanguageModel
from chatsae.lm.placement import pick_device
from chatsae.lm.probe import ISOLATION_TOLERANCE, choose_way, relative_error

# The project's goals for the way chosen, on two cores with models of 10 to 50 M parameters: dialogue by dialogue it
# must be faster than block training in the same run, than naive batches, and than sae_lens made to do the same.
OVER_BLOCKS = 1.15
OVER_ARRIVAL = 2.5  # at the median length below
OVER_PEER = 3.0
OVER_BLOCKS_GPU = 1.0  # on a GPU it must cost no more than blocks
MEDIAN = 300  # tokens of a dialogue

PEER_BLOCKS, PEER_PADDED = f"sae_lens, block {BLOCK:,}", f"sae_lens, padded to {BLOCK:,}"
_SIZE = {"cpu": 256, "cuda": 896}
_TOKENS = {"cpu": 65_536, "cuda": 0}  # that each way reads; 0: the whole pool
_ROW_BATCH = {"cpu": 1, "cuda": 32}  # rows in a forward of sae_lens: on a CPU 1 to 8 are as fast; 32 is its default
_CLOCK = {"cpu": "cpu_s", "cuda": "wall_s"}
_COLUMNS = (
    Column("way"),
    Column("model"),
    Column("tokens_per_s", "tokens / s"),
    Column("tokens_per_cpu_s", "tokens / CPU s"),
    Column("padding"),
    Column("over_blocks_cpu", "/ block, by CPU s"),
    Column("over_blocks_wall", "/ block, by s"),
    Column("peak_share", "of matrix peak"),
)


def bench_harvest(
    size: int = 0,
    *,
    median: int = MEDIAN,
    peer: Path | None = None,
    families: Sequence[str] = FAMILIES,
    layers: int = 0,
    tokens: int = 0,
    pool: int = 4096,
    device: str = "auto",
) -> BenchResult:
    """Every way to read the same dialogues of random tokens, in turns, with a random model of each family.

    `size` is d_in (0: 256, on a GPU 896), `layers` how many (0: as suits the size), `median` the tokens of a dialogue,
    `tokens` what each way reads (0: 65,536, on a GPU all) of a `pool` of dialogues, `peer` a Python with sae_lens.

    Raises:
        UserError: an argument cannot be used, or sae_lens fails in the interpreter asked for.
    """
    if not 1 <= median <= BLOCK:
        raise UserError(f"median: expected the tokens of a dialogue, 1 to {BLOCK:,}, got {median}")
    kind = pick_device(device).type
    size = size or _SIZE[kind]
    check_size(size)
    python = find_interpreter(peer)
    if python is None:
        console.say(f"sae_lens: skipped: {HOW}")
    load, rows, models = _load(), [], []
    for family in families:
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            parameters, depth = random_checkpoint(family, size, layers, model)
            lm = LanguageModel(model, [max(depth - 2, 0)], device=device)
            name = f"{family}, {parameters / 1e6:.3g} M"
            budget = choose_budget(lm)
            sample = sample_dialogues(VOCAB - 1, median, pool, budget, tokens or _TOKENS[kind])
            found, facts = _measured(name, lm, sample, budget, python, strict=peer is not None)
        rows += found
        models.append({"model": name, "parameters": parameters, "d_in": size, "layers": depth, **facts})
    conditions = {"device": _device_name(kind), "threads": torch.get_num_threads(), "load": [load, _load()]}
    conditions |= {"median": median, "pool": pool, "judged_by": _CLOCK[kind], "models": models}
    return BenchResult("harvest", _COLUMNS, conditions, rows, claims_of(rows, _CLOCK[kind], median))


def claims_of(rows: Sequence[Mapping[str, Any]], clock: str, median: int) -> list[Claim]:
    """What is promised of the way chosen, judged by these rows."""
    claims = []
    for model in dict.fromkeys(row["model"] for row in rows):
        by_way = {row["way"]: row for row in rows if row["model"] == model and "tokens" in row}
        chosen = next(row for row in by_way.values() if row["chosen"])
        goals = {BLOCKS: OVER_BLOCKS_GPU}
        if clock == "cpu_s":
            goals = {BLOCKS: OVER_BLOCKS, ARRIVAL: OVER_ARRIVAL, PEER_PADDED: OVER_PEER}
            if median != MEDIAN:
                del goals[ARRIVAL]
        for way, goal in goals.items():
            if way in by_way:
                times = by_way[way][clock] / chosen[clock]  # for equally many tokens
                claims.append(Claim.at_least(f"{model}: {chosen['way']} (chosen), times `{way}`", times, goal))
    return claims


def _measured(
    name: str, lm: LanguageModel, sample: Sample, budget: int, python: Path | None, *, strict: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one model, and the facts about it."""
    way, own, notes = choose_way(lm), own_readers(lm, sample, budget), {}
    for reader in own:
        reader.warm_up()
    readers: list[Reader] = [*own]
    facts: dict[str, Any] = {"way": str(way), "layer": lm.layers[0], "dtype": str(lm.dtype).removeprefix("torch.")}
    facts |= {"dialogues": len(sample.dialogues), "tokens": sample.tokens, "token_budget": budget}
    with ExitStack() as stack:
        if python is None:
            notes = dict.fromkeys((PEER_BLOCKS, PEER_PADDED), f"skipped: {HOW}")
        else:
            try:
                peers, facts["sae_lens"] = _peers(stack, python, lm, sample)
                readers += peers
            except UserError as error:
                if strict:
                    raise
                notes = dict.fromkeys((PEER_BLOCKS, PEER_PADDED), f"failed: {error}")
        matmul = Matmul(lm)
        with console.progress(name, sum(reader.forwarded for reader in readers)) as advance:
            spent = take_turns(readers, matmul, advance)
    clock = _CLOCK[lm.device.type]
    facts["matrix_peak_gflops"] = round(matmul.rates[clock] / 1e9, 1)
    rows = [
        {"way": reader.name, "model": name, "chosen": reader.name == way.way}
        | _row(reader, spent[reader.name], spent[BLOCKS], flops(lm, reader.lengths) / matmul.rates[clock], clock)
        for reader in readers
    ]
    return rows + [{"way": peer, "model": name, "note": note} for peer, note in notes.items()], facts


def _row(reader: Reader, spent: Spent, blocks: Spent, least: float, clock: str) -> dict[str, Any]:
    """The numbers of one way; `least` are the seconds that its operations take at the matrix peak."""
    return {
        "tokens": spent.tokens,
        "padding": round(1 - spent.tokens / reader.forwarded, 4),
        "cpu_s": round(spent.cpu_s, 4),
        "wall_s": round(spent.wall_s, 4),
        "tokens_per_cpu_s": round(spent.tokens / spent.cpu_s),
        "tokens_per_s": round(spent.tokens / spent.wall_s),
        "over_blocks_cpu": round(blocks.cpu_s / spent.cpu_s, 3),
        "over_blocks_wall": round(blocks.wall_s / spent.wall_s, 3),
        "peak_share": round(least / getattr(spent, clock), 3),
    }


def _peers(stack: ExitStack, python: Path, lm: LanguageModel, sample: Sample) -> tuple[list[PeerRows], dict[str, str]]:
    """sae_lens on the same checkpoint and tokens, in blocks and exactly, once its activations have been compared.

    Raises:
        UserError: it fails, or reads other activations.
    """
    batch, pad_id = _ROW_BATCH[lm.device.type], VOCAB - 1
    tokens = {PEER_BLOCKS: sample.blocks, PEER_PADDED: sample.dialogues}
    rows = {name: peer_rows(sequences, pad_id, batch) for name, sequences in tokens.items()}
    job = {"checkpoint": lm.name, "layer": lm.layers[0], "d_in": lm.d_in, "pad_id": pad_id, "row_batch": batch}
    job |= {"dtype": str(lm.dtype).removeprefix("torch."), "device": str(lm.device)}
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    peer = stack.enter_context(Peer(python, scratch, rows, job))
    for name, sequences in tokens.items():
        ours = forward(lm, sequences.select(range(min(batch, len(sequences)))), "single")[0].float().cpu()
        theirs = peer.first[name]
        error = relative_error(theirs, ours) if theirs.shape == ours.shape else float("inf")
        if not error <= ISOLATION_TOLERANCE[lm.dtype]:
            raise UserError(f"bench harvest: `{name}` reads other activations (relative error {error:.1g})")
    found = [PeerRows(name, peer, s.lengths.tolist(), len(rows[name]), batch) for name, s in tokens.items()]
    return found, peer.versions


def _device_name(kind: str) -> str:
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def _load() -> float | None:
    """How many processes have wanted a core in the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
