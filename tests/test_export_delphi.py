"""delphi's cache: every activation where delphi's windows look for it; tests/parity opens it with delphi itself."""

from collections import Counter

import numpy as np
import pytest
import torch

from chatsae.batch import TokenBatch
from chatsae.features.collect import Reading
from chatsae.features.export import delphi
from chatsae.lm.load import LanguageModel
from feature_samples import FIRST, TOKEN, TWICE, planted

pytest_plugins = ["feature_fixtures"]


def places(tokens: TokenBatch) -> list[int]:
    """Where each dialogue begins in the rows, one behind the other: at the first window of 32 that is free."""
    found, end = [], 0
    for n in tokens.lengths.tolist():
        found.append(-(-end // 32) * 32)
        end = found[-1] + n
    return found


def slow_latents(lm: LanguageModel, tokens: TokenBatch, features: list[int], width: int) -> dict[tuple, float]:
    """Every activation, one token and one feature at a time."""
    found, sae = {}, planted(lm)
    for dialogue, place in enumerate(places(tokens)):
        stream = torch.cat([a.acts[0] for a in lm.harvest([tokens.select([dialogue])])])
        acts = sae.encode(stream).detach()
        for position in range(len(acts)):
            for feature in features:
                if (value := float(acts[position, feature])) > 1e-5:
                    found[(*divmod(place + position, width), feature)] = value
    return found


@pytest.mark.parametrize("n", [1, 9])
def test_latents_are_every_activation(lm: LanguageModel, tokens: TokenBatch, n: int) -> None:
    tokens = tokens.select(range(n))
    found = delphi.latents(planted(lm), lm, tokens, [TOKEN, TWICE, FIRST], reading=Reading.of(lm))
    width = found.tokens.shape[1]
    expected = slow_latents(lm, tokens, [TOKEN, TWICE, FIRST], width)
    assert [tuple(row) for row in found.locations.tolist()] == sorted(expected)
    assert found.activations.tolist() == pytest.approx([expected[key] for key in sorted(expected)], rel=1e-3)
    assert found.n_tokens == len(tokens.input_ids)
    assert width == (256 if n > 1 else -(-len(tokens.input_ids) // 32) * 32)


def test_a_window_of_32_tokens_is_of_one_dialogue(lm: LanguageModel, tokens: TokenBatch) -> None:
    """delphi cuts all rows into them, and draws its examples without the latent from those without an activation."""
    found = delphi.latents(planted(lm), lm, tokens, [TOKEN], reading=Reading.of(lm))
    pad, flat = lm.tokenizer.eos_token_id, found.tokens.reshape(-1)
    assert flat.size % 32 == 0
    for dialogue, place in enumerate(places(tokens)):
        own = tokens.select([dialogue]).input_ids.numpy()
        assert (flat[place : place + len(own)] == own).all()
        assert (flat[place + len(own) : -(-(place + len(own)) // 32) * 32] == pad).all()
    windows = flat.reshape(-1, 32)
    assert len(windows) == found.tokens.size // 32
    empty = (windows == pad).all(axis=1)
    assert empty.sum() < 8
    assert not empty[: len(windows) - empty.sum()].any()  # at the end of the last row alone


def test_latents_that_float16_cannot_hold_are_its_largest(lm: LanguageModel, tokens: TokenBatch) -> None:
    sae = planted(lm)
    with torch.no_grad():
        sae.W_enc *= 1e6
        sae.b_enc *= 1e6
    tally: Counter[str] = Counter()
    found = delphi.latents(sae, lm, tokens, [TOKEN], reading=Reading.of(lm), tally=tally)
    assert set(found.activations.tolist()) == {65504.0}
    assert sum(tally.values()) == len(found.activations) > 0


@pytest.mark.parametrize(("last", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint32)])
def test_locations_are_as_wide_as_they_have_to_be(last: int, dtype: type) -> None:
    place = np.array([[1, 0, last], [0, 2, 1], [0, 2, 0], [0, 0, 5]])
    found = delphi.collected(place, np.array([1, 2, 3, 4], np.float32), np.zeros((2, 3), np.int64), 6, Counter())
    assert found.locations.dtype == dtype
    assert found.locations.tolist() == [[0, 0, 5], [0, 2, 0], [0, 2, 1], [1, 0, last]]
    assert found.activations.tolist() == [4, 3, 2, 1]
