"""The probe lets through what is exact, and nothing else."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chatsae.errors import UserError
from chatsae.lm import packed
from chatsae.lm.forward import Way, forward
from chatsae.lm.load import LanguageModel
from chatsae.lm.probe import (
    ISOLATION_TOLERANCE,
    Isolation,
    choose_way,
    isolation,
    isolation_error,
    probe_tokens,
    relative_error,
    token_errors,
)
from chatsae.lm.tap import Decoder
from tiny_models import random_tokens, tiny_model

TOLERANCE = ISOLATION_TOLERANCE[torch.float32]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2"), [0, 2])


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(tiny_model(tmp_path_factory.mktemp("mistral"), "mistral"), [2])


@contextmanager
def hooked(module: nn.Module, change: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def position_ids_alone(cache: bool) -> Any:
    """The usual packing: positions start anew, and transformers is trusted to see it."""

    @contextmanager
    def row(lm: Decoder, lengths: Sequence[int]) -> Iterator[None]:
        extra = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "use_cache": cache}
        handle = lm.decoder.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs | extra), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return row


def test_packing_with_the_default_cache_is_caught(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatsae.lm.forward.packed_row", position_ids_alone(cache=True))
    assert isolation_error(lm, "packed") > 1000 * TOLERANCE
    with pytest.raises(UserError, match=r"harvest.way: .* cannot be read packed: its activations differ by \d"):
        choose_way(lm, "packed")
    # the same comparison passes where the library does keep the sequences apart
    monkeypatch.setattr("chatsae.lm.forward.packed_row", position_ids_alone(cache=False))
    assert isolation_error(lm, "packed") < 1e-5
    assert choose_way(lm, "packed").way == "packed"


@pytest.mark.parametrize(
    ("family", "prefer", "way", "refused"),
    [
        ("qwen2", "auto", "padded", {}),
        ("qwen2", "packed", "packed", {"prefix": "the way is not padded"}),
        ("qwen2", "single", "single", {"prefix": "the way is not padded"}),
        ("gemma2", "auto", "padded", {}),
        ("gpt-oss", "auto", "padded", {}),
        ("mixtral", "auto", "padded", {}),
        ("phi3-longrope", "auto", "padded", {"prefix": "its rotary scheme depends on the longest sequence"}),
    ],
)
def test_the_first_exact_way_is_taken(
    tmp_path: Path, family: str, prefer: Any, way: Way, refused: dict[str, str]
) -> None:
    found = choose_way(LanguageModel(tiny_model(tmp_path, family), [1, 3]), prefer)
    assert found == Isolation(way, found.median, found.p90, not refused, refused)
    assert 0 <= found.median <= found.p90 < 1e-5
    assert str(found).startswith(way)


def test_a_leak_leaves_one_at_a_time(lm: LanguageModel) -> None:
    # a norm over the whole batch lets every token see every other, as a wrong attention would
    with hooked(lm.blocks[0], lambda x: x - x.mean(dim=(0, 1))):
        assert isolation_error(lm) > 100 * TOLERANCE
        found = choose_way(lm)
        assert (found.way, found.median, found.p90, found.prefix) == ("single", 0.0, 0.0, False)
        assert found.refused.keys() == {"padded", "packed", "prefix"}
        assert "padded: its activations differ by" in str(found)
        with pytest.raises(UserError, match=r"cannot be read padded: .*rounding explains 1e-04.*set it to auto"):
            choose_way(lm, "padded")
    assert choose_way(lm).way == "padded"


def test_a_model_that_runs_in_no_way_is_an_error(lm: LanguageModel) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this")

    with hooked(lm.blocks[0], broken):
        for prefer in ("auto", "single"):
            with pytest.raises(UserError, match="cannot be run on a sequence of token ids: RuntimeError: no kernel"):
                choose_way(lm, prefer)


def test_a_leak_into_first_tokens_alone_is_caught(tmp_path: Path) -> None:
    def shift(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, 1:] + 0.5 * x[:, :-1]], dim=1)

    lm = LanguageModel(tiny_model(tmp_path, "qwen2"), [0])
    with hooked(lm.decoder.get_submodule("layers.0.mlp"), shift):
        assert choose_way(lm, "padded").p90 < 1e-5
        assert isinstance(isolation(lm, "packed"), str)


def test_an_error_beyond_the_window_alone_is_caught(windowed: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(probe_tokens(windowed).lengths.tolist()) == 16 + 64
    assert not isinstance(isolation(windowed, "packed"), str)
    band = packed._band
    # one key more than the window has
    monkeypatch.setattr(packed, "_band", lambda size, window, device: band(size, window, device).roll(-1, dims=1))
    assert isinstance(isolation(windowed, "packed"), str)


def test_a_probe_is_no_longer_than_the_context_or_a_second_allows(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_model(tmp_path, "mistral", max_position_embeddings=40, sliding_window=30), [0])
    assert max(probe_tokens(lm).lengths.tolist()) == 40
    assert max(probe_tokens(lm, prefix=9).lengths.tolist()) == 40
    assert choose_way(lm).way == "padded"
    lm.decoder.config.sliding_window = 2000
    lm.max_positions = 4096
    assert max(probe_tokens(lm).lengths.tolist()) == 64


def test_a_prefix_that_is_not_read_is_caught(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_way(lm).prefix
    monkeypatch.setattr("chatsae.lm.prefix._past", lambda decoder, cache: contextmanager(lambda: iter([None]))())
    found = choose_way(lm)
    assert not found.prefix
    assert "differ by" in found.refused["prefix"]


def test_a_model_of_nan_is_left_to_the_harvest(lm: LanguageModel) -> None:
    with hooked(lm.blocks[0], lambda x: x * torch.nan):
        assert choose_way(lm).way == "single"


def test_bfloat16_is_isolated_too(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_model(tmp_path, "qwen2"), [2], dtype="bfloat16")
    assert forward(lm, random_tokens([5, 9])).dtype == torch.bfloat16
    assert isolation_error(lm) < ISOLATION_TOLERANCE[torch.bfloat16]
    assert isolation_error(lm, "packed") < ISOLATION_TOLERANCE[torch.bfloat16]
    assert choose_way(lm).way == "padded"


def test_errors_are_relative() -> None:
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 5.0], [0.0, 0.0]])
    assert token_errors(a, b).tolist() == pytest.approx([1 / 34**0.5, 0])
    many = torch.cat([b[:1]] * 99 + [-b[:1]])
    assert relative_error(many, many[:1].expand(100, 2)) == 0  # one flip in a hundred
    assert relative_error(-many, many) == pytest.approx(2)
