"""Norms and errors of some tokens of a run's dialogues: what the heat map and the scatter plot of the page show."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae import console
from chatsae.batch import Kind, Role, TokenBatch
from chatsae.errors import UserError
from chatsae.features.firings import digest
from chatsae.features.session import RunFeatures
from chatsae.files import read_object, write_json
from chatsae.lm.norms import SINK_RATIO
from chatsae.sae.base import SAE

SCHEMA_VERSION = 1
DIALOGUES = 100
"""First dialogues of the interpretation split that are looked at."""

POINTS = 800
"""Tokens of the scatter plot, drawn at random; up to as many norm sinks come on top."""

_SINKS = 200
_ROLES, _KINDS = len(Role), len(Kind)


class TokenSums:
    """Squared error, norm and L0 of the tokens of one SAE as they stream by."""

    def __init__(self, sae: SAE) -> None:
        self._sae = sae
        self._parts: list[np.ndarray] = []  # rows of norm, mse, l0, role, kind

    @torch.no_grad()
    def add(self, x: Float[Tensor, "N D"], tokens: TokenBatch) -> None:
        """Take in the residual stream of some tokens."""
        x = x.to(self._sae.W_enc.device)
        feature_acts = self._sae.encode(x)
        mse = (self._sae.decode(feature_acts) - x).float().pow(2).mean(1)
        columns = (x.float().norm(dim=1), mse, (feature_acts > 0).sum(1), tokens.role, tokens.kind)
        self._parts.append(np.stack([column.cpu().numpy().astype(np.float64) for column in columns], axis=1))

    def facts(self, *, seed: int = 0) -> dict[str, Any]:
        """What the page reads: `cells` by role and kind, `points`, and the norm from which a token is a sink."""
        norm, mse, l0, role, kind = (np.concatenate(self._parts) if self._parts else np.zeros((0, 5))).T
        if not len(norm):
            raise UserError("no token to measure norms and errors on")
        median = float(np.median(norm))
        sink = norm > SINK_RATIO * median
        rng = np.random.default_rng(seed)
        drawn = rng.permutation(len(norm))[:POINTS]
        chosen = np.union1d(drawn, rng.permutation(np.flatnonzero(sink))[:_SINKS])
        rows = zip(norm[chosen], mse[chosen], role[chosen], kind[chosen], sink[chosen], strict=True)
        return {
            "n_tokens": len(norm),
            "median_norm": _short(median),
            "sink_norm": _short(SINK_RATIO * median),
            "n_sinks": int(sink.sum()),
            "cells": _cells(role.astype(int) * _KINDS + kind.astype(int), mse, l0),
            "points": [[_short(x), _short(y), int(r), int(k), int(s)] for x, y, r, k, s in rows],
        }


def _cells(code: np.ndarray, mse: np.ndarray, l0: np.ndarray) -> list[dict[str, Any]]:
    n = np.bincount(code, minlength=_ROLES * _KINDS)
    sums = [np.bincount(code, weights=values, minlength=_ROLES * _KINDS) for values in (mse, l0)]
    return [
        {"role": int(c) // _KINDS, "kind": int(c) % _KINDS, "n": int(n[c])}
        | {name: _short(float(total[c] / n[c])) for name, total in zip(("mse", "l0"), sums, strict=True)}
        for c in np.flatnonzero(n)
    ]


def token_samples(run: RunFeatures, dialogues: int) -> dict[str, dict[str, Any]]:
    """`TokenSums.facts` of every SAE of a run, kept in RUN/page/SAE.json and made where it is missing.

    Args:
        run: its model is loaded only if one is missing.
        dialogues: as many as the features were built from, so that they are read once.

    Raises:
        UserError: the model or the dialogues cannot be read.
    """
    found = {name: _read(run.run.path / "page" / f"{name}.json", sae) for name, sae in run.saes.items()}
    missing = [name for name, facts in found.items() if facts is None]
    if missing:
        found |= _measure(run, missing, dialogues)
    return {name: facts for name, facts in found.items() if facts is not None}


def stored_sample(path: Path, sae: SAE) -> dict[str, Any] | None:
    """What RUN/page/SAE.json holds of these weights, or None."""
    return _read(path, sae)


def _measure(run: RunFeatures, names: list[str], dialogues: int) -> Mapping[str, dict[str, Any]]:
    sums = {name: TokenSums(run.saes[name]) for name in names}
    lm, tokens = run.lm, run.tokens(dialogues)
    tokens = tokens.select(range(min(DIALOGUES, len(tokens))))
    layers = {layer: i for i, layer in enumerate(lm.layers)}
    with console.progress("measure norms and errors", len(tokens.input_ids)) as advance:
        for batch in lm.harvest([tokens], token_budget=run.run.config.harvest.token_budget):
            for name, own in sums.items():
                own.add(batch.acts[layers[run.saes[name].spec.layer]], batch.tokens)
            advance(len(batch.tokens.input_ids))
    found = {}
    for name, own in sums.items():
        bound = {"schema_version": SCHEMA_VERSION, "sae_sha256": digest(run.saes[name]), "n_dialogues": len(tokens)}
        found[name] = bound | own.facts()
        write_json(run.run.path / "page" / f"{name}.json", found[name])
    return found


def _read(path: Path, sae: SAE) -> dict[str, Any] | None:
    if not path.exists():
        return None
    advice = "delete it, `chatsae report` writes it anew"
    facts = read_object(path, advice, {"schema_version": int, "sae_sha256": str})
    same = facts["schema_version"] == SCHEMA_VERSION and facts["sae_sha256"] == digest(sae)
    return facts if same else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")
