"""What recipes would train, computed from configurations alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.config import Method, RunConfig, SAESpec, sae_specs
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.lm.checkpoint import ModelFacts
from chatsae.lm.facts import planning_facts
from chatsae.recipe import load_recipe

_ADAM = 4  # float32 copies of every SAE weight: weight, gradient, two moments
_SAE_FLOPS = 10  # per weight of W_enc and token: 4 forward, 6 backward; no gradient of x is needed
_GIB = 2**30


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

    def facts(self) -> dict[str, Any]:
        """The pass as JSON."""
        return asdict(self) | {"saes": [spec.name for spec in self.saes]}


def plan_recipes(recipes: Sequence[Path], methods: Sequence[Method]) -> list[Pass]:
    """One pass per recipe and method, in that order; a run directory counts as its recipe.

    Raises:
        UserError: a recipe or the model's configuration cannot be read.
    """
    passes = []
    for path in recipes:
        config = load_recipe(path / "config.yaml" if path.is_dir() else path)
        facts = planning_facts(config.model.name, config.model.revision, config.model.trust_remote_code)
        passes += [plan_pass(path.name, replace(config, data=replace(config.data, method=m)), facts) for m in methods]
    return passes


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
        buffer_bytes=width * config.buffer.capacity * len(layers) * facts.d_in,
        lm_flops=2.0 * (loaded - facts.embedding_parameters) * config.train.tokens,
        sae_flops=float(_SAE_FLOPS) * encoder_weights * config.train.tokens,
    )


def plan_table(passes: Sequence[Pass]) -> str:
    """The passes as text, with the names of the SAEs under the table."""
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
        }
        for p in passes
    ]
    total = sum(len(p.saes) for p in passes)
    title = f"{len(passes)} {'pass trains' if len(passes) == 1 else 'passes train'} {total} SAEs"
    names = dict.fromkeys(f"{p.model}: {', '.join(s.name for s in p.saes)}" for p in passes)
    return "\n".join([console.table(title, [Column(key) for key in rows[0]], rows, group="recipe"), *names])
