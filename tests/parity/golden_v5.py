"""Record what sae_lens 5.10.7 computes: initial weights, loss curves, final weights, a geometric median.

Run it in an environment of its own (README.md); it writes tests/golden/sae_lens_5.10.7.safetensors.
"""

import sys
from pathlib import Path

import sae_lens
import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.training.geometric_median import compute_geometric_median
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file

from parity_inputs import (
    BETAS,
    CASES,
    D_IN,
    D_SAE,
    DECAY,
    LR,
    LR_END,
    SPARSITY_WARMUP,
    STEPS,
    WARMUP,
    Case,
    N,
    batch,
    machine,
)

OUT = Path(__file__).parents[1] / "golden" / "sae_lens_5.10.7.safetensors"


def trainer(case: Case, dtype: str) -> SAETrainer:
    """The trainer of sae_lens itself, without a language model: batches are handed to its step."""
    cfg = LanguageModelSAERunnerConfig(
        architecture=case.architecture,
        d_in=D_IN,
        d_sae=D_SAE,
        dtype=dtype,
        apply_b_dec_to_input=case.apply_b_dec_to_input,
        l1_coefficient=case.coefficient,
        l1_warm_up_steps=SPARSITY_WARMUP,
        jumprelu_bandwidth=case.bandwidth,
        jumprelu_init_threshold=case.init_threshold,
        lr=LR,
        lr_end=LR_END,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=WARMUP,
        lr_decay_steps=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        train_batch_size_tokens=N,
        training_tokens=N * STEPS,
        log_to_wandb=False,
        wandb_id="none",
        verbose=False,
    )
    torch.manual_seed(0)
    sae = TrainingSAE(TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict()))
    return SAETrainer(model=None, sae=sae, activation_store=None, save_checkpoint_fn=None, cfg=cfg)


def record(case: Case, dtype: str) -> dict[str, torch.Tensor]:
    """Initial weights (the same for all cases), all losses, final weights and steps since each feature fired."""
    run = trainer(case, dtype)
    tensors = {f"init/{dtype}/{name}": p.detach().clone() for name, p in run.sae.named_parameters() if "W_" in name}
    losses = []
    for step in range(STEPS):
        losses.append(run._train_step(run.sae, batch(step, run.sae.dtype)).loss.detach())
        run.n_training_steps += 1
    here = f"{case.name}/{dtype}/"
    tensors |= {f"{here}{name}": p.detach() for name, p in run.sae.named_parameters()}
    tensors[f"{here}losses"] = torch.stack(losses)
    tensors[f"{here}steps_since_fired"] = run.n_forward_passes_since_fired.long()
    return tensors


def main() -> None:
    if sae_lens.__version__ != "5.10.7":
        sys.exit(f"sae_lens 5.10.7 is needed, this is {sae_lens.__version__}")
    torch.set_num_threads(1)
    tensors: dict[str, torch.Tensor] = {}
    for case in CASES:
        for dtype in ("float32", "float64"):
            tensors |= record(case, dtype)
            losses = tensors[f"{case.name}/{dtype}/losses"]
            print(f"{case.name} {dtype}: {losses[0]:.6f} -> {losses[-1]:.6f}")
    tensors["geometric_median"] = compute_geometric_median(batch(0, torch.float32, rows=500)).median
    facts = {"sae_lens": sae_lens.__version__, "machine": machine()}
    save_file(tensors, OUT, metadata=facts)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {facts}")


if __name__ == "__main__":
    main()
