"""sae_lens' run_evals on SAEs and rows of token ids, in an interpreter of its own that has sae_lens.

Run as `python -I sae_lens_evals.py JOB`; needs nothing of chatsae. JOB is a JSON file: checkpoint, layer, d_in,
threads, rows (a safetensors file of `tokens` [rows, context_size]), row_batch (rows per forward), saes (directories),
answer (a file to write): a JSON object with the versions, and for each SAE its figures, CPU seconds and seconds.
"""

import json
import sys
import time
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def store(job: dict[str, Any], model: Any, rows: torch.Tensor) -> Any:
    """A store that gives each row as one context."""
    return import_module("sae_lens.training.activations_store").ActivationsStore(
        model=model,
        dataset=import_module("datasets").Dataset.from_dict({"tokens": rows.numpy()}),
        streaming=False,
        hook_name=f"model.layers.{job['layer']}",
        hook_head_index=None,
        context_size=rows.shape[1],
        d_in=job["d_in"],
        n_batches_in_buffer=2,
        total_training_tokens=1,
        store_batch_size_prompts=job["row_batch"],
        train_batch_size_tokens=rows.shape[1],
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )


def load_model(job: dict[str, Any]) -> Any:
    """The checkpoint as sae_lens wraps what is not TransformerLens', only the layer asked for hooked."""
    wrap = import_module("sae_lens.load_model").HookedProxyLM
    transformers = import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32)
    return wrap(model.eval(), None, hook_names=[f"model.layers.{job['layer']}"])


def evaluate(job: dict[str, Any], model: Any, rows: torch.Tensor, directory: str) -> dict[str, Any]:
    """Every figure of run_evals for one SAE, on all rows; none of their tokens is excluded."""
    evals = import_module("sae_lens.evals")
    sae = import_module("sae_lens").SAE.load_from_disk(directory, device="cpu")
    sae.cfg.metadata.hook_name = f"model.layers.{job['layer']}"
    batches = len(rows) // job["row_batch"]
    config = evals.get_eval_everything_config(
        batch_size_prompts=job["row_batch"],
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
    )
    scaler = import_module("sae_lens.training.activation_scaler").ActivationScaler()
    data = store(job, model, rows)
    wall, cpu = time.perf_counter(), time.process_time()
    figures, _ = evals.run_evals(sae, data, model, scaler, config, exclude_special_tokens=False)
    spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    return {"figures": {name: value for group in figures.values() for name, value in group.items()}, **spent}


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    rows = load_file(job["rows"])["tokens"]
    model = load_model(job)
    evaluate(job, model, rows[: job["row_batch"]], job["saes"][0])  # warms up
    versions = {name: metadata.version(name) for name in ("sae-lens", "torch", "transformers")}
    saes = [evaluate(job, model, rows, directory) for directory in job["saes"]]
    Path(job["answer"]).write_text(json.dumps({"versions": versions, "saes": saes}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
