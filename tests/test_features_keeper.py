"""What a pass keeps is what sorting everything would give, in memory for features alone."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.errors import UserError
from chatsae.features import best as best_module
from chatsae.features.best import Best, pack, scores, tokens_of
from chatsae.features.directions import cofiring, decoder_neighbours
from chatsae.features.firings import Firings, digest, firings, hashed, narrow, rounded
from chatsae.features.keeper import PARTS, Keeper, Split, part_columns, share_below
from chatsae.features.records import VALUE_BINS, VALUE_EDGES, Options
from chatsae.sae.init import init_sae
from sae_samples import spec
from tiny_models import random_tokens

Entry = tuple[int, int, float]  # feature, token, value


def slow_best(entries: list[Entry], n: int, n_features: int, starts: list[int] | None) -> list[list[tuple[float, int]]]:
    """The obvious twin of Best: sort everything."""
    found = []
    for feature in range(n_features):
        ranked = sorted((-value, token) for f, token, value in entries if f == feature)
        if starts is not None:
            seen, unique = set(), []
            for value, token in ranked:
                dialogue = sum(s <= token for s in starts)
                if dialogue not in seen:
                    unique.append((value, token))
                seen.add(dialogue)
            ranked = unique
        found.append([(-value, token) for value, token in ranked[:n]])
    return found


def unpacked(row: np.ndarray) -> list[tuple[float, int]]:
    """Values and tokens of the keys of a feature."""
    keys = row[row > 0]
    assert (row[: len(keys)] > 0).all()
    return list(zip(scores(keys).tolist(), tokens_of(keys).tolist(), strict=True))


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    n=st.integers(1, 6),
    distinct=st.booleans(),
    limit=st.sampled_from([1, 7, 10_000]),
    rows=st.sampled_from([1, 2, 2048]),
)
def test_best_is_what_sorting_everything_gives(data, n, distinct, limit, rows):
    n_features, n_tokens = 4, 40
    values = st.sampled_from([0.25, 1.0, 1.5, 1e-20, 3e5])  # few, so that there are ties
    chosen = data.draw(st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, n_tokens - 1)), values, max_size=90))
    entries = data.draw(st.permutations([(f, t, v) for (f, t), v in chosen.items()]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(entries)), max_size=4)))
    starts = [0, 3, 11, 30, n_tokens]
    best = Best(n_features, n, np.array(starts) if distinct else None)
    best._limit = limit
    before, best_module._ROWS = best_module._ROWS, rows
    try:
        for low, high in zip([0, *cuts], [*cuts, len(entries)], strict=True):
            part = entries[low:high]
            feature, token = (np.array([e[i] for e in part], np.int64) for i in range(2))
            best.offer(feature, pack(np.array([e[2] for e in part], np.float32), token))
        best.merge()
    finally:
        best_module._ROWS = before
    found = [unpacked(row) for row in best.keys]
    exact = [(f, t, float(np.float32(v))) for f, t, v in entries]
    assert found == slow_best(exact, n, n_features, starts if distinct else None)


@pytest.mark.parametrize("n_features", [65_536])
def test_65536_features_with_100_contexts_each_stay_below_200_mb(n_features):
    tokens = random_tokens([500] * 20)  # of 10,000 tokens, 4,096 are sampled
    split = Split(tokens)
    generator = np.random.default_rng(0)
    index = np.arange(split.n_tokens, dtype=np.int64)
    portions = []
    for start in range(0, split.n_tokens, 4000):  # 100 features per token
        token = np.repeat(index[start : start + 4000], 100)
        feature = generator.integers(0, n_features, len(token))
        _, first = np.unique(token * n_features + feature, return_index=True)
        portions.append(Firings(token[first], feature[first], generator.random(len(first), np.float32) + 0.1))
    tracemalloc.start()
    keeper = Keeper(split, n_features, Options())
    for portion in portions:
        keeper.add(portion)
    state = keeper.state()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    assert sum(array.nbytes for array in state.values()) < 135e6
    assert state["top"].shape == (n_features, 100)
    assert state["values"].sum() == sum(map(len, portions))
    for feature in (0, 17, n_features - 1):
        entries = [
            (feature, int(t), float(v))
            for p in portions
            for t, v in zip(p.token[p.feature == feature], p.value[p.feature == feature], strict=True)
        ]
        row = state["top"][feature]
        expected = slow_best([(0, t, v) for _, t, v in entries], 100, 1, split.starts.tolist())[0]
        assert unpacked(row) == expected


@pytest.fixture(scope="module")
def kept() -> tuple[Split, np.ndarray, Keeper]:
    """A keeper, and the activations [N, F] it was given."""
    bare = random_tokens([7, 30, 1, 80, 12])
    code = torch.arange(130, dtype=torch.uint8)
    split = Split(replace(bare, role=code % 6, kind=code % 5))
    generator = np.random.default_rng(1)
    acts = rounded(generator.gamma(0.5, 3.0, (split.n_tokens, 9)).astype(np.float32))
    acts[generator.random(acts.shape) < 0.6] = 0
    acts[:, 3] = 0
    keeper = Keeper(split, 9, Options(kept=4, contexts=4, sampled=6))
    for rows in np.array_split(generator.permutation(split.n_tokens), 7):
        row, feature = np.nonzero(acts[rows])
        keeper.add(Firings(rows[row], feature, acts[rows[row], feature]))
    return split, acts, keeper


def test_counts_and_sums_are_those_of_all_activations(kept):
    split, acts, keeper = kept
    position = np.array([p for length in (7, 30, 1, 80, 12) for p in range(length)])
    codes = {
        "role": np.arange(split.n_tokens) % 6,
        "kind": np.arange(split.n_tokens) % 5,
        "position": np.array([0 if p == 0 else 1 if p < 8 else 2 if p < 64 else 3 for p in position]),
    }
    for part, code in codes.items():
        for i in range(len(PARTS[part])):
            column = part_columns(part).start + i
            assert split.totals[column] == (code == i).sum()
            assert (keeper.counts[:, column] == (acts[code == i] > 0).sum(axis=0)).all()
            assert (keeper.sums[:, column] == acts[code == i].astype(np.float64).sum(axis=0)).all()
    assert keeper.values.shape == (9, VALUE_BINS)
    for feature in range(9):
        active = acts[acts[:, feature] > 0, feature]
        found, _ = np.histogram(np.maximum(active, VALUE_EDGES[0]), bins=np.array(VALUE_EDGES))
        assert (keeper.values[feature] == found).all()


def test_firing_is_kept_on_every_sampled_token(kept):
    split, acts, keeper = kept
    assert (keeper.tokens == np.arange(split.n_tokens)).all()
    assert ((acts > 0) == np.unpackbits(keeper.bits, axis=1)[:, : split.n_tokens].T).all()
    some = split.sample(40, seed=3)
    assert len(set(some.tolist())) == 40
    assert (some == split.sample(40, seed=3)).all()
    assert (some != split.sample(40, seed=4)).any()


def test_neighbours_in_firing_are_those_of_the_correlation_matrix(kept):
    split, acts, keeper = kept
    live = [0, 1, 2, 4, 8]
    fires = acts > 0
    index, phi, share = cofiring(keeper.bits, split.n_tokens, np.array([*live, 3]), k=3, least=1)
    assert (index[-1] == -1).all()  # it never fires
    for row, feature in enumerate(live):
        correlation = {j: np.corrcoef(fires[:, feature], fires[:, j])[0, 1] for j in range(9) if j not in (feature, 3)}
        expected = sorted((j for j in correlation if correlation[j] > 0), key=lambda j: -correlation[j])[:3]
        found = [j for j in index[row].tolist() if j >= 0]
        assert phi[row, : len(expected)] == pytest.approx([correlation[j] for j in expected])
        assert [correlation[j] for j in found] == pytest.approx([correlation[j] for j in expected])
        both = [(fires[:, feature] & fires[:, j]).sum() / fires[:, feature].sum() for j in found]
        assert share[row, : len(found)] == pytest.approx(both)


def test_decoder_neighbours_are_the_largest_cosines():
    W_dec = torch.randn(30, 8, generator=torch.Generator().manual_seed(2))
    index, cosine = decoder_neighbours(W_dec, np.array([4, 29]), k=5)
    for row, feature in enumerate((4, 29)):
        all_of_them = torch.cosine_similarity(W_dec[feature], W_dec, dim=1)
        ranked = [j for j in all_of_them.argsort(descending=True).tolist() if j != feature][:5]
        assert index[row].tolist() == ranked
        assert cosine[row] == pytest.approx(all_of_them[ranked].numpy(), abs=1e-6)


def test_a_sample_is_uniform_over_activations_whatever_their_size():
    split = Split(random_tokens([1000]))
    values = np.linspace(0.1, 9, 1000).astype(np.float32)
    keeper = Keeper(split, 300, Options(sampled=20))
    for feature in range(300):
        keeper.add(Firings(np.arange(1000), np.full(1000, feature), values))
    places = tokens_of(keeper.state()["sampled"])
    assert (np.sort(places, axis=1)[:, 1:] != np.sort(places, axis=1)[:, :-1]).all()  # none twice
    found = np.histogram(places, bins=10, range=(0, 1000))[0]
    assert abs(found - 600).max() < 120  # 5 standard deviations


def test_the_share_below_is_that_of_the_values():
    generator = np.random.default_rng(0)
    everything = [
        generator.lognormal(0, 2, 5000),
        generator.uniform(1, 1.1, 3000),  # all in one bin
        np.array([2.0, 2.0, 3.0, 2.1, 9.0]),
        np.ones(7),
    ]
    counts = np.stack([np.histogram(v, bins=np.array(VALUE_EDGES))[0] for v in everything])
    for size, error in ((10**6, 1e-9), (400, 0.06)):
        sampled = [generator.choice(v, min(size, len(v)), replace=False).astype(np.float32) for v in everything]
        feature = np.repeat(np.arange(4), [len(s) for s in sampled])
        found = share_below(counts, np.concatenate(sampled), feature)
        exact = [(v.astype(np.float32) < x).mean() for v, s in zip(everything, sampled, strict=True) for x in s]
        assert found == pytest.approx(exact, abs=error)


def test_rounding_makes_ties_of_what_differs_by_noise_and_keeps_the_order():
    values = np.random.default_rng(0).lognormal(0, 4, 20_000).astype(np.float32)
    noisy = values * (1 + 1e-6 * np.random.default_rng(1).standard_normal(20_000)).astype(np.float32)
    assert (rounded(values) == rounded(noisy)).mean() > 0.98
    assert (abs(rounded(values) / values - 1) < 2**-12).all()
    assert (np.diff(rounded(np.sort(values))) >= 0).all()
    assert rounded(np.zeros(1, np.float32))[0] == 0


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("elements", [1, 50, 10**6])
def test_firings_are_the_activations_above_zero(architecture, elements, monkeypatch):
    monkeypatch.setattr("chatsae.features.firings.ELEMENTS", elements)
    sae = init_sae(spec(6, architecture=architecture), torch.Generator().manual_seed(0))
    x = torch.randn(25, 6, generator=torch.Generator().manual_seed(1))
    index = np.arange(25)[::-1] * 3
    acts = sae.encode(x).detach().numpy()
    found = np.zeros_like(acts)
    for part in firings(sae, x, index):
        found[24 - part.token // 3, part.feature] = part.value
    assert (acts > 0).any()
    assert found == pytest.approx(rounded(acts), rel=2e-3)
    some = np.array([7, 2, 11])
    assert torch.allclose(narrow(sae, some).encode(x), torch.from_numpy(acts[:, some]), atol=1e-6)
    assert torch.equal(narrow(sae, some).W_dec, sae.W_dec[some])


def test_activations_that_are_no_numbers_are_refused():
    sae = init_sae(spec(6), torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="NaN or infinite"):
        list(firings(sae, torch.full((1, 6), torch.inf), np.arange(1)))


def test_a_digest_follows_from_the_weights():
    saes = [init_sae(spec(6), torch.Generator().manual_seed(0)) for _ in range(2)]
    assert digest(saes[0]) == digest(saes[1])
    with torch.no_grad():
        saes[1].b_dec[3] += 1e-6
    assert digest(saes[0]) != digest(saes[1])


def test_the_hash_is_a_permutation_that_its_salt_changes():
    values = np.arange(10_000)
    assert len(np.unique(hashed(values))) == 10_000
    assert len(np.unique(hashed(values, 1))) == 10_000
    assert not np.intersect1d(hashed(values, 1), hashed(values, 2)).size
    assert int(hashed(np.array([0]))[0]) == 0xE220A8397B1DCDAF  # splitmix64 of seed 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"contexts": 0}, "contexts: at least 1"),
        ({"contexts": 101}, "only 100 positions are kept"),
        ({"window": 0}, "window: at least 1"),
        ({"features": -1}, "at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Options(**wrong)
