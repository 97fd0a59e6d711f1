"""Windows of dialogues around chosen tokens, with the activations of a feature on every token of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae import console
from chatsae.batch import TokenBatch
from chatsae.features.best import scores, tokens_of
from chatsae.features.collect import Reading, harvest
from chatsae.features.firings import narrow, rounded
from chatsae.features.keeper import share_below
from chatsae.features.records import Options
from chatsae.features.text import TokenText, message_index
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE

_BEFORE = 0.75  # share of a window that lies before its token: a causal model has seen only that


@dataclass(slots=True)
class Windows:
    """Places to be shown, and what is found there; arrays of one length, `acts` [M, window].

    feature, token (index in the split), top (one of the strongest), dialogue, start (position of the window in its
    dialogue), length, peak (index of the token in the window).
    """

    feature: np.ndarray
    token: np.ndarray
    top: np.ndarray
    dialogue: np.ndarray
    start: np.ndarray
    length: np.ndarray
    peak: np.ndarray
    acts: np.ndarray

    @staticmethod
    def around(kept: Mapping[str, np.ndarray], features: np.ndarray, options: Options, starts: np.ndarray) -> "Windows":
        """The places of the chosen features, in what a keeper kept; activations still zero, but for known peaks.

        A window holds `options.window` tokens, or the dialogue where that is shorter; it never leaves its dialogue.
        """
        parts = []
        for name, n in (("top", options.contexts), ("sampled", options.sampled)):
            keys = kept[name][features, :n]
            row, column = np.nonzero(keys)
            parts.append((features[row], keys[row, column], np.full(len(row), name == "top")))
        feature, key, top = (np.concatenate([part[i] for part in parts]) for i in range(3))
        token = tokens_of(key)
        dialogue = np.searchsorted(starts, token, side="right") - 1
        position = token - starts[dialogue]
        whole = np.diff(starts)[dialogue]
        length = np.minimum(options.window, whole)
        start = np.clip(position - int(options.window * _BEFORE), 0, whole - length)
        acts = np.zeros((len(feature), options.window), np.float32)
        found = Windows(feature, token, top, dialogue, start, length, position - start, acts)
        found.acts[np.flatnonzero(top), found.peak[top]] = scores(key[top])
        return found

    def by_dialogue(self) -> dict[int, np.ndarray]:
        """The windows of each dialogue that has one."""
        order = np.argsort(self.dialogue, kind="stable")
        dialogues, first = np.unique(self.dialogue[order], return_index=True)
        return dict(zip(dialogues.tolist(), np.split(order, first[1:]), strict=True)) if len(order) else {}

    def fill(self, sae: SAE, rows: np.ndarray, x: Float[Tensor, "N D"]) -> None:
        """Take the activations on the tokens of a dialogue, for its windows; a known peak keeps its value."""
        features, column = np.unique(self.feature[rows], return_inverse=True)
        part = narrow(sae, features)
        with torch.no_grad():
            acts = rounded(part.encode(x.to(part.W_enc.device)).float().cpu().numpy())
        for row, c in zip(rows.tolist(), column.tolist(), strict=True):
            start, length, peak = int(self.start[row]), int(self.length[row]), int(self.peak[row])
            known = self.acts[row, peak]
            self.acts[row, :length] = acts[start : start + length, c]
            if self.top[row]:
                self.acts[row, peak] = known

    @property
    def value(self) -> np.ndarray:
        return self.acts[np.arange(len(self.acts)), self.peak]

    def select(self, rows: np.ndarray) -> "Windows":
        """Some of them, in the order given."""
        return Windows(*(getattr(self, name)[rows] for name in self.__slots__))


def read_windows(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    tokens: TokenBatch,
    windows: Mapping[str, Windows],
    reading: Reading,
    *,
    tally: Counter[str] | None = None,
) -> None:
    """Fill the windows of every SAE: the model runs once more, on the dialogues that are shown."""
    rows = {name: found.by_dialogue() for name, found in windows.items()}
    shown = sorted(set().union(*rows.values()))
    if not shown:
        return
    with console.progress("contexts", len(shown)) as advance:
        for batch, acts, index, _ in harvest(lm, tokens.select(shown), reading, tally=tally):
            bounds = batch.cu_seqlens.tolist()
            for i, local in enumerate(index.tolist()):
                for name, sae in saes.items():
                    if (own := rows[name].get(shown[local])) is not None:
                        x = acts[lm.layers.index(sae.spec.layer), bounds[i] : bounds[i + 1]]
                        windows[name].fill(sae, own, x)
            advance(len(batch))


def in_order(windows: Windows, values: np.ndarray) -> tuple[Windows, np.ndarray]:
    """By feature, the strongest first and then the sampled ones, ascending; and the share of smaller activations.

    Of a sampled one that rounding has silenced nothing can be shown: it is left out.
    """
    windows = windows.select(np.flatnonzero(windows.value > 0))
    sign = np.where(windows.top, -1, 1)
    order = np.lexsort((windows.token, sign * windows.value, ~windows.top, windows.feature))
    windows = windows.select(order)
    quantile, some = np.zeros(len(order)), np.flatnonzero(~windows.top)
    quantile[some] = share_below(values, windows.value[some], windows.feature[some])
    return windows, quantile


def context_table(windows: Windows, quantile: np.ndarray, tokens: TokenBatch, text: TokenText) -> pa.Table:
    """contexts.parquet: a row per context, lists with an entry per token."""
    starts = tokens.cu_seqlens.numpy().astype(np.int64)
    length = windows.length
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    row = np.repeat(np.arange(len(length)), length)
    inside = np.arange(len(row)) - offsets[:-1][row]
    at = (starts[windows.dialogue] + windows.start)[row] + inside
    texts = _texts(windows.dialogue, tokens, text)
    place = zip(windows.dialogue[row].tolist(), (windows.start[row] + inside).tolist(), strict=True)
    pieces = [texts[dialogue][position] for dialogue, position in place]

    def lists(values: pa.Array) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(offsets), values)

    turn = message_index(tokens).numpy()[at].astype(np.int16)
    columns = {
        "feature": pa.array(windows.feature.astype(np.int32)),
        "top": pa.array(windows.top),
        "quantile": pa.array(quantile.astype(np.float32), mask=windows.top),
        "value": pa.array(windows.value),
        "dialogue": pa.array([tokens.names[d] for d in windows.dialogue.tolist()], pa.string()),
        "dialogue_index": pa.array(windows.dialogue.astype(np.int32)),
        "start": pa.array(windows.start.astype(np.int32)),
        "peak": pa.array(windows.peak.astype(np.int32)),
        "input_ids": lists(pa.array(tokens.input_ids.numpy()[at].astype(np.int32))),
        "tokens": lists(pa.array(pieces, pa.string())),
        "acts": lists(pa.array(windows.acts[row, inside])),
        "role": lists(pa.array(tokens.role.numpy()[at])),
        "kind": lists(pa.array(tokens.kind.numpy()[at])),
        "turn": lists(pa.array(turn)),
        "prefix": lists(pa.array(tokens.prefix.numpy()[at])),
    }
    return pa.table(columns)


def _texts(dialogues: np.ndarray, tokens: TokenBatch, text: TokenText) -> dict[int, Sequence[str]]:
    bounds, ids = tokens.cu_seqlens.tolist(), tokens.input_ids
    return {int(d): text.of(ids[bounds[d] : bounds[d + 1]].tolist()) for d in np.unique(dialogues)}
