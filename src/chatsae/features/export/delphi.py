"""delphi: the cache of latents of a hookpoint."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from chatsae import console
from chatsae.batch import TokenBatch
from chatsae.exporting import write_json
from chatsae.features.collect import Reading, check, harvest
from chatsae.features.firings import firings, narrow
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE

LEAST = 1e-5
"""Activations up to this are dropped."""
WINDOW = 32
"""delphi's default example_ctx_len: it cuts rows into windows of so many tokens, and dialogues begin with a window."""
ROW = 256
"""Tokens of a row at most, delphi's default cache_ctx_len."""

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Latents:
    """What some latents are on rows of tokens; entries are ordered by row, position and latent."""

    locations: np.ndarray
    """[n, 3]: row, position and latent of each activation; uint16 where that holds them, else uint32."""
    activations: np.ndarray
    """[n], float16, finite."""
    tokens: np.ndarray
    """[rows, ctx], int64; each dialogue is padded to whole windows, and the last row to its end."""
    n_tokens: int
    """Tokens that are no padding."""


def latents(
    sae: SAE,
    lm: LanguageModel,
    tokens: TokenBatch,
    features: Sequence[int],
    *,
    reading: Reading,
    tally: Counter[str] | None = None,
) -> Latents:
    """The activations of some features on dialogues, which lie one behind the other in rows, each padded to windows.

    The model reads each dialogue whole and by itself. A window never holds two dialogues, and none is all padding but
    the last few; padding is never active.

    Raises:
        UserError: the model and the SAE do not go together.
    """
    check({sae.spec.name: sae}, lm)
    tally = Counter() if tally is None else tally
    starts = tokens.cu_seqlens.numpy().astype(np.int64)
    shift, width = _places(starts)
    chosen = np.array(features, np.int64)
    part, layer = narrow(sae, chosen), lm.layers.index(sae.spec.layer)
    found = [np.empty((0, 3), np.int64)]
    values = [np.empty(0, np.float32)]
    with console.progress("latents", len(tokens)) as advance:
        for batch, acts, _, index in harvest(lm, tokens, reading, tally=tally):
            for fired in firings(part, acts[layer], index):
                place = fired.token + shift[np.searchsorted(starts, fired.token, side="right") - 1]
                kept = fired.value > LEAST
                found.append(np.stack([*np.divmod(place, width), chosen[fired.feature]], axis=1)[kept])
                values.append(fired.value[kept])
            advance(len(batch))
    rows = _rows(tokens, lm, shift, width)
    return collected(np.concatenate(found), np.concatenate(values), rows, int(starts[-1]), tally)


def write(
    sae: SAE,
    lm: LanguageModel,
    tokens: TokenBatch,
    features: Sequence[int],
    folder: Path,
    *,
    reading: Reading,
    dataset: str,
    split: str,
    tally: Counter[str],
) -> None:
    """Write HOOKPOINT/0_LAST.safetensors and its config.json: one file for all latents, empty for those not chosen."""
    found = latents(sae, lm, tokens, features, reading=reading, tally=tally)
    place = folder / hookpoint(sae.spec.layer)
    place.mkdir()
    tensors = {"locations": found.locations, "activations": found.activations, "tokens": found.tokens}
    save_file(tensors, place / f"0_{sae.spec.d_sae - 1}.safetensors")
    config: dict[str, Any] = {
        "dataset_repo": dataset,
        "dataset_split": split,
        "dataset_name": "",
        "dataset_column": "",
        "batch_size": None,
        "cache_ctx_len": found.tokens.shape[1],
        "n_tokens": found.n_tokens,
        "n_splits": 1,
        "model_name": lm.label,
    }
    write_json(place / "config.json", config)


def hookpoint(layer: int) -> str:
    """The module whose output is read, seen from the model without its head."""
    return f"layers.{layer}"


def _places(starts: np.ndarray) -> tuple[np.ndarray, int]:
    """How far each dialogue, and what is behind the last, is moved to begin with a window; and the width of a row."""
    padded = -(-np.diff(starts) // WINDOW) * WINDOW
    moved = np.concatenate([[0], np.cumsum(padded)])
    return moved - starts, int(min(ROW, moved[-1]))


def _rows(tokens: TokenBatch, lm: LanguageModel, shift: np.ndarray, width: int) -> np.ndarray:
    pad = next((i for i in (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id) if isinstance(i, int)), 0)
    n = len(tokens.input_ids)
    rows = np.full((-(-(n + int(shift[-1])) // width), width), pad, np.int64)
    rows.flat[np.arange(n) + np.repeat(shift[:-1], tokens.lengths.numpy())] = tokens.input_ids.numpy()
    return rows


def collected(place: np.ndarray, value: np.ndarray, rows: np.ndarray, n_tokens: int, tally: Counter[str]) -> Latents:
    """Activations in order, of places [n, 3] in any order; those beyond float16 become its largest, and are counted."""
    order = np.lexsort((place[:, 2], place[:, 1], place[:, 0]))
    place, value = place[order], value[order]
    if large := int((value > _LARGEST).sum()):
        tally[f"activations above {_LARGEST:g}, the largest of float16, written as that"] += large
    small = len(place) == 0 or int(place.max()) < 2**16
    locations = place.astype(np.uint16 if small else np.uint32)
    return Latents(locations, np.minimum(value, _LARGEST).astype(np.float16), rows, n_tokens)
