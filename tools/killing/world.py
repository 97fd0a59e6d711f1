"""What the verbs are run on: small corpora, recipes for the bundled model, and limits that are met in a second."""

import json
import random
from pathlib import Path

RECIPE = """\
model:
  name: demo
  layers: [1, 3]
data:
  sources: [chats.jsonl]
  text_sources: [texts.jsonl]
  block_size: 64
  max_length: 96
  ngram: 8
  held_out: [6, 8, 4]
  epochs: 0
  workers: 1
harvest:
  pool: 16
  token_budget: 256
  prefix: "off"
buffer:
  capacity: 512
sae:
  architectures: [standard, jumprelu]
  expansion_factors: [1]
  lrs: [1.0e-3]
train:
  tokens: 1280
  batch_size: 64
  step: plain
  log_every: 2
  checkpoint_every: 3
eval:
  dialogues: 6
"""

_TWO = ["--sae", "L1-1x-standard", "L3-1x-jumprelu"]
_FEATURES = [*_TWO, "--dialogues", "24", "--features", "8", "--contexts", "5"]
_LITTLE = ["--model.layers", "1", "--sae.architectures", "standard", "--train.tokens", "640"]
COMMANDS = {
    "train": ["train", "recipe.yaml", "--out", "run"],
    "prepare": ["prepare", "recipe.yaml", "--out", "data", "--data.max-tokens", "3000"],
    "features": ["features", "run", *_FEATURES],
    "judge": ["judge", "run", *_TWO, "--dialogues", "24", "--features", "6", "--controls", "4"],
    "report": ["report", "run", *_FEATURES],
    "sweep": ["sweep", "recipe.yaml", "--out", "sweep", "--methods", "fast", "bt-p", "--points", "2", *_LITTLE],
}
BASE: dict[str, tuple[str, ...]] = {
    "train": (),
    "prepare": (),
    "features": ("train",),
    "judge": ("train", "features"),
    "report": ("train", "features"),
    "sweep": (),
}
"""The verbs that have to be run before."""


def corpus(folder: Path) -> None:
    """Dialogues and documents of random words: some cut, some repeated, some that are no dialogues."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeghilmnorstu", k=rng.randint(2, 8))) for _ in range(400)]
    words += [word.capitalize() for word in words[:80]] + [str(n) for n in range(40)] + ["the", "of", "and", "to"] * 20

    def text(least: int, most: int) -> str:
        chosen = rng.choices(words, k=rng.randint(least, most))
        return " ".join(word + rng.choice(("", "", "", ",", ".", "?")) for word in chosen)

    chats: list[object] = []
    for number in range(500):
        messages = [{"role": role, "content": text(4, 24)} for role in ("user", "assistant") * rng.randint(1, 2)]
        chats.append({"messages": messages})
        if number % 20 == 0:
            chats += [rng.choice(chats), {"messages": [{"role": "user", "content": ""}]}]
    folder.mkdir(parents=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    documents = [{"text": text(20, 120)} for _ in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (folder / "recipe.yaml").write_text(RECIPE)


def small() -> None:
    """States are written at every turn, and files are full soon: all that an hour of work meets, within a second."""
    from chatsae.data.store import prepare, selection, shards
    from chatsae.features import collect

    vars(prepare).update(_CHECKPOINT_SECONDS=0.0)
    vars(selection).update(CHUNK=16)
    vars(shards).update(SEGMENT_TOKENS=500, SHARD_TOKENS=1_500)
    collect.collect.__kwdefaults__["seconds"] = 0.0  # pyrefly: ignore
