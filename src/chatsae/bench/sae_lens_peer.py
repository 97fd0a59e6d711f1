"""sae_lens' ActivationsStore over rows of token ids, in an interpreter of its own that has sae_lens.

Run as `python -I sae_lens_peer.py JOB`; needs nothing of chatsae. JOB is a JSON file: checkpoint, layer, d_in, dtype,
device, threads, pad_id (a token id that no row means), row_batch (rows per forward), rows (by name, a safetensors file
of `tokens` [rows, context_size]), sample (a file to write). Prints a JSON line when it is ready, having written the
activations of the first batch of each, and then one for each line `NAME BATCHES` that it reads: tokens delivered
(padding removed, as the store does), CPU seconds and seconds.
"""

import json
import sys
import time
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def load(job: dict[str, Any]) -> Any:
    """The checkpoint as sae_lens wraps what is not TransformerLens', only the layer asked for hooked."""
    wrap = import_module("sae_lens.load_model").HookedProxyLM
    transformers = import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=dtype).to(job["device"])
    return wrap(model.eval(), None, hook_names=[hook(job)])


def hook(job: dict[str, Any]) -> str:
    """The output of the block, by its module path."""
    return f"model.layers.{job['layer']}"


def store(job: dict[str, Any], model: Any, rows: torch.Tensor) -> Any:
    """A store that reads each row as one context and leaves out padding."""
    device = torch.device(job["device"])
    return import_module("sae_lens.training.activations_store").ActivationsStore(
        model=model,
        dataset=import_module("datasets").Dataset.from_dict({"tokens": rows.numpy()}),
        streaming=False,
        hook_name=hook(job),
        hook_head_index=None,
        context_size=rows.shape[1],
        d_in=job["d_in"],
        n_batches_in_buffer=2,
        total_training_tokens=1,
        store_batch_size_prompts=job["row_batch"],
        train_batch_size_tokens=rows.shape[1],
        prepend_bos=False,
        normalize_activations="none",
        device=device,
        dtype=job["dtype"],
        exclude_special_tokens=torch.tensor([job["pad_id"]], device=device),
    )


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints

    def answer(facts: dict[str, Any]) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    model = load(job)
    rows = {name: load_file(file)["tokens"] for name, file in job["rows"].items()}
    first = {name: store(job, model, tokens).get_filtered_llm_batch() for name, tokens in rows.items()}
    save_file({name: acts.float().cpu().contiguous() for name, acts in first.items()}, job["sample"])
    stores = {name: store(job, model, tokens) for name, tokens in rows.items()}
    names = ("sae-lens", "transformer-lens", "torch", "transformers")
    answer({name: metadata.version(name) for name in names})
    for line in sys.stdin:
        name, batches = line.rsplit(maxsplit=1)
        wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
        for _ in range(int(batches)):
            tokens += len(stores[name].get_filtered_llm_batch())
        spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        answer({"tokens": tokens, **spent})


if __name__ == "__main__":
    main(sys.argv[1])
