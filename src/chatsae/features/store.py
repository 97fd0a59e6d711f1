"""What is known about the features of an SAE, on disk: facts.json, two tables and the arrays of the pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from chatsae.errors import UserError
from chatsae.features.keeper import PARTS
from chatsae.features.records import Context, Feature
from chatsae.files import damaged, json_text, read_object, settle, whole

SCHEMA_VERSION = 1

_PER_TOKEN = ("input_ids", "tokens", "acts", "role", "kind", "turn", "prefix")


@dataclass(frozen=True)
class FeatureStore:
    """The features of one SAE over an interpretation split: a row of `table` for each, contexts of those selected.

    facts: model, SAE and its digest, split, dialogues, tokens, seed, options. kept: the arrays of the pass (see
    docs/features.md), from which contexts of further features can be made.
    """

    facts: dict[str, Any]
    table: pa.Table
    context_table: pa.Table
    kept: Mapping[str, np.ndarray] = field(repr=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def name(self) -> str:
        """Of the SAE."""
        return str(self.facts["sae"])

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The columns of `table` that hold numbers, a row per feature of the SAE; histograms are [F, bins]."""
        found = {}
        for name, column in zip(self.table.column_names, self.table.columns, strict=True):
            array = column.combine_chunks()
            if pa.types.is_fixed_size_list(array.type):
                found[name] = array.flatten().to_numpy().reshape(-1, array.type.list_size)
            elif not pa.types.is_list(array.type):
                found[name] = array.to_numpy(zero_copy_only=False)
        return found

    @cached_property
    def indices(self) -> np.ndarray:
        """The features that have contexts, ascending."""
        return np.flatnonzero(self.columns["selected"])

    @property
    def live(self) -> np.ndarray:
        """The features that fired at all, ascending."""
        return np.flatnonzero(self.columns["n_active"])

    def means(self, part: str) -> np.ndarray:
        """The mean activation of every feature over the tokens of each role, kind or position [F, parts]."""
        totals = np.array(self.facts["tokens"][part])
        return self.columns[f"{part}_sums"] / np.maximum(totals, 1)

    def feature(self, index: int, *, contexts: int | None = None, sampled: int | None = None) -> Feature:
        """One feature with its contexts, or as many of them; of one that was not selected, without.

        Raises:
            UserError: the SAE has no such feature.
        """
        self.check(index)
        row = self.table.slice(index, 1).to_pylist()[0]
        means = {f"{part}_means": tuple(self.means(part)[index].tolist()) for part in PARTS}
        counts = {f"{part}_counts": tuple(row[f"{part}_counts"]) for part in (*PARTS, "value")}

        def ranked(*names: str) -> tuple[Any, ...]:
            return tuple(zip(*(row[name] or () for name in names), strict=True))

        return Feature(
            index=index,
            density=row["density"],
            max_act=row["max_act"],
            mean_act=row["mean_act"],
            contexts=self.contexts(index, contexts),
            sampled=self.contexts(index, sampled, top=False),
            promoted=ranked("promoted_tokens", "promoted_logits"),
            suppressed=ranked("suppressed_tokens", "suppressed_logits"),
            decoder_neighbours=ranked("decoder_neighbours", "decoder_cosines"),
            cofiring=ranked("cofiring_neighbours", "cofiring_correlations", "cofiring_shares"),
            **means,
            **counts,
        )

    def contexts(self, index: int, n: int | None = None, *, top: bool = True) -> tuple[Context, ...]:
        """The strongest contexts of a feature, or those sampled; the first `n`, of the sampled ones spread evenly.

        Raises:
            UserError: the SAE has no such feature.
        """
        self.check(index)
        first, middle, last = (np.searchsorted(self._order, 2 * index + i) for i in range(3))
        start, stop = (first, middle) if top else (middle, last)
        own = self.context_table.slice(start, stop - start)  # take reads all of the table it is asked of
        if n is not None and n < len(own):
            own = own.slice(0, n) if top else own.take(np.linspace(0, len(own) - 1, n).round().astype(int))
        return tuple(_context(row) for row in own.to_pylist())

    def check(self, index: int) -> None:
        """Refuse a feature that the SAE does not have.

        Raises:
            UserError: it does not.
        """
        if not 0 <= index < len(self.table):
            raise UserError(f"{self.name} has features 0..{len(self.table) - 1}; {index} is not one of them")

    @cached_property
    def _order(self) -> np.ndarray:
        """By feature, the strongest contexts before the sampled ones: ascending."""
        feature = self.context_table["feature"].to_numpy().astype(np.int64)
        return 2 * feature + ~self.context_table["top"].to_numpy(zero_copy_only=False)

    def save(self, path: Path | str) -> None:
        """Write the directory as a whole or not at all; one that is there is replaced.

        Raises:
            UserError: it cannot be written.
        """
        path = Path(path)
        with whole(path) as new:
            new.mkdir()
            pq.write_table(self.table, new / "features.parquet", compression="zstd")
            pq.write_table(self.context_table, new / "contexts.parquet", compression="zstd", row_group_size=4096)
            save_file(dict(self.kept), new / "pass.safetensors")
            (new / "facts.json").write_text(json_text(self.facts), encoding="utf-8")

    @staticmethod
    def load(path: Path | str) -> "FeatureStore":
        """Read a directory that `save` wrote.

        Raises:
            UserError: there is none, it is damaged, or another version of chatsae wrote it.
        """
        path = Path(path)
        settle(path.parent, below=False)
        if not (path / "facts.json").is_file():
            raise UserError(f"{path} holds no features (no facts.json); `chatsae features RUN` makes them")
        advice = "`chatsae features RUN --rebuild` makes it anew"
        facts = read_object(path / "facts.json", advice, {"schema_version": int})
        if facts["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{path} was written with schema {facts['schema_version']}, this chatsae reads {SCHEMA_VERSION}; "
                f"{advice}"
            )
        try:
            return FeatureStore(
                facts=facts,
                table=pq.read_table(path / "features.parquet"),
                context_table=pq.read_table(path / "contexts.parquet"),
                kept=load_file(path / "pass.safetensors"),
            )
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, SafetensorError) as error:
            raise damaged(path, error, advice) from None


def fixed(values: np.ndarray, dtype: Any) -> pa.FixedSizeListArray:
    """A column with a list of equal length in every row."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel().astype(dtype)), values.shape[1])


def ragged(rows: Sequence[int], values: Sequence[Sequence[Any]], n: int, kind: pa.DataType) -> pa.Array:
    """A column of `n` lists, those of `rows` with values, the others null."""
    found: list[Sequence[Any] | None] = [None] * n
    for row, value in zip(rows, values, strict=True):
        found[row] = value
    return pa.array(found, pa.list_(kind))


def _context(row: dict[str, Any]) -> Context:
    per_token = {name: tuple(row[name]) for name in _PER_TOKEN}
    return Context(
        feature=row["feature"],
        dialogue=row["dialogue"],
        value=row["value"],
        quantile=row["quantile"],
        start=row["start"],
        peak=row["peak"],
        index=row["dialogue_index"],
        **per_token,
    )
