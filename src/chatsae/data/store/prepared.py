"""Prepared data, read back: token batches of a method from one store of shards."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from chatsae.batch import SPLITS, Split, TokenBatch
from chatsae.config import Method
from chatsae.data.blocks import Tokens
from chatsae.data.render import as_sequences, batches
from chatsae.data.store.manifest import Manifest, tokenizer_facts
from chatsae.data.store.shards import Shard, read_shard
from chatsae.data.store.writing import TEXT
from chatsae.errors import UserError

_CHUNK = 256  # sequences per batch


class Prepared:
    """A directory that `prepare` wrote, for the tokenizer it was written with.

    Raises:
        UserError: it holds no finished data, or was made with another tokenizer or chat template.
    """

    def __init__(self, directory: Path | str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.read(self.directory)
        self._tokenizer = tokenizer
        made, ours = self.manifest.facts["recipe"]["tokenizer"], tokenizer_facts(tokenizer)
        for key, what in (("sha256", "tokenizer"), ("template_sha256", "chat template"), ("date", "date")):
            if made.get(key) != ours.get(key):
                raise UserError(
                    f"{self.directory} was prepared with another {what} (sha256 {str(made.get(key))[:12]}, the "
                    f"model's is {str(ours.get(key))[:12]}); prepare the data for this model"
                )

    def batches(
        self,
        *,
        split: Split = "train",
        method: Method = "fast",
        max_length: int = 8192,
        block_size: int = 2048,
        tally: Counter[str] | None = None,
    ) -> Iterator[TokenBatch]:
        """The labelled sequences of a method, as `render` gives them; bt-p has the split train only.

        Raises:
            UserError: there is no such data, or a shard is missing or has changed.
        """
        counts = Counter[str]() if tally is None else tally
        name = TEXT if method == "bt-p" else split
        if split not in SPLITS or name not in self.manifest.facts["splits"] or (method == "bt-p" and split != "train"):
            has = ", ".join(self.manifest.facts["splits"])
            raise UserError(f"{self.directory} holds nothing for method {method}, split {split}; it has {has}")
        prefix = tuple(self.manifest.facts["recipe"]["tokenizer"].get("prefix_ids", ())) if method != "bt-p" else ()
        whole = self._sequences(name)
        sequences = as_sequences(whole, self._tokenizer, method, max_length, block_size, counts)
        return batches(sequences, prefix, _CHUNK, counts)

    def _sequences(self, name: str) -> Iterator[Tokens]:
        for shard in self.manifest.facts["splits"][name]["shards"]:
            for _, tokens in read_shard(self.directory, Shard(**shard)):
                yield tokens
