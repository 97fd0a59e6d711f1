"""The paper's own figures (paper.json), to be set beside a run on the same model, layer, width and architecture."""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from chatsae.config import Architecture, Method, RunConfig, SAESpec
from chatsae.errors import UserError

SOURCE = "arXiv 2506.07691"


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One SAE of the paper's tables, which print log2 of eq. 7; `table` is their number where it is known here."""

    model: str
    layer: int
    expansion_factor: int
    architecture: Architecture
    method: Method
    log2_mse: float
    log2_mse_st: float
    table: int | None

    @property
    def source(self) -> str:
        """How a row of a comparison names it."""
        return "paper" if self.table is None else f"paper, Table {self.table}"

    def figures(self) -> dict[str, float]:
        """The values as printed (log2) and as errors: the one place where the logarithm is undone."""
        return {
            "mse": 2.0**self.log2_mse,
            "log2_mse": self.log2_mse,
            "mse_st": 2.0**self.log2_mse_st,
            "log2_mse_st": self.log2_mse_st,
        }


@cache
def paper_rows() -> tuple[PaperRow, ...]:
    """Every SAE whose figures are known here."""
    text = resources.files("chatsae.evals").joinpath("paper.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return tuple(PaperRow(**dict(zip(data["columns"], values, strict=True))) for values in data["rows"])


def paper_model(name: str) -> str:
    """The paper's model that `name` means, with or without its owner.

    Raises:
        UserError: the paper has no such model.
    """
    known = dict.fromkeys(row.model for row in paper_rows())
    meant = {key.casefold(): model for model in known for key in (model, model.partition("/")[2])}
    found = meant.get(name.casefold())
    if found is None:
        near = difflib.get_close_matches(name.casefold(), meant, n=1)
        hint = f"perhaps you meant {meant[near[0]]}" if near else f"it has {', '.join(known)}"
        raise UserError(f"--paper: the paper has no figures of a model {name!r}; {hint}")
    return found


def paper_row(model: str, spec: SAESpec, method: Method) -> PaperRow | None:
    """The paper's row on the same model (by hub name), layer, width, architecture and method."""
    wanted = (model.casefold(), spec.layer, spec.expansion_factor, spec.architecture, method)
    rows = (r for r in paper_rows() if wanted == (r.model.casefold(), *_place(r)))
    return next(rows, None)


def differences_from_paper(config: RunConfig, spec: SAESpec) -> list[str]:
    """What a run trained an SAE with, where the paper's settings (the defaults of `chatsae.config`) are others."""
    paper = RunConfig()
    standard = spec.architecture == "standard"
    penalty, coefficients = (
        ("l1_coefficients", paper.sae.l1_coefficients) if standard else ("l0_coefficients", paper.sae.l0_coefficients)
    )
    pairs: dict[str, tuple[Any, Any]] = {
        "train.tokens": (config.train.tokens, paper.train.tokens),
        "train.batch_size": (config.train.batch_size, paper.train.batch_size),
        "sae.form": (spec.form, paper.sae.form),
        f"sae.{penalty}": (spec.coefficient, coefficients[0]),
        "sae.lrs": (spec.lr, paper.sae.lrs[0]),
    }
    if not standard:
        pairs["sae.bandwidth"] = (spec.bandwidth, paper.sae.bandwidth)
        pairs["sae.init_threshold"] = (spec.init_threshold, paper.sae.init_threshold)
    return [f"{name} {_text(own)} (paper {_text(its)})" for name, (own, its) in pairs.items() if own != its]


def _place(row: PaperRow) -> tuple[int, int, Architecture, Method]:
    return row.layer, row.expansion_factor, row.architecture, row.method


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
