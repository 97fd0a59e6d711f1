"""How long a pass will take on this machine, from a few seconds of measuring; no weights are read.

Counted are the forwards of the language model and the steps of the SAEs. The mixing buffer is not: it copies some four
times d_in numbers per token and layer, where a step of an SAE moves 3.5 d_in² (expansion factor 8, batches of 128), and
a run on the bundled model spends 1 % of its time there. Nor are reading and tokenising, which depend on the data, nor
what a cached prefix saves; that a model looks its tokens up is counted with its blocks.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil

import torch

from chatsae import console
from chatsae.config import Method, RunConfig, SAESpec, Way
from chatsae.errors import UserError
from chatsae.lm.facts import planning_config
from chatsae.lm.hf import LOAD_ERRORS, one_line
from chatsae.lm.packed import PackingRefused
from chatsae.lm.placement import Placement, pick_placement, quantization_of
from chatsae.lm.stand_in import StandIn, stand_in
from chatsae.lm.tap import FORWARD_ERRORS, Decoder
from chatsae.training.overlap import overlaps, shared_threads
from chatsae.training.schedule import buffer_capacity, steps_of
from chatsae.training.timing import lm_rate, sae_rate

WORTH_PREDICTING = 30.0
"""Seconds of work from which on a run is calibrated."""

_SAE_SHARE = 0.4  # of the seconds for measuring
_ERRORS = (*LOAD_ERRORS, *FORWARD_ERRORS, MemoryError, PackingRefused, UserError)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a pass; None where they could not be measured."""

    lm_seconds: float | None
    sae_seconds: float | None
    overlap: bool = False
    """Whether they are spent at the same time."""

    @property
    def seconds(self) -> float | None:
        """Of the whole pass."""
        if self.lm_seconds is None or self.sae_seconds is None:
            return None
        return max(self.lm_seconds, self.sae_seconds) if self.overlap else self.lm_seconds + self.sae_seconds

    @property
    def lm_share(self) -> float | None:
        """The language model's part of the work."""
        if self.lm_seconds is None or self.sae_seconds is None or not self.seconds:
            return None
        return self.lm_seconds / (self.lm_seconds + self.sae_seconds)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Seconds per token: of the language model to the deepest layer by method, and of a step of all SAEs.

    None where they could not be measured: `missing` says why. `notes` say what they were scaled from.
    """

    lm: Mapping[Method, float | None] = field(default_factory=dict)
    sae: float | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    overlap: bool = False
    """Whether a run spends them at the same time."""

    def predict(self, config: RunConfig, *, done: int = 0) -> Prediction:
        """The time of a pass from step `done` on, if the data are enough for its tokens."""
        steps, batch_size = steps_of(config.train).total, config.train.batch_size
        lm, read = self.lm.get(config.data.method), harvested(config, steps) - harvested(config, done)
        return Prediction(
            lm_seconds=None if lm is None else lm * read,
            sae_seconds=None if self.sae is None else self.sae * (steps - done) * batch_size,
            overlap=self.overlap,
        )


def harvested(config: RunConfig, steps: int) -> int:
    """Tokens that the model has read after so many steps: the buffer is filled, half of it is served, that half is
    filled again, and so on.
    """
    batch_size, capacity = config.train.batch_size, buffer_capacity(config)
    half = max(capacity // 2 // batch_size, 1) * batch_size
    return capacity + (ceil(steps * batch_size / half) - 1) * half if steps else 0


def calibrate(
    config: RunConfig, specs: Sequence[SAESpec], seconds: float, *, methods: Sequence[Method] | None = None
) -> Calibration:
    """Time the first blocks of the model, with random weights, and random SAEs: about `seconds` for all `methods`.

    What cannot be measured is None, with the reason. The global random generators are left as they are.
    """
    methods = (config.data.method,) if methods is None else methods
    missing: list[str] = []
    start, lm = time.perf_counter(), None
    with _reasons(missing, f"{config.model.name} was not timed"):
        lm = _model(config)
    left = max(seconds - (time.perf_counter() - start), seconds / 2)
    with _reasons(missing, "the SAEs were not timed"):
        device, overlap = _placement(config).device, lm is not None and overlaps(config, lm)
        with shared_threads(overlap, device):
            return replace(_measure(config, specs, left, methods, lm, device, missing), overlap=overlap)
    return Calibration(missing=tuple(missing))


def predict_run(
    config: RunConfig,
    specs: Sequence[SAESpec],
    *,
    lm: Decoder,
    way: Way,
    token_budget: int,
    done: int = 0,
    overlap: bool = False,
    seconds: float = 2.0,
) -> float | None:
    """Time the model and the SAEs of a run, and say how long it will take from step `done` on; returns that in seconds.

    None where it is less than half a minute, or cannot be measured. A first look of a tenth of `seconds` tells whether
    the rest of them are worth it.
    """
    config = replace(config, harvest=replace(config.harvest, way=way, token_budget=token_budget))
    prediction = None
    for share in (0.1, 0.9):
        found = _measure(config, specs, share * seconds, (config.data.method,), lm, lm.device, [])
        prediction = replace(found, overlap=overlap).predict(config, done=done)
        if prediction.seconds is None:
            console.say(f"no time is predicted: {'; '.join(found.missing)}")
        if prediction.seconds is None or prediction.seconds < WORTH_PREDICTING:
            return None
        taken, model = prediction.seconds, prediction.lm_share
    console.say(f"predicted: {duration(taken)} (language model {model:.0%}), reading the data not counted")
    return taken


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 4.2 s, 1 min 20 s, 3 h 5 min, 2 d 3 h."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    for large, small, units in ((86400, 3600, "d h"), (3600, 60, "h min"), (60, 1, "min s")):
        whole, rest = divmod(round(seconds / small), large // small)
        if whole:
            return f"{whole:,} {units.split()[0]} {rest} {units.split()[1]}"
    return "1 min 0 s"


def _placement(config: RunConfig) -> Placement:
    model = config.model
    return pick_placement(model.device, model.dtype, model.device_map, model.quantization)


def _model(config: RunConfig) -> StandIn:
    """What is timed in place of the model.

    Raises:
        UserError: it cannot be built, or not as the run would have it.
    """
    model, placement = config.model, _placement(config)
    found = planning_config(model.name, model.revision, model.trust_remote_code)
    if model.quantization.startswith("bnb") or (quantization_of(found) and model.quantization == "checkpoint"):
        raise UserError("quantised weights are timed only in a run")
    with _generators_kept(placement.device):
        return stand_in(
            found,
            max(model.layers),
            name=model.name,
            device=placement.device,
            dtype=placement.dtype,
            layer_path=model.layer_path,
            trust_remote_code=model.trust_remote_code,
        )


def _measure(
    config: RunConfig,
    specs: Sequence[SAESpec],
    seconds: float,
    methods: Sequence[Method],
    lm: Decoder | None,
    device: torch.device,
    missing: list[str],
) -> Calibration:
    """Time a model, if there is one, and the SAEs."""
    in_blocks = {method: method in ("bt-f", "bt-p") for method in methods}
    rates: dict[bool, float] = {}
    notes: list[str] = []
    sae = None
    with _generators_kept(device):
        if lm is not None:
            depth = (max(config.model.layers) + 1) / (max(lm.layers) + 1)
            share = (1 - _SAE_SHARE) * seconds / len(set(in_blocks.values()))
            for blocks in sorted(set(in_blocks.values())):
                with _reasons(missing, f"{config.model.name} was not timed"):
                    rates[blocks] = depth * lm_rate(lm, config, share, blocks=blocks, notes=notes)
        with _reasons(missing, "the SAEs were not timed"):
            sae = sae_rate(specs, config, _SAE_SHARE * seconds, device=device, notes=notes)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    lm_rates = {method: rates.get(blocks) for method, blocks in in_blocks.items()}
    return Calibration(lm_rates, sae, tuple(dict.fromkeys(missing)), tuple(dict.fromkeys(notes)))


@contextmanager
def _reasons(missing: list[str], what: str) -> Iterator[None]:
    """Turn an exception into a line."""
    try:
        yield
    except _ERRORS as error:
        missing.append(f"{what}: {one_line(error)}")


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators as they are."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
