"""The n-gram hashes against their specification, and the sets that hold them against Python's."""

import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatsae.batch import Dialogue, Message
from chatsae.data.bitmaps import Suspects
from chatsae.data.hashing import SPEC, WINDOW_MULTIPLIER, WORD_MULTIPLIER, Hashes, home, ngram_hashes, pick_engine
from chatsae.data.hashset import HashSet, MemoryFullError, hash_set
from chatsae.errors import UserError

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba (the extra `fast`)")
engines = pytest.mark.parametrize("engine", ["numpy", pytest.param("numba", marks=needs_numba)])
SPACES = [chr(c) for c in range(sys.maxunicode + 1) if not chr(c).strip()]
ALMOST_SPACES = list(  # the neighbours of the white space
    "\x84\xa1\u1681\u200b\u2027\u202a\u2030\u205e\u2060\u3001\ufeff"
)
MASK = (1 << 64) - 1
pieces = st.lists(
    st.one_of(
        st.sampled_from([*SPACES, " ", "\n"]),
        st.sampled_from(["a ", "b ", "c\n", "d\u2003", "e\x85", "é\u3000"]),
        st.sampled_from(["a", "b", "bb", "é", "中", "😀", "\ud800", *ALMOST_SPACES]),
        st.text(max_size=3),
    ),
    max_size=40,
).map("".join)
turns = st.builds(str.__mul__, pieces, st.integers(1, 8))
lengths = st.one_of(st.integers(1, 3), st.integers(1, 25))
chat = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), turns), max_size=4)
role_sets = st.sampled_from([(), ("user",), ("user", "assistant"), ("tool",)])


def dialogues(*chats: list[tuple[str, str]]) -> list[Dialogue]:
    return [Dialogue(str(i), "s", tuple(Message(*turn) for turn in chat)) for i, chat in enumerate(chats)]


def fmix64(h: int) -> int:
    h = (h ^ h >> 33) * 0xFF51AFD7ED558CCD & MASK
    h = (h ^ h >> 33) * 0xC4CEB9FE1A85EC53 & MASK
    return h ^ h >> 33


def polynomial(items: list[int], multiplier: int) -> int:
    value = 0
    for item in items:
        value = (value * multiplier + item) & MASK
    return value


def specified(dialogue: Dialogue, n: int, roles: tuple[str, ...]) -> list[int]:
    """The specification, word by word."""
    found = []
    for message in dialogue.messages:
        if roles and message.role not in roles:
            continue
        encoded = [word.encode("utf-8", "surrogatepass") for word in message.content.split()]
        words = [fmix64(polynomial([byte + 1 for byte in word], WORD_MULTIPLIER)) for word in encoded]
        windows = [polynomial(words[i : i + n], WINDOW_MULTIPLIER) for i in range(len(words) - n + 1)]
        found += [fmix64(window) or 1 for window in windows]
    return found


def lists(hashes: Hashes) -> list[list[int]]:
    values, bounds = hashes.values.tolist(), hashes.bounds.tolist()
    assert hashes.values.dtype == np.uint64
    assert bounds[0] == 0
    assert bounds[-1] == len(values)
    return [values[a:b] for a, b in pairwise(bounds)]


@engines
@given(items=st.lists(chat, max_size=4), n=lengths, roles=role_sets)
@example(items=[], n=1, roles=())
@example(items=[[("user", "\ud800 \udfff? \ud83d\ude00 😀 ?")]], n=1, roles=())
@example(items=[[("user", " ".join(f"a{s}b" for s in SPACES))]], n=1, roles=())
@example(items=[[("user", " ".join(map("x{}y".format, ALMOST_SPACES)))]], n=1, roles=())
@settings(deadline=None)
def test_hashes_are_those_of_the_specification(engine, items, n, roles):
    items = dialogues(*items)
    assert lists(ngram_hashes(items, n, roles, engine=engine)) == [specified(d, n, roles) for d in items]


def test_the_specification_has_not_changed():
    text = "Words of\u3000one turn: na\u00efve, \u4e2d\u6587 \U0001f600."
    items = dialogues([("user", text), ("assistant", "of one turn:")])
    assert SPEC == "poly64-v1"
    assert len(SPACES) == 29
    for engine in ["numpy"] + ["numba"] * (find_spec("numba") is not None):
        (found,) = lists(ngram_hashes(items, 3, engine=engine))
        assert found[:3] == [0x5580582A1611833C, 0xD73350CCB2DCDFEB, 0xB8AF5D18C81BC1E4]
        assert found[3:] == [0xCFA204CEE15BEAC2, 0x13339C72008A5592, 0xD73350CCB2DCDFEB]


@engines
@given(items=st.lists(chat, max_size=4), n=st.integers(1, 3))
@settings(deadline=None)
def test_hashes_are_equal_where_words_are(engine, items, n):
    items, found = dialogues(*items), {}
    for dialogue, hashes in zip(items, lists(ngram_hashes(items, n, engine=engine)), strict=True):
        split = [message.content.split() for message in dialogue.messages]
        windows = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
        for window, value in zip(windows, hashes, strict=True):
            assert found.setdefault(window, value) == value
    assert len(set(found.values())) == len(found)


@engines
def test_long_turns_and_long_words_are_hashed_in_pieces(engine):
    rng = np.random.default_rng(0)
    words = [str(n) * int(rng.integers(1, 40)) for n in rng.integers(0, 10**6, 4000)]
    words[1000] = "wörd" * 100_000  # more than a piece of the NumPy hash
    items = dialogues([("user", " ".join(words))])
    (hashes,) = lists(ngram_hashes(items, 2, engine=engine))
    assert len(hashes) == 3999
    assert pick_engine(engine) == engine
    for i in (0, 999, 1000, 1001, 2000, 3998):
        (pair,) = dialogues([("user", " ".join(words[i : i + 2]))])
        assert hashes[i] == specified(pair, 2, ())[0]


@needs_numba
def test_both_engines_agree_on_a_long_turn():
    rng = np.random.default_rng(1)
    text = "".join(rng.choice(["a", "é", " ", "\u2003", "\x85", "中", "\n"], 300_000))
    items = dialogues([("user", text)], [("user", text[1:])])
    assert lists(ngram_hashes(items, 20, engine="numba")) == lists(ngram_hashes(items, 20, engine="numpy"))


def test_unknown_engines_and_lengths_are_refused():
    with pytest.raises(UserError, match="numba or numpy, got 'gpu'"):
        ngram_hashes([], 3, engine="gpu")
    with pytest.raises(UserError, match="got 0"):
        ngram_hashes([], 0)


def test_numba_is_imported_when_needed_and_can_be_missing():
    code = """
import sys
import chatsae.data.dedup as d
from chatsae.errors import UserError
assert "numba" not in sys.modules
sys.modules["numba"] = None
assert d.Greedy(3).engine == "numpy"
for refused in (lambda: d.Greedy(3, engine="numba"), lambda: __import__("chatsae.data.hashset").data.hashset.FlatSet()):
    try:
        refused()
    except UserError as error:
        assert "chatsae[fast]" in str(error)
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


hashes64 = st.one_of(
    st.integers(1, MASK),
    st.integers(1, 300),  # all at the first home
    st.integers(MASK - 300, MASK),  # and at the last one, where there is little room behind
)
arrays = st.lists(hashes64, max_size=300).map(lambda values: np.array(values, np.uint64))


def keys_of(held: HashSet, chunk: int = 7) -> list[int]:
    return [key for keys in held.keys(chunk) for key in keys.tolist()]


@engines
@given(adds=st.lists(arrays, max_size=6), asked=arrays, modulus=st.integers(1, 3))
@settings(deadline=None)
def test_hash_sets_equal_python_sets(engine, adds, asked, modulus):
    held, expected = hash_set(engine), set()
    for values in adds:
        held.add(values)
        expected.update(values.tolist())
        assert len(held) == len(expected)
    assert keys_of(held) == sorted(expected)
    asked = np.concatenate([asked, *adds])
    assert held.contains(asked).tolist() == [value in expected for value in asked.tolist()]
    held.retain(lambda keys: keys % np.uint64(modulus) == 0)
    expected = {value for value in expected if value % modulus == 0}
    assert keys_of(held) == sorted(expected)
    assert len(held) == len(expected)
    held.add(asked)
    assert keys_of(held) == sorted(expected | set(asked.tolist()))


@engines
def test_growth_keeps_every_key_and_its_bytes(engine):
    rng = np.random.default_rng(2)
    held, expected, most = hash_set(engine), set(), 16.5 if engine == "numba" else 128
    for count in (10, 5_000, 60_000, 150_000):
        values = rng.integers(1, MASK, count, dtype=np.uint64)
        held.add(values)
        expected.update(values.tolist())
        assert keys_of(held, 1 << 12) == sorted(expected)
        if count > 5_000:
            assert 8 <= held.nbytes / len(held) <= most
    copy = hash_set(engine)
    copy.add(np.array(sorted(expected), np.uint64))  # quadratic, if they were inserted in this order
    assert keys_of(copy, 1 << 12) == sorted(expected)
    before = held.nbytes
    held.retain(lambda keys: keys < np.uint64(1 << 61))
    assert keys_of(held) == sorted(value for value in expected if value < 1 << 61)
    assert held.nbytes < before / 5


@engines
@given(limit=st.integers(1, 20_000), parts=st.lists(st.integers(1, 800), max_size=8), seed=st.integers(0, 9))
@settings(deadline=None)
def test_a_limit_is_kept(engine, limit, parts, seed):
    rng = np.random.default_rng(seed)
    held, expected = hash_set(engine, limit), set()
    for count in parts:
        values = rng.integers(1, MASK, count, dtype=np.uint64)
        if held.fits(count):
            keep, new = held.greedy(values.copy(), np.array([0, count]))
            assert keep.tolist() == [True]
            assert sorted(new.tolist()) == sorted(set(values.tolist()))
            expected.update(values.tolist())
        else:
            with pytest.raises(MemoryFullError, match="bytes that they may take"):
                held.add(values)
            expected.update(values[held.contains(values)].tolist())
        assert held.nbytes <= max(limit, 8 * 64 + 8 * 64)
        assert keys_of(held) == sorted(expected)


@needs_numba
@given(values=arrays, slots=st.integers(1, 1 << 40))
@settings(deadline=None)
def test_homes_rise_with_the_keys_for_any_number_of_slots(values, slots):
    from chatsae.data import kernels

    expected = [(value >> 16) * slots >> 48 for value in values.tolist()]
    assert home(values, slots).tolist() == expected
    assert [kernels.home(value, np.uint64(slots)) for value in values] == expected
    assert max(expected, default=0) < slots


def test_too_many_slots_and_too_little_memory_are_said():
    from chatsae.data import hashset

    table = np.zeros(4, np.uint64)
    with pytest.raises(UserError, match=r"2\^40 slots.*--engine spark"):
        hashset._resize(table, (1 << 40) + 1)
    with pytest.raises(UserError, match=r"no memory for 8796\.1 GB.*memory_gb"):
        hashset._resize(table, 1 << 40)


@needs_numba
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_growing_table_never_needs_twice_its_memory():
    code = """
import numpy as np
from chatsae.data.hashset import FlatSet

def kb(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

rng = np.random.default_rng(0)
FlatSet().add(rng.integers(1, (1 << 64) - 1, 10_000, dtype=np.uint64))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before, held = kb("VmRSS"), FlatSet()
for _ in range(50):
    held.add(rng.integers(1, (1 << 64) - 1, 100_000, dtype=np.uint64))
assert len(held) > 4_999_900
print((kb("VmHWM") - before) * 1024 / len(held), held.nbytes / len(held))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    peak, held = map(float, done.stdout.split())
    assert 8 < held <= 16.1
    assert held - 1 < peak < 18


@engines
@given(chunks=st.lists(arrays, max_size=4), nbytes=st.sampled_from([1, 3, 64, 4096]))
@settings(deadline=None)
def test_what_occurs_twice_is_suspected(engine, chunks, nbytes):
    suspects = Suspects(iter(chunks), nbytes=nbytes, engine=engine)
    values = np.concatenate([np.zeros(0, np.uint64), *chunks])
    places = home(values, 8 * nbytes).tolist()
    assert suspects(values).tolist() == [places.count(place) > 1 for place in places]
    assert suspects.nbytes == nbytes


@engines
def test_distinct_hashes_are_estimated(engine):
    rng = np.random.default_rng(3)
    values = rng.integers(1, MASK, 20_000, dtype=np.uint64)
    suspects = Suspects([values, values[:5000]], nbytes=8_000, engine=engine)
    assert suspects.distinct == pytest.approx(20_000, rel=0.03)
    assert Suspects([values], nbytes=10, engine=engine).distinct == float("inf")
