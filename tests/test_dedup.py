"""The greedy n-gram deduplication against its definition."""

import json
from collections import Counter
from importlib.util import find_spec
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.batch import Dialogue, Message
from chatsae.data import dedup as module
from chatsae.data.dedup import Greedy, MemoryFullError, dedup, dedup_reference, ngrams
from chatsae.data.hashing import ngram_hashes
from chatsae.errors import UserError
from shared_data import shared_data

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba (the extra `fast`)")
engines = pytest.mark.parametrize("engine", ["numpy", pytest.param("numba", marks=needs_numba)])
GB = 1 if find_spec("numba") else 8  # a Python set takes 8 times the bytes of the table
texts = st.lists(st.text("abc |\n", max_size=20), max_size=10)
FILES = [
    "gpteacher_codegen",
    "gpteacher_roleplay",
    "gpteacher_toolformer",
    "gsm8k",
    "self_instruct_human",
    "taskmaster4",
]


def dialogues(*texts: str) -> list[Dialogue]:
    """One dialogue per text; a bar parts its turns, which are the user's and the assistant's in turn."""
    return [
        Dialogue(str(i), "s", tuple(Message(("user", "assistant")[j % 2], t) for j, t in enumerate(text.split("|"))))
        for i, text in enumerate(texts)
    ]


def kept(items: list[Dialogue], n: int, **options) -> list[int]:
    return [int(d.id) for d in dedup(items, ngram=n, **options)]


@pytest.fixture(scope="module")
def real() -> list[Dialogue]:
    items = []
    for name in FILES:
        with shared_data("dialogues", f"{name}.jsonl").open("rb") as lines:
            rows = [json.loads(line)["messages"] for line in lines]
        items += [Dialogue("", name, tuple(Message(**m) for m in row)) for row in rows]
    return [Dialogue(str(i), d.source, d.messages) for i, d in enumerate(items)]


@pytest.fixture(scope="module")
def really_kept(real) -> list[bool]:
    return dedup_reference(real, 20)


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
    items = dialogues(*texts)
    assert kept(items, 3) == expected
    assert [i for i, keep in enumerate(dedup_reference(items, 3)) if keep] == expected


def test_drops_are_counted_and_zero_turns_it_off():
    items = dialogues("a b", "a b", "a b")
    tally = Counter()
    assert len(list(dedup(items, ngram=2, tally=tally))) == 1
    assert tally == {"shares 2 words in a row with an earlier dialogue": 2}
    assert list(dedup(items, ngram=0)) == items
    with pytest.raises(UserError, match=r"data\.ngram.*-1"):
        dedup(items, ngram=-1)
    with pytest.raises(UserError, match="got 0"):
        Greedy(0)
    with pytest.raises(UserError, match="memory_gb: expected a number above 0, got 0"):
        dedup(items, memory_gb=0)


def test_only_the_turns_of_some_roles_count():
    items = dialogues("a b c|x", "a b c|x y z", "p|x y z", "q q q|x y z")
    assert kept(items, 3) == [0, 2]
    assert kept(items, 3, roles=("user",)) == [0, 2, 3]
    assert kept(items, 3, roles=["assistant"]) == [0, 1]
    assert ngrams(items[1], 2, ("user",)) == {("a", "b"), ("b", "c")}


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


@given(texts, st.integers(1, 4))
@settings(deadline=None)
def test_equals_the_definition(texts, n):
    items = dialogues(*texts)
    expected = by_definition(items, n)
    assert kept(items, n) == expected
    assert [i for i, keep in enumerate(dedup_reference(items, n)) if keep] == expected


@engines
@given(texts, st.integers(1, 4), st.lists(st.integers(0, 10), max_size=3), st.sampled_from([(), ("user",)]))
@settings(deadline=None)
def test_greedy_in_any_batches_equals_the_reference(engine, texts, n, cuts, roles):
    items, greedy = dialogues(*texts), Greedy(n, roles=roles, engine=engine)
    ends = [*sorted(cuts), len(items)]
    keep = [k for a, b in zip([0, *ends], ends, strict=False) for k in greedy.keep(items[a:b])]
    assert keep == dedup_reference(items, n, roles)
    remembered = {w for d, k in zip(items, keep, strict=True) if k for w in ngrams(d, n, roles)}
    assert len(greedy) == len(remembered)


@engines
@given(texts, st.integers(1, 4), st.sampled_from([1, 2, 100]))
@settings(deadline=None)
def test_narrowing_anywhere_changes_nothing(engine, texts, n, map_bytes):
    items = dialogues(*texts)
    expected = dedup_reference(items, n)
    for cut in range(len(items) + 1):
        greedy = Greedy(n, engine=engine)
        keep = greedy.keep(items[:cut])
        before = len(greedy)
        greedy.narrow([items[cut : cut + 2], items[cut + 2 :]], map_bytes=map_bytes)  # of 8 bits: they collide
        assert len(greedy) <= before
        for item in items[cut:]:
            keep += greedy.keep([item])
        assert keep == expected
        with pytest.raises(UserError, match="may occur twice"):
            greedy.narrow([])


@engines
def test_narrowing_forgets_what_occurs_once(engine):
    greedy = Greedy(2, engine=engine)
    greedy.keep(dialogues("a b c", "d e f g"))
    rest = dialogues("x y", "e f", "x y z", "u v")
    greedy.narrow([rest], map_bytes=1000)
    assert len(greedy) == 1  # of "a b", "b c", "d e", "e f", "f g" only "e f" comes again
    assert greedy.keep(rest) == [True, False, False, True]
    assert len(greedy) == 2  # and "x y"


@engines
@given(texts, st.integers(1, 4), st.integers(0, 10), st.integers(0, 10), st.booleans())
@settings(deadline=None)
def test_restored_decisions_go_on_as_if_uninterrupted(engine, texts, n, cut, narrowed_at, at_once):
    """What `take_new` gave is all that a new process needs; narrowed before the interruption, after it, or never."""
    items = dialogues(*texts)
    expected = dedup_reference(items, n)
    first, second = Greedy(n, engine=engine), Greedy(n, engine=engine)
    taken, taken_narrow, keep = [], [], []
    for i, item in enumerate(items[:cut]):
        if i == narrowed_at:
            first.narrow([items[i:]], map_bytes=1)
        keep += first.keep([item])
        (taken_narrow if i >= narrowed_at else taken).append(first.take_new())
    every = np.concatenate([np.zeros(0, np.uint64), *taken, *taken_narrow])
    assert len(set(every.tolist())) == len(every)
    if at_once:
        second.narrow([items[cut:]], known=[every], map_bytes=1)
    elif cut > narrowed_at:
        second.restore(np.concatenate([np.zeros(0, np.uint64), *taken]))
        second.narrow([items[narrowed_at:]], map_bytes=1)
        second.restore(np.concatenate(taken_narrow) if taken_narrow else np.zeros(0, np.uint64))
    else:
        second.restore(every)
        assert len(second) == len(every)
    assert len(second.take_new()) == 0
    assert keep + second.keep(items[cut:]) == expected


@engines
def test_the_first_call_of_take_new_gives_all(engine):
    items = dialogues("a b c", "d e", "a b", "f g")
    late, each = Greedy(2, engine=engine), Greedy(2, engine=engine)
    late.keep(items[:3])
    each.take_new()
    each.keep(items[:3])
    assert sorted(late.take_new().tolist()) == sorted(each.take_new().tolist())
    late.keep(items[3:])
    assert late.take_new().tolist() == ngram_hashes(items[3:], 2).values.tolist()
    assert late.take_new().tolist() == []


@engines
@given(texts, st.integers(1, 3))
@settings(deadline=None)
def test_shared_hashes_are_all_that_counts(engine, texts, n):
    items = dialogues(*texts)
    found = Counter(h for d in items for h in set(ngram_hashes([d], n).values.tolist()))
    shared = np.array(sorted(h for h, count in found.items() if count > 1), np.uint64)
    greedy = Greedy(n, engine=engine)
    greedy.only(shared)
    assert greedy.keep(items) == dedup_reference(items, n)
    assert len(greedy) <= len(shared)


def wordy(count: int, rng: np.random.Generator) -> list[Dialogue]:
    """Dialogues of 30 words; every fifth repeats a part of another."""
    parts = [[str(x) for x in rng.integers(0, 10**9, 30)] for _ in range(count)]
    for i in range(5, count, 5):
        parts[i][3:8] = parts[int(rng.integers(0, i))][10:15]
    return dialogues(*(" ".join(words) for words in parts))


@engines
@pytest.mark.parametrize("bytes_each", [4, 12, 40])
def test_memory_gb_is_kept_and_changes_nothing(engine, bytes_each):
    items = wordy(2000, np.random.default_rng(0))  # some 50,000 n-grams
    memory_gb = 50_000e-9 * bytes_each * (1 if engine == "numba" else 8)
    narrowed, keep = [], []
    greedy = Greedy(4, memory_gb=memory_gb, engine=engine)
    for start in range(0, len(items), 10):
        try:
            keep += greedy.keep(items[start : start + 10])
        except MemoryFullError:
            assert greedy.full
            narrowed.append(start)
            greedy.narrow(items[i : i + 100] for i in range(start, len(items), 100))
            keep += greedy.keep(items[start : start + 10])
        assert greedy.nbytes <= memory_gb * 1e9
        assert not greedy.full
    assert keep == dedup_reference(items, 4)
    assert 0.7 * len(items) < sum(keep) < 0.95 * len(items)
    assert len(narrowed) == (bytes_each < 40)


def test_a_refused_batch_leaves_no_trace():
    items = wordy(300, np.random.default_rng(1))
    greedy = Greedy(4, memory_gb=1e-4 * GB)
    keep = greedy.keep(items[:100])
    before = len(greedy)
    with pytest.raises(MemoryFullError, match=r"memory_gb = 0\.000[18] is used up after 100 dialogues by 2,[0-9]{3} n"):
        greedy.keep(items[100:])
    assert len(greedy) == before
    greedy.narrow([items[100:]])
    assert keep + greedy.keep(items[100:]) == dedup_reference(items, 4)


def test_dedup_reads_again_when_memory_is_full():
    items = wordy(3000, np.random.default_rng(2))
    expected = [i for i, keep in enumerate(dedup_reference(items, 4)) if keep]
    assert kept(items, 4, memory_gb=4e-4 * GB) == expected

    source = dedup(iter(items), ngram=4, memory_gb=4e-4 * GB)
    with pytest.raises(MemoryFullError, match=r"used up after .* raise it, give a source that can be read twice"):
        list(source)
    assert kept(iter(items), 4, memory_gb=0.1) == expected

    with pytest.raises(
        UserError, match=r"may occur twice; raise it \(at most 0.* GB are needed\), .*--engine spark"
    ) as full:
        kept(items, 4, memory_gb=3e-5 * GB)
    needed = float(str(full.value).split("at most ")[1].split()[0])
    assert needed == pytest.approx(16e-9 * GB * 3000 * 27, rel=0.15)


def test_a_source_in_another_order_each_time_is_refused():
    class Shuffled:
        rng = np.random.default_rng(3)
        items = wordy(1000, rng)

        def __iter__(self):
            return iter([self.items[i] for i in self.rng.permutation(len(self.items))])

    with pytest.raises(UserError, match="the same order each time"):
        list(dedup(Shuffled(), ngram=4, memory_gb=2e-4 * GB))


@engines
def test_too_many_hashes_to_restore_are_refused_and_can_be_narrowed(engine):
    items = wordy(600, np.random.default_rng(4))
    first = Greedy(4, engine=engine)
    keep = first.keep(items[:500])
    hashes = first.take_new().astype(np.int64)  # the bits are the same
    second = Greedy(4, engine=engine, memory_gb=2e-4 * (1 if engine == "numba" else 8))
    with pytest.raises(MemoryFullError, match="used up"):
        second.restore(hashes)
    assert (second.full, len(second)) == (True, 0)
    second.narrow([items[500:]], known=[hashes[:7000], hashes[7000:]])
    assert not second.full
    assert len(second) < len(hashes) / 10
    assert second.nbytes <= (2e5 if engine == "numba" else 16e5)
    assert keep + second.keep(items[500:]) == dedup_reference(items, 4)
    with pytest.raises(MemoryFullError, match=r"cannot hold the 1[0-9],[0-9]{3} shared n-grams"):
        Greedy(4, engine=engine, memory_gb=5e-5).only(hashes)


def test_results_come_early_and_an_error_comes_after_them():
    read = []

    def source():
        for item in wordy(5000, np.random.default_rng(5)):
            if len(read) == 3300:
                raise UserError("line 3300 is broken")
            read.append(item)
            yield item

    stream = dedup(source(), ngram=4)
    assert read == []
    assert next(stream) == read[0]
    assert len(read) == 32
    got = [read[0]]
    with pytest.raises(UserError, match="line 3300"):
        got += stream  # in place: what came before the error stays
    assert got == [d for d, keep in zip(read, dedup_reference(read, 4), strict=True) if keep]


def test_long_dialogues_make_small_batches():
    read = []

    def source():
        for i in range(40):
            read.append(i)
            yield dialogues(f"{i} " * 500_000)[0]

    stream = dedup(source(), ngram=20)
    next(stream)
    assert len(read) == 3 + 2  # 4 M characters


def test_without_numba_a_hint_is_given_once(monkeypatch, capsys):
    monkeypatch.setattr(module, "pick_engine", lambda engine: engine or "numpy")
    monkeypatch.setattr(module, "_SLOW_AFTER", 100)
    items = wordy(100, np.random.default_rng(6))
    quiet, loud = Greedy(4, engine="numpy"), Greedy(4)
    quiet.keep(items * 3)
    loud.keep(items)
    assert capsys.readouterr().err == ""
    loud.keep(items)
    loud.keep(items)
    assert capsys.readouterr().err.count("pip install 'chatsae[fast]'") == 1


@engines
def test_real_dialogues_as_the_reference_keeps_them(engine, real, really_kept):
    assert len(real) > 10_000
    greedy = Greedy(20, engine=engine)
    assert [k for i in range(0, len(real), 1000) for k in greedy.keep(real[i : i + 1000])] == really_kept


def test_real_dialogues_within_little_memory(real, really_kept):
    assert [d.id for d in dedup(real, memory_gb=0.01 * GB)] == [
        d.id for d, k in zip(real, really_kept, strict=True) if k
    ]


def test_real_dialogues_keep_the_prefix_property(real):
    items = list(islice(real, 1500))
    whole = kept(items, 20)
    assert 100 < len(whole) < 1500
    assert kept(items[:600], 20) == [i for i in whole if i < 600]
    assert whole == kept([items[i] for i in whole], 20)
