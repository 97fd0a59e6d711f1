"""The v6 form against the installed sae_lens 6: same weights, same batches, its own trainer."""

import pytest
import torch
from sae_lens import (
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from chatsae.sae import SAE, StepState, init_sae, make_state, train_step
from chatsae.training.schedule import lr_at, sparsity_scale_at
from parity_inputs import BETAS, CASES, LR, LR_END, Case, batch

D_IN, D_SAE, N = 64, 512, 128
STEPS, WARMUP, DECAY, SPARSITY_WARMUP = 400, 20, 80, 12


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def theirs(case: Case, dtype: torch.dtype) -> SAETrainer:
    shared = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": str(dtype).removeprefix("torch."),
        "apply_b_dec_to_input": case.apply_b_dec_to_input,
    }
    torch.manual_seed(0)
    sae: TrainingSAE
    if case.architecture == "standard":
        sae = StandardTrainingSAE(
            StandardTrainingSAEConfig(**shared, l1_coefficient=case.coefficient, l1_warm_up_steps=SPARSITY_WARMUP)
        )
    else:
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                **shared,
                l0_coefficient=case.coefficient,
                l0_warm_up_steps=SPARSITY_WARMUP,
                jumprelu_bandwidth=case.bandwidth,
                jumprelu_init_threshold=case.init_threshold,
            )
        )
        # sae_lens keeps the threshold in float32 whatever the dtype
        sae.threshold.data = torch.full((D_SAE,), case.init_threshold, dtype=dtype)
    cfg = SAETrainerConfig(
        total_training_samples=N * STEPS,
        train_batch_size_samples=N,
        lr=LR,
        lr_end=LR_END,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=WARMUP,
        lr_decay_steps=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))


def ours(case: Case, dtype: torch.dtype, start: dict[str, torch.Tensor]) -> StepState:
    sae = SAE.create(case.spec("v6", D_IN, D_SAE), dtype=dtype)
    sae.load_file_tensors_(start)
    return make_state(sae, betas=BETAS, fused=False)


def run(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, StepState, SAETrainer]:
    """Losses of both, step by step."""
    trainer = theirs(case, dtype)
    state = ours(case, dtype, trainer.sae.state_dict())
    here, there = [], []
    for step in range(STEPS):
        x = batch(step, dtype, N, D_IN)
        there.append(trainer._train_step(trainer.sae, x).loss.detach())
        trainer.n_training_steps += 1
        lr = lr_at(step, total_steps=STEPS, lr=LR, lr_end=LR_END, warmup_steps=WARMUP, decay_steps=DECAY)
        scale = sparsity_scale_at(step, warmup_steps=SPARSITY_WARMUP)
        here.append(train_step(state, x, lr=lr, sparsity_scale=scale, clip_grad_norm=1.0).total)
    return torch.stack(here), torch.stack(there), state, trainer


def weights(state: StepState, trainer: SAETrainer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    mine = {name.replace("raw_threshold", "threshold"): p.detach() for name, p in state.sae.named_parameters()}
    yours = {name: p.detach() for name, p in trainer.sae.named_parameters()}
    assert list(mine) == list(yours)  # the order in which the clipped norm is summed
    return {name: (mine[name], yours[name]) for name in mine}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64(case):
    here, there, state, trainer = run(case, torch.float64)
    loss = ((here - there).abs() / there).max().item()
    worst = {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in weights(state, trainer).items()}
    print(
        f"\n{case.name} float64, {STEPS} steps: loss {loss:.1e}, " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
    )
    assert loss <= 1e-12
    assert max(worst.values()) <= 1e-12
    assert state.steps_since_fired.equal(trainer.n_forward_passes_since_fired.long())
    assert state.firing_counts.equal(trainer.act_freq_scores)
    if case.architecture == "jumprelu":
        assert (trainer.sae.threshold != case.init_threshold).any()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32_to_the_bit(case):
    here, there, state, trainer = run(case, torch.float32)
    equal = int((here == there).sum())
    print(f"\n{case.name} float32: {equal} of {STEPS} losses bit-equal, {there[0]:.3f} -> {there[-1]:.3f}")
    assert here.equal(there)
    for a, b in weights(state, trainer).values():
        assert a.equal(b)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_initial_weights(case):
    trainer = theirs(case, torch.float32)
    torch.manual_seed(0)
    sae = init_sae(case.spec("v6", D_IN, D_SAE))
    for name, tensor in sae.file_tensors().items():
        assert tensor.equal(trainer.sae.state_dict()[name]), name
