"""Schedules against torch's own schedulers, and the paper's constants."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from chatsae.config import BufferConfig, RunConfig, TrainConfig
from chatsae.training.schedule import Steps, buffer_capacity, lr_at, sparsity_scale_at, steps_of

LR, LR_END = 7e-5, 7e-6


def test_the_papers_constants_follow_from_the_default_shares():
    assert steps_of(TrainConfig()) == Steps(total=320_000, lr_warmup=16_000, lr_decay=64_000, sparsity_warmup=10_000)
    assert LR * TrainConfig().lr_end_share == pytest.approx(LR_END, rel=1e-15)


@pytest.mark.parametrize(("total", "warmup", "decay"), [(640, 32, 128), (100, 5, 20), (50, 1, 1)])
def test_lr_is_that_of_the_three_schedulers_in_sequence(total, warmup, decay):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedulers = [
        LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=max(warmup - 1, 1)),
        CosineAnnealingLR(optimizer, T_max=total - warmup - decay, eta_min=LR_END),
        LinearLR(optimizer, start_factor=LR_END / LR, end_factor=0.0, total_iters=decay),
    ]
    schedule = SequentialLR(optimizer, schedulers, milestones=[warmup, total - decay])
    for step in range(total):
        ours = lr_at(step, total_steps=total, lr=LR, lr_end=LR_END, warmup_steps=warmup, decay_steps=decay)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        optimizer.step()
        schedule.step()


def test_landmarks_of_the_papers_run():
    def lr(step: int) -> float:
        return lr_at(step, total_steps=320_000, lr=LR, lr_end=LR_END, warmup_steps=16_000, decay_steps=64_000)

    assert lr(0) == pytest.approx(LR / 16_000)
    assert lr(15_999) == pytest.approx(LR)
    assert lr(16_000) == LR
    assert lr(136_000) == pytest.approx((LR + LR_END) / 2)  # half of the cosine's 240,000 steps
    assert lr(256_000) == LR_END
    assert lr(288_000) == pytest.approx(LR_END / 2)
    assert 0 < lr(319_999) < LR_END / 60_000
    assert lr(320_000) == 0 == lr(400_000)


def test_phases_may_be_absent():
    def lr(step: int) -> float:
        return lr_at(step, total_steps=10, lr=1.0, lr_end=0.1, warmup_steps=0, decay_steps=0)

    assert lr(0) == 1.0
    assert lr(5) == pytest.approx(0.55)
    assert lr(10) == 0.1
    assert lr_at(4, total_steps=10, lr=1.0, lr_end=0.1, warmup_steps=5, decay_steps=5) == 1.0
    assert lr_at(5, total_steps=10, lr=1.0, lr_end=0.1, warmup_steps=5, decay_steps=5) == 0.1


def test_sparsity_scale():
    assert [sparsity_scale_at(k, warmup_steps=4) for k in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert sparsity_scale_at(0, warmup_steps=0) == 1


@pytest.mark.parametrize(
    ("capacity", "tokens", "held"),
    [
        (500_000, 40_960_000, 500_000),  # the paper's
        (500_000, 2_000_128, 500_000),
        (500_000, 20_000, 4_992),  # the default: a quarter of 156 batches
        (500_000, 300, 256),  # two batches
        (10_000, 20_000, 10_000),  # asked for, and needed
        (50_000, 20_000, 19_968),  # more than all
    ],
)
def test_the_buffer_is_never_larger_than_the_training_needs(capacity, tokens, held):
    config = RunConfig(buffer=BufferConfig(capacity=capacity), train=TrainConfig(tokens=tokens))
    assert buffer_capacity(config) == held
