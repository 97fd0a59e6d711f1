"""Everything a resume needs, as one checkpoint: weights, optimizer, counts, buffer, data cursor."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from chatsae.runs import Checkpoint


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def snapshot(
    step: int, states: Mapping[str, Stateful], acts: Stateful, tally: Counter[str] | None = None
) -> Checkpoint:
    """The whole state of a training after `step` steps; `tally` is what its data dropped up to there."""
    flat: dict[str, Any] = {f"buffer/{k}": v for k, v in acts.state_dict().items()}
    if tally is not None:
        flat["dropped"] = dict(tally)
    for name, state in states.items():
        flat |= {f"sae/{name}/{k}": v for k, v in state.state_dict().items()}
    return Checkpoint(
        step=step,
        tensors={k: v for k, v in flat.items() if isinstance(v, Tensor)},
        facts={k: v for k, v in flat.items() if not isinstance(v, Tensor)},
    )


def restore(checkpoint: Checkpoint, states: Mapping[str, Stateful], acts: Stateful) -> None:
    """Put a snapshot back, bit for bit."""
    flat = {**checkpoint.tensors, **checkpoint.facts}
    acts.load_state_dict(_under("buffer/", flat))
    for name, state in states.items():
        state.load_state_dict(_under(f"sae/{name}/", flat))


def _under(prefix: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
