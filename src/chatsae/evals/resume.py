"""Run a language model only as far as an evaluation needs it: on from a layer, and through the head in parts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from chatsae.lm.harvest import ISOLATION_TOLERANCE
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import FORWARD_ERRORS, splice

_PROBE = (2, 9)  # sequences and tokens of the forwards that say what a model allows


class Trunk:
    """A model with its head in two parts: states up to the head, and the logits of chosen states.

    Both shortcuts are probed on the model at hand and left where they change a result: `resumed` are the layers from
    which a forward can go on without the blocks before it, `headless` says that states are not yet logits, and
    `constant` are the layers after which a stream that is the same vector at every token gives the same states in
    every sequence.
    """

    def __init__(self, full: LanguageModel, layers: Sequence[int], *, shortcuts: bool = True) -> None:
        """`full` has its head; without `shortcuts` every forward is a whole one."""
        self.full = full
        self.layers = tuple(layers)
        self.headless = False
        self.resumed: frozenset[int] = frozenset()
        self._shapes: dict[int, Any] = {}
        self._decoded: Any = None
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(full.vocab_size, _PROBE, generator=generator).to(full.device)
        with torch.inference_mode():
            if shortcuts:
                self._record(ids)
                self.headless = self._head_is_apart(ids)
                self.resumed = frozenset(layer for layer in self.layers if self._resumes(layer, ids))
            self.constant = frozenset(layer for layer in self.layers if self._is_constant(layer, ids))

    def clean(self, ids: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T S"], dict[int, Float[Tensor, "B T D"]]]:
        """States of the model as it is, and the residual stream after each layer; one forward."""
        residuals: dict[int, Tensor] = {}

        def keep(x: Tensor, layer: int) -> Tensor:
            residuals[layer] = x
            return x

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(splice(self.full, layer, partial(keep, layer=layer)))
            return self._states(ids), residuals

    def spliced(self, layer: int, residual: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T S"]:
        """States with another residual stream after `layer`; only later blocks run, where the model allows it."""
        if layer in self.resumed:
            return self._resume(layer, residual, ids)
        with splice(self.full, layer, lambda x: residual.to(x)):
            return self._states(ids)

    def logits(self, states: Float[Tensor, "N S"]) -> Float[Tensor, "N V"]:
        """What the model predicts from states, which may be chosen from many sequences."""
        if not self.headless:
            return states
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=self.full.device)
        kind, place = self._decoded
        decoded = kind(last_hidden_state=states[None].to(place))
        with _instead(self.full.decoder, lambda *args, **kwargs: decoded):
            return self.full.model(input_ids=ids, use_cache=False).logits[0]

    def _states(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T S"]:
        if self.headless:
            return self.full.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return self.full.model(input_ids=ids, use_cache=False).logits

    def _resume(self, layer: int, residual: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T S"]:
        with ExitStack() as stack:
            for i, block in enumerate(self.full.blocks[: layer + 1]):
                given = _shaped(self._shapes[i], residual)
                stack.enter_context(_instead(block, lambda *args, given=given, **kwargs: given))
            return self._states(ids)

    def _record(self, ids: Int[Tensor, "B T"]) -> None:
        """Remember what the blocks put out beside the residual stream, and what the decoder does."""

        def remember(module: nn.Module, args: tuple[object, ...], output: object, i: int) -> None:
            self._shapes[i] = output

        def decoded(module: nn.Module, args: tuple[object, ...], output: Any) -> None:
            state = getattr(output, "last_hidden_state", None)
            self._decoded = None if state is None else (type(output), state.device)

        handles = [block.register_forward_hook(partial(remember, i=i)) for i, block in enumerate(self.full.blocks)]
        handles.append(self.full.decoder.register_forward_hook(decoded))
        try:
            self.full.model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _head_is_apart(self, ids: Int[Tensor, "B T"]) -> bool:
        """Whether the head, fed some states alone, gives their logits."""
        if self._decoded is None:
            return False
        expected = self.full.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        self.headless = True
        try:
            states = self._states(ids).flatten(0, 1)
            order = torch.arange(len(states) - 1, -1, -1, device=states.device)
            parts = [self.logits(states[rows]) for rows in order.split(5)]
            return self._close(torch.cat(parts), expected[order])
        except FORWARD_ERRORS:
            return False
        finally:
            self.headless = False

    def _resumes(self, layer: int, ids: Int[Tensor, "B T"]) -> bool:
        """Whether going on from another stream gives, bit for bit, what a whole forward with it gives.

        On hardware where even two whole forwards differ, rounding may.
        """
        _, residuals = self.clean(ids)
        other = residuals[layer].flip(0).roll(1, dims=1) * 0.5
        with splice(self.full, layer, lambda x: other.to(x)):
            expected, again = self._states(ids), self._states(ids)
        self._states(ids.flip(1))  # what a module keeps from one forward to the next must not help
        try:
            got = self._resume(layer, other, ids)
        except FORWARD_ERRORS:
            return False
        return torch.equal(got, expected) if torch.equal(expected, again) else self._close(got, expected)

    def _is_constant(self, layer: int, ids: Int[Tensor, "B T"]) -> bool:
        """Whether sequences of other tokens and lengths have equal states once their streams are one constant."""
        generator = torch.Generator().manual_seed(1)
        vector = torch.randn(self.full.d_in, generator=generator).to(self.full.device, self.full.dtype)
        both = self.spliced(layer, vector.expand(*ids.shape, -1), ids)
        short = ids[:1, :-3]
        alone = self.spliced(layer, vector.expand(*short.shape, -1), short)
        return self._close(both[1], both[0]) and self._close(both[1:, :-3], alone)

    def _close(self, got: Float[Tensor, "*N"], expected: Float[Tensor, "*N"]) -> bool:
        error = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1).clamp_min(1e-30)
        return bool((error <= tolerance(self.full.dtype)).all())


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error that rounding explains."""
    return ISOLATION_TOLERANCE.get(dtype, ISOLATION_TOLERANCE[torch.float32])


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Another forward for a module while the context lasts; its hooks still run."""
    own = module.__dict__.get("forward")  # a wrapper that a library put there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _shaped(output: Any, residual: Float[Tensor, "B T D"]) -> Any:
    """A block's output as it was recorded, with another stream and without what else was in it."""
    if isinstance(output, (tuple, list)):
        return type(output)([residual.to(output[0].device), *(None for _ in output[1:])])
    return residual.to(output.device)
