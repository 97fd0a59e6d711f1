"""From SAEs, a model and dialogues to what is known about their features."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from chatsae.batch import Dialogue, TokenBatch, head
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.features.best import scores
from chatsae.features.collect import Reading, collect, gather, identity
from chatsae.features.directions import cofiring, decoder_neighbours, logit_lens
from chatsae.features.firings import hashed
from chatsae.features.keeper import PARTS, Split, part_columns
from chatsae.features.records import Options
from chatsae.features.store import SCHEMA_VERSION, FeatureStore, fixed, ragged
from chatsae.features.text import TokenText
from chatsae.features.windows import Windows, context_table, in_order, read_windows
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE

Kept = Mapping[str, np.ndarray]


def contexts(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    dialogues: Iterable[Dialogue],
    *,
    options: Options | None = None,
    limit: int | None = None,
    max_length: int = 8192,
    token_budget: int = 0,
    tally: Counter[str] | None = None,
) -> dict[str, FeatureStore]:
    """What the features of SAEs respond to in the first `limit` dialogues, each cut at `max_length` tokens.

    The model runs once over all of them, and once more over those that are shown. Memory is bounded by features (see
    docs/features.md). What is found does not depend on `token_budget` or on the order in which dialogues go through
    the model, but for rounding beyond the fourth digit.

    Raises:
        UserError: there is no dialogue, the model cannot take one, an SAE is not of this model, or a feature that was
            asked for does not exist.
    """
    tokens = gather(render(head(dialogues, limit), lm.tokenizer, max_length=max_length, tally=tally), limit)
    return build(saes, lm, tokens, options or Options(), reading=Reading.of(lm, token_budget), tally=tally)


def build(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    tokens: TokenBatch,
    options: Options,
    *,
    reading: Reading,
    folder: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    beside: Mapping[str, SAE] | None = None,
    tally: Counter[str] | None = None,
) -> dict[str, FeatureStore]:
    """A pass over rendered dialogues and its contexts; `folder` is where the state of the pass is kept meanwhile.

    `facts` are kept with the store. `beside` are controls under names of their own: they are read in the same pass,
    and all their features get contexts. Errors are those of `contexts`.
    """
    for sae in saes.values():
        check_index(sae, *named_features(options))
    both = {**saes, **(beside or {})}
    keepers, reading = collect(both, lm, tokens, options, reading=reading, folder=folder, tally=tally)
    kept = {name: keeper.state() for name, keeper in keepers.items()}
    n_sampled = {name: len(keeper.tokens) for name, keeper in keepers.items()}
    added = {"sampled_tokens": n_sampled} | dict(facts or {})
    shown = dict.fromkeys(saes, options) | dict.fromkeys(beside or {}, replace(options, features=0, also=()))
    return show(both, lm, tokens, shown, kept=kept, reading=reading, facts=added, tally=tally)


def show(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    tokens: TokenBatch,
    options: Options | Mapping[str, Options],
    *,
    kept: Mapping[str, Kept],
    reading: Reading,
    facts: Mapping[str, Any],
    tally: Counter[str] | None = None,
) -> dict[str, FeatureStore]:
    """Contexts of the features that are selected, from what a pass over the same dialogues kept.

    `options` are those of all SAEs, or by SAE.

    Raises:
        UserError: see `contexts`.
    """
    options = dict.fromkeys(saes, options) if isinstance(options, Options) else options
    for name, sae in saes.items():
        check_index(sae, *named_features(options[name]))
    split, text = Split(tokens), TokenText(lm.tokenizer)
    chosen = {name: select(kept[name], options[name]) for name in saes}
    windows = {name: Windows.around(kept[name], chosen[name], options[name], split.starts) for name in saes}
    read_windows(saes, lm, tokens, windows, reading, tally=tally)
    stores = {}
    for name, sae in saes.items():
        what = identity({name: sae}, lm, tokens, options[name])
        ordered, quantile = in_order(windows[name], kept[name]["values"])
        own: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "sae": name,
            **what,
            **facts,
            "sae_sha256": what["sae_sha256"][name],
            "sampled_tokens": _of(facts["sampled_tokens"], name),
            "layer": sae.spec.layer,
            "d_sae": sae.spec.d_sae,
            "n_live": int(np.count_nonzero(kept[name]["values"].any(axis=1))),
            "options": asdict(options[name]),
            "parts": {part: list(names) for part, names in PARTS.items()},
            "tokens": {part: split.totals[part_columns(part)].tolist() for part in PARTS},
            "reading": asdict(reading),
        }
        table = _feature_table(sae, lm, kept[name], chosen[name], split.n_tokens, own["sampled_tokens"], text)
        stores[name] = FeatureStore(
            json.loads(json.dumps(own)), table, context_table(ordered, quantile, tokens, text), kept[name]
        )
    return stores


def select(kept: Kept, options: Options) -> np.ndarray:
    """The features that get contexts, ascending: those named, or live ones in an order that the seed gives; and `also`.

    More of them include those that fewer had.
    """
    if isinstance(options.features, int):
        live = np.flatnonzero(kept["values"].any(axis=1))
        order = np.argsort(hashed(live, options.seed), kind="stable")
        chosen = live[order[: options.features or None]]
    else:
        chosen = np.array(options.features, np.int64)
    return np.union1d(chosen, np.array(options.also, np.int64))


def named_features(options: Options) -> tuple[int, ...]:
    """The features that are asked for by their index."""
    return options.also if isinstance(options.features, int) else (*options.features, *options.also)


def check_index(sae: SAE, *features: int) -> None:
    """Refuse features that an SAE does not have.

    Raises:
        UserError: it has not one of them.
    """
    for index in features:
        if not 0 <= index < sae.spec.d_sae:
            raise UserError(f"{sae.spec.name} has features 0..{sae.spec.d_sae - 1}; {index} is not one of them")


def _of(found: Mapping[str, int] | int, name: str) -> int:
    return found if isinstance(found, int) else found[name]


@torch.no_grad()
def _feature_table(
    sae: SAE, lm: LanguageModel, kept: Kept, chosen: np.ndarray, n_tokens: int, n_sampled: int, text: TokenText
) -> pa.Table:
    """features.parquet: a row per feature of the SAE; what is null was not worked out for it."""
    n = sae.spec.d_sae
    role = part_columns("role")
    active = kept["counts"][:, role].sum(axis=1, dtype=np.int64)
    total = kept["sums"][:, role].sum(axis=1)
    selected = np.zeros(n, bool)
    selected[chosen] = True
    columns: dict[str, Any] = {
        "index": pa.array(np.arange(n, dtype=np.int32)),
        "selected": pa.array(selected),
        "n_active": pa.array(active),
        "density": pa.array(active / n_tokens),
        "max_act": pa.array(np.where(active > 0, scores(kept["top"][:, 0]), 0).astype(np.float32)),
        "mean_act": pa.array((total / n_tokens).astype(np.float64)),
        "value_counts": fixed(kept["values"], np.int64),
    }
    for part in PARTS:
        columns[f"{part}_counts"] = fixed(kept["counts"][:, part_columns(part)], np.int64)
        columns[f"{part}_sums"] = fixed(kept["sums"][:, part_columns(part)], np.float64)
    for name, (values, kind) in _directions(sae, lm, kept, chosen, n_sampled, text).items():
        columns[name] = ragged(chosen.tolist(), values, n, kind)
    return pa.table(columns)


def _directions(
    sae: SAE, lm: LanguageModel, kept: Kept, chosen: np.ndarray, n_sampled: int, text: TokenText
) -> dict[str, tuple[Sequence[Sequence[Any]], pa.DataType]]:
    """Logit lens and neighbours of the chosen features: a list for each."""
    found: dict[str, tuple[Sequence[Sequence[Any]], pa.DataType]] = {}
    lens = logit_lens(lm, sae.W_dec[torch.from_numpy(chosen).to(sae.W_dec.device)])
    for name, ranked in zip(("promoted", "suppressed"), lens or (), strict=False):
        found[f"{name}_tokens"] = [[text.one(i) for i in row] for row in ranked[0].tolist()], pa.string()
        found[f"{name}_logits"] = ranked[1].tolist(), pa.float32()
    for name in ("promoted", "suppressed") if lens is None else ():
        found[f"{name}_tokens"] = [[]] * len(chosen), pa.string()
        found[f"{name}_logits"] = [[]] * len(chosen), pa.float32()
    near, cosine = decoder_neighbours(sae.W_dec, chosen)
    found["decoder_neighbours"] = near.tolist(), pa.int32()
    found["decoder_cosines"] = cosine.tolist(), pa.float32()
    index, correlation, share = cofiring(kept["bits"], n_sampled, chosen)
    real = [[i >= 0 for i in row] for row in index.tolist()]
    for name, values, kind in (
        ("neighbours", index, pa.int32()),
        ("correlations", correlation, pa.float32()),
        ("shares", share, pa.float32()),
    ):
        rows = zip(values.tolist(), real, strict=True)
        found[f"cofiring_{name}"] = [[v for v, good in zip(row, mask, strict=True) if good] for row, mask in rows], kind
    return found
