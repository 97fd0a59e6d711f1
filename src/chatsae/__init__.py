"""chatsae: train, judge and steer sparse autoencoders on instruct language models, dialogue by dialogue.

Every public name is imported when it is first used, so `import chatsae` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "BufferConfig": "chatsae.config",
    "DataConfig": "chatsae.config",
    "Dialogue": "chatsae.batch",
    "Document": "chatsae.batch",
    "FeatureStore": "chatsae.features.store",
    "LanguageModel": "chatsae.lm.load",
    "Message": "chatsae.batch",
    "ModelConfig": "chatsae.config",
    "Report": "chatsae.evals.report",
    "RunConfig": "chatsae.config",
    "SAE": "chatsae.sae.base",
    "SAEConfig": "chatsae.config",
    "TokenBatch": "chatsae.batch",
    "TrainConfig": "chatsae.config",
    "UserError": "chatsae.errors",
    "compare": "chatsae.evals.report",
    "contexts": "chatsae.features.build",
    "dedup": "chatsae.data.dedup",
    "evaluate": "chatsae.evals.evaluate",
    "grid": "chatsae.sae.grid",
    "load_recipe": "chatsae.recipe",
    "mix": "chatsae.buffer",
    "read": "chatsae.data.reading",
    "read_text": "chatsae.data.reading",
    "render": "chatsae.data.render",
    "steer": "chatsae.steering.attach",
    "train": "chatsae.training.loop",
    "train_run": "chatsae.training.session",
}

if TYPE_CHECKING:
    from chatsae.batch import Dialogue, Document, Message, TokenBatch
    from chatsae.buffer import mix
    from chatsae.config import BufferConfig, DataConfig, ModelConfig, RunConfig, SAEConfig, TrainConfig
    from chatsae.data.dedup import dedup
    from chatsae.data.reading import read, read_text
    from chatsae.data.render import render
    from chatsae.errors import UserError
    from chatsae.evals.evaluate import evaluate
    from chatsae.evals.report import Report, compare
    from chatsae.features.build import contexts
    from chatsae.features.store import FeatureStore
    from chatsae.lm.load import LanguageModel
    from chatsae.recipe import load_recipe
    from chatsae.sae.base import SAE
    from chatsae.sae.grid import grid
    from chatsae.steering.attach import steer
    from chatsae.training.loop import train
    from chatsae.training.session import train_run

__all__ = [  # noqa: RUF022  # plain alphabetical order
    "BufferConfig",
    "DataConfig",
    "Dialogue",
    "Document",
    "FeatureStore",
    "LanguageModel",
    "Message",
    "ModelConfig",
    "Report",
    "RunConfig",
    "SAE",
    "SAEConfig",
    "TokenBatch",
    "TrainConfig",
    "UserError",
    "compare",
    "contexts",
    "dedup",
    "evaluate",
    "grid",
    "load_recipe",
    "mix",
    "read",
    "read_text",
    "render",
    "steer",
    "train",
    "train_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chatsae' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
