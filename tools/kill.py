"""Kill verbs at random moments and file operations, resume them, and compare every file with an uninterrupted run.

Each kill follows from the seed and its number: `python tools/kill.py --seed 0 --only 17` repeats number 17. Processes
are forked from one that has imported everything. Prints each difference and the place of the files; exits 1 if any.
"""

import argparse
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from killing.operations import Kill, Operations
from killing.trees import differences, tree
from killing.world import BASE, COMMANDS, corpus, small

AGAIN = 0.25
"""Share of kills after which the resumed run is killed as well."""

MOMENTS = 0.35
"""Share of kills at a moment; the others are at a file operation."""

LIMIT_SECONDS = 600.0
"""A process that takes longer hangs; generous, for a machine may be busy with other things."""


FEW = 400
"""A run that imports more modules than that is made again, to know how much time it takes without."""

IMPORTED = ("training.session", "training.prepare", "features.judging", "page.write", "sweep")
"""Parts of chatsae that are imported before the first process is forked."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code, or minus the signal; file operations and CPU seconds until then."""

    code: int
    operations: int
    cpu_seconds: float
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run of a verb: how it ended, and its files."""

    ended: Ended
    files: dict[str, Any]


def run(verb: str, place: Path, kill: Kill | None = None) -> Ended:
    """One command of a verb in a directory, in a process of its own."""
    report = place.parent / "ended.txt"
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _child(verb, place, kill, report)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (done := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            raise SystemExit(f"chatsae {' '.join(COMMANDS[verb])} in {place} did not end in {LIMIT_SECONDS:.0f} s")
        time.sleep(0.005)
    said = report.read_text().split() if report.exists() else []
    usage = done[2]
    operations, modules = (int(said[0]), tuple(said[1:])) if said else (0, ())
    return Ended(os.waitstatus_to_exitcode(done[1]), operations, usage.ru_utime + usage.ru_stime, modules)


def _child(verb: str, place: Path, kill: Kill | None, report: Path) -> None:
    code = 3
    try:
        os.chdir(place)
        log = os.open(place.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        small()
        operations = Operations(place, kill)
        operations.install()
        from chatsae.cli import main

        code = main(COMMANDS[verb])
        report.write_text(" ".join([str(operations.n), *sys.modules]))
    except BaseException:  # noqa: BLE001 - it is shown, and nothing of the parent may run here
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Worlds:
    """The start and the uninterrupted end of every verb, made once, in a scratch directory."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._known: dict[str, Reference] = {}
        _import([f"chatsae.{name}" for name in IMPORTED])
        self._base = scratch / "base"
        corpus(self._base)

    def start(self, verb: str) -> Path:
        """A fresh directory in which a verb can be run; always at the same path, which some files name."""
        for needed in BASE[verb]:
            self.reference(needed)
        shutil.rmtree(self.scratch / "work", ignore_errors=True)
        place = self.scratch / "work" / "place"
        shutil.copytree(self._base, place)
        for needed in BASE[verb]:
            shutil.copytree(self.scratch / "after" / needed, place, dirs_exist_ok=True)
        return place

    def reference(self, verb: str) -> Reference:
        """What a verb does and leaves where nothing interrupts it."""
        if verb not in self._known:
            place = self.start(verb)
            ended = run(verb, place)
            if _import(ended.modules) > FEW:  # which took time that later processes need not take
                place = self.start(verb)
                ended = run(verb, place)
            if ended.code:
                raise SystemExit(f"chatsae {' '.join(COMMANDS[verb])} ended with {ended.code}:\n{self.log()}")
            self._known[verb] = Reference(ended, tree(place))
            shutil.copytree(place, self.scratch / "after" / verb)
        return self._known[verb]

    def log(self) -> str:
        """What the processes of the latest run said."""
        return (self.scratch / "work" / "log.txt").read_text(errors="replace")[-4000:]


def _import(names: Sequence[str]) -> int:
    """Import modules of a process into this one; how many there were to import."""
    before = len(sys.modules)
    for name in names:
        if name not in sys.modules and name.split(".")[0] not in ("__main__", "__mp_main__"):
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001 - some modules only come into being with another
                continue
    return len(sys.modules) - before


def kill_of(rng: random.Random, reference: Ended) -> Kill:
    """A moment or an operation, somewhere in a run like the reference."""
    if rng.random() < MOMENTS:
        return Kill(cpu_seconds=max(rng.random() * reference.cpu_seconds, 1e-3))
    return Kill(operation=rng.randint(1, reference.operations), when=rng.choice(("before", "middle", "after")))


def one(worlds: Worlds, verb: str, rng: random.Random) -> tuple[list[str], str]:
    """Kill a verb once or twice, resume it, and compare: the differences, and what was done."""
    reference = worlds.reference(verb)
    place = worlds.start(verb)
    done = []
    for _ in range(2 if rng.random() < AGAIN else 1):
        kill = kill_of(rng, reference.ended)
        ended = run(verb, place, kill)
        done.append(f"{kill} -> {ended.code}")
        if ended.code == 0:
            break
        if ended.code not in (-signal.SIGKILL, -signal.SIGPROF):
            return [f"the run ended with {ended.code}:\n{worlds.log()}"], "; ".join(done)
        shutil.copytree(place, place.parent / f"killed-{len(done)}", symlinks=True)
    ended = run(verb, place)
    if ended.code:
        return [f"the resumed run ended with {ended.code}:\n{worlds.log()}"], "; ".join(done)
    return differences(reference.files, tree(place)), "; ".join(done)


def _cpu_seconds(whose: int) -> float:
    used = resource.getrusage(whose)
    return used.ru_utime + used.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kills; 1 if a file differs anywhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--verb", choices=list(COMMANDS), help="this verb only; by default all in turn")
    parser.add_argument("--only", type=int, help="only the kill of this number")
    options = parser.parse_args(argv)
    verbs = [options.verb] if options.verb else list(COMMANDS)
    numbers = range(options.n) if options.only is None else [options.only]
    scratch = Path(tempfile.mkdtemp(prefix="chatsae-kill-")).resolve()
    worlds, start, failed = Worlds(scratch), time.monotonic(), 0
    for done, number in enumerate(numbers, start=1):
        verb = verbs[number % len(verbs)]
        found, what = one(worlds, verb, random.Random(f"{options.seed}/{verb}/{number}"))
        if found:
            failed += 1
            kept = scratch / f"failed-{number}"
            shutil.copytree(scratch / "work", kept)
            print(f"\n{number}: chatsae {' '.join(COMMANDS[verb])}: {what}; files in {kept}")
            print("\n".join(f"  {line}" for line in found[:40]), flush=True)
        left = (time.monotonic() - start) / done * (len(numbers) - done)
        print(f"\r{done} of {len(numbers)} kills, {failed} differ, {left:.0f} s left   ", end="", flush=True)
    taken, spent = time.monotonic() - start, sum(map(_cpu_seconds, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    print(
        f"\nseed {options.seed}: {len(numbers) - failed} of {len(numbers)} equal after a kill, "
        f"in {taken:.0f} s ({spent:.0f} s of CPU time)"
    )
    if not failed:
        shutil.rmtree(scratch)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
