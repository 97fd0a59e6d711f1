"""sae_lens' own trainer on recorded activations, in an interpreter that has it; see tools/end_to_end.py.

Run as `python end_to_end_peer.py JOB`; needs nothing of chatsae. JOB is a JSON file: acts (a safetensors file of
`train` [M, d_in]), start (initial weights), out (a safetensors file to write), seed, threads, tokens, batch_size, lr,
lr_end, lr_warmup, lr_decay and sparsity_warmup (steps), architecture, coefficient, bandwidth, init_threshold,
apply_b_dec_to_input.
Prints a JSON line: wall and CPU seconds of `SAETrainer.fit`.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def batches(rows: Tensor, *, batch_size: int, seed: int) -> Iterator[Tensor]:
    """The rows in random order, in whole batches, pass after pass; both trainers get these."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for i in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[order[i : i + batch_size]]


def training_sae(job: dict[str, Any], start: dict[str, Tensor]) -> Any:
    """An SAE of sae_lens with the given weights."""
    lens = import_module("sae_lens")
    d_in, d_sae = start["W_enc"].shape
    shared = {"d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": job["apply_b_dec_to_input"]}
    if job["architecture"] == "standard":
        own = {"l1_coefficient": job["coefficient"], "l1_warm_up_steps": job["sparsity_warmup"]}
        sae = lens.StandardTrainingSAE(lens.StandardTrainingSAEConfig(**shared, **own))
    else:
        own = {"l0_coefficient": job["coefficient"], "l0_warm_up_steps": job["sparsity_warmup"]}
        own |= {"jumprelu_bandwidth": job["bandwidth"], "jumprelu_init_threshold": job["init_threshold"]}
        sae = lens.JumpReLUTrainingSAE(lens.JumpReLUTrainingSAEConfig(**shared, **own))
    for name, p in sae.named_parameters():
        p.data.copy_(start["raw_threshold" if name == "threshold" else name])
    return sae


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
    config, trainer = import_module("sae_lens.config"), import_module("sae_lens.training.sae_trainer")
    sae = training_sae(job, load_file(job["start"]))
    rows = load_file(job["acts"])["train"]
    cfg = config.SAETrainerConfig(
        total_training_samples=job["tokens"],
        train_batch_size_samples=job["batch_size"],
        lr=job["lr"],
        lr_end=job["lr_end"],
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=job["lr_warmup"],
        lr_decay_steps=job["lr_decay"],
        logger=config.LoggingConfig(log_to_wandb=False),
    )
    provider = batches(rows, batch_size=job["batch_size"], seed=job["seed"])
    theirs = trainer.SAETrainer(cfg=cfg, sae=sae, data_provider=provider)
    wall, cpu = time.perf_counter(), time.process_time()
    trained = theirs.fit()
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    named = {"raw_threshold" if name == "threshold" else name: p for name, p in trained.named_parameters()}
    save_file({name: p.detach().contiguous() for name, p in named.items()}, job["out"])
    answers.write(json.dumps(seconds | {"sae_lens": metadata.version("sae-lens"), "steps": theirs.n_training_steps}))


if __name__ == "__main__":
    main(sys.argv[1])
