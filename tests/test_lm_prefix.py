"""A prefix that is computed once gives the activations that computing it every time gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chatsae.batch import TokenBatch
from chatsae.lm.forward import bare_tokens, forward, unchecked
from chatsae.lm.harvest import Harvest
from chatsae.lm.load import LanguageModel
from chatsae.lm.prefix import PrefixCache
from tiny_models import VOCAB, tiny_model

TAILS = [5, 1, 30, 12, 2, 70, 9, 200, 3]
FAMILIES = ("qwen2", "llama", "qwen3", "gemma2", "gemma3", "mistral", "phi", "gpt-oss", "mixtral", "qwen2-moe", "bloom")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2"), [0, 2])


def with_prefix(tails: list[int], lengths: list[int], seed: int = 0) -> TokenBatch:
    """Random sequences, each of which begins with so many tokens of the same prefix."""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randint(VOCAB, (max(lengths),), generator=torch.Generator().manual_seed(99))
    rows = [
        torch.cat([prefix[:p], torch.randint(VOCAB, (n,), generator=generator)])
        for n, p in zip(tails, lengths, strict=True)
    ]
    tokens = bare_tokens(rows)
    return replace(tokens, prefix=tokens.position < torch.tensor(lengths)[tokens.sequence])


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def test_only_a_prefix_that_pays_counts(lm: LanguageModel) -> None:
    cache, tokens = PrefixCache(lm), with_prefix([5, 80, 90, 91, 1, 0, 40], [10, 10, 10, 10, 10, 10, 3])
    # of the sixth nothing is left but the prefix, and its last token has to be computed
    assert cache.lengths(tokens).tolist() == [10, 10, 10, 0, 10, 9, 0]
    assert cache.common(tokens.select([0, 1, 4])) == 10
    assert cache.common(tokens.select([0, 5])) == 9
    assert cache.common(tokens.select([0, 3])) == 0
    assert cache.common(tokens.select([0])) == 0
    others = with_prefix([5], [10])
    others = replace(others, input_ids=(others.input_ids + 1) % VOCAB)
    assert cache.common(TokenBatch.concat([tokens.select([0]), others])) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_it_from_the_cache(tmp_path: Path, family: str) -> None:
    lm = LanguageModel(tiny_model(tmp_path, family), [1, 3])
    tokens = with_prefix([5, 1, 30, 12, 2], [10] * 5)
    seen: list[torch.Size] = []
    handle = lm.blocks[1].register_forward_hook(
        lambda m, a, o: seen.append((o if isinstance(o, Tensor) else o[0]).shape)
    )
    cache = PrefixCache(lm)
    got = unchecked(lm, tokens, "padded", prefix=cache)
    again = unchecked(lm, tokens, "padded", prefix=cache)
    handle.remove()
    assert [tuple(shape[:2]) for shape in seen] == [(1, 10), (5, 30), (5, 30)]
    assert worst(got, forward(lm, tokens, "single")) <= 1e-5
    assert torch.equal(got, again)


def test_the_harvest_keeps_sequences_with_and_without_apart(lm: LanguageModel) -> None:
    tokens = with_prefix(TAILS * 2, [12, 3] * len(TAILS))
    want = Harvest(lm, [tokens], way="padded", token_budget=150, prefix=False)
    expected = {
        n: a for b in want for n, a in zip(b.tokens.names, b.acts.split(b.tokens.lengths.tolist(), 1), strict=True)
    }
    computed: list[int] = []
    handle = lm.blocks[0].register_forward_hook(lambda m, a, o: computed.append(o.shape[0] * o.shape[1]))
    batches = list(Harvest(lm, [tokens], way="padded", token_budget=150, prefix=True))
    again = list(Harvest(lm, [tokens], way="padded", token_budget=150, prefix=True, skip=2))
    handle.remove()
    got = {
        n: a for b in batches for n, a in zip(b.tokens.names, b.acts.split(b.tokens.lengths.tolist(), 1), strict=True)
    }
    assert got.keys() == expected.keys()
    assert max(worst(got[name], expected[name]) for name in got) <= 1e-5
    assert all(torch.equal(a.acts, b.acts) for a, b in zip(again, batches[2:], strict=True))
    # twelve tokens of each of the seven short ones were read, not computed
    assert sum(computed) < 2 * int(tokens.cu_seqlens[-1])
    heads = [got[str(i)][:, :12] for i in range(0, 18, 2) if TAILS[i % 9] < 30]
    assert all(torch.equal(head, heads[0]) for head in heads)


def test_it_is_used_by_default_where_it_is_exact(lm: LanguageModel) -> None:
    tokens = with_prefix([4] * 20, [12] * 20)
    computed: list[int] = []
    harvest = Harvest(lm, [tokens])
    handle = lm.blocks[0].register_forward_hook(lambda m, a, o: computed.append(o.shape[0] * o.shape[1]))
    batches = list(harvest)
    handle.remove()
    assert computed == [12, 80]
    assert sum(b.acts.shape[1] for b in batches) == 320


def test_a_few_prefixes_are_kept(lm: LanguageModel) -> None:
    cache = PrefixCache(lm)
    for n in (*range(5, 15), 14):
        tokens = with_prefix([4, 5], [n, n])
        assert worst(unchecked(lm, tokens, "padded", prefix=cache), forward(lm, tokens)) <= 1e-5
    assert len(cache._known) == 4
