"""Attention on foreign dialogues: against an attention written out by hand, and where the answer is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from chatsae.batch import TokenBatch
from chatsae.errors import UserError
from chatsae.evals.leakage import Leakage, leakage
from chatsae.lm.forward import forward
from chatsae.lm.load import LanguageModel
from tiny_models import random_tokens, tiny_model

LENGTHS = [12, 1, 40, 7, 30, 3, 64, 2, 33]  # 192 tokens: four blocks of 48
BLOCK = 48


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    known: dict[str, LanguageModel] = {}

    def get(family: str) -> LanguageModel:
        if family not in known:
            known[family] = LanguageModel(tiny_model(tmp_path_factory.mktemp(family), family), [1, 3])
        return known[family]

    return get


def by_hand(lm: LanguageModel, tokens: TokenBatch) -> dict[int, tuple[float, float, float]]:
    """Shares from the attention weights that transformers itself gives, token by token and head by head."""
    whole = lm.with_head().model
    before = whole.config._attn_implementation
    whole.set_attn_implementation("eager")
    shares = {}
    blocks = list(zip(tokens.input_ids.split(BLOCK), tokens.sequence.split(BLOCK), strict=True))
    try:
        given = [whole(input_ids=ids[None], output_attentions=True).attentions for ids, _ in blocks]
    finally:
        whole.set_attn_implementation(before)
    for layer in range(lm.n_layers):
        everything = foreign = exposed = first = 0.0
        for attentions, (_, owner) in zip(given, blocks, strict=True):
            for query in range(BLOCK):
                rows = attentions[layer][0, :, query].double()
                strange = owner != owner[query]
                everything += rows.sum().item()
                foreign += rows[:, strange].sum().item()
                if owner[query] != owner[0]:
                    exposed += rows.sum().item()
                    first += rows[:, 0].sum().item()
        # keys after the query have no weight, whoever owns them
        shares[layer] = (foreign / everything, foreign / exposed, first / everything)
    return shares


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_shares_are_those_of_the_weights_written_out(models, family):
    lm, tokens = models(family), random_tokens(LENGTHS)
    with torch.inference_mode():
        expected = by_hand(lm, tokens)
    found = leakage(lm, [tokens], block_size=BLOCK)
    assert found.reason is None
    assert found.layers is not None
    assert list(found.layers) == [0, 1, 2, 3]
    for layer, own in found.layers.items():
        got = (own.foreign, own.foreign_exposed, own.foreign_first)
        assert got == pytest.approx(expected[layer], rel=1e-5, abs=1e-7)
        assert 0.05 < own.foreign < own.foreign_exposed < 1


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "mistral", "gpt-oss", "bloom"])
def test_pieces_with_a_cache_give_the_same(models, family):
    lm, tokens = models(family), random_tokens(LENGTHS)
    whole = leakage(lm, [tokens], block_size=BLOCK, limit=2)
    for queries in (5, 47):
        pieces = leakage(lm, [tokens], block_size=BLOCK, limit=2, max_bytes=4 * 4 * BLOCK * queries + 3)
        for layer, own in whole.layers.items():
            got = pieces.layers[layer]
            assert (got.foreign, got.foreign_first) == pytest.approx((own.foreign, own.foreign_first), rel=1e-5)


def test_uniform_attention_spends_the_uniform_share(tmp_path):
    lm = LanguageModel(tiny_model(tmp_path, "qwen2"), [1, 3])
    with torch.no_grad():
        for name, parameter in lm.decoder.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    tokens = random_tokens([4, 4, 8])
    found = leakage(lm, [tokens], block_size=8)
    # two blocks: the second dialogue of the first sees 4 foreign of 5, 6, 7, 8 tokens, the second block none
    uniform = (4 / 5 + 4 / 6 + 4 / 7 + 4 / 8) / 16
    assert (found.n_blocks, found.n_tokens, found.exposed) == (2, 16, 0.25)
    assert found.uniform == pytest.approx(uniform, rel=1e-12)
    for own in found.layers.values():
        assert own.foreign == pytest.approx(uniform, rel=1e-5)
        assert own.foreign_exposed == pytest.approx(4 * uniform, rel=1e-5)
        assert own.foreign_first == pytest.approx(uniform / 4, rel=1e-5)


def test_a_dialogue_that_fills_its_block_leaks_nothing(models):
    found = leakage(models("qwen2"), [random_tokens([16, 32])], block_size=16)
    assert (found.uniform, found.exposed, found.n_blocks) == (0.0, 0.0, 3)
    for own in found.layers.values():
        assert (own.foreign, own.foreign_exposed, own.foreign_first) == (0.0, None, 0.0)


def test_how_dialogues_are_batched_changes_nothing(models):
    lm, tokens = models("qwen2"), random_tokens(LENGTHS)
    parts = [tokens.select([0, 1, 2]), tokens.select([3]), tokens.select([4, 5, 6, 7, 8])]
    assert leakage(lm, parts, block_size=BLOCK) == leakage(lm, [tokens], block_size=BLOCK)
    two = leakage(lm, parts, block_size=BLOCK, limit=2)
    assert (two.n_blocks, two.n_tokens) == (2, 96)
    assert two == leakage(lm, [tokens.select([0, 1, 2, 3, 4]), tokens.select([5, 6])], block_size=BLOCK, limit=2)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_afterwards_as_before(models):
    lm, tokens = models("llama"), random_tokens(LENGTHS)
    before, n_hooks = forward(lm, tokens), hooks(lm.decoder)
    name = lm.decoder.config._attn_implementation
    assert name != "eager"
    leakage(lm, [tokens], block_size=BLOCK)

    def fails(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise KeyboardInterrupt

    handle = lm.blocks[2].register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        leakage(lm, [tokens], block_size=BLOCK)
    handle.remove()
    assert lm.decoder.config._attn_implementation == name
    assert hooks(lm.decoder) == n_hooks
    assert torch.equal(forward(lm, tokens), before)


def test_a_model_without_attention_weights_has_a_reason(models, monkeypatch):
    found = leakage(models("mamba"), [random_tokens(LENGTHS)], block_size=BLOCK)
    assert found.layers is None
    assert found.reason == "the model's attention gives no weights"
    assert found.uniform is not None
    lm = models("qwen2")
    with torch.no_grad():
        saved = lm.blocks[1].self_attn.q_proj.bias.clone()
        lm.blocks[1].self_attn.q_proj.bias.fill_(torch.inf)
    broken = leakage(lm, [random_tokens(LENGTHS)], block_size=BLOCK)
    with torch.no_grad():
        lm.blocks[1].self_attn.q_proj.bias.copy_(saved)
    assert (broken.layers, broken.reason) == (None, "the attention weights are not finite")


@pytest.mark.parametrize(
    ("block_size", "message"),
    [(0, "positive number, got 0"), (257, "257, the context of .* is 256"), (200, "fill no block of 200 tokens")],
)
def test_block_sizes_that_cannot_be_are_refused(models, block_size, message):
    with pytest.raises(UserError, match=rf"data.block_size.*{message}"):
        leakage(models("qwen2"), [random_tokens(LENGTHS)], block_size=block_size)


def test_leakage_is_a_record_of_plain_numbers(models):
    found = leakage(models("qwen2"), [random_tokens(LENGTHS)], block_size=BLOCK)
    assert isinstance(found, Leakage)
    assert found.block_size == BLOCK
    assert {type(v) for own in found.layers.values() for v in (own.foreign, own.foreign_first)} == {float}
