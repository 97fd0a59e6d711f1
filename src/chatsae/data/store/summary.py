"""What became of every row of prepared data, for people."""

from collections import Counter
from typing import Any

from chatsae import console
from chatsae.console import Column
from chatsae.data.store.manifest import Manifest

_LOW = 0.05  # share of a source's usable dialogues below which something else than repetition is likely


def prepared_table(manifest: Manifest) -> str:
    """What became of every source's rows."""
    rows = [_row(kind, source) for kind, sources in manifest.facts["counts"].items() for source in sources]
    columns = [Column(key) for key in rows[0]]
    sources = [source for sources in manifest.facts["counts"].values() for source in sources]
    left_out = [f"{source['name']}: {reasons}" for source in sources if (reasons := _reasons(source))]
    caption = "\n".join([*left_out, f"manifest sha256 {manifest.sha256}"])
    return console.table("Prepared data", columns, rows, group="kind", caption=caption)


def warnings(manifest: Manifest) -> list[str]:
    """What a person should know before training on it."""
    lines = []
    recipe, splits = manifest.facts["recipe"], manifest.facts["splits"]
    for source in manifest.facts["counts"].get("dialogues", []):
        usable = source["rows"] - sum(source["rejected"].values())
        kept = usable - source["dropped"]
        if usable and kept < _LOW * usable:
            lines.append(
                f"{source['name']} keeps {kept:,} of {usable:,} dialogues; {recipe['dedup']['ngram']} words that open "
                f"many of them, a system prompt say, have this effect: see data.ngram_roles and data.ngram"
            )
    if "eval" in splits:
        stop, why = recipe["stops"], "the sources have no more"
        if stop is not None and splits["train"]["tokens"] >= stop["tokens"]:
            why = (
                "reading ended with the training tokens that data.max_tokens asks for; raise it, or set it to 0 to "
                "read the sources whole, or lower data.held_out"
            )
        for name, wanted in zip(("eval", "interpret", "steer"), recipe["held_out"], strict=True):
            if splits[name]["sequences"] < wanted:
                lines.append(f"{name} has {splits[name]['sequences']:,} of {wanted:,} dialogues: {why}")
    short = [name for name in ("train", "text") if name in splits and splits[name]["tokens"] < recipe["max_tokens"]]
    lines += [f"{n} has {splits[n]['tokens']:,} of {recipe['max_tokens']:,} tokens: the data ended" for n in short]
    return lines


def _row(kind: str, source: dict[str, Any]) -> dict[str, Any]:
    sequences, tokens = source["sequences"], source["tokens"]
    rejected = sum(source["rejected"].values())
    usable = source["rows"] - rejected
    return {
        "kind": kind,
        "source": source["name"],
        "rows": source["rows"],
        "rejected": rejected,
        "duplicate": source["dropped"],
        "kept %": 100 * (usable - source["dropped"]) / usable if usable else None,
        "not needed": source["surplus"],
        "skipped": sum(source["skipped"].values()) - _kept_notes(source["skipped"]),
        "train": sequences.get("train", sequences.get("text", 0)),
        "tokens": tokens.get("train", tokens.get("text", 0)),
        "eval": sequences.get("eval", 0),
        "interpret": sequences.get("interpret", 0),
        "steer": sequences.get("steer", 0),
    }


def _kept_notes(skipped: dict[str, int]) -> int:
    return sum(number for note, number in skipped.items() if note.startswith("kept"))


def _reasons(source: dict[str, Any]) -> str:
    reasons = Counter(source["rejected"]) + Counter(source["skipped"])
    return ", ".join(f"{number:,} × {reason}" for reason, number in reasons.most_common())
