"""Everything a resume needs, as one checkpoint: weights, optimizer, counts, buffer, data cursor."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from chatsae.runs import Checkpoint
from chatsae.sae.base import Losses


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
            self._sums[name] = loss.mse.double() if before is None else before.to(loss.mse.device) + loss.mse
        self._steps += 1

    def take(self) -> dict[str, float]:
        """The means by SAE; counting begins again."""
        means = {name: total.item() / self._steps for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, **{f"sum/{name}": total for name, total in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A state of before there were means is empty; they begin with the next step."""
        self._steps = state.get("steps", 0)
        self._sums = _under("sum/", state)


def snapshot(
    step: int,
    states: Mapping[str, Stateful],
    acts: Stateful,
    tally: Counter[str] | None = None,
    **others: Stateful,
) -> Checkpoint:
    """The whole state of a training after `step` steps; `tally` is what its data dropped up to there."""
    flat: dict[str, Any] = {} if tally is None else {"dropped": dict(tally)}
    parts = {"buffer": acts, **others, **{f"sae/{name}": state for name, state in states.items()}}
    for prefix, part in parts.items():
        flat |= {f"{prefix}/{key}": value for key, value in part.state_dict().items()}
    return Checkpoint(
        step=step,
        tensors={k: v for k, v in flat.items() if isinstance(v, Tensor)},
        facts={k: v for k, v in flat.items() if not isinstance(v, Tensor)},
    )


def restore(checkpoint: Checkpoint, states: Mapping[str, Stateful], acts: Stateful, **others: Stateful) -> None:
    """Put a snapshot back, bit for bit; `others` are named as they were for `snapshot`."""
    flat = {**checkpoint.tensors, **checkpoint.facts}
    parts = {**others, "buffer": acts, **{f"sae/{name}": state for name, state in states.items()}}
    for prefix, part in parts.items():
        part.load_state_dict(_under(f"{prefix}/", flat))


def _under(prefix: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
