"""Whether the model reads ahead in a thread while the SAEs train, and how many threads either gets."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from chatsae.config import RunConfig, sae_specs
from chatsae.lm.tap import Decoder

_ALIKE = 0.3, 0.65
"""Shares of the model in the work of a run between which, on a CPU, half of the threads for either beats all for each
in turn: small operations gain little from a second thread. `chatsae bench overlap` measures it."""


def overlaps(config: RunConfig, lm: Decoder) -> bool:
    """Whether a run of this recipe reads ahead; the results are the same to the bit at the same number of threads.

    auto: on a CPU with threads to share where model and SAEs have about as much to do. That is by arithmetic, so that a
    recipe takes the same way every time.
    """
    if config.harvest.overlap != "auto":
        return config.harvest.overlap == "on"
    low, high = _ALIKE
    return lm.device.type == "cpu" and torch.get_num_threads() > 1 and low < lm_share(config, lm) < high


def lm_share(config: RunConfig, lm: Decoder) -> float:
    """An estimate of the model's share in the work of a run.

    In operations that the best matrix product takes as long for: 4 per weight and token in the model's blocks, which
    reach half of that speed; in an SAE with few active features 4 per weight of its encoder and token, and 600 per
    weight and batch, of which Adam's memory traffic is most (docs/performance.md); the plain step takes some three
    times that, and is what a run without numba has. `lm` may have fewer blocks than the run's model, as the ones have
    that are built to be timed.
    """
    blocks, depth = list(lm.blocks)[: max(lm.layers) + 1], (max(config.model.layers) + 1) / (max(lm.layers) + 1)
    model = 4 * depth * sum(p.numel() for block in blocks for p in block.parameters())
    specs = sae_specs(config.sae, layers=config.model.layers, d_in=lm.d_in)
    plain = config.train.step == "plain" or find_spec("numba") is None
    saes = (3 if plain else 1) * (4 + 600 / config.train.batch_size) * sum(spec.d_in * spec.d_sae for spec in specs)
    return model / (model + saes)


@contextmanager
def shared_threads(overlap: bool, device: torch.device) -> Iterator[bool]:
    """Half of torch's threads for the model and half for the SAEs, where both work at once on a CPU; gives whether."""
    before = torch.get_num_threads()
    if not overlap or device.type != "cpu" or before < 2:
        yield False
        return
    torch.set_num_threads(before // 2)  # a thread that starts takes it over
    try:
        yield True
    finally:
        torch.set_num_threads(before)
