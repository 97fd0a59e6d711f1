"""Features as tables for people and as JSON for programs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from chatsae import console
from chatsae.console import Column
from chatsae.features.keeper import PARTS
from chatsae.features.lookup import Row
from chatsae.features.records import Context
from chatsae.features.store import FeatureStore

_AROUND = 24  # characters on either side of a token that is shown


def feature_rows(store: FeatureStore, only: Sequence[int] = ()) -> list[Row]:
    """The features that have contexts, or `only` some: what they respond to, as JSON holds it."""
    means = {part: store.means(part) for part in PARTS}
    found = []
    for index in only or store.indices.tolist():
        feature = store.feature(index, contexts=1, sampled=0)
        strongest: dict[str, Any] = {}
        for part, names in PARTS.items():
            best = int(np.argmax(means[part][index]))
            live = feature.mean_act > 0
            strongest[part] = names[best] if live else None
            strongest[f"{part}_ratio"] = float(means[part][index, best] / feature.mean_act) if live else None
        found.append(
            {
                "feature": index,
                "density": feature.density,
                "max_act": feature.max_act,
                "mean_act": feature.mean_act,
                **strongest,
                "promoted": [{"token": t, "logit": v} for t, v in feature.promoted],
                "suppressed": [{"token": t, "logit": v} for t, v in feature.suppressed],
                "decoder_neighbours": [{"feature": i, "cosine": c} for i, c in feature.decoder_neighbours],
                "cofiring": [{"feature": i, "correlation": c, "share": s} for i, c, s in feature.cofiring],
                "example": example(feature.contexts[0]) if feature.contexts else None,
                "dialogue": feature.contexts[0].dialogue if feature.contexts else None,
            }
        )
    return found


def example(context: Context, around: int = _AROUND) -> str:
    """The token of a context in angle quotes, with some text before and after it."""
    before = "".join(context.tokens[: context.peak])
    after = "".join(context.tokens[context.peak + 1 :])
    return f"{before[-around:]}«{context.tokens[context.peak]}»{after[:around]}"


def feature_table(store: FeatureStore, only: Sequence[int] = (), rows: int = 20) -> str:
    """The first features of a store as a text table; see `feature_rows`."""
    indices = list(only) or store.indices.tolist()
    shown = [
        {
            "feature": str(row["feature"]),
            "density": row["density"],
            "max": row["max_act"],
            "role": _where(row, "role"),
            "kind": _where(row, "kind"),
            "promotes": " ".join(visible(p["token"]) for p in row["promoted"][:4]),
            "example": visible(row["example"] or ""),
        }
        for row in feature_rows(store, indices[:rows])
    ]
    columns = [Column(name) for name in ("feature", "density", "max", "role", "kind", "promotes", "example")]
    left = len(indices) - len(shown)
    caption = "role and kind: where its mean activation is largest, as a multiple of that over all tokens"
    caption += f"; {left:,} more with --rows or --json" if left else ""
    return console.table(store.name, columns, shown, caption=caption)


def token_table(name: str, text: str, rows: Sequence[Row]) -> str:
    """What `by_token` found, as a text table."""
    keys = ("feature", "mean_on_token", "mean_everywhere", "difference", "active_on_token", "density")
    shown = [{**row, "feature": str(row["feature"])} for row in rows]
    n = rows[0]["occurrences"] if rows else 0
    headers = {"active_on_token": "active on token"}
    columns = [Column(key, headers.get(key, key.replace("_", " "))) for key in keys]
    return console.table(f"{name}: features on {visible(text)!r}", columns, shown, caption=f"{n:,} occurrences")


def text_table(name: str, rows: Sequence[Row]) -> str:
    """What `on_text` found, as a text table."""
    shown = [
        {
            "position": str(row["position"]),
            "token": visible(row["token"]),
            "role": row["role"],
            "kind": row["kind"],
            "features": "  ".join(f"{f['feature']} ({f['value']:.3g})" for f in row["features"]),
        }
        for row in rows
    ]
    columns = [Column(key) for key in ("position", "token", "role", "kind", "features")]
    return console.table(f"{name}: the strongest features of each token", columns, shown)


def like_tables(name: str, index: int, found: dict[str, list[Row]]) -> str:
    """What `like` found, as text tables."""
    shown = {key: [{**row, "feature": str(row["feature"])} for row in rows] for key, rows in found.items()}
    near = [Column("feature"), Column("cosine"), Column("density")]
    with_it = [Column("feature"), Column("correlation"), Column("share"), Column("density")]
    titles = (f"{name}: directions like {index}", f"{name}: fire with {index}")
    caption = "share: of the tokens on which it fires, those on which the other fires too"
    first = console.table(titles[0], near, shown["decoder"])
    return f"{first}\n\n{console.table(titles[1], with_it, shown['cofiring'], caption=caption)}"


def visible(text: str) -> str:
    """Text on one line, with line ends and tabs shown."""
    return text.replace("\n", "↵").replace("\r", "␍").replace("\t", "⇥")


def _where(row: Row, part: str) -> str:
    return f"{row[part]} {row[f'{part}_ratio']:.1f}×" if row[part] else "-"
