"""`chatsae bench eval`: what evaluating M SAEs of a layer costs in forwards of the model, beside sae_lens."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from chatsae import console
from chatsae.batch import TokenBatch
from chatsae.bench.models import VOCAB, check_size, random_checkpoint
from chatsae.bench.peer import HOW, find_interpreter
from chatsae.bench.result import BenchResult, Claim
from chatsae.config import SAESpec
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.evals.evaluate import evaluate_tokens
from chatsae.lm.forward import bare_tokens
from chatsae.lm.load import LanguageModel, load_tokenizer
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae

OURS, WHOLE, PEER = "chatsae", "chatsae, whole forwards", "sae_lens run_evals"
MANY = (1, 4, 16)

# The goals of the project: one pass and what is left of it per SAE, where others run the model four times for each.
SAVES = 1.4  # times the CPU time of whole forwards, at 16 SAEs in the middle of a model: there are 1.9 times as many
OVER_PEER = 4.0  # times the CPU time of sae_lens, at 16 SAEs: it runs 5.9 times as many forwards

_CONTEXT, _ROWS, _ROW_BATCH = 256, 8, 4
_FACTOR = 4  # d_sae / d_in
_SCRIPT = Path(__file__).with_name("sae_lens_evals.py")
_COLUMNS = (
    Column("way"),
    Column("saes"),
    Column("forwards", "forwards,\ncounted"),
    Column("formula", "by the\nformula"),
    Column("cpu_s", "CPU s"),
    Column("cpu_forwards", "CPU s in\nforwards"),
    Column("over_ours", "times\nours"),
)
_AGREE = {"explained_variance": "explained_variance", "l0": "l0", "loss": "ce_loss_without_sae"}
_TOLERANCE = 1e-3  # relative, in float32


def bench_eval(
    size: int = 0,
    *,
    peer: Path | None = None,
    many: Sequence[int] = MANY,
    layers: int = 0,
    rows: int = _ROWS,
    context: int = _CONTEXT,
) -> BenchResult:
    """Evaluate M SAEs on the middle layer of a random model, with the shortcuts and with whole forwards.

    `size` is d_in (0: 256), `layers` how many (0: as suits the size), `rows` sequences of `context` random tokens are
    evaluated on, `peer` is a Python with sae_lens, which gets the same checkpoint, SAEs and tokens.

    Raises:
        UserError: an argument cannot be used, or sae_lens fails in the interpreter asked for.
    """
    size = size or 256
    check_size(size)
    python = find_interpreter(peer)
    with tempfile.TemporaryDirectory() as scratch:
        parameters, depth = random_checkpoint("qwen2", size, layers, Path(scratch) / "model")
        load_tokenizer("demo").save_pretrained(Path(scratch) / "model")  # says which tokens are special
        layer = depth // 2 - 1
        lm = LanguageModel(Path(scratch) / "model", [layer], device="cpu", head=True)
        tokens = _tokens(rows, context)
        saes = _saes(lm, layer, max(many))
        evaluate_tokens(dict(list(saes.items())[:1]), lm, [_tokens(1, context)])  # warms up
        forward = _forward_cpu(lm, tokens)
        found: list[dict[str, Any]] = []
        for m in many:
            some = dict(list(saes.items())[:m])
            for way, shortcuts in ((OURS, True), (WHOLE, False)):
                found.append(_own_row(way, some, lm, tokens, forward, shortcuts=shortcuts))
                console.say(f"{way}: {m} SAEs in {found[-1]['cpu_s']:.1f} CPU s")
        found += _peer_rows(python, Path(scratch), lm, saes, tokens, found, forward, many, strict=peer is not None)
    for row in found:
        ours = next(r for r in found if r["way"] == OURS and r["saes"] == row["saes"])
        row["over_ours"] = round(row["cpu_s"] / ours["cpu_s"], 2) if "cpu_s" in row else None
    conditions = {"parameters": parameters, "layers": depth, "layer": layer, "d_in": size, "d_sae": _FACTOR * size}
    conditions |= {"tokens": rows * context, "threads": torch.get_num_threads(), "forward_cpu_s": round(forward, 3)}
    return BenchResult("eval", _COLUMNS, conditions, found, claims_of(found))


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What is promised of the evaluation, judged by these rows."""
    most = max(row["saes"] for row in rows)
    at = {row["way"]: row for row in rows if row["saes"] == most and "cpu_s" in row}
    ours = at[OURS]
    claims = [Claim.at_most(f"forwards counted for {most} SAEs", ours["forwards"], ours["formula"])]
    saved = at[WHOLE]["cpu_s"] / ours["cpu_s"]
    claims.append(Claim.at_least(f"CPU time of whole forwards over ours, {most} SAEs", round(saved, 3), SAVES))
    if PEER in at:
        times = at[PEER]["cpu_s"] / ours["cpu_s"]
        claims.append(Claim.at_least(f"CPU time of {PEER} over ours, {most} SAEs", round(times, 3), OVER_PEER))
    return claims


def formula(way: str, m: int, after: float) -> float:
    """Forwards of the whole model for m SAEs on a layer after which the share `after` of the blocks lies.

    Ours: 1 + (m + 1) (1 − l / L), an ablation for all of them counted whole; whole forwards: one, one per SAE, and
    again one for ablations; sae_lens: four per SAE, of which the one that only reads activations ends at the layer.
    """
    return {OURS: 1 + (m + 1) * after, WHOLE: 1.0 + m + 1, PEER: m * (3 + 1 - after)}[way]


def _tokens(rows: int, context: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    return bare_tokens(list(torch.randint(VOCAB - 1, (rows, context), generator=generator)))


def _saes(lm: LanguageModel, layer: int, n: int) -> dict[str, SAE]:
    made = SAESpec(
        name="", architecture="standard", form="v6", layer=layer, d_in=lm.d_in, d_sae=_FACTOR * lm.d_in,
        coefficient=1.0, lr=1e-3,
    )  # fmt: skip
    specs = [replace(made, name=f"L{layer}-{_FACTOR}x-standard-{i}") for i in range(n)]
    return {s.name: init_sae(s, torch.Generator().manual_seed(i)) for i, s in enumerate(specs)}


@torch.inference_mode()
def _forward_cpu(lm: LanguageModel, tokens: TokenBatch) -> float:
    """CPU seconds of one plain forward over the tokens, head included: the best of three."""
    ids = tokens.padded()

    def run() -> None:
        for part in ids.split(_ROW_BATCH):
            lm.model(input_ids=part, use_cache=False)

    return min(_cpu(run) for _ in range(3))


def _cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@contextmanager
def _counted(lm: LanguageModel) -> Iterator[list[int]]:
    """Tokens that blocks run on, one entry per block and forward."""
    ran: list[int] = []

    def count(module: nn.Module, args: tuple[object, ...], out: torch.Tensor) -> None:
        ran.append(out.shape[0] * out.shape[1])

    handles = [block.get_submodule("mlp").register_forward_hook(count) for block in lm.blocks]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _own_row(
    way: str, saes: Mapping[str, SAE], lm: LanguageModel, tokens: TokenBatch, forward: float, *, shortcuts: bool
) -> dict[str, Any]:
    budget = _ROW_BATCH * int(tokens.lengths[0])

    with _counted(lm) as ran:
        start = time.process_time()
        report = evaluate_tokens(saes, lm, [tokens], token_budget=budget, shortcuts=shortcuts, gsnr=False)
        cpu = time.process_time() - start
    after = 1 - (lm.layers[0] + 1) / lm.n_layers
    return {
        "way": way,
        "saes": len(saes),
        "forwards": round(sum(ran) / (len(tokens.input_ids) * lm.n_layers), 3),
        "formula": round(formula(way, len(saes), after), 3),
        "cpu_s": round(cpu, 4),
        "cpu_forwards": round(cpu / forward, 2),
        "figures": {name: report.rows[next(iter(saes))][name] for name in (*_AGREE, "delta_loss")},
    }


def _peer_rows(
    python: Path | None,
    scratch: Path,
    lm: LanguageModel,
    saes: Mapping[str, SAE],
    tokens: TokenBatch,
    own: Sequence[Mapping[str, Any]],
    forward: float,
    many: Sequence[int],
    *,
    strict: bool,
) -> list[dict[str, Any]]:
    """sae_lens on the first SAE, once its figures have been compared; it takes them one by one, so M cost M times it.

    Raises:
        UserError: it fails, and was asked for.
    """
    notes = [{"way": PEER, "saes": m, "note": f"skipped: {HOW}"} for m in many]
    if python is None:
        console.say(notes[0]["note"])
        return notes
    try:
        answer = run_peer(python, scratch, lm, [next(iter(saes.values()))], tokens)
        found = answer["saes"][0]
        _compare(found["figures"], own[0]["figures"])
    except UserError as error:
        if strict:
            raise
        return [note | {"note": f"failed: {error}"} for note in notes]
    after = 1 - (lm.layers[0] + 1) / lm.n_layers
    rows = []
    for m in many:
        cpu = found["cpu_s"] * m
        row = {"way": PEER, "saes": m, "formula": round(formula(PEER, m, after), 3), "cpu_s": round(cpu, 4)}
        rows.append(row | {"cpu_forwards": round(cpu / forward, 2), "versions": answer["versions"]})
    return rows


def run_peer(python: Path, scratch: Path, lm: LanguageModel, saes: Sequence[SAE], tokens: TokenBatch) -> dict[str, Any]:
    """What sae_lens' run_evals says of SAEs on sequences of one length, and what it cost.

    Raises:
        UserError: it fails.
    """
    rows, answer = scratch / "rows.safetensors", scratch / "answer.json"
    save_file({"tokens": tokens.padded()}, rows)
    directories = [scratch / f"sae-{i}" for i in range(len(saes))]
    for sae, directory in zip(saes, directories, strict=True):
        sae.save(directory, metadata={"hook_name": f"blocks.{sae.spec.layer}.hook_resid_post"})
    job = {"checkpoint": lm.name, "layer": lm.layers[0], "d_in": lm.d_in, "threads": torch.get_num_threads()}
    job |= {"rows": str(rows), "row_batch": _ROW_BATCH, "saes": [str(d) for d in directories], "answer": str(answer)}
    written = scratch / "evals.json"
    written.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run([python, "-I", _SCRIPT, written], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()[-1]
        raise UserError(f"bench eval: sae_lens: {last}")
    return json.loads(answer.read_text(encoding="utf-8"))


def _compare(theirs: Mapping[str, float], ours: Mapping[str, float]) -> None:
    """Refuse to time what gives other figures."""
    pairs = {name: (theirs[other], ours[name]) for name, other in _AGREE.items()}
    pairs["loss with the SAE"] = theirs["ce_loss_with_sae"], ours["loss"] + ours["delta_loss"]
    for name, (there, here) in pairs.items():
        if not abs(there - here) <= _TOLERANCE * max(abs(here), 1e-3):
            raise UserError(f"bench eval: sae_lens has another {name}: {there:.6g}, ours is {here:.6g}")
