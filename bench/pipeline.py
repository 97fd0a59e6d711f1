"""Tokens per second of each stage on this machine: harvest, mixing buffer, SAE step. Prints JSON."""

import json
import time
from collections.abc import Callable, Iterator

import torch

from chatsae.batch import ActivationBatch
from chatsae.buffer import mix
from chatsae.config import SAEConfig, sae_specs
from chatsae.data.reading import read
from chatsae.data.render import render
from chatsae.lm.load import LanguageModel
from chatsae.runs import environment
from chatsae.sae.grid import build_grid
from chatsae.sae.step import make_state, train_step

BATCH = 128


def seconds_per_call(call: Callable[[], object], budget: float = 3.0) -> float:
    """Mean time of a call after three calls to warm up, over about `budget` seconds."""
    for _ in range(3):
        call()
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < budget:
        call()
        n += 1
    return (time.perf_counter() - start) / n


def main() -> None:
    lm = LanguageModel("demo", [3])
    rows = []
    tokens = render(read("pydocs"), lm.tokenizer)
    batches = [next(harvest) for harvest in [lm.harvest(tokens, pool=1024)] for _ in range(8)]
    harvest = lm.harvest(render(read("pydocs"), lm.tokenizer), pool=1024)
    next(harvest)
    start, n = time.perf_counter(), 0
    for batch in harvest:
        n += batch.acts.shape[1]
        if time.perf_counter() - start > 5:
            break
    rows.append({"stage": "render + harvest", "tokens_per_second": n / (time.perf_counter() - start)})

    def endless() -> Iterator[ActivationBatch]:
        while True:
            yield from batches

    mixer = mix(endless(), capacity=50_000, batch_size=BATCH)
    rows.append({"stage": "mix", "tokens_per_second": BATCH / seconds_per_call(lambda: next(mixer))})
    for form in ("paper", "v6"):
        specs = sae_specs(SAEConfig(form=form), layers=lm.layers, d_in=lm.d_in)
        for name, sae in build_grid(specs, seed=0).items():
            state = make_state(sae)
            seconds = seconds_per_call(
                lambda state=state: train_step(state, next(mixer)[0], lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)
            )
            rows.append({"stage": f"step {name} {form}", "ms": 1e3 * seconds, "tokens_per_second": BATCH / seconds})
    conditions = {"d_in": lm.d_in, "batch_size": BATCH, "threads": torch.get_num_threads()}
    print(json.dumps({"bench": "pipeline", "machine": environment(), "conditions": conditions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
