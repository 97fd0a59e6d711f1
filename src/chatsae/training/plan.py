"""What recipes would train, computed from configurations alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.config import DataConfig, Method, RunConfig, SAESpec, check_run, sae_specs
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.lm.checkpoint import ModelFacts
from chatsae.lm.facts import planning_facts
from chatsae.recipe import load_recipe, run_recipe
from chatsae.training.calibrate import calibrate, duration
from chatsae.training.schedule import buffer_capacity
from chatsae.training.timing import ACTIVE, DIALOGUE

_ADAM = 4  # float32 copies of every SAE weight: weight, gradient, two moments
_SAE_FLOPS = 10  # per weight of W_enc and token: 4 forward, 6 backward; no gradient of x is needed
_GIB = 2**30
_TIMED = (
    f"Times: measured on this machine with random weights, on dialogues of about {DIALOGUE} tokens or on blocks, with "
    f"{ACTIVE:.0%} of the features active; reading and tokenising are not counted."
)


@dataclass(frozen=True)
class Pass:
    """One pass of a language model: every SAE of a recipe, for one method."""

    recipe: str
    method: Method
    model: str
    saes: tuple[SAESpec, ...]
    tokens: int
    lm_bytes: int
    sae_bytes: int
    buffer_bytes: int
    lm_flops: float
    sae_flops: float
    predicted_seconds: float | None = None
    predicted_lm_seconds: float | None = None
    predicted_sae_seconds: float | None = None
    notes: tuple[str, ...] = ()
    """Why a time was not predicted, or what it was scaled from."""
    context: str = ""
    """What the model's context does to the sequences, where it is shorter than they may be."""

    def facts(self) -> dict[str, Any]:
        """The pass as JSON."""
        return asdict(self) | {"saes": [spec.name for spec in self.saes]}


def plan_recipes(recipes: Sequence[Path], methods: Sequence[Method], seconds: float = 0) -> list[Pass]:
    """`plan_configs` of recipes in files; a run directory counts as its recipe.

    Raises:
        UserError: a recipe cannot be read; see `plan_configs`.
    """
    return plan_configs([(path.name, load_recipe(run_recipe(path))) for path in recipes], methods, seconds)


def plan_configs(configs: Sequence[tuple[str, RunConfig]], methods: Sequence[Method], seconds: float = 0) -> list[Pass]:
    """One pass per recipe and method, in that order.

    Args:
        configs: recipes with their names.
        seconds: of measuring on this machine per recipe, which predict the times of its passes; 0: none are.

    Raises:
        UserError: the model's configuration cannot be read, no run can have a recipe's values, or there is no method.
    """
    if not methods:
        raise UserError("plan needs at least one method")
    if not 0 <= seconds < float("inf"):
        raise UserError(f"--seconds must be at least 0 and finite, not {seconds}")
    planned: list[tuple[list[Pass], list[RunConfig]]] = []
    for name, config in configs:
        model = config.model
        each = [replace(config, data=replace(config.data, method=method)) for method in methods]
        for one in each:
            check_run(one)
        facts = planning_facts(model.name, model.revision, model.trust_remote_code, layer_path=model.layer_path)
        planned.append(([plan_pass(name, one, facts) for one in each], each))
    if seconds <= 0:
        return [p for passes, _ in planned for p in passes]
    timed = []
    with console.progress("measure", len(planned)) as advance:
        for passes, each in planned:
            advance(0, passes[0].model)
            timed += _with_times(passes, each, seconds)
            advance(1)
    return timed


def _with_times(passes: Sequence[Pass], configs: Sequence[RunConfig], seconds: float) -> list[Pass]:
    """The passes of one recipe with their predicted times."""
    found = calibrate(configs[0], passes[0].saes, seconds, methods=[p.method for p in passes])
    timed = []
    for planned, config in zip(passes, configs, strict=True):
        prediction = found.predict(config)
        timed.append(
            replace(
                planned,
                predicted_seconds=prediction.seconds,
                predicted_lm_seconds=prediction.lm_seconds,
                predicted_sae_seconds=prediction.sae_seconds,
                notes=found.missing + found.notes,
            )
        )
    return timed


def plan_pass(recipe: str, config: RunConfig, facts: ModelFacts) -> Pass:
    """Sizes and work of one pass.

    Memory counts the blocks up to the deepest layer and the embedding, the SAEs with gradients and Adam moments in
    float32, and the mixing buffer. FLOPs are 2 per language-model weight and token, and 10 per weight of W_enc
    and token for an SAE's dense forward and backward.

    Raises:
        UserError: a layer is out of range.
    """
    layers = tuple(sorted(config.model.layers))
    for layer in layers:
        if not 0 <= layer < facts.n_layers:
            raise UserError(f"{recipe}: model.layers: {facts.name} has layers 0 to {facts.n_layers - 1}, not {layer}")
    specs = tuple(sae_specs(config.sae, layers=layers, d_in=facts.d_in))
    width = 4 if config.model.dtype == "float32" else 2
    loaded = facts.parameters_through(layers[-1])
    encoder_weights = sum(spec.d_in * spec.d_sae for spec in specs)
    return Pass(
        recipe=recipe,
        method=config.data.method,
        model=config.model.name,
        saes=specs,
        tokens=config.train.tokens,
        lm_bytes=width * loaded,
        sae_bytes=4 * _ADAM * 2 * encoder_weights,
        buffer_bytes=width * buffer_capacity(config) * len(layers) * facts.d_in,
        lm_flops=2.0 * (loaded - facts.embedding_parameters) * config.train.tokens,
        sae_flops=float(_SAE_FLOPS) * encoder_weights * config.train.tokens,
        context=_context(config.data, facts),
    )


def _context(data: DataConfig, facts: ModelFacts) -> str:
    size = data.max_length if data.method == "fast" else data.block_size
    if facts.max_positions is None or size <= facts.max_positions:
        return ""
    if data.method == "fast":
        return f"dialogues are cut at {facts.max_positions:,} tokens, the context of {facts.name}"
    return f"{data.method} cannot run: data.block_size is {size:,}, the context of {facts.name} {facts.max_positions:,}"


def plan_table(passes: Sequence[Pass]) -> str:
    """The passes as text; under the table what their times were predicted from, and the names of the SAEs."""
    timed = any(p.predicted_lm_seconds or p.predicted_sae_seconds or p.notes for p in passes)
    rows = [
        {
            "recipe": p.recipe,
            "method": p.method,
            "SAEs": len(p.saes),
            "tokens": p.tokens,
            "LM GiB": p.lm_bytes / _GIB,
            "SAE GiB": p.sae_bytes / _GIB,
            "buffer GiB": p.buffer_bytes / _GIB,
            "LM PFLOP": p.lm_flops / 1e15,
            "SAE PFLOP": p.sae_flops / 1e15,
            **(_times(p) if timed else {}),
        }
        for p in passes
    ]
    total = sum(len(p.saes) for p in passes)
    title = f"{len(passes)} {'pass trains' if len(passes) == 1 else 'passes train'} {total} SAEs"
    notes = dict.fromkeys(f"{p.recipe}: {note}" for p in passes for note in (p.context, *p.notes) if note)
    names = dict.fromkeys(f"{p.model}: {', '.join(s.name for s in p.saes)}" for p in passes)
    table = console.table(title, [Column(key) for key in rows[0]], rows, group="recipe")
    return "\n".join([table, *([_TIMED] if timed else []), *notes, *names])


def _times(planned: Pass) -> dict[str, str]:
    named = {
        "LM time": planned.predicted_lm_seconds,
        "SAE time": planned.predicted_sae_seconds,
        "time": planned.predicted_seconds,
    }
    return {name: "-" if seconds is None else duration(seconds) for name, seconds in named.items()}
