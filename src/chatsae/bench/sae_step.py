"""`chatsae bench sae-step`: one training step of an SAE, ours beside those of other libraries and of plain PyTorch."""

import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from chatsae import console
from chatsae.bench.peer import answer, chosen_interpreter
from chatsae.bench.result import BenchResult, Claim
from chatsae.bench.step_cases import LR, Case, Matrix, Start, make_start
from chatsae.bench.step_limits import COUNTED, Limits, timed
from chatsae.bench.step_peers import (
    DICTIONARY_LEARNING,
    FAST,
    FASTER,
    MODULES,
    PLAIN,
    SAE_LENS,
    SIMPLE,
    Contender,
    Own,
    absent,
    contenders,
)
from chatsae.console import Column
from chatsae.errors import UserError

# What holds on a CPU with AVX2 (docs/performance.md): times the tokens per CPU second of another in the same run.
SPARSE = 64  # features active on a token, at most, for the goals of the sparse step
OVER_LIBRARIES = {256: 3.0, 896: 4.0}  # sae_lens and dictionary_learning at batch size 128, by d_in
OVER_SIMPLE = 2.0  # the best of the plain PyTorch steps, at batch size 128
OVER_SAE_LENS_LARGE = 4.5  # at batch sizes of 1,024 and more
NEVER_SLOWER = 1.0  # than the best of the plain PyTorch steps, in any case of some size
OVER_SAE_LENS_DENSE = 1.5  # standard SAEs of which half of the features are active

HOW = "no interpreter with the peers: `make .venv-peers/.done` sets one up in .venv-peers, --peer PATH names another"
_BESIDE = Path(__file__).parents[3] / ".venv-peers" / "bin" / "python"
_SCRIPT = Path(__file__).with_name("step_process.py")
_NEEDS = ("torch", "numba", "numpy", "rich", "jaxtyping", "safetensors")
_TURN = 0.15  # seconds of steps in a turn, one step at least
_SHORT_TURN = 2 * 10**9  # multiplications in the time that all turns take where steps are short
_LONG = 0.3  # seconds from which a step finds nothing of its own in a cache, whoever came before it
_SMALL = Case("standard", 16, 8, 32, 4)  # on which everyone is tried first
_EXACT = 1e-5  # relative error of a product; with one of more the simple step is not float32


def bench_sae_step(matrix: Matrix, *, peer: Path | None = None) -> BenchResult:
    """Everyone who is here in every case of `matrix`, in turns, in one process.

    `peer` is a Python that has sae_lens, dictionary_learning or sparsify; without it, that of `.venv-peers` beside the
    sources is used unless this one has one of them.

    Raises:
        UserError: an argument cannot be used, or the other interpreter fails.
    """
    matrix.cases("cpu")
    python = None if peer is None and any(find_spec(name) for name in MODULES) else _interpreter(peer)
    if python is None:
        facts = measured(matrix)
        if not any(find_spec(name) for name in MODULES):
            console.say(f"peers: skipped: {HOW}")
    else:
        facts = _measured_in(python, matrix)
    rows, conditions = facts["rows"], facts["conditions"]
    return BenchResult("sae-step", _columns(conditions["device"]), conditions, rows, claims_of(rows))


def claims_of(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What is promised of the step that a run takes, judged by these rows; a GPU has no goals yet."""
    claims = []
    for case in dict.fromkeys(row["case"] for row in rows if "ms" in row):
        by_name = {row["what"]: row for row in rows if row.get("case") == case and "ms" in row}
        ours = by_name.get(FAST)
        if ours is None or ours["clock"] != "CPU":
            continue
        for name, goal in _goals(ours).items():
            others = [row["ms"] for what, row in by_name.items() if what in _ASKED[name] and row["float32"]]
            if others:
                claims.append(Claim.at_least(f"{case}: times `{name}`", min(others) / ours["ms"], goal))
    return claims


_BEST_SIMPLE = "best simple PyTorch"
_ASKED = {
    SAE_LENS: (SAE_LENS,),
    DICTIONARY_LEARNING: (DICTIONARY_LEARNING,),
    _BEST_SIMPLE: (PLAIN, SIMPLE, FASTER["cpu"]),
}


def _goals(row: Mapping[str, Any]) -> dict[str, float]:
    """The goals of a case, by whom they are against."""
    large = row["batch_size"] >= 128 and row["d_in"] >= 256
    goals = {_BEST_SIMPLE: NEVER_SLOWER} if large else {}
    if row["l0"] == "dense":
        return goals | ({SAE_LENS: OVER_SAE_LENS_DENSE} if row["architecture"] == "standard" else {})
    if row["l0"] > SPARSE:
        return goals
    if row["batch_size"] >= 1024:
        return goals | {SAE_LENS: OVER_SAE_LENS_LARGE}
    if row["batch_size"] != 128 or row["d_in"] not in OVER_LIBRARIES:
        return goals
    goal = OVER_LIBRARIES[row["d_in"]]
    return {SAE_LENS: goal, DICTIONARY_LEARNING: goal, _BEST_SIMPLE: OVER_SIMPLE}


def measured(matrix: Matrix) -> dict[str, Any]:
    """Conditions and rows of a run in this process.

    Raises:
        UserError: an argument cannot be used.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases, rounds = matrix.cases(device), matrix.turns()
    load, rows, limits = _load(), [], []
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # of the other libraries
        warnings.simplefilter("ignore")
        console.say("loading the other libraries, compiling the step")
        small = dict.fromkeys(replace(_SMALL, architecture=case.architecture) for case in cases)
        for case in small if FAST not in absent(device) else ():
            _compile(case, device)
        for case in small:
            _Turns(case, device, 1).measure(lambda *_: None)
        with console.progress("sae-step", sum(_cost(case) for case in cases)) as advance:
            for case in cases:
                found, limit = _Turns(case, device, rounds).measure(advance)
                rows += found
                limits.append({"case": case.name, **limit})
    rows += [{"what": name, "note": note} for name, note in absent(device).items()]
    conditions: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "clock": "CPU time of the process" if device == "cpu" else "device events",
        "threads": torch.get_num_threads(),
        "load": [load, _load()],
        "rounds": rounds,
        "learning_rate": LR,
        "roofline": COUNTED,
        "limits": limits,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", *_installed())},
    }
    return {"conditions": conditions, "rows": rows}


class _Turns:
    """One case: everyone takes turns, every second round backwards."""

    def __init__(self, case: Case, device: str, rounds: int) -> None:
        self.case, self.device, self.rounds = case, device, rounds
        self.start: Start = make_start(case, device)
        self.limits = Limits(case, device)
        self.here: dict[str, Contender] = {}
        self.notes: dict[str, str] = {}
        self.steps: dict[str, int] = {}
        self.spent: dict[str, list[tuple[float, float]]] = {}

    def measure(self, advance: Callable[..., None]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The rows, and what the machine can do at most."""
        self._begin()
        share = _cost(self.case) / self.rounds
        for turn in range(self.rounds):
            self.limits.measure()
            for name in self.here if turn % 2 == 0 else reversed(self.here):
                self._turn(name)
            advance(share, self.case.name)
        return self._rows(), self.limits.facts()

    def _begin(self) -> None:
        """Everyone takes two steps, from moments that are not zero: those of rows that never fired cost nothing."""
        for name, make in contenders(self.case, self.device).items():
            try:
                contender = make(self.start, self.device)
                contender.step(self.start.batches[0])
                for state in contender.optimizer.state.values():
                    state["exp_avg"].fill_(1e-3)
                    state["exp_avg_sq"].fill_(1e-6)
                seconds = timed(self.device, lambda c=contender: c.step(self.start.batches[1]))[1]
            except Exception as error:
                if name not in MODULES:
                    raise
                self.notes[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
                continue
            self.here[name], self.spent[name] = contender, []
            self.steps[name] = max(round(_TURN / seconds), 1)

    def _turn(self, name: str) -> None:
        contender, batches, done = self.here[name], self.start.batches, len(self.spent[name])
        count = self.steps[name]
        if not self.spent[name] or self.spent[name][-1][1] < _LONG:
            contender.step(batches[done % len(batches)])  # its weights come into the cache

        def steps() -> None:
            for i in range(count):
                contender.step(batches[(done + i) % len(batches)])

        judged, wall = timed(self.device, steps)
        self.spent[name].append((judged / count, wall / count))

    def _rows(self) -> list[dict[str, Any]]:
        case, batches = self.case, self.start.batches
        ms = {name: 1e3 * statistics.median(judged for judged, _ in spent) for name, spent in self.spent.items()}
        shape = {"case": case.name, "architecture": case.architecture, "d_in": case.d_in, "d_sae": case.d_sae}
        shape |= {"batch_size": case.batch_size, "l0": case.l0}
        rows: list[dict[str, Any]] = []
        for name, contender in self.here.items():
            l0 = statistics.mean(contender.l0(batch) for batch in batches)
            exact = name != FASTER[self.device] or self.limits.error <= _EXACT
            rows.append(
                {"what": name, **shape}
                | {"l0_measured": round(l0) if l0 >= 100 else round(l0, 1), "took": contender.took, "ms": ms[name]}
                | {"wall_ms": 1e3 * statistics.median(wall for _, wall in self.spent[name])}
                | {"clock": "CPU" if self.device == "cpu" else "device", "float32": exact}
                | {"tokens_per_s": round(1e3 * case.batch_size / ms[name])}
                | {"over_sae_lens": ms[SAE_LENS] / ms[name] if SAE_LENS in ms else None}
                | {"roofline_share": 1e3 * self.limits.least(l0) / ms[name]}
                | {"threads": torch.get_num_threads()}
                | (
                    {"note": f"its products are off by {self.limits.error:.1g}: not float32"}
                    if self.device == "cpu" and not exact
                    else {}
                )
            )
        return rows + [{"what": name, **shape, "note": note} for name, note in self.notes.items()]


def _interpreter(asked: Path | None) -> Path | None:
    """The one asked for, or that of `.venv-peers`; None where there is none.

    Raises:
        UserError: the one asked for is no Python, or lacks what is needed.
    """
    return chosen_interpreter(asked, _BESIDE, "one of the peers", _problem)


def _problem(python: Path) -> str | None:
    """Why this is no interpreter that can run the benchmark with a peer."""
    names = [*_NEEDS, *MODULES]
    code = f"import json, importlib.util as u; print(json.dumps([n for n in {names!r} if u.find_spec(n) is None]))"
    printed, problem = answer(python, code)
    if problem is not None:
        return problem
    try:
        missing = json.loads(printed)
    except json.JSONDecodeError as error:
        return str(error)
    if set(missing) >= set(MODULES):
        return f"it has none of {', '.join(MODULES)}"
    needed = [name for name in missing if name in _NEEDS]
    return f"it has no {', '.join(needed)}" if needed else None


def _measured_in(python: Path, matrix: Matrix) -> dict[str, Any]:
    """`measured` in another interpreter; its progress goes to the same terminal."""
    command = [str(python), "-I", str(_SCRIPT), json.dumps(asdict(matrix))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"bench sae-step: {python} ended with code {done.returncode}")
    facts = json.loads(done.stdout.splitlines()[-1])
    if "error" in facts:
        raise UserError(facts["error"])
    return facts


def _cost(case: Case) -> int:
    """What a turn of everyone takes, roughly, in multiplications."""
    return _SHORT_TURN + case.weights * (case.batch_size + 64)


def _installed() -> list[str]:
    names = {"numba": "numba", **MODULES}
    return [package for name, package in names.items() if find_spec(name)]


def _columns(device: str) -> tuple[Column, ...]:
    cpu = "CPU " if device == "cpu" else ""
    return (
        Column("what"),
        Column("architecture", "SAE"),
        Column("d_in"),
        Column("d_sae"),
        Column("batch_size", "B"),
        Column("l0_measured", "L0"),
        Column("took"),
        Column("ms", f"{cpu}ms / step"),
        Column("tokens_per_s", f"tokens / {cpu}s"),
        Column("over_sae_lens", "x sae_lens"),
        Column("roofline_share", "of roofline"),
        Column("threads"),
    )


def _compile(case: Case, device: str) -> None:
    """Some steps of ours, of either kind, before another library is loaded: one of them puts a function of its own in
    place of math.fabs, which numba then cannot compile."""
    start = make_start(case, device)
    own = Own(start, device)
    for batch in start.batches[:1] * 4:
        own.step(batch)


def _load() -> float | None:
    """How many processes have wanted a core in the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
