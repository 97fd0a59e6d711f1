"""Memory of a training step beyond weights and moments: step_memory.py [D_IN D_SAE L0 BATCH_SIZE ...]. Prints JSON.

Every row is measured in a process of its own, over three steps; Linux only.
"""

import json
import subprocess
import sys
from pathlib import Path

from chatsae.bench.engines import peak_bytes, resident_bytes
from chatsae.bench.step_cases import Case, make_start
from chatsae.bench.step_peers import Own
from chatsae.runs import environment
from chatsae.sae.choose import StepKind

DEFAULT = ("3584", "28672", "64", "128", "1024")
KINDS: dict[str, StepKind] = {"fast": "fast", "plain": "plain"}


def measured(case: Case, kind: StepKind) -> dict[str, object]:
    """Megabytes: of weights and their moments, of the encoder's output, and at the peak beyond the former."""
    warm = Own(make_start(Case(case.architecture, 8, 8, 16, 4), "cpu"), "cpu", kind)
    for _ in range(3):  # what is loaded and compiled first is not of the step
        warm.step(make_start(Case(case.architecture, 8, 8, 16, 4), "cpu").batches[0])
    start = make_start(case, "cpu")
    own = Own(start, "cpu", kind)
    start.tensors.clear()
    without_moments = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    for i in range(3):
        own.step(start.batches[i % len(start.batches)])
    moments = 2 * sum(p.numel() * 4 for group in own.optimizer.param_groups for p in group["params"])
    beyond = peak_bytes() - (without_moments or 0) - moments
    return {
        "what": f"chatsae {kind}",
        "took": own.took,
        "batch_size": case.batch_size,
        "weights_and_moments_mb": round(1.5 * moments / 1e6),
        "encoder_output_mb": round(4 * case.batch_size * case.d_sae / 1e6, 1),
        "beyond_mb": round(beyond / 1e6, 1),
    }


def main(argv: list[str]) -> None:
    if argv[:1] == ["one"]:
        d_in, d_sae, l0, batch_size = map(int, argv[2:])
        case = Case("standard", d_in, d_sae // d_in, batch_size, l0)
        print(json.dumps(measured(case, KINDS[argv[1]])))
        return
    d_in, d_sae, l0, *batch_sizes = argv or DEFAULT
    rows = []
    for batch_size in batch_sizes:
        for kind in KINDS:
            command = [sys.executable, __file__, "one", kind, d_in, d_sae, l0, batch_size]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout))
    conditions = {"d_in": int(d_in), "d_sae": int(d_sae), "l0": int(l0)}
    print(json.dumps({"bench": "memory", "machine": environment(), "conditions": conditions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
