"""Where a model's files are and what they say, before any weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from chatsae.errors import UserError
from chatsae.files import damaged, read_object
from chatsae.lm.gguf import gguf_checkpoint, names_gguf
from chatsae.lm.hf import LOAD_ERRORS, one_line, quiet
from chatsae.lm.stacks import build, count_blocks, decoder_of, refuse_others, text_config

_TIMEOUT = 10.0  # seconds for the one request that tells whether the hub answers
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Source:
    """Where the files of a model are: a local directory, or a hub name with `offline` when only its cache answers.

    `revision` of a hub model is the commit that its branch or tag stood at when it was looked up.
    """

    name: str
    path: str
    revision: str | None = None
    offline: bool = False
    trust_remote_code: bool = False

    @property
    def local(self) -> bool:
        return Path(self.path).is_dir()

    def kwargs(self) -> dict[str, Any]:
        """The arguments that every `from_pretrained` of this model takes."""
        where = {} if self.local else {"revision": self.revision, "local_files_only": self.offline}
        return {"trust_remote_code": self.trust_remote_code, **where}


def demo_model_path() -> Path:
    """The directory of the tiny chat model that comes with the package."""
    return Path(__file__).parents[1] / "demo" / "tiny-chat"


def locate(
    name: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    needs: tuple[str, ...] = ("config.json",),
) -> Source:
    """Find a model by directory, by hub name, as a GGUF file or as a preset; one of the files `needs` must be there.

    Raises:
        UserError: nothing is there, a file is missing, or the hub neither answers nor has left a copy in its cache.
    """
    path = demo_model_path() if str(name) == "demo" else Path(name).expanduser()
    if names_gguf(name) and not path.is_dir():
        return Source(str(name), str(gguf_checkpoint(name, revision)))
    if path.is_dir():
        if not any((path / file).is_file() for file in needs):
            raise UserError(f"{path}: no {' or '.join(needs)} in this directory; a Hugging Face checkpoint is expected")
        return Source(str(name), str(path), trust_remote_code=trust_remote_code)
    if str(name) == "demo":
        raise UserError(f"demo: the bundled model is missing from this installation ({path})")
    if path.exists():
        raise UserError(f"{name}: a file; the directory of a Hugging Face checkpoint is expected")
    offline, commit = _ask_hub(str(name), revision, needs)
    return Source(str(name), str(name), commit or revision, offline, trust_remote_code)


def _ask_hub(name: str, revision: str | None, needs: tuple[str, ...]) -> tuple[bool, str | None]:
    """Whether the hub's local cache has to do, because the hub does not answer; and the commit of a revision."""
    try:
        return False, huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_TIMEOUT).sha
    except hub_errors.HFValidationError:
        raise UserError(f"{name}: no such directory, and not the form of a hub name (owner/model)") from None
    except hub_errors.GatedRepoError:
        raise UserError(f"{name}: gated on the hub; accept its terms there, then log in with `hf auth login`") from None
    except hub_errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no revision {revision!r} of it") from None
    except hub_errors.RepositoryNotFoundError:
        raise UserError(f"{name}: no such directory, and no such model on the hub (or a private one)") from None
    except (hub_errors.HTTPError, OSError) as error:
        cached = [huggingface_hub.try_to_load_from_cache(name, file, revision=revision) for file in needs]
        paths = [Path(found) for found in cached if isinstance(found, str)]
        if not paths:
            raise UserError(f"{name}: not found locally, hub unreachable: {one_line(error)}") from None
        return True, paths[0].parent.name  # snapshots/COMMIT/FILE


def read_config(source: Source) -> PreTrainedConfig:
    """The configuration of a decoder-only language model.

    Raises:
        UserError: it cannot be read, is of an unknown architecture, or is not that of a decoder-only language model.
    """
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(source.path, **source.kwargs())
    except LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{source.name}: brings its own code; read it, then allow it with model.trust_remote_code"
            ) from None
        raise UserError(f"{source.name}: config.json cannot be used: {one_line(error)}") from None
    refuse_others(config, source.name)
    return config


def check_shards(source: Source) -> None:
    """Open the header of every weight file of a local checkpoint; reads no weights.

    Raises:
        UserError: there is no safetensors file, or one is missing, truncated or corrupt.
    """
    for file in weight_files(source) if source.local else ():
        path = Path(source.path) / file
        if not path.is_file():
            raise UserError(f"{path}: this shard is missing; the index names it")
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or corrupt: {one_line(error)}") from None


def weight_files(source: Source) -> list[str]:
    """The names of the safetensors files of a local checkpoint.

    Raises:
        UserError: there is none, or the index of them is damaged.
    """
    directory = Path(source.path)
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.is_file():
        return [single.name]
    if index.is_file():
        names = read_object(index, keys={"weight_map": dict})["weight_map"].values()
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise damaged(index, f"weight_map names {wrong[0]!r} as a file")
        return sorted(set(names))
    raise UserError(f"{directory}: no model.safetensors; weights are read from safetensors files only")


def load_tokenizer(
    name: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights; `chat_template`: the name of one, where it has several.

    Raises:
        UserError: there is none, it cannot be read, or it has no chat template of that name.
    """
    source = locate(name, revision, trust_remote_code, needs=_TOKENIZER_FILES)
    return read_tokenizer(source, chat_template, _max_positions(source))


def _max_positions(source: Source) -> int | None:
    """The context of the model that a tokenizer belongs to; None where its configuration is absent or says nothing."""
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(source.path, **source.kwargs())
        return getattr(text_config(config), "max_position_embeddings", None)
    except LOAD_ERRORS:  # whoever loads the model is told
        return None


def read_tokenizer(
    source: Source, chat_template: str | None = None, max_positions: int | None = None
) -> PreTrainedTokenizerBase:
    """See `load_tokenizer`; `model_max_length` is at most `max_positions`, the model's context."""
    if source.local and not any((Path(source.path) / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(f"{source.path}: no tokenizer in this directory ({' or '.join(_TOKENIZER_FILES)})")
    try:
        with quiet():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source.path, **source.kwargs())
    except LOAD_ERRORS as error:
        raise UserError(f"{source.name}: the tokenizer cannot be read: {one_line(error)}") from None
    if max_positions is not None:  # many a tokenizer claims 1e30
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_positions)
    if chat_template is not None:
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        if chat_template not in named:
            has = f"it has {', '.join(sorted(named))}" if named else "it has no named ones"
            raise UserError(f"model.chat_template: {source.name} has no chat template {chat_template!r}; {has}")
        tokenizer.chat_template = named[chat_template]
    return tokenizer


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's configuration says about its size; parameters are counted, not estimated."""

    name: str
    model_type: str
    d_in: int
    n_layers: int
    vocab_size: int
    max_positions: int | None
    parameters: int
    embedding_parameters: int
    block_parameters: tuple[int, ...]

    def parameters_through(self, layer: int) -> int:
        """Parameters that are loaded to read the residual stream after `layer`: the embedding and the blocks so far."""
        return self.embedding_parameters + sum(self.block_parameters[: layer + 1])


def model_facts(
    name: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    layer_path: str | None = None,
) -> ModelFacts:
    """The size of a model from its config.json alone; the model is built without memory for its weights.

    Of a multimodal model the decoder and the head are counted, not the towers.

    Raises:
        UserError: see `locate` and `read_config`.
    """
    source = locate(name, revision, trust_remote_code)
    config = read_config(source)
    text = text_config(config)
    try:
        with quiet(), torch.device("meta"):
            model = build(config, trust_remote_code)
    except LOAD_ERRORS as error:
        raise UserError(f"{name}: config.json describes no model that can be built: {one_line(error)}") from None
    embedding = model.get_input_embeddings().weight
    n_layers = count_blocks(config, layer_path)
    _, _, blocks = decoder_of(model, n_layers, layer_path)
    return ModelFacts(
        name=str(name),
        model_type=config.model_type,
        d_in=text.hidden_size,
        n_layers=n_layers,
        vocab_size=embedding.shape[0],
        max_positions=getattr(text, "max_position_embeddings", None),
        parameters=sum(p.numel() for p in model.parameters()),
        embedding_parameters=embedding.numel(),
        block_parameters=tuple(sum(p.numel() for p in block.parameters()) for block in blocks),
    )
