"""Patterns that the tokens a feature fires on may have in common, read off one token and what stands around it."""

import re
import string
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from chatsae.batch import Kind, Role
from chatsae.features.records import Context

CHAT = ("position", "first content", "end of turn", "opening", "header", "control", "role name", "template", "prefix")
"""Families about the structure of a chat; those of `BROAD` are too, but say little about a token."""
LEXICAL = ("token", "word", "class", "starts", "ends", "after", "before", "predicts")
BROAD = ("role", "turn")
TOPICAL = ("script around", "code around", "word around")
"""Families about the context, not the token: a broad theme at best."""
ORDER = (*CHAT, *LEXICAL, *BROAD, *TOPICAL)
"""Of patterns that hold for the same tokens, the family that stands first names them."""

_ROLES = {int(role): role.name.lower().replace("_", " ") for role in Role}
_HEADER = (int(Kind.CONTROL), int(Kind.ROLE_NAME), int(Kind.TEMPLATE_TEXT))
_LONGEST_AFFIX = 8
_LONGEST_NGRAM = 4
_WORD = re.compile(r"[^\W\d_]{4,}")  # that can be a theme
_CODE = re.compile(r"[][{}()=<>_\\;|&#`]")
_CODE_SHARE = 0.06  # of the characters around: prose has fewer of these


class Pattern(NamedTuple):
    """What a token has or has not: a family and a value in it."""

    family: str
    value: str

    @property
    def name(self) -> str:
        """In words."""
        return _NAMES[self.family].format(self.value)

    @property
    def rank(self) -> int:
        return ORDER.index(self.family)


_NAMES = {
    "position": "first token of the dialogue",
    "first content": "first content token of {} turn",
    "end of turn": "end of {} turn",
    "opening": "control token that opens {} turn",
    "header": "header of {} turn",
    "control": "control token",
    "role name": "role name in a header",
    "template": "text of the template",
    "prefix": "the prefix that every dialogue begins with",
    "token": "token `{}`",
    "word": "word `{}`",
    "class": "{}",
    "starts": "token that starts with `{}`",
    "ends": "token that ends with `{}`",
    "after": "token after `{}`",
    "before": "token before `{}`",
    "predicts": "token before one that the feature promotes",
    "role": "token of {} turn",
    "turn": "token of turn {}",
    "script around": "{} text",
    "code around": "code",
    "word around": "text with the word `{}`",
}


def patterns_of(context: Context) -> set[Pattern]:
    """Every pattern that the token at a context's peak has; "predicts" depends on a feature and is not among them."""
    return {*_chat(context), *_lexical(context), *_around(context)}


def _chat(context: Context) -> Iterator[Pattern]:
    i = context.peak
    kind, role = context.kind[i], context.role[i]
    whose = ("any", _article(_ROLES[role]))
    if context.start + i == 0:
        yield Pattern("position", "0")
    if kind == int(Kind.CONTENT):
        first = context.start + i == 0 if i == 0 else (context.kind[i - 1], context.role[i - 1]) != (kind, role)
        if first and role != int(Role.NONE):
            yield from (Pattern("first content", who) for who in whose)
    if kind == int(Kind.END_OF_TURN):
        yield from (Pattern("end of turn", who) for who in whose)
    if kind == int(Kind.CONTROL) and role != int(Role.NONE):
        yield from (Pattern("opening", who) for who in whose)
    if kind in _HEADER and role != int(Role.NONE):
        yield Pattern("header", whose[1])
    if kind in (int(Kind.CONTROL), int(Kind.FIRST), int(Kind.END_OF_TURN)):
        yield Pattern("control", "")
    if kind == int(Kind.ROLE_NAME):
        yield Pattern("role name", "")
    if kind == int(Kind.TEMPLATE_TEXT):
        yield Pattern("template", "")
    if context.prefix[i]:
        yield Pattern("prefix", "")
    if role != int(Role.NONE):
        yield Pattern("role", whose[1])
    if context.turn[i] >= 0:
        yield Pattern("turn", str(context.turn[i] + 1))


def _lexical(context: Context) -> Iterator[Pattern]:
    i, tokens = context.peak, context.tokens
    token = tokens[i]
    word = token.strip().casefold()
    yield Pattern("token", token)
    if word:
        yield Pattern("word", word)
    yield from (Pattern("class", name) for name in _classes(token))
    for n in range(3, min(_LONGEST_AFFIX, len(word) - 1) + 1):
        yield Pattern("starts", word[:n])
        yield Pattern("ends", word[-n:])
    for n in range(1, min(_LONGEST_NGRAM, i) + 1):
        yield Pattern("after", "".join(tokens[i - n : i]))
    if i + 1 < len(tokens):
        yield Pattern("before", tokens[i + 1])


def _around(context: Context) -> Iterator[Pattern]:
    text = "".join(context.tokens)
    if not text.isascii():
        letters = [c for c in text if c.isalpha()]
        foreign = [name for c in letters if (name := _script(c)) is not None]
        if len(foreign) > len(letters) / 2:
            yield Pattern("script around", max(sorted(set(foreign)), key=foreign.count))
    if len(_CODE.findall(text)) > _CODE_SHARE * len(text):
        yield Pattern("code around", "")
    for word in set(_WORD.findall(text.casefold())):
        yield Pattern("word around", word)


@cache
def _classes(token: str) -> tuple[str, ...]:
    """Names of the character classes of a token."""
    text = token.strip()
    if not text:
        return ("line break",) if "\n" in token else ("white space",)
    scripts = {_script(c) for c in text if c.isalpha()}
    found = {
        "digits": text.isdigit(),
        "punctuation": all(unicodedata.category(c)[0] == "P" for c in text),
        "code symbol": all(c in string.punctuation for c in text) and _CODE.search(text) is not None,
        "capitalised word": text[0].isupper() and text[1:].islower(),
        "word in capitals": len(text) > 1 and text.isupper(),
        "emoji or symbol": all(unicodedata.category(c) in ("So", "Sk", "Sm") for c in text),
    }
    named = {f"{script} letters": True for script in scripts if script is not None}
    return tuple(name for name, holds in (found | named).items() if holds)


@cache
def _script(letter: str) -> str | None:
    """The script of a letter; None of a Latin one."""
    name = unicodedata.name(letter, "").split(" ")[0].capitalize()
    return None if name in ("Latin", "", "Modifier", "Feminine", "Masculine", "Micro", "Fullwidth") else name


def _article(role: str) -> str:
    return f"{'an' if role[0] in 'aeio' else 'a'} {role}"
