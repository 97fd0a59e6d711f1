"""Everything a resume needs, as one checkpoint: weights, optimizer, counts, buffer, data cursor."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from chatsae.runs import Checkpoint
from chatsae.sae.base import Losses
from chatsae.sae.step import StepState


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MeanErrors:
    """The squared error of every SAE, averaged over the steps since it was last taken.

    Sums stay on their device in float64: no step waits for a GPU over them, and a resume goes on to the same bits.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, losses: Mapping[str, Losses]) -> None:
        """Count one step."""
        for name, loss in losses.items():
            before = self._sums.get(name)
            self._sums[name] = loss.mse.double() if before is None else before + loss.mse
        self._steps += 1

    def take(self) -> dict[str, float]:
        """The means by SAE; counting begins again."""
        means = {name: total.item() / self._steps for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, **{f"sum/{name}": total for name, total in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any], devices: Mapping[str, torch.device]) -> None:
        """A state of before there were means is empty; they begin with the next step."""
        self._steps = state.get("steps", 0)
        self._sums = {name: total.to(devices[name]) for name, total in _under("sum/", state).items()}


def snapshot(
    step: int,
    states: Mapping[str, Stateful],
    acts: Stateful,
    tally: Counter[str] | None = None,
    errors: MeanErrors | None = None,
) -> Checkpoint:
    """The whole state of a training after `step` steps; `tally` is what its data dropped up to there."""
    flat: dict[str, Any] = {f"buffer/{k}": v for k, v in acts.state_dict().items()}
    flat |= {f"errors/{k}": v for k, v in (errors or MeanErrors()).state_dict().items()}
    if tally is not None:
        flat["dropped"] = dict(tally)
    for name, state in states.items():
        flat |= {f"sae/{name}/{k}": v for k, v in state.state_dict().items()}
    return Checkpoint(
        step=step,
        tensors={k: v for k, v in flat.items() if isinstance(v, Tensor)},
        facts={k: v for k, v in flat.items() if not isinstance(v, Tensor)},
    )


def restore(
    checkpoint: Checkpoint, states: Mapping[str, StepState], acts: Stateful, errors: MeanErrors | None = None
) -> None:
    """Put a snapshot back, bit for bit."""
    flat = {**checkpoint.tensors, **checkpoint.facts}
    if errors is not None:
        devices = {name: state.sae.W_enc.device for name, state in states.items()}
        errors.load_state_dict(_under("errors/", flat), devices)
    acts.load_state_dict(_under("buffer/", flat))
    for name, state in states.items():
        state.load_state_dict(_under(f"sae/{name}/", flat))


def _under(prefix: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
