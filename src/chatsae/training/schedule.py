"""Learning rate and sparsity coefficient as pure functions of the step; the first step is 0."""

import math
from dataclasses import dataclass

from chatsae.config import BufferConfig, RunConfig, TrainConfig


@dataclass(frozen=True)
class Steps:
    """Lengths of the phases of a training, in steps."""

    total: int
    lr_warmup: int
    lr_decay: int
    sparsity_warmup: int


def steps_of(config: TrainConfig) -> Steps:
    """The phases as the shares of `config` give them; the defaults at the paper's length give the paper's numbers."""
    total = config.tokens // config.batch_size
    return Steps(
        total=total,
        lr_warmup=round(config.lr_warmup_share * total),
        lr_decay=round(config.lr_decay_share * total),
        sparsity_warmup=round(config.sparsity_warmup_share * total),
    )


def buffer_capacity(config: RunConfig) -> int:
    """Activations that the mixing buffer of a training holds, which fills it before the first step.

    At the default of buffer.capacity no more than a quarter of what the training takes; at another value no more than
    all of it; always two batches.
    """
    asked, taken = config.buffer.capacity, steps_of(config.train).total * config.train.batch_size
    most = taken // 4 if asked == BufferConfig().capacity else taken
    return min(asked, max(most, 2 * config.train.batch_size))


def lr_at(step: int, *, total_steps: int, lr: float, lr_end: float, warmup_steps: int, decay_steps: int) -> float:
    """Linear warm-up to `lr`, cosine to `lr_end`, linear decay to zero (paper, training parameters).

    The closed form of what sae_lens builds from LinearLR, CosineAnnealingLR and LinearLR.
    """
    decay_start = total_steps - decay_steps
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step < decay_start:
        progress = (step - warmup_steps) / (decay_start - warmup_steps)
        return lr_end + (lr - lr_end) * (1 + math.cos(math.pi * progress)) / 2
    return lr_end * max(total_steps - step, 0) / decay_steps if decay_steps else lr_end


def sparsity_scale_at(step: int, *, warmup_steps: int) -> float:
    """The factor of the sparsity coefficient: 0 at the first step, 1 from `warmup_steps` on."""
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
