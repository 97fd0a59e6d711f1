"""The coefficient of an SAE that is to end at a target L0 (`sae.target_l0`)."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chatsae.sae.base import Losses

EVERY = 25
"""Steps between two changes of a coefficient."""

START = 2.0
"""Times the target: the L0 that an SAE begins with. From more, thresholds can overshoot, and they come down slowly."""

_SETTLING = 0.8, 0.9, 0.97
"""Shares of the steps after which L0 is set, as it is before the last one; from the first of them on the coefficient
stays."""

_INTEGRAL, _PROPORTIONAL, _MOST = 0.2, 1.0, 3.0


class Steered:
    """Factors of the coefficients of those SAEs that have a target, moved against the error of their L0.

    Every `EVERY` steps the error is log(L0 / target), L0 being the mean since the last change, within ±`_MOST`; the
    logarithm of the factor is the sum of all errors so far times `_INTEGRAL`, and the last one times `_PROPORTIONAL`.
    The sum finds the coefficient, the last error damps: Adam moves biases and thresholds at a bounded speed, so that L0
    follows the coefficient late. It acts through the coefficient, so that every kind of step takes it as it is.
    A penalty that is quadratic in L0 - target holds L0 near to the target only for coefficients that are large enough.

    In the last fifth of the steps the coefficient stays, and thresholds or biases are moved a few times, by the same
    for all features, to where L0 is the target (`settles`): thresholds that are too high would come down too slowly.
    """

    def __init__(self, targets: Mapping[str, float], total_steps: int) -> None:
        """`targets` by SAE, of those that have one."""
        self.targets = dict(targets)
        self._settling = [*(round(share * total_steps) for share in _SETTLING), total_steps - 1]
        self._last = self._settling[0]
        self._found = dict.fromkeys(targets, 0.0)
        self._damped = dict.fromkeys(targets, 0.0)
        self._sums: dict[str, Tensor] = {}

    def factor(self, name: str) -> float:
        """What the coefficient of an SAE is multiplied with; 1 without a target."""
        return math.exp(self._found[name] + self._damped[name]) if name in self._found else 1.0

    def settles(self, step: int) -> bool:
        """Whether L0 is to be set before step `step`."""
        return bool(self.targets) and step in self._settling

    def see(self, step: int, losses: Mapping[str, Losses]) -> None:
        """Take account of the losses of step `step`, the first one being 0."""
        for name in self.targets:
            l0 = losses[name].l0.double()
            self._sums[name] = self._sums[name].to(l0.device) + l0 if name in self._sums else l0
        if (step + 1) % EVERY or not self.targets:
            return
        sums, self._sums = self._sums, {}
        for name, total in sums.items():
            error = math.log(max(total.item() / EVERY, 1e-3) / self.targets[name])
            error = min(max(error, -_MOST), _MOST) if step < self._last else 0.0
            self._found[name] += _INTEGRAL * error
            self._damped[name] = _PROPORTIONAL * error

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; sums are tensors."""
        parts = {"found": self._found, "damped": self._damped, "sum": self._sums}
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name in self.targets:
            self._found[name], self._damped[name] = float(state[f"found/{name}"]), float(state[f"damped/{name}"])
        self._sums = {name: state[f"sum/{name}"] for name in self.targets if f"sum/{name}" in state}
