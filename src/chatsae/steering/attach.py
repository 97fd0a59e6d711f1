"""Attach steering to a model: one context manager, tested on the spot."""

from collections.abc import Sequence
from typing import Any

from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.steering.hooks import Steering
from chatsae.steering.proof import self_test
from chatsae.steering.spec import SteerSpec


def attach(
    lm: LanguageModel, specs: Sequence[SteerSpec], *, rows: Sequence[Sequence[int]] | None = None, test: bool = True
) -> Steering:
    """The context in which the specs act; `test`: first prove on two short rows that they do, and only where asked.

    Raises:
        UserError: see `Steering` and `self_test`.
    """
    steering = Steering(lm, specs, rows=rows)
    if test and specs:
        steering.tested = self_test(lm, steering.specs)
    return steering


def steer(
    lm: LanguageModel,
    sae: SAE | str | None = None,
    *,
    feature: int | None = None,
    alpha: float = 0.0,
    specs: Sequence[SteerSpec] = (),
    rows: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> Steering:
    """`with steer(lm, sae, feature=1234, alpha=50): lm.chat(...)` adds alpha times the unit decoder row (`Steering`).

    `options` are further fields of `SteerSpec`; or give whole `specs`, and which of them act on which of the `rows`.

    Raises:
        UserError: see `SteerSpec` and `Steering`.
    """
    if bool(specs) == (sae is not None or feature is not None or "vector" in options):
        raise UserError("steering: give a sae and its feature, or specs")
    if not specs:
        try:
            specs = (SteerSpec(sae=sae, feature=feature, strength=alpha, **options),)
        except TypeError as error:
            raise UserError(f"steering: {error}") from None
    return attach(lm, specs, rows=rows)
