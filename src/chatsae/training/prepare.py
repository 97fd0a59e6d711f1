"""Prepare the data of a recipe for its model."""

from pathlib import Path

from chatsae import console
from chatsae.config import RunConfig
from chatsae.data.store.manifest import Manifest
from chatsae.data.store.prepare import Engine, prepare
from chatsae.data.store.summary import warnings
from chatsae.lm.checkpoint import load_tokenizer


def prepare_data(config: RunConfig, out: Path, *, engine: Engine = "local") -> Manifest:
    """Prepare the data of a recipe in a directory; see `chatsae.data.store.prepare.prepare`.

    Raises:
        UserError: the recipe, the tokenizer, a source or the directory is not usable.
    """
    data = config.data
    model = config.model
    tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code, chat_template=model.chat_template)
    max_tokens = config.train.tokens if data.max_tokens is None else data.max_tokens
    manifest = prepare(data, tokenizer, out, seed=config.train.seed, max_tokens=max_tokens, engine=engine)
    for line in warnings(manifest):
        console.warn(line)
    return manifest
