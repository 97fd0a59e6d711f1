"""Paired prompt sets: read from files, checked, and halved into pairs to choose on and pairs to report on."""

import difflib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from chatsae.audit.shipped import SHIPPED, SHIPPED_PREFIXES, shipped_pairs
from chatsae.batch import Message
from chatsae.errors import UserError
from chatsae.files import parse_json, read_json

Half = Literal["choose", "report"]
"""choose: features, probes and their settings are picked on it; report: the numbers that count are measured on it."""

_HALVES: dict[str, Half] = {
    "train": "choose",
    "val": "choose",
    "choose": "choose",
    "test": "report",
    "report": "report",
}
_PAIR_KEYS = ("id", "positive", "negative", "category", "split")
_HEADER_KEYS = ("set", "prefixes")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two prompts that should be answered differently; `half` is None where the file leaves it to chance."""

    id: str
    positive: tuple[Message, ...]
    negative: tuple[Message, ...]
    category: str = ""
    half: Half | None = None


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Pairs of one kind. `prefixes`: how answers begin that show the behaviour; empty: those of refusals."""

    name: str
    source: str
    pairs: tuple[Pair, ...]
    prefixes: tuple[str, ...] = ()


def load_sets(values: Sequence[str], *, pairs: int, tally: Counter[str] | None = None) -> list[PromptSet]:
    """The sets that are named; without a name all that come with the package, at most `pairs` of each.

    A value is a shipped set's name, a .jsonl file of pairs, POSITIVE.json:NEGATIVE.json or a directory of such files
    by splits (docs/audit.md). A pair with a prompt that another pair of the set has is left out and counted.

    Raises:
        UserError: names the file, the line and the field.
    """
    counts = Counter[str]() if tally is None else tally
    found = [_unique(_load(value, counts), pairs, counts) for value in values or SHIPPED]
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--sets: two sets are called {twice[0]!r}; `set` in the first line of a .jsonl file names it")
    return found


def halves(prompts: Sequence[Pair], seed: int) -> tuple[list[int], list[int]]:
    """Indices of the pairs to choose on and of those to report on; half and half by `seed` where no file says it.

    Raises:
        UserError: a half has fewer than 8 pairs.
    """
    if any(pair.half is not None for pair in prompts):
        chosen = [i for i, pair in enumerate(prompts) if pair.half == "choose"]
        report = [i for i, pair in enumerate(prompts) if pair.half == "report"]
    else:
        order = random.Random(seed).sample(range(len(prompts)), len(prompts))
        chosen, report = sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])
    if min(len(chosen), len(report)) < 8:
        raise UserError(
            f"{len(chosen)} pairs to choose features on and {len(report)} others to report on; 8 of each are needed"
        )
    return chosen, report


def _load(value: str, tally: Counter[str]) -> PromptSet:
    path = Path(value)
    if value in SHIPPED and not path.exists():
        pairs = tuple(
            Pair(f"{value}-{i}", _user(positive), _user(negative), half=half)
            for i, (positive, negative, half) in enumerate(shipped_pairs(value))
        )
        return PromptSet(value, "shipped", pairs, SHIPPED_PREFIXES[value])
    if path.is_dir():
        return _directory(path, tally)
    if path.suffix == ".jsonl":
        return _jsonl(path)
    positive, colon, negative = value.partition(":")
    if not colon:
        raise UserError(
            f"--sets: {value!r} is no set: {', '.join(SHIPPED)}, a .jsonl file of pairs, POSITIVE.json:NEGATIVE.json, "
            f"or a directory with harmful_train.json, harmless_train.json and so on"
        )
    pairs = _joined(Path(positive), Path(negative), None, tally)
    return PromptSet(Path(positive).stem, value, tuple(pairs))


def _unique(found: PromptSet, limit: int, tally: Counter[str]) -> PromptSet:
    """Without pairs that share a prompt with an earlier one, which could stand in the other half."""
    seen: set[tuple[Message, ...]] = set()
    kept: list[Pair] = []
    room: Counter[Half | None] = Counter()
    for pair in found.pairs:
        if pair.positive == pair.negative:
            tally[f"{found.name}: both prompts of a pair are the same"] += 1
        elif pair.positive in seen or pair.negative in seen:
            tally[f"{found.name}: a prompt that another pair has"] += 1
        elif room[pair.half] >= (limit if pair.half is None else limit // 2):
            tally[f"{found.name}: pairs beyond --pairs {limit}"] += 1
        else:
            kept.append(pair)
            room[pair.half] += 1
            seen |= {pair.positive, pair.negative}
    if not kept:
        raise UserError(f"{found.source}: holds no pair of prompts")
    return replace(found, pairs=tuple(kept))


# --- lines of pairs ---------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> PromptSet:
    name, prefixes, pairs = path.stem, (), []
    for number, entry in _lines(path):
        at = f"{path}, line {number}"
        if not pairs and isinstance(entry, dict) and "set" in entry:
            _keys(entry, _HEADER_KEYS, at)
            name = _text(entry["set"], f"{at}: set")
            prefixes = _texts(entry.get("prefixes", []), f"{at}: prefixes")
        else:
            pairs.append(_pair(entry, number, at))
    if len({pair.half is None for pair in pairs}) > 1:
        raise UserError(f"{path}: some pairs have a split and others none; give it to all, or to none")
    return PromptSet(name, str(path), tuple(pairs), prefixes)


def _pair(entry: Any, number: int, at: str) -> Pair:
    if not isinstance(entry, dict):
        raise UserError(f"{at}: expected an object with positive and negative, not {_short(entry)}")
    _keys(entry, _PAIR_KEYS, at)
    for key in ("positive", "negative"):
        if key not in entry:
            raise UserError(f"{at}: {key} is missing")
    split = entry.get("split")
    if split is not None and (not isinstance(split, str) or split not in _HALVES):
        raise UserError(f"{at}: split: expected one of {', '.join(_HALVES)}, not {_short(split)}")
    return Pair(
        id=str(entry.get("id", f"line {number}")),
        positive=_prompt(entry["positive"], f"{at}: positive"),
        negative=_prompt(entry["negative"], f"{at}: negative"),
        category=_text(entry.get("category") or "", f"{at}: category", empty=True),
        half=None if split is None else _HALVES[split],
    )


def _prompt(value: Any, at: str) -> tuple[Message, ...]:
    """What a user asks, or messages of which the last is the user's."""
    if isinstance(value, str):
        return _user(_text(value, at))
    if not isinstance(value, list) or not value:
        raise UserError(f"{at}: expected a text or a list of messages, not {_short(value)}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise UserError(f"{at}[{i}]: expected an object with role and content, not {_short(message)}")
        messages.append(Message(*(_text(message.get(key), f"{at}[{i}].{key}") for key in ("role", "content"))))
    if messages[-1].role != "user":
        raise UserError(f"{at}: the last message must be the user's, not of role {messages[-1].role!r}")
    return tuple(messages)


# --- files of instructions --------------------------------------------------------------------------------------------


def _directory(path: Path, tally: Counter[str]) -> PromptSet:
    """`harmful_SPLIT.json` and `harmless_SPLIT.json`: train and val to choose on, test to report on."""
    splits = [split for split in ("train", "val", "test") if (path / f"harmful_{split}.json").is_file()]
    if "test" not in splits or len(splits) < 2:
        raise UserError(f"{path}: expected harmful_test.json, and harmful_train.json or harmful_val.json")
    pairs = [
        replace(pair, id=f"{split}-{pair.id}")
        for split in splits
        for pair in _joined(path / f"harmful_{split}.json", path / f"harmless_{split}.json", _HALVES[split], tally)
    ]
    return PromptSet(path.name, str(path), tuple(pairs))


def _joined(positive: Path, negative: Path, half: Half | None, tally: Counter[str]) -> list[Pair]:
    """Instructions of two files, the i-th with the i-th."""
    first, second = _instructions(positive), _instructions(negative)
    n = min(len(first), len(second))
    if len(first) != len(second):
        longer = positive if len(first) > n else negative
        tally[f"{longer.name}: no partner in the other file"] += abs(len(first) - len(second))
    return [
        Pair(str(i), _user(a), _user(b), category, half)
        for i, ((a, category), (b, _)) in enumerate(zip(first[:n], second[:n], strict=True))
    ]


def _instructions(path: Path) -> list[tuple[str, str]]:
    """`[{"instruction": ..., "category": ...}]`, the files of refusal_direction; other keys are not looked at."""
    entries: Any = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of objects with instruction and category, not {_short(entries)}")
    found = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or "instruction" not in entry:
            raise UserError(f"{path}, entry {i}: expected an object with instruction, not {_short(entry)}")
        at = f"{path}, entry {i}"
        category = _text(entry.get("category") or "", f"{at}: category", empty=True)
        found.append((_text(entry["instruction"], f"{at}: instruction"), category))
    return found


# --- small parts ------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a .jsonl file with their line numbers; blank lines are none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is no JSON: {error}") from None


def _keys(entry: Mapping[str, Any], known: Sequence[str], at: str) -> None:
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"{at}: unknown key {key!r}; {f'perhaps {near[0]}' if near else 'known: ' + ', '.join(known)}"
            )


def _text(value: Any, at: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value.strip() or empty):
        raise UserError(f"{at}: expected a text, not {_short(value)}")
    return value


def _texts(value: Any, at: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise UserError(f"{at}: expected a list of texts, not {_short(value)}")
    return tuple(_text(one, f"{at}[{i}]") for i, one in enumerate(value))


def _user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
