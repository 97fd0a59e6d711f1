"""`chatsae norms`: how long activations are after every block, and which tokens are sinks, to choose a layer by."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.batch import ActivationBatch
from chatsae.config import RunConfig
from chatsae.console import Column
from chatsae.evals.pareto import METADATA, SETTINGS, figure_paths, need_matplotlib
from chatsae.files import whole
from chatsae.lm.checkpoint import model_facts
from chatsae.lm.load import load_model
from chatsae.lm.norms import POSITIONS, LayerNorms, measure_norms, norms_sentence
from chatsae.training.inputs import SAMPLE
from chatsae.training.pipeline import token_batches

_RANGES = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(POSITIONS)]
RANGES = (*_RANGES, f"{POSITIONS[-1]}+")
"""Names of the ranges of positions."""

_POOL = 128  # sequences that are sorted by length together: few tokens are read


def recipe_norms(config: RunConfig, figure: Path | None = None, tokens: int = SAMPLE) -> tuple[dict[str, Any], str]:
    """The norms after every block over the first training tokens of a recipe, as JSON and as text; drawn if asked.

    Raises:
        UserError: the model or the data cannot be read, or the figure cannot be drawn.
    """
    if figure is not None:
        need_matplotlib()
        figure_paths(figure)
    model = config.model
    n_layers = model_facts(model.name, model.revision, model.trust_remote_code, layer_path=model.layer_path).n_layers
    lm = load_model(replace(model, layers=tuple(range(n_layers))))
    stream = token_batches(config.data, lm.tokenizer, seed=config.train.seed)

    def batches() -> Iterator[ActivationBatch]:
        n = 0
        with console.progress(f"read {n_layers} layers", tokens) as advance:
            for batch in lm.harvest(stream, token_budget=config.harvest.token_budget or 4096, pool=_POOL):
                advance(batch.acts.shape[1])
                n += batch.acts.shape[1]
                yield batch
                if n >= tokens:
                    return

    found = measure_norms(batches(), lm.layers)
    if figure is not None:
        for path in draw(found, figure, title=f"{lm.name}, {config.data.method}"):
            console.say(f"drawn: {path}")
    sinks = [norms_sentence(one, lm.tokenizer) for one in found if one.n_sinks]
    facts = {"model": lm.name, "method": config.data.method, "layers": [one.facts() for one in found]}
    return facts, "\n".join([_table(found), *sinks])


def _table(found: Sequence[LayerNorms]) -> str:
    rows = [
        {"layer": one.layer, "median": one.median, "sinks": one.n_sinks / one.n_tokens, "held": one.norm_share}
        | {name: None if at is None else at / one.median for name, at in zip(RANGES, one.by_position, strict=True)}
        for one in found
    ]
    columns = [Column("layer"), Column("median", "median norm"), Column("sinks", "sinks, share of tokens")]
    columns += [Column("held", "of squared norm"), *(Column(name, f"at {name}") for name in RANGES)]
    caption = f"median norms by position are over the median of the layer; {found[0].n_tokens:,} tokens"
    return console.table("norms of the residual stream after each block", columns, rows, caption=caption)


def draw(found: Sequence[LayerNorms], path: Path, *, title: str = "") -> list[Path]:
    """A heat map of norm over median, by layer and position; returns the files written.

    Raises:
        UserError: matplotlib is missing, or a file cannot be written.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    nan = float("nan")
    rows = [[nan if at is None else at / one.median for at in one.by_position] for one in found]
    with matplotlib.rc_context(SETTINGS):
        drawing = Figure(figsize=(6.4, 1.6 + 0.22 * len(found)), layout="constrained")
        axes = drawing.subplots()
        axes.grid(visible=False)
        image = axes.imshow(rows, aspect="auto", cmap="viridis", norm=LogNorm(0.1, 300, clip=True), origin="lower")
        axes.set_xticks(range(len(RANGES)), RANGES)
        axes.set_yticks(range(len(found)), [str(one.layer) for one in found], fontsize=7)
        axes.set(xlabel="position in the sequence", ylabel="layer", title=title)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value == value:
                    shade = "black" if value > 30 else "white"
                    axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=6, color=shade)
        drawing.colorbar(image, ax=axes, label="median norm there / median norm of the layer")
        written = figure_paths(path)
        for file in written:
            with whole(file) as new:
                drawing.savefig(new, format=file.suffix[1:], dpi=150, metadata=METADATA[file.suffix.lower()])
    return written
