"""Roles, kinds and special ids of many families' templates, in training and in prompts, against patterns by hand."""

import re
from functools import cache

import pytest
from transformers import PreTrainedTokenizerBase

from chat_tokenizer import chat_tokenizer
from chatsae.batch import Dialogue, Kind, Message, Role, TokenBatch
from chatsae.data.render import render
from chatsae.data.template import DATE, template_facts
from chatsae.steering.rows import Row, row_of_ids, row_of_prompt
from templates import FAMILIES, Family

Turns = tuple[tuple[str, str], ...]
CHAT: Turns = (("user", "why is the sky"), ("assistant", "blue light"), ("user", "sky"), ("assistant", "It scatters"))
NAMES = ("assistant", "model", "User", "Assistant", "System")
_ROLES = {"none": Role.NONE, "default": Role.DEFAULT_SYSTEM} | {role.name.lower(): role for role in Role}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@cache
def tokenizer_of(family: Family) -> PreTrainedTokenizerBase:
    return chat_tokenizer(
        family.template,
        bos=family.bos,
        eos=family.eos,
        special=tuple(family.special.split()),
        words=("user", "system", *(("ass", "istant") if family.split_names else NAMES)),
    )


def pieces_of(family: Family, turns: Turns, *, prompt: bool) -> list[tuple[Role, str, str]]:
    """Whose, the pattern and the content of every piece that the template writes."""
    head = [piece for piece in family.head if piece[0] == "none" or turns[0][0] != "system"]
    pieces = [(_ROLES[whose], pattern, "") for whose, pattern in head]
    for i, (role, content) in enumerate(turns):
        last = family.last_assistant if i == len(turns) - 1 and role == "assistant" else ""
        pieces.append((_ROLES[role], last or getattr(family, role), content))
    return [*pieces, *([(Role.ASSISTANT, family.opening, "")] if prompt else [])]


def by_hand(family: Family, turns: Turns, *, prompt: bool = False) -> tuple[str, list[tuple[Role, Kind, bool]]]:
    """The text, and the labels of each of its characters."""
    text, labels = "", []
    special = re.compile("|".join(map(re.escape, family.special.split())))
    for whose, pattern, content in pieces_of(family, turns, prompt=prompt):
        names, inside, plain = [], (0, 0), ""
        for part in re.split(r"(\{\w+\}|@)", pattern):
            start = len(plain)
            plain += content if part == "@" else part.strip("{}")
            inside = (start, len(plain)) if part == "@" else inside
            names += [(start, len(plain))] if part.startswith("{") else []
        mine = [(whose, Kind.TEMPLATE_TEXT, False)] * len(plain)
        mine[inside[0] : inside[1]] = [(whose, Kind.CONTENT, False)] * (inside[1] - inside[0])
        for start, stop in names:
            counts = whose in (Role.USER, Role.ASSISTANT)
            mine[start:stop] = [(whose, Kind.ROLE_NAME, counts)] * (stop - start)
        for found in special.finditer(plain):
            lone = found[0] == family.bos and (family.lone_bos or whose == Role.NONE)
            kind = Kind.END_OF_TURN if found[0] in family.closing.split() else Kind.CONTROL
            label = (Role.NONE, Kind.CONTROL, False) if lone else (whose, kind, True)
            mine[found.start() : found.end()] = [label] * len(found[0])
        text, labels = text + plain, labels + mine
    return text, labels


def expected(family: Family, turns: Turns, *, prompt: bool = False) -> list[tuple[str, Role, Kind, bool]]:
    """The tokens and their labels: each has those of its content, where it holds some, else those of its end."""
    tokenizer = tokenizer_of(family)
    text, labels = by_hand(family, turns, prompt=prompt)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        said = [labels[p] for p in range(start, stop) if labels[p][1] == Kind.CONTENT and not text[p].isspace()]
        found.append((tokenizer.decode([token]), *(said[0] if said else labels[stop - 1])))
    token, role, _, special = found[0]
    return [(token, role, Kind.FIRST, special), *found[1:]]


def transformers_text(family: Family, turns: Turns, *, prompt: bool = False) -> str:
    """What transformers makes of the turns, on the day that every date is pinned to."""
    template = re.sub(r"strftime_now\('%d %b %Y'\)", f"'{DATE}'", family.template)
    template = re.sub(r"strftime_now\('%Y-%m-%d'\)", "'2024-07-26'", template)
    chat = [{"role": r, "content": [{"type": "text", "text": c}] if family.parts else c} for r, c in turns]
    return tokenizer_of(family).apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )


def of_batch(batch: TokenBatch, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, Role, Kind, bool]]:
    columns = (batch.input_ids, batch.role, batch.kind, batch.special)
    return [
        (tokenizer.decode([i]), Role(r), Kind(k), s) for i, r, k, s in zip(*(c.tolist() for c in columns), strict=True)
    ]


def of_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, Role, Kind]]:
    columns = (row.input_ids, row.role, row.kind)
    return [(tokenizer.decode([i]), Role(r), Kind(k)) for i, r, k in zip(*(c.tolist() for c in columns), strict=True)]


def trained(family: Family, turns: Turns) -> list[tuple[str, Role, Kind, bool]]:
    messages = tuple(Message(role, content) for role, content in turns)
    (batch,) = render([Dialogue("d", "test", messages)], tokenizer_of(family))
    return of_batch(batch, tokenizer_of(family))


def dialogues_of(family: Family) -> list[Turns]:
    return [CHAT, CHAT[:2], *([(("system", "You are kind"), *CHAT)] if family.system else [])]


def test_the_patterns_are_what_the_template_writes(family: Family) -> None:
    for turns in dialogues_of(family):
        assert by_hand(family, turns)[0] == transformers_text(family, turns)
        assert by_hand(family, turns[:-1], prompt=True)[0] == transformers_text(family, turns[:-1], prompt=True)


def test_special_ids_and_where_an_answer_stops(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    facts = template_facts(tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(facts.special_ids)) == set(family.expected.split())
    assert tokenizer.convert_ids_to_tokens(facts.stop_ids) == family.stop.split()
    assert facts.parts == family.parts


def test_labels_in_training(family: Family) -> None:
    for turns in dialogues_of(family):
        assert trained(family, turns) == expected(family, turns)


def test_labels_of_prompts(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    for turns in dialogues_of(family):
        messages = [{"role": role, "content": content} for role, content in turns[:-1]]
        labelled = [label[:3] for label in expected(family, turns[:-1], prompt=True)]
        assert of_row(row_of_prompt(messages, tokenizer), tokenizer) == labelled


def test_labels_of_prompts_by_their_headers(family: Family) -> None:
    """Token ids alone: what a turn is can be read off its header, where special tokens make it one.

    White space at the end of a content cannot be told from the template's.
    """
    tokenizer = tokenizer_of(family)
    row = row_of_prompt([{"role": r, "content": c} for r, c in CHAT[:-1]], tokenizer)
    found, known = (of_row(r, tokenizer) for r in (row_of_ids(row.input_ids, tokenizer), row))
    assert [token for token, *_ in found] == [token for token, *_ in known]
    if not family.headers:
        return
    start = len(
        tokenizer("".join(text for whose, text in family.head if whose == "user"), add_special_tokens=False).input_ids
    )
    for (token, *mine), (_, *theirs) in list(zip(found, known, strict=True))[start:]:
        if token.isspace() and mine[1] == Kind.CONTENT:
            assert mine[0] == theirs[0]
        else:
            assert mine == theirs, token
