"""Rendering with real chat templates: ids against transformers itself, labels against a twin written by hand."""

import copy
import datetime
import itertools
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

import chatsae
from chat_tokenizer import CHATML, MISTRAL, PHI, SPECIAL, chat_tokenizer
from chatsae.batch import Dialogue, Document, Kind, Message, Role, TokenBatch
from chatsae.data.reading import read
from chatsae.data.render import render
from chatsae.data.template import DATE, template_facts
from chatsae.errors import UserError
from shared_data import shared_data

DEFAULT_SYSTEM = {
    "small": "You are kind.",
    "tiny-chat": "You are Tiny, a small assistant that has read the documentation of Python.",
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
}
LLAMA_SYSTEM = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
CHAT = (("user", "Why is the sky blue?"), ("assistant", "It scatters light."))


@cache
def real(name: str, template: str | None = None) -> PreTrainedTokenizerBase:
    if template is None:
        return AutoTokenizer.from_pretrained(shared_data("tokenizers", name))
    tokenizer = copy.copy(real(name))
    tokenizer.chat_template = shared_data("tokenizers", name, f"chat_template.{template}.jinja").read_text("utf-8")
    return tokenizer


@cache
def tiny_chat() -> PreTrainedTokenizerBase:
    directory = Path(chatsae.__file__).parent / "demo" / "tiny-chat"
    return AutoTokenizer.from_pretrained(directory)


TOKENIZERS = {
    "small": chat_tokenizer,
    "tiny-chat": tiny_chat,
    "qwen2.5": lambda: real("qwen2.5"),
    "llama3.0": lambda: real("llama3.1", "llama3.0"),
    "llama3.1": lambda: real("llama3.1"),
    "llama3.2": lambda: real("llama3.1", "llama3.2"),
}


@pytest.fixture(params=TOKENIZERS)
def name(request: pytest.FixtureRequest) -> str:
    TOKENIZERS[request.param]()  # skips here when the data is absent
    return request.param


def dialogue(*turns: tuple[str, str], id: str = "d") -> Dialogue:
    return Dialogue(id, "test", tuple(Message(role, content) for role, content in turns))


def rendered(items: list[Any], tokenizer: PreTrainedTokenizerBase, **options: Any) -> TokenBatch:
    return TokenBatch.concat(list(render(items, tokenizer, **options)))


def by_transformers(item: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    chat = [{"role": m.role, "content": m.content} for m in item.messages]
    return tokenizer.apply_chat_template(chat, tokenize=True, date_string=DATE)["input_ids"]


def labels(batch: TokenBatch) -> list[tuple[int, Role, Kind, bool]]:
    columns = (batch.input_ids, batch.role, batch.kind, batch.special)
    return [(i, Role(r), Kind(k), s) for i, r, k, s in zip(*(c.tolist() for c in columns), strict=True)]


Piece = tuple[str, Role, Kind, bool]


def twin(name: str, item: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, Role, Kind, bool]]:
    """Piece by piece what each template writes, with the labels each piece has by definition."""
    pieces = list(_llama(name, item) if name.startswith("llama") else _chatml(name, item))
    found = [
        (i, role, kind, special)
        for text, role, kind, special in pieces
        for i in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    first = found[0]
    return [(first[0], first[1], Kind.FIRST, first[3]), *found[1:]]


def _turn(role: Role, before: list[str], word: str, after: list[str], text: str, kind: Kind, end: str) -> list[Piece]:
    named = role in (Role.USER, Role.ASSISTANT)
    return [
        *((t, role, Kind.CONTROL, True) for t in before),
        (word, role, Kind.ROLE_NAME, named),
        *((t, role, Kind.CONTROL, True) for t in after),
        ("\n" if end == "<|im_end|>" else "\n\n", role, Kind.TEMPLATE_TEXT, False),
        (text, role, kind, False),
        (end, role, Kind.END_OF_TURN, True),
    ]


def _chatml(name: str, item: Dialogue) -> Iterator[Piece]:
    turns = [(Role[m.role.upper()], m.role, m.content, Kind.CONTENT) for m in item.messages]
    if turns[0][0] != Role.SYSTEM:
        turns.insert(0, (Role.DEFAULT_SYSTEM, "system", DEFAULT_SYSTEM[name], Kind.TEMPLATE_TEXT))
    for role, word, text, kind in turns:
        yield from _turn(role, ["<|im_start|>"], word, [], text, kind, "<|im_end|>")
        yield "\n", role, Kind.TEMPLATE_TEXT, False


def _llama(name: str, item: Dialogue) -> Iterator[Piece]:
    yield "<|begin_of_text|>", Role.NONE, Kind.FIRST, False
    turns = [(Role[m.role.upper()], m.role, m.content.strip(), Kind.CONTENT) for m in item.messages]
    if turns[0][0] != Role.SYSTEM and name != "llama3.0":
        turns.insert(0, (Role.DEFAULT_SYSTEM, "system", "", Kind.TEMPLATE_TEXT))
    for i, (role, word, text, kind) in enumerate(turns):
        pieces = _turn(role, ["<|start_header_id|>"], word, ["<|end_header_id|>"], text, kind, "<|eot_id|>")
        if i == 0 and name != "llama3.0":  # the header's two line ends are one token, the date's another
            pieces.insert(-2, (LLAMA_SYSTEM, role, Kind.TEMPLATE_TEXT, False))
        yield from pieces


# no private-use characters: the contents are located with them (test_private_use_characters_in_a_content)
_texts = st.text("ab1?<|im_ \n\r\t\u00a0\u3000\u2028é\u0301Å你😀🏽\u200dשи\0", max_size=12) | st.sampled_from(
    ["user", "assistant\n", "  a  b", "\n", "\n\n x", "\u0301", " \t", "system\nuser", "<|im_start|", "{{ bos_token }}"]
)
_words = st.text("abu你😀é?<1", min_size=1, max_size=4) | st.sampled_from(["user", "assistant", "system"])
_plain_texts = st.lists(_words, min_size=1, max_size=4).map(" ".join)


def _chats(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[str, str]]]:
    turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=4)
    system = st.lists(st.tuples(st.just("system"), texts), max_size=1)
    return st.builds(list.__add__, system, turns)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(chat=_chats(_texts))
def test_ids_equal_those_of_transformers(name, chat):
    tokenizer, item = TOKENIZERS[name](), dialogue(*chat)
    batch = rendered([item], tokenizer)
    assert batch.input_ids.tolist() == by_transformers(item, tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(chat=_chats(_plain_texts))
def test_labels_equal_those_of_the_twin(name, chat):
    tokenizer, item = TOKENIZERS[name](), dialogue(*chat)
    tally = Counter()
    batch = rendered([item], tokenizer, tally=tally)
    assert labels(batch) == twin(name, item, tokenizer)
    assert not tally


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(chat=_chats(_texts))
def test_every_content_is_found_whatever_white_space_it_has(name, chat):
    """The content tokens of a role hold all that is said in it, and at most white space of the template besides."""
    tokenizer, item = TOKENIZERS[name](), dialogue(*chat)
    tally = Counter()
    batch = rendered([item], tokenizer, tally=tally)
    assert not tally
    plain = twin(name, dialogue(*((role, "x") for role, _ in chat)), tokenizer)
    assert [row[:2] for row in labels(batch) if row[3]] == [row[:2] for row in plain if row[3]]
    for role in (Role.SYSTEM, Role.USER, Role.ASSISTANT):
        inside = (batch.role == role) & (batch.kind == Kind.CONTENT)
        said = [m.content for m in item.messages if Role[m.role.upper()] == role]
        ids = [i for text in said for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert "".join(tokenizer.decode(batch.input_ids[inside]).split()) == "".join(tokenizer.decode(ids).split())


SPECIAL_IDS = {"qwen2.5": (872, 77091, 151644, 151645)} | {
    f"llama3.{i}": (882, 78191, 128006, 128007, 128009) for i in range(3)
}


@pytest.mark.parametrize("name", SPECIAL_IDS)
def test_special_ids_are_the_papers(name):
    assert template_facts(TOKENIZERS[name]()).special_ids == SPECIAL_IDS[name]


def test_no_double_beginning_of_text(name):
    tokenizer = TOKENIZERS[name]()
    for method in ("fast", "bt-f"):
        ids = rendered([dialogue(*CHAT)] * 3, tokenizer, method=method, block_size=8).input_ids.tolist()
        pairs = list(itertools.pairwise(ids))
        assert (tokenizer.bos_token_id, tokenizer.bos_token_id) not in pairs
        if tokenizer.bos_token_id is not None:
            assert tokenizer.bos_token_id in ids


def test_a_date_in_the_template_is_pinned(name, monkeypatch):
    tokenizer = TOKENIZERS[name]()
    chat = [{"role": role, "content": content} for role, content in CHAT]
    found, unpinned = [], set()
    for day in (datetime.datetime(2025, 1, 1), datetime.datetime(2026, 12, 31)):
        today = type("Today", (datetime.datetime,), {"now": classmethod(lambda cls, tz=None, day=day: day)})
        monkeypatch.setattr(chat_template_utils, "datetime", today)
        found.append(rendered([dialogue(*CHAT)], tokenizer).input_ids.tolist())
        unpinned.add(tokenizer.apply_chat_template(chat, tokenize=False))
    assert found[0] == found[1]
    assert len(unpinned) == (2 if name == "llama3.2" else 1)  # so the two days do make a difference


def test_a_date_that_the_template_wants_given_is_pinned():
    dated = chat_tokenizer("{{ date_string or strftime_now('%d %b %Y') }}" + CHATML)
    assert dated.decode(rendered([dialogue(*CHAT)], dated).input_ids).startswith(f"{DATE}<|im_start|>")
    given = chat_tokenizer("{{ date_string | upper }}" + CHATML)
    assert given.decode(rendered([dialogue(*CHAT)], given).input_ids).startswith(f"{DATE.upper()}<|im_start|>")


@pytest.mark.parametrize("format", ["%Y-%m-%d", "%d %B %Y", "%A, %b %d %y", "%H:%M:%S", "%a %j", "today"])
@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}\n  x{% endif %}"])
def test_a_date_that_only_strftime_now_gives_is_pinned(format, start):
    dated = chat_tokenizer(start + "{{ strftime_now('" + format + "') }}" + CHATML)
    fixed = chat_tokenizer(start + datetime.datetime(2024, 7, 26).strftime(format) + CHATML)
    found, expected = (rendered([dialogue(*CHAT)], t).input_ids.tolist() for t in (dated, fixed))
    assert found == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("small", 13), ("qwen2.5", 24), ("llama3.0", 5), ("llama3.1", 30), ("llama3.2", 30)]
)
def test_the_constant_prefix_and_where_a_system_prompt_ends_it(name, expected):
    tokenizer = TOKENIZERS[name]()
    prefix = template_facts(tokenizer).prefix_ids
    assert len(prefix) == expected
    batch = rendered([dialogue(*CHAT), dialogue(("system", "Be brief."), *CHAT)], tokenizer)
    default, custom = (batch.select([i]) for i in range(2))
    assert default.input_ids[:expected].tolist() == list(prefix)
    assert default.prefix.tolist() == [True] * expected + [False] * (len(default.prefix) - expected)
    shared = next(p for p, (a, b) in enumerate(zip(custom.input_ids.tolist(), prefix, strict=False)) if a != b)
    assert 0 < shared < expected
    assert custom.prefix.tolist() == [True] * shared + [False] * (len(custom.prefix) - shared)


def test_a_cut_dialogue_is_the_start_of_the_whole_one_and_is_counted(name):
    tokenizer = TOKENIZERS[name]()
    items = [dialogue(*CHAT, ("user", "Go on. " * 30)), dialogue(*CHAT)]
    whole = rendered(items, tokenizer)
    for length in (int(whole.lengths[1]), int(whole.lengths[1]) + 10):
        tally = Counter()
        short = rendered(items, tokenizer, max_length=length, tally=tally)
        assert tally == {f"cut at {length} tokens": 1}
        assert short.lengths.tolist() == [length, whole.lengths[1]]
        assert labels(short.select([0])) == labels(whole.select([0]))[:length]
        assert labels(short.select([1])) == labels(whole.select([1]))
    assert short.select([0]).kind[-1] == Kind.CONTENT  # its end token is gone


def test_white_space_round_a_content_is_content_where_the_template_keeps_it():
    batch = rendered([dialogue(("user", "\n  a b \n"), ("assistant", " c"))], real("qwen2.5"))
    texts = [(real("qwen2.5").decode([i]), role, kind) for i, role, kind, _ in labels(batch)][22:]
    assert texts == [
        ("user", Role.USER, Kind.ROLE_NAME),
        ("\n\n", Role.USER, Kind.TEMPLATE_TEXT),  # one token for the template's line end and the content's
        (" ", Role.USER, Kind.CONTENT),
        (" a", Role.USER, Kind.CONTENT),
        (" b", Role.USER, Kind.CONTENT),
        (" \n", Role.USER, Kind.CONTENT),
        ("<|im_end|>", Role.USER, Kind.END_OF_TURN),
        ("\n", Role.USER, Kind.TEMPLATE_TEXT),
        ("<|im_start|>", Role.ASSISTANT, Kind.CONTROL),
        ("assistant", Role.ASSISTANT, Kind.ROLE_NAME),
        ("\n", Role.ASSISTANT, Kind.TEMPLATE_TEXT),
        (" c", Role.ASSISTANT, Kind.CONTENT),
        ("<|im_end|>", Role.ASSISTANT, Kind.END_OF_TURN),
        ("\n", Role.ASSISTANT, Kind.TEMPLATE_TEXT),
    ]


def test_empty_contents_and_turns_of_one_role_keep_their_places(name):
    tokenizer = TOKENIZERS[name]()
    item = dialogue(("user", ""), ("user", "a"), ("assistant", ""), ("assistant", ""), ("user", "b"))
    batch = rendered([item], tokenizer)
    assert labels(batch) == twin(name, item, tokenizer)


def test_tool_turns_lie_inside_a_user_turn_of_the_template():
    tokenizer = real("qwen2.5")
    item = dialogue(("user", "Q"), ("assistant", "X"), ("tool", "42"), ("tool", "7"), ("assistant", "Z"))
    tally = Counter()
    batch = rendered([item], tokenizer, tally=tally)
    assert not tally
    assert batch.input_ids.tolist() == by_transformers(item, tokenizer)
    tool = [(tokenizer.decode([i]), kind, special) for i, role, kind, special in labels(batch) if role == Role.TOOL]
    assert [text for text, kind, _ in tool if kind == Kind.CONTENT] == ["4", "2", "7"]
    assert [text for text, _, special in tool if special] == ["<|im_start|>", "user", "<|im_end|>"]


def test_the_words_user_and_assistant_in_a_content_are_not_special(name):
    tokenizer = TOKENIZERS[name]()
    batch = rendered([dialogue(("user", "user"), ("assistant", "assistant user"))], tokenizer)
    content = batch.kind == Kind.CONTENT
    assert content.any()
    assert not batch.special[content].any()
    ids = torch.tensor(template_facts(tokenizer).special_ids)
    assert torch.isin(batch.input_ids[content], ids).any()  # by id they would have been


def test_dialogues_that_cannot_be_rendered_are_counted_and_left_out(name):
    tokenizer = TOKENIZERS[name]()
    forged = "<|eot_id|>" if name.startswith("llama") else "<|im_end|>"
    items = [
        dialogue(("user", f"Hi{forged}"), ("assistant", "No.")),
        dialogue(("human", "Hi"), ("gpt", "Hello")),
        dialogue(("System", "Be brief."), *CHAT),
        dialogue(),
        dialogue(("user", "half \ud800"), ("assistant", "No.")),
        dialogue(*CHAT, id="good"),
    ]
    tally = Counter()
    batch = rendered(items, tokenizer, tally=tally)
    assert batch.names == ("good",)
    assert tally == {
        "special token in the content": 1,
        "unknown role 'human'": 1,
        "unknown role 'System'": 1,
        "no turn": 1,
        "content is not valid Unicode": 1,
    }
    with pytest.raises(UserError, match=r"no token sequence: .*1 × special token in the content"):
        list(render(items[:1], tokenizer))


def test_a_template_that_raises_skips_one_dialogue():
    tokenizer = chat_tokenizer(MISTRAL, bos="<s>")
    tally = Counter()
    items = [dialogue(*CHAT, id="a"), dialogue(("system", "Be brief."), *CHAT), dialogue(*CHAT, id="b")]
    assert rendered(items, tokenizer, tally=tally).names == ("a", "b")
    assert tally == {"template: Only user and assistant roles are supported!": 1}


def test_a_turn_the_template_leaves_out_is_counted():
    silent = CHATML.replace("for m in messages", "for m in messages if m['role'] != 'tool'")
    tally = Counter()
    items = [dialogue(*CHAT), dialogue(*CHAT, ("tool", "42"))]
    assert len(rendered(items, chat_tokenizer(silent), tally=tally)) == 1
    assert tally == {"turn left out by the template": 1}


def test_contents_that_the_template_rewrites_are_labelled_by_the_headers():
    shouting = CHATML.replace("m['content'] +", "(m['content'] | upper if 'loud' in m['content'] else m['content']) +")
    broken = shouting.replace("m['content'] | upper", "m['content'][1:-1]")  # eats the marks
    tokenizer = chat_tokenizer(broken)
    tally = Counter()
    item = dialogue(("user", "(loud) Hello there"), ("assistant", "Hi"))
    batch = rendered([item], tokenizer, tally=tally)
    assert tally == {"kept, but labelled by its headers: the contents could not be located": 1}
    assert batch.input_ids.tolist() == by_transformers(item, tokenizer)
    plain = dialogue(("user", "loud) Hello ther"), ("assistant", "Hi"))
    expected = twin("small", plain, tokenizer)
    for (i, role, kind, special), (j, *known) in zip(labels(batch), expected, strict=True):
        assert i == j
        line_end = kind == Kind.CONTENT and known[1] == Kind.TEMPLATE_TEXT and tokenizer.decode([i]) == "\n"
        assert line_end or [role, kind, special] == known


def test_private_use_characters_in_a_content(name):
    """The characters that locate contents may occur in one: the labels are then the coarser ones, the ids the same."""
    tokenizer = TOKENIZERS[name]()
    item = dialogue(("user", "a \U000f0000 b \U00100001"), ("assistant", "c"))
    tally = Counter()
    batch = rendered([item], tokenizer, tally=tally)
    assert batch.input_ids.tolist() == by_transformers(item, tokenizer)
    assert tally == {"kept, but labelled by its headers: the contents could not be located": 1}
    ends = [r for _, r, k, _ in labels(batch) if k == Kind.END_OF_TURN and r != Role.DEFAULT_SYSTEM]
    assert ends == [Role.USER, Role.ASSISTANT]


def show(batch: TokenBatch) -> str:
    """One letter per token: its kind, in capitals where it is special."""
    letters = {Kind.FIRST: "f", Kind.CONTROL: "c", Kind.ROLE_NAME: "r", Kind.TEMPLATE_TEXT: "t", Kind.END_OF_TURN: "e"}
    return "".join(
        (letters.get(kind, ".").upper() if special else letters.get(kind, ".")) for _, _, kind, special in labels(batch)
    )


def test_templates_of_other_families():
    chat = dialogue(("user", "Q"), ("assistant", "X"), ("user", "Z"))
    mistral = chat_tokenizer(MISTRAL, bos="<s>")
    batch = rendered([chat], mistral)
    # <s> [INST] _ Q [/INST] _ X </s> [INST] _ Z [/INST]
    assert show(batch) == "fCt.Ct.ECt.C"
    u, a = Role.USER, Role.ASSISTANT
    assert [Role(r) for r in batch.role.tolist()] == [Role.NONE, u, u, u, a, a, a, a, u, u, u, u]
    phi = rendered([chat], chat_tokenizer(PHI))
    # <|user|> \n Q <|end|> \n <|assistant|> \n X <|end|> \n <|user|> \n Z <|end|> \n <|endoftext|>
    assert show(phi) == "Ft.EtCt.EtCt.EtC"
    assert [Role(r) for r in phi.role.tolist()] == [u] * 5 + [a] * 5 + [u] * 6


def test_a_token_that_joins_a_space_of_the_template_to_a_word_is_content():
    tokenizer = chat_tokenizer(MISTRAL, bos="<s>")
    batch = rendered([dialogue(("user", "light"), ("assistant", "x"))], tokenizer)
    assert tokenizer.decode(batch.input_ids[2]) == " light"
    assert batch.kind[2] == Kind.CONTENT


def test_a_token_of_the_template_across_a_blank_content_stays_the_templates():
    tokenizer = chat_tokenizer(PHI.replace("+ '<|end|>", "+ '\\n<|end|>"))
    batch = rendered([dialogue(("user", ""), ("assistant", "Q"))], tokenizer)
    assert tokenizer.decode(batch.input_ids[1]) == "\n\n"
    assert show(batch) == "FtEtCt.tEtC"


def test_no_chat_template_names_the_tokenizer_and_the_way_out():
    tokenizer = chat_tokenizer("", bos="</s>")
    tokenizer.chat_template = None
    tokenizer.name_or_path = "models/base"
    with pytest.raises(UserError, match=r"models/base has no chat template.*Instruct.*bt-p"):
        render([dialogue(*CHAT)], tokenizer)
    text = Document("t", "test", "Hello there, why is the sky blue?")
    assert len(rendered([text], tokenizer, method="bt-p", block_size=4)) > 0


def test_a_template_that_refuses_everything_is_one_line():
    with pytest.raises(UserError, match=r"refuses a plain dialogue \(template: No\.\)"):
        render([dialogue(*CHAT)], chat_tokenizer("{{ raise_exception('No.') }}"))


def test_facts_follow_the_template_of_the_moment():
    tokenizer = chat_tokenizer(CHATML + " ")
    facts = template_facts(tokenizer)
    assert template_facts(tokenizer) is facts
    tokenizer.chat_template = PHI
    assert template_facts(tokenizer).sha256 != facts.sha256
    assert template_facts(tokenizer).prefix_ids == (SPECIAL.index("<|user|>"), facts.prefix_ids[2])


def check_batch(batch: TokenBatch) -> None:
    starts = batch.cu_seqlens[:-1].long()
    assert batch.input_ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == batch.position.dtype == torch.int32
    assert (batch.position[starts] == 0).all()
    assert (batch.position == torch.arange(len(batch.position)) - starts[batch.sequence]).all()
    assert ((batch.kind == Kind.FIRST) == (batch.position == 0)).all()


def some(n: int) -> list[Dialogue]:
    return [
        dialogue(("user", f"Hello {i} " * (i % 7)), ("assistant", "It scatters light."), id=str(i)) for i in range(n)
    ]


def test_bt_f_is_fast_end_to_end_in_blocks(name):
    tokenizer = TOKENIZERS[name]()
    items, tally = some(40), Counter()
    fast = rendered(items, tokenizer)
    blocks = rendered(items, tokenizer, method="bt-f", block_size=32, chunk=3, tally=tally)
    check_batch(fast)
    check_batch(blocks)
    n = len(blocks) * 32
    assert blocks.names == tuple(f"block {i}" for i in range(len(blocks)))
    assert blocks.lengths.tolist() == [32] * len(blocks)
    assert tally == {"tokens after the last whole block": len(fast.input_ids) - n}
    assert 0 <= len(fast.input_ids) - n < 32
    for column in ("input_ids", "role", "special"):
        assert torch.equal(getattr(blocks, column), getattr(fast, column)[:n])
    inner = (fast.kind[:n] != Kind.FIRST) & (blocks.kind != Kind.FIRST)
    assert torch.equal(blocks.kind[inner], fast.kind[:n][inner])
    # the first token of a dialogue inside a block is what the template makes of it
    assert set(blocks.kind[(fast.kind[:n] == Kind.FIRST) & (blocks.kind != Kind.FIRST)].tolist()) == {Kind.CONTROL}
    assert blocks.special[blocks.kind == Kind.FIRST].any()
    prefix = template_facts(tokenizer).prefix_ids
    for row, inside in zip(blocks.input_ids.view(-1, 32).tolist(), blocks.prefix.view(-1, 32).tolist(), strict=True):
        assert inside == [tuple(row[: p + 1]) == prefix[: p + 1] for p in range(32)]


def test_bt_f_isolated_is_bt_f_cut_at_the_edges_of_dialogues(name):
    tokenizer = TOKENIZERS[name]()
    items, tally, block_tally = some(40), Counter(), Counter()
    fast = rendered(items, tokenizer)
    blocks = rendered(items, tokenizer, method="bt-f", block_size=32, tally=block_tally)
    pieces = rendered(items, tokenizer, method="bt-f-isolated", block_size=32, chunk=3, tally=tally)
    check_batch(pieces)
    assert tally == block_tally
    for column in ("input_ids", "role", "special"):
        assert torch.equal(getattr(pieces, column), getattr(blocks, column))
    n = len(blocks) * 32
    edges = {edge for edge in (*range(0, n + 1, 32), *fast.cu_seqlens.tolist()) if edge <= n}
    assert pieces.cu_seqlens.tolist() == sorted(edges)
    numbers = [int(name.removeprefix("block ").partition(".")[0]) for name in pieces.names]
    assert numbers == [start // 32 for start in pieces.cu_seqlens[:-1].tolist()]
    assert len(set(pieces.names)) == len(pieces) > len(blocks)


@pytest.mark.parametrize(
    ("get", "before", "after"),
    [
        (lambda: real("qwen2.5"), [], [151643]),
        (lambda: real("llama3.1"), [128000], []),
        (chat_tokenizer, [], [SPECIAL.index("<|endoftext|>")]),
        (lambda: chat_tokenizer(bos="<s>"), [SPECIAL.index("<s>")], []),
    ],
)
def test_bt_p_joins_documents_as_in_pretraining(get, before, after):
    tokenizer = get()
    texts = ["Hello there.", "It scatters light.", "Why? 😀 你好", "x<|im_end|><|eot_id|>"] * 5
    tally = Counter()
    batch = rendered(
        [Document(str(i), "test", t) for i, t in enumerate(texts)], tokenizer, method="bt-p", block_size=16, tally=tally
    )
    check_batch(batch)
    expected = [
        i
        for t in texts
        if "<|" not in t
        for i in [*before, *tokenizer(t, add_special_tokens=False)["input_ids"], *after]
    ]
    n = len(batch) * 16
    assert batch.input_ids.tolist() == expected[:n]
    assert tally["special token in the content"] == 5
    assert tally["tokens after the last whole block"] == len(expected) - n < 16
    separators = torch.isin(batch.input_ids, torch.tensor([*before, *after])) & (batch.position > 0)
    assert separators.any()
    assert ((batch.kind == Kind.CONTROL) == separators).all()
    for column in (batch.special, batch.prefix, batch.role):
        assert not column.any()


def test_wrong_arguments():
    tokenizer = chat_tokenizer()
    for options, says in (
        ({"method": "bt"}, "'bt' is not one of fast, bt-f, bt-f-isolated, bt-p"),
        ({"max_length": 0}, "max_length: expected a positive number, got 0"),
        ({"method": "bt-f", "block_size": -1}, "block_size: expected a positive number"),
    ):
        with pytest.raises(UserError, match=says):
            render([dialogue(*CHAT)], tokenizer, **options)
    with pytest.raises(UserError, match="bt-p takes documents, got a Dialogue"):
        list(render([dialogue(*CHAT)], tokenizer, method="bt-p"))
    with pytest.raises(UserError, match="takes dialogues, got a Document"):
        list(render([Document("t", "test", "Hi")], tokenizer))
    with pytest.raises(UserError, match=r"no token sequence$"):
        list(render([], tokenizer))
    with pytest.raises(UserError, match=r"no token sequence: \d+ × tokens after the last whole block$"):
        list(render([dialogue(*CHAT)], tokenizer, method="bt-f"))


@pytest.mark.parametrize("method", ["fast", "bt-f"])
def test_rendering_streams(method):
    """No more than a chunk is read ahead of what was asked for (a block may need the next chunk to fill)."""
    taken = 0

    def endless() -> Iterator[Dialogue]:
        nonlocal taken
        while True:
            taken += 1
            yield some(7)[taken % 7]

    stream = render(endless(), chat_tokenizer(), method=method, block_size=16, chunk=4)
    assert taken == 0
    sizes = []
    for _ in range(10):
        sizes.append(len(next(stream)))
        assert taken <= 4 * len(sizes) + 4
    assert sizes == [4] * 10


def test_chunks_do_not_change_the_tokens():
    items = some(11)
    one = rendered(items, chat_tokenizer(), chunk=1)
    all_at_once = rendered(items, chat_tokenizer(), chunk=64)
    assert one.names == all_at_once.names
    for column in ("input_ids", "cu_seqlens", "position", "role", "kind", "special", "prefix"):
        assert torch.equal(getattr(one, column), getattr(all_at_once, column))


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.2"])
def test_real_dialogues(name):
    tokenizer = TOKENIZERS[name]()
    items = [d for _, d in zip(range(150), read(str(shared_data("dialogues", "taskmaster4.jsonl"))), strict=False)]
    tally = Counter()
    batch = rendered(items, tokenizer, tally=tally)
    assert not tally
    assert batch.names == tuple(d.id for d in items)
    for i, item in enumerate(items):
        assert batch.select([i]).input_ids.tolist() == by_transformers(item, tokenizer)
