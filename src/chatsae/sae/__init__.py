"""Sparse autoencoders: the two architectures in their two forms, the training step, and files that sae_lens reads."""

from chatsae.sae.base import SAE, Losses
from chatsae.sae.grid import build_grid
from chatsae.sae.init import geometric_median, init_sae, set_b_dec_
from chatsae.sae.jumprelu import JumpReLUSAE
from chatsae.sae.standard import StandardSAE
from chatsae.sae.step import StepState, make_state, train_step

__all__ = [
    "SAE",
    "JumpReLUSAE",
    "Losses",
    "StandardSAE",
    "StepState",
    "build_grid",
    "geometric_median",
    "init_sae",
    "make_state",
    "set_b_dec_",
    "train_step",
]
