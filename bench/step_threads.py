"""Training steps on one thread, on two, and two SAEs side by side on one thread each. Run on an idle machine.

Prints JSON. `busy` is CPU seconds per second: above the number of cores' worth of threads, someone waits for someone.
Two SAEs: one after the other with all threads each, or side by side in two Python threads with one thread each.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from chatsae.bench.step_cases import Case, make_start
from chatsae.bench.step_peers import Own
from chatsae.runs import environment


def measured(step: Callable[[], object], seconds: float) -> dict[str, float]:
    """Median milliseconds of a call, and the CPUs it keeps busy."""
    step()
    walls, start, cpu = [], time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        step()
        walls.append(time.perf_counter() - before)
    busy = (time.process_time() - cpu) / (time.perf_counter() - start)
    return {"ms": round(1e3 * statistics.median(walls), 3), "busy": round(busy, 2)}


def rows(case: Case, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds per step of one SAE, and per pair of steps of two SAEs."""
    start = make_start(case, "cpu")
    saes, batch = [Own(start, "cpu") for _ in range(2)], start.batches[0]
    found = {}
    with ThreadPoolExecutor(2) as pool:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[f"one SAE, {threads} threads"] = measured(lambda: saes[0].step(batch), seconds)
            found[f"two in turn, {threads} threads"] = measured(lambda: [own.step(batch) for own in saes], seconds)
        torch.set_num_threads(1)
        list(pool.map(lambda _: torch.set_num_threads(1), range(2)))
        beside = measured(lambda: list(pool.map(lambda own: own.step(batch), saes)), seconds)
        found["two side by side, 1 thread each"] = beside
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, nargs="+", default=[256, 896])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--l0", nargs="+", default=["64", "dense"])
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    results = []
    for d_in in args.d_in:
        for batch_size in args.batch_sizes:
            for l0 in args.l0:
                case = Case("standard", d_in, 8, batch_size, "dense" if l0 == "dense" else int(l0))
                conditions = {"d_in": d_in, "batch_size": batch_size, "l0": l0}
                results.append(conditions | {"rows": rows(case, args.seconds)})
    print(json.dumps({"bench": "step threads", "machine": environment(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
