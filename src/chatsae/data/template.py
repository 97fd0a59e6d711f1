"""A tokenizer's own chat template: what it writes, and where the contents of a dialogue lie in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import chain, takewhile
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from chatsae.batch import Dialogue, Message, Role
from chatsae.data.labels import Grammar, Labels, Span
from chatsae.errors import UserError

DATE = "26 Jul 2024"
"""What templates that print a date print, so that token ids repeat from day to day (Llama-3.1's own default)."""

ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}

_NOW = {"d": "26", "m": "07", "b": "Jul", "B": "July", "Y": "2024", "y": "24", "a": "Fri", "A": "Friday"}
_NOW |= {"j": "208", "H": "00", "M": "00", "S": "00"}
_OPEN, _CLOSE, _MARKERS = 0xF0000, 0x100000, 0xFFFE  # two private-use planes: a pair of characters for each turn
_MARKER = re.compile(f"[{chr(_OPEN)}-{chr(_OPEN + _MARKERS - 1)}{chr(_CLOSE)}-{chr(_CLOSE + _MARKERS - 1)}]")
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_PROBES = (
    ("Hello", "Hi there!", "Why is the sky blue?", "It scatters light."),
    ("2 + 2", "4", "Thanks", "You are welcome."),
    ("Write a poem.", "No.", "Écris !", "Rien."),
)


CharacterSpan = tuple[int, int, int]
"""Where a content begins, where its first character that is no white space stands, and where it ends."""


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What is the same in every dialogue of a template.

    `prefix_ids` begin every dialogue that brings no system turn; `special_ids` are the token ids of the paper's
    MSE_st; `sha256` is that of the template's text.
    """

    prefix_ids: tuple[int, ...]
    special_ids: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue as text. `spans`: the place of each turn's content; None where they could not be located."""

    name: str
    text: str
    roles: tuple[Role, ...]
    spans: tuple[CharacterSpan, ...] | None


class SkippedError(Exception):
    """A dialogue that cannot be rendered; the message is the reason to count."""


def template_facts(tokenizer: PreTrainedTokenizerBase) -> TemplateFacts:
    """The facts of the tokenizer's chat template, worked out once per tokenizer.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses a plain dialogue.
    """
    return chat_template(tokenizer).facts


def chat_template(tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
    """The tokenizer's chat template, analysed; kept for the tokenizers used last.

    Raises:
        UserError: see `template_facts`.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    try:
        text = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"the tokenizer of {name} has no chat template, so it cannot render dialogues: use an instruct model "
            f"(its name often ends in -Instruct or -it), or data.method bt-p, which reads plain text"
        ) from None
    return _analysed(tokenizer, name, text, len(tokenizer))


@lru_cache(maxsize=4)
def _analysed(tokenizer: PreTrainedTokenizerBase, name: str, text: str, _size: int) -> "ChatTemplate":
    return ChatTemplate(tokenizer, name, text)


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens, those included that no attribute of the tokenizer names."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(chain(tokenizer.all_special_ids, added))


def special_text(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds the text of any special token; matches nothing where there is none."""
    texts = [str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(control_ids(tokenizer))]
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, offsets: bool) -> Any:
    """Token ids (and character offsets) of each text, with nothing added by the tokenizer."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


class ChatTemplate:
    """Renders dialogues with a tokenizer's chat template and labels the tokens that come of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> None:
        self._tokenizer = tokenizer
        self._template = _pinned(text)
        self._special_text = special_text(tokenizer)
        self._grammar = Grammar(lambda i: str(tokenizer.decode([i])), control_ids(tokenizer), tokenizer.bos_token_id)
        try:
            self._grammar = self._learned()
            probes = [self._probe(_turns(contents)) for contents in _PROBES]
        except SkippedError as error:
            raise UserError(f"the chat template of {name} refuses a plain dialogue ({error})") from None
        labels = [self.label(rendered, ids, offsets) for rendered, ids, offsets in probes]
        special = {i for (_, ids, _), found in zip(probes, labels, strict=True) for i in np.array(ids)[found.special]}
        self.facts = TemplateFacts(
            prefix_ids=_common_prefix([ids for _, ids, _ in probes]),
            special_ids=tuple(sorted(int(i) for i in special)),
            sha256=sha256(text.encode()).hexdigest(),
        )

    def render(self, dialogue: Dialogue) -> Rendered:
        """The dialogue as text, with the place of every content.

        Raises:
            SkippedError: a role is unknown, a content holds a special token or no valid Unicode, or the template
                raises or leaves a turn out.
        """
        messages = dialogue.messages
        if not messages:
            raise SkippedError("no turn")
        for message in messages:
            if message.role not in ROLES:
                raise SkippedError(f"unknown role {message.role[:20]!r}")
            check_content(message.content, self._special_text)
        try:
            text = self._text(messages)
        except _TEMPLATE_ERRORS as error:
            raise SkippedError(f"template: {_line(error)}") from None
        return Rendered(dialogue.id, text, tuple(ROLES[m.role] for m in messages), self._locate(messages, text))

    def label(self, rendered: Rendered, ids: Sequence[int], offsets: Sequence[Span] | None) -> Labels:
        """Labels of the tokens of a rendered dialogue.

        A token across an edge is content where it holds more of it than white space, or begins in it.
        """
        if rendered.spans is None or offsets is None:
            return self._grammar.label_by_headers(ids, own_system=Role.SYSTEM in rendered.roles)
        return self._grammar.label(ids, self._token_spans(rendered.spans, offsets), rendered.roles)

    @staticmethod
    def _token_spans(spans: Sequence[CharacterSpan], offsets: Sequence[Span]) -> list[Span]:
        starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
        begin, core, end = np.array(spans).T
        first = np.searchsorted(starts, begin)
        earlier = np.minimum(first, np.searchsorted(stops, core, side="right"))
        first = np.where(core < end, earlier, first)  # a blank content claims no token of the template
        return list(zip(first.tolist(), np.searchsorted(starts, end).tolist(), strict=True))

    def _text(self, messages: Sequence[Message]) -> str:
        chat: Any = [{"role": message.role, "content": message.content} for message in messages]
        text = self._tokenizer.apply_chat_template(chat, chat_template=self._template, tokenize=False, date_string=DATE)
        assert isinstance(text, str)
        return text

    def _locate(self, messages: Sequence[Message], plain: str) -> tuple[CharacterSpan, ...] | None:
        """Character spans of the contents: marked with private-use characters, rendered, and found again.

        Marks stand around the whole content, or, where the template trims it, around its core. None where the
        template rewrites a content, so that the marks do not survive or the text is another one.
        """
        if len(messages) > _MARKERS:
            return None
        whole = [_marked(i, message, core=False) for i, message in enumerate(messages)]
        cores = [_marked(i, message, core=True) for i, message in enumerate(messages)]
        for marked in [whole] if cores == whole else [whole, cores]:
            try:
                text = self._text(marked)
            except _TEMPLATE_ERRORS:
                return None
            if _MARKER.sub("", text) == plain:
                return _spans(text, plain, len(messages))
        return None

    def _probe(self, messages: Sequence[Message]) -> tuple[Rendered, list[int], list[Span] | None]:
        rendered = self.render(Dialogue("probe", "probe", tuple(messages)))
        encoded = encode(self._tokenizer, [rendered.text], offsets=self._tokenizer.is_fast)
        offsets = encoded["offset_mapping"][0] if self._tokenizer.is_fast else None
        return rendered, encoded["input_ids"][0], offsets

    def _gaps(self, messages: Sequence[Message]) -> list[list[int]]:
        """Token ids before, between and after the contents; empty where the contents cannot be located."""
        rendered, ids, offsets = self._probe(messages)
        if rendered.spans is None or offsets is None:
            return []
        flat = [0, *chain.from_iterable(self._token_spans(rendered.spans, offsets)), len(ids)]
        return [ids[start:stop] for start, stop in zip(flat[::2], flat[1::2], strict=True)]

    def _learned(self) -> Grammar:
        """The grammar with the tokens that end a turn, and the words that name the roles, filled in."""
        turns = _turns(_PROBES[0])
        gaps = self._gaps(turns)
        closing = self._grammar.first_control(gaps[-1]) if gaps else None
        grammar = replace(self._grammar, closing=frozenset(() if closing is None else (closing,)))
        names = {grammar.header_name(gap): ROLES[turn.role] for gap, turn in zip(gaps, turns, strict=False)}
        try:
            with_system = self._gaps([Message("system", "Be kind."), *turns])
        except SkippedError:  # a template without system turns
            with_system = []
        if with_system:
            names.setdefault(grammar.header_name(with_system[0]), Role.SYSTEM)
        names.pop("", None)
        return replace(grammar, names=names)


def check_content(content: str, special_text: re.Pattern[str]) -> None:
    """Refuse what would forge special tokens or cannot be encoded.

    Raises:
        SkippedError: with the reason.
    """
    if special_text.search(content):
        raise SkippedError("special token in the content")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise SkippedError("content is not valid Unicode") from None


def _pinned(template: str) -> str:
    """The template with DATE for today: some ask `strftime_now` themselves, which no argument can replace."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f"|replace('%{letter}', '{value}')" for letter, value in _NOW.items())
    # the line end after the macro is not part of what the template writes (trim_blocks)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


def _turns(contents: Sequence[str]) -> list[Message]:
    return [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]


def _marked(index: int, message: Message, *, core: bool) -> Message:
    content = message.content
    inner = content.strip() if core else content
    lead = content.index(inner)
    wrapped = f"{content[:lead]}{chr(_OPEN + index)}{inner}{chr(_CLOSE + index)}{content[lead + len(inner) :]}"
    return Message(message.role, wrapped)


def _spans(marked: str, text: str, turns: int) -> tuple[CharacterSpan, ...] | None:
    """The places between the marks, in the text without them.

    Raises:
        SkippedError: both marks of a turn are gone.
    """
    places: dict[int, int] = {}
    marks = list(_MARKER.finditer(marked))
    for before, mark in enumerate(marks):
        places[ord(mark[0])] = mark.start() - before
    if any(_OPEN + i not in places and _CLOSE + i not in places for i in range(turns)):
        raise SkippedError("turn left out by the template")
    if [ord(mark[0]) for mark in marks] != [base + i for i in range(turns) for base in (_OPEN, _CLOSE)]:
        return None  # a mark is gone, or contents stand twice or in another order
    spans = [(places[_OPEN + i], places[_CLOSE + i]) for i in range(turns)]
    return tuple((start, stop - len(text[start:stop].lstrip()), stop) for start, stop in spans)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    columns = zip(*sequences, strict=False)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
