"""Seconds per token of a language model and of the steps of SAEs, measured on this machine."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.config import RunConfig, SAESpec, Way
from chatsae.lm.budget import choose_budget
from chatsae.lm.forward import bare_tokens, broken_sequences, plan, unchecked
from chatsae.lm.stand_in import free_bytes
from chatsae.lm.tap import Decoder
from chatsae.sae.grid import build_grid
from chatsae.sae.step import StepState, make_state, train_step
from chatsae.training.side_by_side import side_by_side

DIALOGUE = 300
"""Median tokens of the dialogues that are timed; their lengths are lognormal, as those of chat corpora are."""

ACTIVE = 0.05
"""Share of the features that are active in the SAEs that are timed: about that of the bundled model's after a tenth of
their training. On a CPU the time of a step depends on it."""

_CLEAR = 10  # bandwidths in a standard deviation of the pre-activations, at least
_SPREAD = 0.7  # of the logarithm of their lengths
_PROBE = 64  # tokens of the first forward, which tells how many the others can have
_SAE_BYTES = {"cpu": 2**28, "cuda": 2**32}  # for all SAEs that are timed


def lm_rate(lm: Decoder, config: RunConfig, seconds: float, *, blocks: bool, notes: list[str]) -> float:
    """Seconds per real token to the deepest of `lm.layers`, in forwards as the run has them.

    Args:
        blocks: sequences of `data.block_size` tokens; else of the lengths of dialogues.
        notes: where the run's forwards take too long, it is said here that smaller ones were timed.
    """
    end, generator = time.perf_counter() + seconds, torch.Generator().manual_seed(config.train.seed)
    way: Way = "padded" if config.harvest.way == "auto" else config.harvest.way

    def forward(lengths: Sequence[int]) -> tuple[int, float]:
        tokens = bare_tokens([torch.randint(lm.vocab_size, (n,), generator=generator) for n in lengths])
        start = time.perf_counter()
        broken_sequences(lm.layers, unchecked(lm, tokens, way), tokens)  # which waits for a GPU
        return len(tokens.input_ids), time.perf_counter() - start

    probe = [min(_PROBE, lm.max_positions or _PROBE)]
    forward(probe)
    n_probe, slow = forward(probe)
    budget = config.harvest.token_budget or choose_budget(lm, way)
    affordable = max(int((end - time.perf_counter()) / 4 / slow * n_probe), _PROBE)
    longest = min(config.data.block_size if blocks else config.data.max_length, lm.max_positions or affordable)
    if affordable < budget:
        notes.append(f"{lm.name}: forwards of {affordable:,} tokens were timed; the run has up to {budget:,}")
    drawn = _lengths(config.harvest.pool, min(longest, affordable), blocks=blocks, generator=generator)
    planned = plan(drawn, token_budget=min(budget, affordable), way=way)
    shuffled = torch.randperm(len(planned), generator=generator).tolist()
    measured: list[tuple[int, float]] = []
    for batch in cycle(planned[j] for j in shuffled):
        measured.append(forward([drawn[i] for i in batch]))
        if time.perf_counter() >= end:
            break
    kept = measured[1:] or measured  # the first one allocates
    return sum(taken for _, taken in kept) / sum(n for n, _ in kept)


def _lengths(n: int, longest: int, *, blocks: bool, generator: torch.Generator) -> list[int]:
    """The tokens of each sequence of a pool."""
    drawn = (torch.randn(n, generator=generator) * _SPREAD).exp() * DIALOGUE
    return [longest] * n if blocks else drawn.round().clamp(1, longest).int().tolist()


def sae_rate(
    specs: Sequence[SAESpec], config: RunConfig, seconds: float, *, device: torch.device, notes: list[str]
) -> float:
    """Seconds per token of one step of every SAE, the SAEs side by side as in a run.

    Where there is no memory for all of them, one of each architecture, form and width is timed; and where that is too
    wide, a narrower one, whose time is scaled with d_sae (`notes` say so).
    """
    end, batch_size = time.perf_counter() + seconds, config.train.batch_size
    most = min(_SAE_BYTES.get(device.type, _SAE_BYTES["cpu"]), free_bytes(device) // 4)
    timed = _timed_specs(specs, batch_size, most)
    narrower = sorted({(wide.d_sae, spec.d_sae) for wide, spec in timed.items() if spec.d_sae < wide.d_sae})
    notes += [f"SAEs of {a:,} features: {b:,} were timed, and the time scaled with the width" for a, b in narrower]
    ready = [_ready(spec, config, device) for spec in timed.values()]
    step = partial(_step_seconds, clip_grad_norm=config.train.clip_grad_norm)
    rounds: list[list[float]] = []
    with side_by_side(len(ready), [device]) as together:
        together(step, ready)  # allocates
        start = time.perf_counter()
        while not rounds or time.perf_counter() < end:
            rounds.append(together(step, ready))
        passed = time.perf_counter() - start
    alone = [sum(taken) / len(rounds) for taken in zip(*rounds, strict=True)]
    at_once = passed / (len(rounds) * sum(alone))  # seconds that pass per second of a step
    means = {_kind(wide): 0.0 for wide in timed}
    for (wide, spec), mean in zip(timed.items(), alone, strict=True):
        same = sum(_kind(other) == _kind(wide) for other in timed)
        means[_kind(wide)] += at_once * mean * wide.d_sae / spec.d_sae / same
    return sum(means[_kind(spec)] for spec in specs) / batch_size


def _timed_specs(specs: Sequence[SAESpec], batch_size: int, most_bytes: int) -> Mapping[SAESpec, SAESpec]:
    """The SAEs that are timed, each by the one that it stands for."""

    def feature_bytes(spec: SAESpec) -> int:  # weights, gradients and two moments; some copies of the activations
        return 4 * 8 * (spec.d_in + batch_size)

    if sum(spec.d_sae * feature_bytes(spec) for spec in specs) <= most_bytes:
        return {spec: spec for spec in specs}
    kinds = {_kind(spec): spec for spec in specs}.values()
    each = most_bytes // len(kinds)
    return {s: replace(s, d_sae=min(s.d_sae, max(each // feature_bytes(s) // 64 * 64, 64))) for s in kinds}


def _kind(spec: SAESpec) -> tuple[object, ...]:
    """What the time of a step depends on."""
    return spec.architecture, spec.form, spec.d_in, spec.d_sae, spec.apply_b_dec_to_input


def _ready(spec: SAESpec, config: RunConfig, device: torch.device) -> tuple[StepState, Float[Tensor, "N D"]]:
    """A random SAE and a batch on which `ACTIVE` of its features are active and few are near their threshold."""
    (sae,) = build_grid([spec], config.train.seed).values()
    generator = torch.Generator().manual_seed(config.train.seed)
    x = torch.randn(config.train.batch_size, spec.d_in, generator=generator)
    with torch.no_grad():
        spread = (x @ sae.W_enc).std().item()  # of the pre-activations, which are normally distributed
        x *= max(1.0, _CLEAR * max(spec.bandwidth, spec.init_threshold) / spread)
        spread = (x @ sae.W_enc).std().item()
        sae.b_enc.fill_(spec.init_threshold - NormalDist().inv_cdf(1 - ACTIVE) * spread)
    train = config.train
    how = {"betas": train.adam_betas, "step": train.step, "encoder_precision": train.encoder_precision}
    return make_state(sae.to(device), **how), x.to(device)


def _step_seconds(ready: tuple[StepState, Float[Tensor, "N D"]], clip_grad_norm: float) -> float:
    (state, x), start = ready, time.perf_counter()
    train_step(state, x, lr=0.0, sparsity_scale=1.0, clip_grad_norm=clip_grad_norm)  # lr 0: it stays as active
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
