"""What prepared data is made of, and whether it still is."""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from chatsae.config import DataConfig
from chatsae.data.hashing import SPEC
from chatsae.data.render import template_facts
from chatsae.data.sources import Source
from chatsae.data.store.shards import Shard
from chatsae.data.template import DATE
from chatsae.errors import UserError
from chatsae.files import damaged, read_object, sha256, shared_name

FORMAT = 1
MANIFEST = "manifest.json"


def recipe_of(
    config: DataConfig,
    sources: Sequence[Source],
    texts: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    max_tokens: int,
) -> dict[str, Any]:
    """Everything that the prepared bytes follow from."""
    return {
        "format": FORMAT,
        "chatsae": metadata.version("chatsae"),
        "sources": [source_facts(source) for source in sources],
        "text_sources": [source_facts(source) for source in texts],
        "order": config.order,
        "seed": seed,
        "max_tokens": max_tokens,
        "stops": stop_rule(config, max_tokens),
        "held_out": list(config.held_out),
        "dedup": {"ngram": config.ngram, "ngram_roles": list(config.ngram_roles), "hash": SPEC},
        "tokenizer": tokenizer_facts(tokenizer),
    }


def stop_rule(config: DataConfig, max_tokens: int) -> dict[str, int] | None:
    """When there is enough: `tokens`, a dialogue counted to `max_length` only, so that every method has max_tokens.

    bt-f and bt-p leave up to a block over, fast cuts long dialogues. None: never, all there is is taken.
    """
    if not max_tokens:
        return None
    return {"tokens": max_tokens + config.block_size, "max_length": config.max_length}


def source_facts(source: Source) -> dict[str, Any]:
    """A source's label, and its revision on the hub or the size and digest of its local files."""
    facts: dict[str, Any] = {"name": source.label}
    if source.name == "pydocs":
        facts["revision"] = f"Python {platform.python_version()}"
    elif source.revision is not None:
        facts["revision"] = source.revision
    if source.files:
        root = Path(source.name).expanduser()
        facts["files"] = [
            {
                "file": path.name if path == root else str(path.relative_to(root)),
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            for path in source.files
        ]
    return facts


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's name, the digest of its tokens and rules and of its chat template, and the date it prints."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts: dict[str, Any] = {"sha256": hashlib.sha256(rules.encode()).hexdigest()}
    if tokenizer.chat_template:
        template = template_facts(tokenizer)
        facts |= {"template_sha256": template.sha256, "prefix_ids": list(template.prefix_ids), "date": DATE}
    return facts


def changes(before: Any, after: Any, where: str = "") -> list[str]:
    """The leaves in which two recipes differ, as `field: before -> after`.

    Those of older versions call data and models by their path, which is no difference from its `shared_name`.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        return [line for key in keys for line in changes(before.get(key), after.get(key), f"{where}.{key}".lstrip("."))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for i, (a, b) in pairs for line in changes(a, b, f"{where}[{i}]")]
    today = (shared_name(before), shared_name(before, apart=True)) if isinstance(before, str) else ()
    return [] if before == after or after in today else [f"{where}: {_short(before)} -> {_short(after)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def manifest_digest(facts: dict[str, Any]) -> str:
    """What stands for a run's data: the digest of its prepared data's manifest, or of the facts about its sources."""
    text = json.dumps(facts, sort_keys=True)
    return facts.get("manifest_sha256") or hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """manifest.json of prepared data, and the digest that stands for it."""

    facts: dict[str, Any]
    sha256: str

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest in a directory.

        Raises:
            UserError: there is none, it is damaged, or of another format.
        """
        path = directory / MANIFEST
        if not path.is_file():
            what = "is not prepared to the end" if (directory / "state").is_dir() else "holds no prepared data"
            raise UserError(f"{directory} {what} (no {MANIFEST}); run chatsae prepare")
        advice = f"delete {directory} and prepare the data again"
        facts = read_object(path, advice, {"recipe": dict, "splits": dict})
        found = facts["recipe"].get("format")
        if found != FORMAT:
            raise UserError(f"{path} has format {found}, this version reads {FORMAT}; prepare the data again")
        if not _whole(facts):
            raise damaged(path, "recipe or splits lacks something", advice)
        return cls(facts, sha256(path))


def _whole(facts: dict[str, Any]) -> bool:
    """Whether what readers take from a manifest is there."""
    try:
        _ = [Shard(**shard) for split in facts["splits"].values() for shard in split["shards"]]
        return isinstance(facts["recipe"]["tokenizer"], dict) and isinstance(facts["recipe"]["sources"], list)
    except (AttributeError, KeyError, TypeError):
        return False
