"""A tokenizer's own chat template: what it writes, and where the contents of a dialogue lie in it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import chain, product, takewhile
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from chatsae.batch import Dialogue, Message, Role
from chatsae.data.bounded import problem_of
from chatsae.data.labels import Grammar, Labels, Sign, Span
from chatsae.data.marks import CharacterSpan, LeftOutError, locate
from chatsae.errors import UserError

DATE = "26 Jul 2024"
"""What templates that print a date print, so that token ids repeat from day to day (Llama-3.1's own default)."""

ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}

_NOW = {"d": "26", "m": "07", "b": "Jul", "B": "July", "Y": "2024", "y": "24", "a": "Fri", "A": "Friday"}
_NOW |= {"j": "208", "H": "00", "M": "00", "S": "00"}
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, MemoryError, AssertionError),
)
_LONGEST = 100_000  # characters that a template may write for a dialogue of two short turns
_PROBES = (
    ("Hello", "Hi there!", "Why is the sky blue?", "It scatters light."),
    ("2 + 2", "4", "Thanks", "You are welcome."),
    ("Write a poem.", "No.", "Écris !", "Rien."),
)


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What is the same in every dialogue of a template.

    `prefix_ids` begin every dialogue that brings no system turn; `special_ids` are the token ids of the paper's
    MSE_st; `stop_ids` end an answer; `sha256` is that of the template's text. `parts`: the template takes a content as
    a list of parts, not as a string.
    """

    prefix_ids: tuple[int, ...]
    special_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    parts: bool
    sha256: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue as text. `spans`: the place of each turn's content; None where they could not be located.

    `prompt`: it ends with what the template writes before an answer.
    """

    name: str
    text: str
    roles: tuple[Role, ...]
    spans: tuple[CharacterSpan, ...] | None
    prompt: bool = False


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
        if isinstance(tokenizer.chat_template, dict) and tokenizer.chat_template:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise UserError(
                f"the tokenizer of {name} has no default chat template, only named ones: {names}; "
                f"set model.chat_template to one of them"
            ) from None
        raise UserError(
            f"the tokenizer of {name} has no chat template, so it cannot render dialogues: use an instruct model "
            f"(its name often ends in -Instruct or -it), or data.method bt-p, which reads plain text"
        ) from None
    return _analysed(tokenizer, name, text, len(tokenizer))


@lru_cache(maxsize=4)
def _analysed(tokenizer: PreTrainedTokenizerBase, name: str, text: str, _size: int) -> "ChatTemplate":
    _try_out(tokenizer, name, text)
    return ChatTemplate(tokenizer, name, text)


def _try_out(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> None:
    """Render a short dialogue within limits of time and memory: a template is a program that came with the model.

    jinja's sandbox limits ranges only, not loops in loops, products or the length of what is written.

    Raises:
        UserError: the template does not end, or takes too much memory.
    """
    turns = _turns(_PROBES[0][:2])

    def render() -> None:
        for parts, prompt in product((False, True), repeat=2):
            contents: list[Any] = [[{"type": "text", "text": m.content}] if parts else m.content for m in turns]
            chat: Any = [{"role": m.role, "content": c} for m, c in zip(turns, contents, strict=True)]
            try:
                written = tokenizer.apply_chat_template(
                    chat, chat_template=text, tokenize=False, add_generation_prompt=prompt
                )
            except MemoryError:
                raise
            except _TEMPLATE_ERRORS:
                continue
            if len(str(written)) > _LONGEST:
                raise MemoryError

    problem = problem_of(render)
    if problem is not None:
        raise UserError(f"the chat template of {name} cannot be rendered for a plain dialogue: {problem}")


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens, those included that no attribute of the tokenizer names."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(chain(tokenizer.all_special_ids, added))


def document_begin(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that begins a document; None where the tokenizer has none, or one that opens turns in the template."""
    if tokenizer.bos_token_id is None or not tokenizer.chat_template:
        return tokenizer.bos_token_id
    try:
        return None if chat_template(tokenizer).begins_turns else tokenizer.bos_token_id
    except UserError:  # a template that cannot be used, which documents do not need
        return tokenizer.bos_token_id


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
        problems = []
        for parts in (False, True):
            self._parts = parts
            begin = tokenizer.bos_token_id
            self._grammar = Grammar(lambda i: str(tokenizer.decode([i])), control_ids(tokenizer), begin, begin)
            try:
                self._grammar, stop = self._learned()
                probes = [self._probe(_turns(contents)) for contents in _PROBES]
                break
            except SkippedError as error:
                problems.append(error)
        else:
            raise UserError(f"the chat template of {name} refuses a plain dialogue ({problems[0]})") from None
        labels = [self.label(rendered, ids, offsets) for rendered, ids, offsets in probes]
        special = {i for (_, ids, _), found in zip(probes, labels, strict=True) for i in np.array(ids)[found.special]}
        self.facts = TemplateFacts(
            prefix_ids=_common_prefix([ids for _, ids, _ in probes]),
            special_ids=tuple(sorted(int(i) for i in special)),
            stop_ids=() if stop is None else (stop,),
            parts=self._parts,
            sha256=sha256(text.encode()).hexdigest(),
        )

    @property
    def begins_turns(self) -> bool:
        """Whether the template opens turns with the tokenizer's beginning-of-text token."""
        return any(self._grammar.begin in ids for ids, _ in self._grammar.signs) and self._grammar.bos is None

    def render(self, dialogue: Dialogue, *, prompt: bool = False) -> Rendered:
        """The dialogue as text, with the place of every content; `prompt`: with what comes before an answer.

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
        text = self.text(messages, prompt=prompt)

        def render(marked: Sequence[Message]) -> str | None:
            try:
                return self.text(marked, prompt=prompt)
            except SkippedError:
                return None

        try:
            spans = locate(messages, text, render)
        except LeftOutError:
            raise SkippedError("turn left out by the template") from None
        return Rendered(dialogue.id, text, tuple(ROLES[m.role] for m in messages), spans, prompt)

    def text(self, messages: Iterable[Message], *, prompt: bool = False) -> str:
        """What the template makes of messages; nothing else in the package renders, but for `_try_out`.

        Raises:
            SkippedError: the template raises.
        """
        chat: Any = [{"role": m.role, "content": self._content(m.content)} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                chat,
                chat_template=self._template,
                tokenize=False,
                date_string=DATE,
                add_generation_prompt=prompt,
            )
        except _TEMPLATE_ERRORS as error:
            raise SkippedError(f"template: {_line(error)}") from None
        assert isinstance(text, str)
        return text

    def prompt_ids(self, messages: Iterable[Message]) -> list[int]:
        """The token ids of a prompt, up to and with what comes before its answer; contents may hold special tokens.

        Raises:
            SkippedError: the template raises, or a content is no valid Unicode.
        """
        try:
            ids: list[int] = encode(self._tokenizer, [self.text(messages, prompt=True)], offsets=False)["input_ids"][0]
        except UnicodeEncodeError:
            raise SkippedError("content is not valid Unicode") from None
        return ids

    def label(self, rendered: Rendered, ids: Sequence[int], offsets: Sequence[Span] | None) -> Labels:
        """Labels of the tokens of a rendered dialogue.

        A token across an edge is content where it holds more of it than white space, or begins in it.
        """
        if rendered.spans is None or offsets is None:
            return self._grammar.label_by_headers(ids, own_system=Role.SYSTEM in rendered.roles)
        answer = Role.ASSISTANT if rendered.prompt else None
        return self._grammar.label(ids, self._token_spans(rendered.spans, offsets), rendered.roles, answer=answer)

    @staticmethod
    def _token_spans(spans: Sequence[CharacterSpan], offsets: Sequence[Span]) -> list[Span]:
        starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
        begin, core, end = np.array(spans).T
        first = np.searchsorted(starts, begin)
        earlier = np.minimum(first, np.searchsorted(stops, core, side="right"))
        first = np.where(core < end, earlier, first)  # a blank content claims no token of the template
        return list(zip(first.tolist(), np.searchsorted(starts, end).tolist(), strict=True))

    def _content(self, content: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": content}] if self._parts else content

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

    def _learned(self) -> tuple[Grammar, int | None]:
        """The grammar with what the template writes around turns filled in, and the token that ends an answer."""
        grammar = replace(self._grammar, bos=None)
        turns = _turns(_PROBES[0])
        gaps = self._gaps(turns)
        if not gaps:
            return self._grammar, None
        opening = self._opening(turns[:1])
        stop = grammar.first_control(gaps[-1])
        # a beginning-of-text token that also stands between a question and its answer opens or closes turns
        turned = grammar.begin in gaps[1] or stop == grammar.begin
        grammar = replace(grammar, bos=None if turned else grammar.begin)
        header = grammar.first_control(opening)
        question_end = gaps[1][: gaps[1].index(header)] if header in gaps[1] else []
        closing = {stop, grammar.first_control(question_end)} - {None}
        grammar = replace(grammar, closing=frozenset(i for i in closing if i is not None))
        seen = [(turn.role, gap) for turn, gap in zip(turns, gaps, strict=False)]
        for before, role in ((turns[:0], "system"), (turns[:2], "tool")):
            with suppress(SkippedError):  # a template without such turns
                more = self._gaps([*before, Message(role, "Be kind."), *turns])
                seen += [(role, gap) for gap in more[len(before) :][:1]]
        return self._with_headers(grammar, seen, opening), stop

    def _with_headers(self, grammar: Grammar, seen: Sequence[tuple[str, list[int]]], opening: list[int]) -> Grammar:
        """The grammar with the headers at the end of gaps; `opening` is that of an answer."""
        names: dict[str, Role] = {}
        headers: dict[Role, tuple[int, ...]] = {}
        signs: dict[Sign, tuple[Role, tuple[tuple[int, ...], ...]]] = {}
        for role, gap in [*seen[1:], ("assistant", opening)]:  # the first may hold a text of the template's own
            sign, header, tail = grammar.sign(gap)
            names.setdefault(sign[1], ROLES[role])
            if sign[0]:
                headers.setdefault(ROLES[role], header)
                known, tails = signs.get(sign, (ROLES[role], ()))
                signs[sign] = (known, tails if tail in tails else (*tails, tail))
        own = grammar.sign(list(takewhile(lambda i: i not in grammar.closing, seen[0][1])))[0]
        if own[0] and len(grammar.closing.intersection(seen[0][1])) > 0:
            signs.setdefault(own, (Role.DEFAULT_SYSTEM, ((),)))
        names.pop("", None)
        return replace(grammar, names=names, headers=headers, signs=signs)

    def _opening(self, messages: Sequence[Message]) -> list[int]:
        """What the template writes before an answer; nothing where it cannot be told from what it writes anyway."""
        try:
            with_it, without = (self.text(messages, prompt=prompt) for prompt in (True, False))
        except SkippedError:
            return []
        text = with_it[len(without) :] if with_it.startswith(without) else ""
        return encode(self._tokenizer, [text], offsets=False)["input_ids"][0] if text else []


def messages_of(prompt: str | Sequence[Message | Mapping[str, str]]) -> tuple[Message, ...]:
    """What a user asks, or messages in either form, as messages.

    Raises:
        UserError: a mapping has no role or no content.
    """
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    messages = []
    for message in prompt:
        if not isinstance(message, Message):
            try:
                message = Message(message["role"], message["content"])
            except KeyError as error:
                raise UserError(
                    f"a message has the keys role and content; {error} is missing in {dict(message)!r}"
                ) from None
        messages.append(message)
    return tuple(messages)


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


def _common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    columns = zip(*sequences, strict=False)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
