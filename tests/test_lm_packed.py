"""A packed row keeps its sequences apart, in every family that it does not refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatsae.batch import TokenBatch
from chatsae.errors import UserError
from chatsae.lm import packed
from chatsae.lm.forward import Way, bare_tokens, forward
from chatsae.lm.harvest import Harvest
from chatsae.lm.load import LanguageModel
from chatsae.lm.packed import PackingRefused, packed_row
from tiny_models import VOCAB, random_tokens, tiny_model, tiny_tokenizer

LENGTHS = [12, 1, 40, 7, 100, 3, 64, 2]
PACKED = ("qwen2", "llama", "qwen3", "gemma3", "mistral", "phi", "olmo2", "mixtral", "qwen2-moe", "phi3-longrope")
REFUSED = {
    "gemma2": "takes softcap",
    "gpt-oss": "takes s_aux",
    "phimoe": "not told of the mask over 16 tokens",
    "bloom": "cannot be replaced",
    "mamba": "cannot be replaced",
}
EXPERTS = ("gpt-oss", "mixtral", "qwen2-moe")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    known: dict[str, LanguageModel] = {}

    def get(family: str) -> LanguageModel:
        if family not in known:
            known[family] = LanguageModel(tiny_model(tmp_path_factory.mktemp(family), family), [1, 3])
        return known[family]

    return get


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@pytest.mark.parametrize("family", [*PACKED, *REFUSED])
def test_every_way_gives_the_activations_of_one_at_a_time(models: Callable[[str], LanguageModel], family: str) -> None:
    lm, tokens = models(family), random_tokens(LENGTHS)
    alone = torch.cat([forward(lm, tokens.select([i])) for i in range(len(tokens))], dim=1)
    assert torch.equal(forward(lm, tokens, "single"), alone)
    assert worst(forward(lm, tokens), alone) <= 1e-5
    if family in REFUSED:
        with pytest.raises(PackingRefused, match=REFUSED[family]):
            forward(lm, tokens, "packed")
        with pytest.raises(UserError, match=rf"cannot be read packed: its attention .*{REFUSED[family]}"):
            next(Harvest(lm, [tokens], way="packed"))
    else:
        assert worst(forward(lm, tokens, "packed"), alone) <= 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3", "mistral", "gpt-oss", "mixtral", "qwen2-moe"])
@pytest.mark.parametrize("way", ["padded", "packed"])
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 48), min_size=2, max_size=6), data=st.data())
def test_replacing_a_dialogue_leaves_the_others_as_they_are(
    models: Callable[[str], LanguageModel], family: str, way: Way, lengths: list[int], data: st.DataObject
) -> None:
    if way == "packed" and family in REFUSED:
        return
    lm, tokens, i = models(family), random_tokens(lengths), data.draw(st.integers(0, len(lengths) - 1))
    rows = list(tokens.input_ids.split(lengths))
    rows[i] = (rows[i] + 1) % VOCAB
    before, after = forward(lm, tokens, way), forward(lm, bare_tokens(rows), way)
    others = tokens.sequence != i
    if family in EXPERTS:  # an expert's matrix product sums in another order when it has other tokens beside
        assert worst(after[:, others], before[:, others]) <= 1e-6
    else:
        assert torch.equal(after[:, others], before[:, others])
    assert not torch.equal(after[:, ~others], before[:, ~others])


@given(
    n=st.integers(1, 300),
    window=st.none() | st.integers(1, 200),
    groups=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    scale=st.none() | st.floats(0.1, 2.0),
)
def test_attention_of_one_sequence_is_the_textbook_one(
    n: int, window: int | None, groups: tuple[int, int], scale: float | None
) -> None:
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(1, groups[0], n, 8, generator=generator)
    k, v = (torch.randn(1, groups[1], n, size, generator=generator) for size in (8, 12))
    distance = torch.arange(n)[:, None] - torch.arange(n)
    seen = (distance >= 0) & (distance < (window or n))
    many = [x.repeat_interleave(groups[0] // groups[1], dim=1) for x in (k, v)]
    scores = q @ many[0].transpose(2, 3) * (8**-0.5 if scale is None else scale)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ many[1]
    assert torch.allclose(packed._one(q, k, v, window, scale), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_the_kernel_of_a_gpu_gets_the_same_sequences_and_window(
    models: Callable[[str], LanguageModel], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        """The contract of torch's varlen kernel: `window_size` counts the keys to the left of the query's own."""
        assert cu_q.dtype == torch.int32
        assert max_q == max_k == int(cu_q.diff().max())
        assert options["enable_gqa"] is (q.shape[1] != k.shape[1])
        left, right = options["window_size"]
        assert right == 0
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        token = torch.arange(len(q))
        sequence = torch.bucketize(token, cu_q[1:], right=True)
        distance = token[:, None] - token
        seen = (sequence[:, None] == sequence) & (distance >= 0) & (distance <= (len(q) if left == -1 else left))
        scores = torch.einsum("nhd,mhd->hnm", q, k) * options["scale"]
        calls.append(left)
        return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    lm, tokens = models(family), random_tokens(LENGTHS)
    expected = forward(lm, tokens, "single")
    monkeypatch.setattr(packed, "_varlen_attn", varlen)
    monkeypatch.setattr(packed, "_fits_varlen", lambda query, value: True)
    assert worst(forward(lm, tokens, "packed"), expected) <= 1e-5
    assert calls == [15 if family == "mistral" else -1] * 4


def test_the_model_is_as_before(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_tokenizer(tiny_model(tmp_path, "gemma3")), [3])
    full, tokens = lm.with_head(), random_tokens([9, 30])

    def state() -> list[object]:
        with torch.inference_mode():
            logits = full.model(input_ids=tokens.padded(), use_cache=False).logits
        return [lm.decoder.config._attn_implementation, full.model.config._attn_implementation, logits]

    before, answer = state(), lm.chat("hello", max_new_tokens=8)
    forward(lm, tokens, "packed")
    after = state()
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])  # type: ignore[arg-type]
    assert lm.chat("hello", max_new_tokens=8) == answer
    assert not lm.decoder._forward_pre_hooks


def test_the_model_is_as_before_a_row_that_fails(models: Callable[[str], LanguageModel]) -> None:
    lm = models("qwen2")
    name, expected = lm.decoder.config._attn_implementation, forward(lm, random_tokens([5]))
    seen: list[str] = []

    def fail(module: object, args: object) -> None:
        seen.append(lm.decoder.config._attn_implementation)
        raise ZeroDivisionError

    handle = lm.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        forward(lm, random_tokens([5]), "packed")
    handle.remove()
    assert seen == [packed.ATTENTION]
    assert lm.decoder.config._attn_implementation == name
    assert torch.equal(forward(lm, random_tokens([5])), expected)


def test_the_attention_knows_no_row_but_the_current_one(models: Callable[[str], LanguageModel]) -> None:
    lm = models("qwen2")
    name = lm.decoder.config._attn_implementation
    lm.decoder.config._attn_implementation = packed.ATTENTION
    try:
        with pytest.raises(PackingRefused, match="outside of a packed row"):
            forward(lm, random_tokens([5]))
    finally:
        lm.decoder.config._attn_implementation = name
    x = torch.ones(1, 4, 8, 8)
    with pytest.raises(PackingRefused, match="8 queries and 8 keys"), packed_row(lm, [3, 4]):
        packed.attend(lm.blocks[0], x, x, x, None)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"softcap": 50.0}, "takes softcap"),
        ({"position_bias": torch.zeros(1)}, "takes position_bias"),
        ({"s_aux": torch.zeros(4), "softcap": 1.0}, "takes s_aux, softcap"),
        ({"is_causal": False}, "more than causal attention"),
        ({"dropout": 0.1}, "more than causal attention"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "more than causal attention"),
    ],
)
def test_what_the_attention_does_not_know_it_refuses(
    models: Callable[[str], LanguageModel], asked: dict[str, Any], reason: str
) -> None:
    lm, x = models("qwen2"), torch.ones(1, 4, 3, 8)
    given_ = {"attention_mask": None, "softcap": None, "output_attentions": False, "position_ids": x, **asked}
    with pytest.raises(PackingRefused, match=reason), packed_row(lm, [3]):
        packed.attend(lm.blocks[0], x, x, x, **given_)


def test_pieces_of_dialogues_in_blocks_see_their_own_piece_only(models: Callable[[str], LanguageModel]) -> None:
    """bt-f-isolated: blocks of tokens whose attention stays within the dialogues that they hold pieces of."""
    lm, size = models("qwen2"), 32
    dialogues = random_tokens([20, 30, 5, 50, 23])
    total = int(dialogues.cu_seqlens[-1])
    edges = sorted({*dialogues.cu_seqlens.tolist(), *range(0, total + 1, size)})
    bounds = torch.tensor(edges).diff().tolist()
    pieces = bare_tokens(list(dialogues.input_ids.split(bounds)))
    harvested = {
        b.tokens.names[i]: b.acts[:, s:e] for b in Harvest(lm, [pieces], token_budget=60) for i, s, e in spans(b.tokens)
    }
    blocks = dialogues.input_ids.reshape(-1, size)
    which = dialogues.sequence.reshape(-1, size)
    position = pieces.position.reshape(-1, size)
    lower = torch.ones(size, size, dtype=torch.bool).tril()
    mask = (which[:, :, None] == which[:, None, :]) & lower
    seen: list[Tensor] = []
    handles = [lm.blocks[n].register_forward_hook(lambda m, a, o: seen.append(o)) for n in lm.layers]
    with torch.inference_mode():
        lm.decoder(input_ids=blocks, attention_mask=mask[:, None], position_ids=position, use_cache=False)
    for handle in handles:
        handle.remove()
    expected = torch.stack(seen).flatten(1, 2)
    got = torch.cat([harvested[name] for name in pieces.names], dim=1)
    assert worst(got, expected) <= 1e-5
    # and with attention over the whole block, as bt-f has it, they are others
    assert worst(forward(lm, bare_tokens(list(blocks))), expected) > 0.01


def spans(tokens: TokenBatch) -> list[tuple[int, int, int]]:
    bounds = tokens.cu_seqlens.tolist()
    return [(i, bounds[i], bounds[i + 1]) for i in range(len(tokens))]


def test_an_empty_batch_has_no_activations(models: Callable[[str], LanguageModel]) -> None:
    assert forward(models("qwen2"), random_tokens([]), "packed").shape == (2, 0, 32)
