"""Reading and replacing the residual stream."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from chatsae.errors import UserError
from chatsae.lm.harvest import forward
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import (
    cache_argument,
    cache_given,
    cache_of,
    check_blocks,
    find_blocks,
    read_residuals,
    splice,
    tokens_in,
)
from tiny_models import DECODERS, random_tokens, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(tiny_tokenizer(tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")), [0, 1, 2, 3], head=True)


def logits(lm: LanguageModel) -> Tensor:
    with torch.inference_mode():
        return lm.with_head().model(input_ids=random_tokens([7, 7]).padded(), use_cache=False).logits


NORMS = {"gpt2": "ln_f", "phi": "final_layernorm"}


@pytest.mark.parametrize("family", [*DECODERS, "gpt2", "phi", "olmo2", "gpt-oss", "minicpm3"])
def test_a_layer_is_the_residual_stream_after_its_block(tmp_path: Path, family: str) -> None:
    lm = LanguageModel(tiny_model(tmp_path, family), [0, 1, 2, 3], head=True)
    ids = random_tokens([11, 11]).padded()
    with torch.inference_mode():
        states = lm.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        residuals = read_residuals(lm, ids)
    assert [r.shape for r in residuals] == [(2, 11, 32)] * 4
    for layer in range(3):
        assert torch.equal(residuals[layer], states[layer + 1])
    assert not torch.allclose(residuals[3], states[4])  # the library's last entry is after the final norm
    last_norm = lm.decoder.get_submodule(NORMS.get(family, "norm"))
    with torch.inference_mode():
        assert torch.equal(last_norm(residuals[3]), states[4])


def test_the_forward_stops_after_the_deepest_layer(lm: LanguageModel) -> None:
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, b in enumerate(lm.blocks)]
    two = LanguageModel(lm.name, [1], head=True)
    two.blocks, kept = lm.blocks, two.blocks
    two.decoder, kept_decoder = lm.decoder, two.decoder
    with torch.inference_mode():
        found = read_residuals(two, random_tokens([5]).padded())
    assert ran == [0, 1]
    for handle in handles:
        handle.remove()
    two.blocks, two.decoder = kept, kept_decoder
    with torch.inference_mode():
        assert torch.equal(found[0], read_residuals(two, random_tokens([5]).padded())[0])


def test_no_hook_stays_behind(lm: LanguageModel) -> None:
    forward(lm, random_tokens([5]))
    with pytest.raises(ZeroDivisionError), splice(lm, 1, lambda x: x * (1 / 0)):
        logits(lm)
    assert not any(block._forward_hooks for block in lm.blocks)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "qwen2-moe", "gpt2"])
def test_splicing_the_identity_changes_no_bit(tmp_path: Path, family: str) -> None:
    lm = LanguageModel(tiny_model(tmp_path, family), [1], head=True)
    plain = logits(lm)
    for layer in range(4):
        with splice(lm, layer, lambda x: x.clone()):
            assert torch.equal(logits(lm), plain)


def test_a_replacement_reaches_the_logits_and_only_while_it_lasts(lm: LanguageModel) -> None:
    plain = logits(lm)
    with splice(lm, 2, lambda x: x + 1):
        changed = logits(lm)
    assert not torch.allclose(changed, plain)
    assert torch.equal(logits(lm), plain)
    # the last block: its replacement is what the norm and the head see
    given = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with splice(lm, 3, lambda x: given):
        expected = lm.model.lm_head(lm.decoder.norm(given))
        assert torch.equal(logits(lm), expected)


@pytest.mark.parametrize("kind", [tuple, list])
def test_blocks_that_return_more_than_a_tensor_are_spliced_too(lm: LanguageModel, kind: type) -> None:
    class Wrapped(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: object, **kwargs: object) -> object:
            return kind((self.block(*args, **kwargs), "kept"))

    wrapped = LanguageModel(lm.name, [1])
    block = Wrapped(wrapped.blocks[1])
    wrapped.blocks[1] = block
    wrapped.head = True  # so that it is spliced as it stands
    outputs: list[object] = []
    with splice(wrapped, 1, lambda x: x * 2):
        block.register_forward_hook(lambda m, a, o: outputs.append(o))
        found = read_residuals(wrapped, random_tokens([5]).padded())
    alone = read_residuals(LanguageModel(lm.name, [1]), random_tokens([5]).padded())
    assert torch.equal(found[0], alone[0] * 2)
    assert type(outputs[0]) is kind
    assert outputs[0][1] == "kept"


def test_checking_reads_what_reading_reads(lm: LanguageModel) -> None:
    ids = random_tokens([5]).padded()
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(check_blocks(lm, ids), read_residuals(lm, ids), strict=True))


def test_checking_says_what_a_model_cannot_do(lm: LanguageModel) -> None:
    ids = random_tokens([5]).padded()
    strange = LanguageModel(lm.name, [2])
    third = strange.blocks[2]

    class Twice(nn.Module):
        def forward(self, x: Tensor, **kwargs: object) -> Tensor:
            return third(third(x, **kwargs), **kwargs)

    class Fails(nn.Module):
        def forward(self, x: Tensor, **kwargs: object) -> Tensor:
            raise ValueError("no picture was given\nmore")

    strange.blocks[0] = Twice()
    with pytest.raises(UserError, match="block 2 runs 3 times in a forward"):
        check_blocks(strange, ids)
    strange.blocks[0] = Fails()
    with pytest.raises(UserError, match=r"does not run on token ids alone: no picture was given$"):
        check_blocks(strange, ids)
    whole = LanguageModel(lm.name, [2], head=True)
    whole.blocks[3] = Fails()  # is not run when the model is read
    assert len(check_blocks(whole, ids)) == 1


def test_splicing_acts_on_generation_and_on_a_model_loaded_without_head(lm: LanguageModel) -> None:
    cut = LanguageModel(lm.name, [1])
    plain = cut.chat("Hi", max_new_tokens=8)
    noise = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 50
    fresh = LanguageModel(lm.name, [1])  # its head is loaded by the splice
    for model in (cut, fresh):
        with splice(model, 2, lambda x: x + noise):
            assert model.chat("Hi", max_new_tokens=8) != plain
        assert model.chat("Hi", max_new_tokens=8) == plain


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3", "mamba"])
def test_a_cache_is_given_and_taken_under_the_name_that_this_transformers_has(tmp_path: Path, family: str) -> None:
    model = LanguageModel(tiny_model(tmp_path, family), [1], head=True).model
    ids = random_tokens([9, 9]).padded()
    with torch.inference_mode():
        cache = cache_of(model(input_ids=ids[:, :-1], use_cache=True))
        if family == "mamba":  # a state that does not say how many tokens it is of
            assert cache is None
            return
        assert tokens_in(cache) == 8
        given = cache_argument(model, cache)
        assert cache_given({"input_ids": ids, **given}) is cache
        last = model(input_ids=ids[:, -1:], **given).logits[:, -1]
        assert torch.allclose(last, model(input_ids=ids, use_cache=False).logits[:, -1], atol=1e-5)
    assert tokens_in(cache) == 9
    assert cache_of(object()) is cache_given({}) is None


def test_what_is_no_residual_stream_is_refused(lm: LanguageModel) -> None:
    message = r"layer 1: the replacement is \[2, 7, 8\], the residual stream \[2, 7, 32\]"
    with pytest.raises(UserError, match=message), splice(lm, 1, lambda x: x[..., :8]):
        logits(lm)
    with pytest.raises(UserError, match=r"layer 4 does not exist: .* 0..3"), splice(lm, 4, lambda x: x):
        pass
    narrow = LanguageModel(lm.name, [1])
    narrow.d_in = 31
    with pytest.raises(UserError, match=r"layer 1: the block puts out \[1, 5, 32\]; \[1, 5, 31\]"):
        read_residuals(narrow, random_tokens([5]).padded())


def test_the_blocks_are_found_or_their_absence_said() -> None:
    inner = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])})
    model = nn.ModuleDict({"a": inner, "layers": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])})
    assert find_blocks(model, 2) == ("layers", model["layers"])
    assert find_blocks(model, 2, "a.experts") == ("a.experts", inner["experts"])
    assert find_blocks(model, 2, "model.layers") == ("layers", model["layers"])
    with pytest.raises(UserError, match=r"no list of 3 decoder blocks in this model; model.layer_path"):
        find_blocks(model, 3)
    with pytest.raises(UserError, match="no list of 2 decoder blocks at 'h'"):
        find_blocks(model, 2, "h")
