"""The test at attach time: steering acts on the row it is meant for, and on no other."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from chatsae.errors import UserError
from chatsae.lm.harvest import ISOLATION_TOLERANCE, relative_error
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import FORWARD_ERRORS, cache_argument, cache_of, splice
from chatsae.steering.hooks import Steering
from chatsae.steering.spec import SteerSpec


def self_test(lm: LanguageModel, specs: Sequence[SteerSpec]) -> dict[str, Any]:
    """Steer the first of two short rows at every layer of the specs, with and without a cache.

    Returns: hook_calls and forwards; changed, the relative change of the steered row's logits; unchanged_bits, whether
    the other row's are the same to the bit; cache_error, how far a cached forward is from a whole one (None: the model
    has no cache).

    Raises:
        UserError: a hook does not run once per forward, the steered row does not change, the other does, or the two
            ways of reading differ.
    """
    full = lm.with_head()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(full.vocab_size, (2, 6), generator=generator).to(full.device)
    with torch.inference_mode():
        clean, norms = _clean(full, ids, sorted({spec.place for spec in specs}))
        probes = [SteerSpec(vector=s.direction(), layer=s.place, strength=norms[s.place]) for s in specs]
        with Steering(lm, probes, rows=[range(len(probes)), ()]) as whole:
            found = full.model(input_ids=ids, use_cache=False).logits
        with Steering(lm, probes, rows=[range(len(probes)), ()]) as parts:
            cached = _cached(full, ids)
    _check_calls(full, whole, parts)
    facts = {
        "hook_calls": sum(whole.hook_calls.values()) + sum(parts.hook_calls.values()),
        "forwards": whole.forwards + parts.forwards,
        "changed": relative_error(found[0].float(), clean[0].float()),
        "unchanged_bits": torch.equal(found[1], clean[1]),
        "cache_error": None if cached is None else relative_error(cached.float(), found[:, -1].float()),
    }
    tolerance = ISOLATION_TOLERANCE.get(full.dtype, ISOLATION_TOLERANCE[torch.float32])
    if not facts["changed"] > 0:
        raise UserError(
            f"steering: {full.name} gives the same logits with the stream changed; it cannot be steered here"
        )
    other = relative_error(found[1].float(), clean[1].float())
    if not facts["unchanged_bits"] and other > tolerance:
        raise UserError(f"steering: one row of {full.name} changes another in its batch, by {other:.2g}")
    if facts["cache_error"] is not None and facts["cache_error"] > tolerance:
        raise UserError(f"steering: with a cache {full.name} is steered otherwise, by {facts['cache_error']:.2g}")
    return facts


def _clean(full: LanguageModel, ids: Tensor, layers: Sequence[int]) -> tuple[Tensor, dict[int, float]]:
    """Logits, and the mean norm of the stream after each layer."""
    norms: dict[int, float] = {}

    def keep(layer: int, x: Tensor) -> Tensor:
        norms[layer] = float(x.float().norm(dim=-1).mean())
        return x

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(splice(full, layer, lambda x, layer=layer: keep(layer, x)))
        return full.model(input_ids=ids, use_cache=False).logits, norms


def _cached(full: LanguageModel, ids: Tensor) -> Tensor | None:
    """Logits at the last token, read after the others; None where the model keeps no such cache."""
    first = full.model(input_ids=ids[:, :-1], use_cache=True)
    cache = cache_of(first)
    if cache is None:
        return None
    try:
        given = cache_argument(full.model, cache)
        return full.model(input_ids=ids[:, -1:], **given, use_cache=True).logits[:, -1]
    except FORWARD_ERRORS:
        return None


def _check_calls(full: LanguageModel, *sessions: Steering) -> None:
    for session in sessions:
        for layer, calls in session.hook_calls.items():
            if calls != session.forwards or not calls:
                raise UserError(
                    f"steering: layer {layer} of {full.name} was hooked {calls} times in {session.forwards} forwards"
                )
