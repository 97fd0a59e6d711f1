"""The greedy n-gram deduplication against its definition."""

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatsae.batch import Dialogue, Message
from chatsae.data.dedup import dedup
from chatsae.errors import UserError
from shared_data import shared_data


def dialogues(*texts: str) -> list[Dialogue]:
    """One dialogue per text; a bar parts its turns."""
    return [
        Dialogue(str(i), "s", tuple(Message("user", turn) for turn in text.split("|"))) for i, text in enumerate(texts)
    ]


def kept(items: list[Dialogue], n: int) -> list[int]:
    return [int(d.id) for d in dedup(items, ngram=n)]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c", "x b c", "a b c d"], [0, 1]),  # "a b c" again
        (["a b|c d", "z a b c d"], [0, 1]),  # windows do not cross turns
        (["a b", "a b"], [0, 1]),  # shorter than a window: always kept
        (["a b c", "p a b c q r s", "q r s"], [0, 2]),  # what is dropped is not remembered
        (["a b c a b c"], [0]),  # a repetition within itself does not count
        (["a\u00a0b\u3000c", "x|a \n b\tc"], [0]),  # any white space parts words
        (["a b c", "A b c"], [0, 1]),  # case matters
    ],
)
def test_known_answers(texts, expected):
    assert kept(dialogues(*texts), 3) == expected


def test_drops_are_counted_and_zero_turns_it_off():
    items = dialogues("a b", "a b", "a b")
    tally = Counter()
    assert len(list(dedup(items, ngram=2, tally=tally))) == 1
    assert tally == {"shares 2 words in a row with an earlier dialogue": 2}
    assert list(dedup(items, ngram=0)) == items
    with pytest.raises(UserError, match=r"data\.ngram.*-1"):
        dedup(items, ngram=-1)


def by_definition(items: list[Dialogue], n: int) -> list[int]:
    """Compares every dialogue with every kept one, string by string."""
    found: list[Dialogue] = []
    for item in items:
        shared = any(
            a[i : i + n] == b[j : j + n]
            for other in found
            for a in (m.content.split() for m in item.messages)
            for b in (m.content.split() for m in other.messages)
            for i in range(len(a) - n + 1)
            for j in range(len(b) - n + 1)
        )
        if not shared:
            found.append(item)
    return [int(d.id) for d in found]


@given(st.lists(st.text("ab |\n", max_size=14), max_size=8), st.integers(1, 4))
def test_equals_the_definition(texts, n):
    items = dialogues(*texts)
    assert kept(items, n) == by_definition(items, n)


def test_real_dialogues_keep_the_prefix_property():
    with shared_data("dialogues", "gpteacher_codegen.jsonl").open("rb") as lines:
        rows = [json.loads(line)["messages"] for line in islice(lines, 1500)]
    items = [Dialogue(str(i), "s", tuple(Message(**m) for m in row)) for i, row in enumerate(rows)]
    whole = kept(items, 20)
    assert 100 < len(whole) < 1500
    assert kept(items[:600], 20) == [i for i in whole if i < 600]
    assert whole == kept([items[i] for i in whole], 20)
