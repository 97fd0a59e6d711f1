"""Steering acts on the tokens it is meant for, once each, and on nothing else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chatsae
from chatsae.batch import Dialogue, Kind, Message, Role
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import cache_argument, cache_of
from chatsae.steering import ops
from chatsae.steering.attach import attach
from chatsae.steering.generate import generate
from chatsae.steering.rows import left_padded, row_of_ids, row_of_prompt, rows_of_dialogues
from chatsae.steering.spec import SteerSpec, Where, load_specs
from tiny_models import tiny_model, tiny_tokenizer

PROMPTS = ["What is a list?", "Who are you, and what do you know about the module that reads files?", "Hi"]
LAYER = 3


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    """In float64, so that what differs by rounding differs by 1e-12."""
    lm = LanguageModel("demo", [LAYER], head=True)
    lm.model.double()
    lm.dtype = torch.float64
    return lm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(tiny_tokenizer(tiny_model(tmp_path_factory.mktemp("steer"))), [1], head=True)


def spec(lm: LanguageModel, strength: float = 8.0, seed: int = 0, **options: Any) -> SteerSpec:
    vector = torch.randn(lm.d_in, generator=torch.Generator().manual_seed(seed))
    return SteerSpec(**{"vector": vector, "layer": lm.layers[0], "strength": strength} | options)


# --- operations -------------------------------------------------------------------------------------------------------


def slow(x: list[float], op: str, d: list[float], s: float) -> list[float]:
    """The operation on one vector, in plain Python."""
    norm = sum(v * v for v in d) ** 0.5
    u = [v / norm for v in d]
    c = sum(a * b for a, b in zip(x, u, strict=True))
    wanted = {"add": c + s, "set": s, "min_clamp": max(c, s), "cap": min(c, s), "scale": s * c, "ablate": 0.0}[op]
    return [a + (wanted - c) * b for a, b in zip(x, u, strict=True)]


@given(st.sampled_from(ops.OPS), st.integers(0, 1000), st.floats(-20, 20))
@settings(max_examples=40, deadline=None)
def test_an_operation_is_its_slow_twin(op: ops.Op, seed: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, d = (torch.randn(*shape, generator=generator).double() for shape in ((5, 7), (7,)))
    got = ops.steered(x, op, d, strength)
    expected = torch.tensor([slow(row.tolist(), op, d.tolist(), strength) for row in x], dtype=torch.float64)
    assert torch.allclose(got, expected, atol=1e-12)
    assert torch.allclose(ops.steered(x, op, 3 * d, strength), got, atol=1e-12)  # the direction's length is no matter
    half = ops.steered(x, op, d, strength, torch.full((5,), 0.5))
    assert torch.allclose(half - x, (got - x) / 2, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projection_becomes_what_is_asked(dtype: torch.dtype) -> None:
    x, d = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype) * 3, torch.randn(32)
    close = 1e-4 if dtype == torch.float32 else 0.1
    assert ops.projection(ops.steered(x, "ablate", d, 0.0), d).abs().max() < close
    assert (ops.projection(ops.steered(x, "set", d, 5.0), d) - 5).abs().max() < close
    assert ops.projection(ops.steered(x, "min_clamp", d, 1.0), d).min() > 1 - close
    assert ops.projection(ops.steered(x, "cap", d, 1.0), d).max() < 1 + close
    assert ops.steered(x, "set", d, 5.0).dtype == dtype


# --- rows -------------------------------------------------------------------------------------------------------------


def test_prompts_are_labelled_as_rendered_dialogues_are(demo: LanguageModel) -> None:
    turns = [Message("user", "What is a list?"), Message("assistant", "A sequence."), Message("user", "And a set?")]
    row = row_of_prompt(turns, demo.tokenizer)
    (tokens,) = render([Dialogue("d", "s", (*turns, Message("assistant", "Unordered.")))], demo.tokenizer)
    n = len(row)
    assert row.input_ids.tolist() == tokens.input_ids[:n].tolist()
    assert row.role.tolist() == tokens.role[:n].tolist()
    assert row.kind.tolist() == tokens.kind[:n].tolist()
    assert demo.tokenizer.decode(row.input_ids).endswith("<|im_start|>assistant\n")
    (answered,) = rows_of_dialogues(tokens)
    assert answered.n_prompt == n
    assert len(answered) > n
    from_ids = row_of_ids(row.input_ids, demo.tokenizer)
    assert from_ids.role.tolist() == row.role.tolist()
    assert from_ids.kind.tolist() == row.kind.tolist()
    assert {Role.USER, Role.DEFAULT_SYSTEM, Role.ASSISTANT} <= set(row.role.tolist())
    own = row_of_prompt([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], demo.tokenizer)
    assert row_of_ids(own.input_ids, demo.tokenizer).role.tolist() == own.role.tolist()
    assert Role.SYSTEM in own.role.tolist()
    with pytest.raises(UserError, match="special token in the content"):
        row_of_prompt("<|im_end|>", demo.tokenizer)
    with pytest.raises(UserError, match="role and content"):
        row_of_prompt([{"role": "user"}], demo.tokenizer)


# --- generation -------------------------------------------------------------------------------------------------------


def logits_of(lm: LanguageModel, into: list[torch.Tensor]) -> Any:
    return lm.model.register_forward_hook(lambda module, args, out: into.append(out.logits[:, -1].clone()))


WHERES = {
    "everywhere": {},
    "prompt": {"where": Where(phase="prompt")},
    "generated": {"where": Where(phase="generated"), "schedule": "decay", "schedule_tokens": 3},
    "control": {"where": Where(kinds=("control", "end_of_turn"))},
    "user": {"where": Where(roles=("user",)), "op": "set"},
    "positions": {"where": Where(positions=(-1, -2, 30, 45), exclude=(30,)), "strength": 60.0},
    "first": {"schedule": "first_n", "schedule_tokens": 4, "op": "ablate"},
}


@pytest.mark.parametrize("name", WHERES)
def test_rows_of_a_batch_are_those_generated_alone_without_cache(demo: LanguageModel, name: str) -> None:
    """One steered row and one unsteered, left-padded and cached, to 1e-6 in the logits (float64: 1e-9)."""
    steering = spec(demo, **{"strength": 25.0} | WHERES[name])
    together: list[torch.Tensor] = []
    handle = logits_of(demo, together)
    both = generate(demo, PROMPTS, [(), [steering], ()], max_new_tokens=10, test=False)
    handle.remove()
    assert both.hook_calls == {LAYER: both.forwards}
    for i, prompt in enumerate(PROMPTS):
        alone: list[torch.Tensor] = []
        handle = logits_of(demo, alone)
        found = generate(demo, [prompt], [[steering] if i == 1 else []], max_new_tokens=10, use_cache=False, test=False)
        handle.remove()
        (one,) = found.completions
        assert one.token_ids == both.completions[i].token_ids
        for step, logits in enumerate(alone):
            assert (logits[0] - together[step][i]).abs().max() < 1e-9
    plain: list[torch.Tensor] = []
    handle = logits_of(demo, plain)
    generate(demo, PROMPTS, max_new_tokens=10, test=False)
    handle.remove()
    last = min(len(plain), len(together)) - 1
    assert all(torch.equal(plain[step][0], together[step][0]) for step in range(last))  # bit for bit
    assert any(not torch.equal(plain[step][1], together[step][1]) for step in range(last))


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "bloom", "gemma3", "mamba"])
def test_other_architectures_give_the_same_alone_and_together(tmp_path: Path, family: str) -> None:
    """Learned positions, experts, no positions, a sliding window, and a state in place of a cache."""
    lm = LanguageModel(tiny_tokenizer(tiny_model(tmp_path, family)), [1], head=True)
    steering = spec(lm, 6.0, where=Where(exclude=(0,), kinds=("content", "control")))
    both = generate(lm, PROMPTS[1:], [[steering], []], max_new_tokens=6)
    for i, specs in enumerate([[steering], []]):
        alone = generate(lm, [PROMPTS[1 + i]], [specs], max_new_tokens=6, use_cache=False)
        assert alone.completions[0].token_ids == both.completions[i].token_ids
    plain = generate(lm, PROMPTS[1:], max_new_tokens=6)
    assert plain.completions[0].token_ids != both.completions[0].token_ids
    assert plain.completions[1].token_ids == both.completions[1].token_ids


class Watched:
    """The stream before and after the steering of a layer, and the difference between them."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm, self.before, self.after = lm, [], []

    def __enter__(self) -> "Watched":
        block = self.lm.blocks[self.lm.layers[0]]
        self._handle = block.register_forward_hook(lambda m, a, out: self.before.append(_stream(out).clone()))
        return self

    def late(self) -> None:
        """Inside the steering context: hooks run in the order in which they came."""
        block = self.lm.blocks[self.lm.layers[0]]
        self._late = block.register_forward_hook(lambda m, a, out: self.after.append(_stream(out).clone()))

    def __exit__(self, *error: object) -> None:
        self._handle.remove()
        self._late.remove()

    def differences(self) -> Iterator[torch.Tensor]:
        return (after - before for after, before in zip(self.after, self.before, strict=True))


def _stream(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_delta_is_applied_once_per_token(demo: LanguageModel, use_cache: bool, beams: int) -> None:
    rows = [row_of_prompt(prompt, demo.tokenizer) for prompt in PROMPTS]
    ids, mask = left_padded(rows, 0)
    acts = spec(demo, 10.0)
    steering = attach(demo, [acts], rows=[[0], [], [0]], test=False)
    unit = ops.unit(acts.direction())
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "use_cache": use_cache}
    with Watched(demo) as watched, steering:
        watched.late()
        demo.model.generate(input_ids=ids, attention_mask=mask, **options)
    count = 0
    for forward, change in enumerate(watched.differences()):
        assert len(change) == len(rows) * beams
        for b, row in enumerate(change):
            padding = ids.shape[1] - len(rows[b // beams])
            fed = row[padding:] if forward == 0 or not use_cache else row
            if b // beams == 1:
                assert not row.any()
            else:
                assert not row[: len(row) - len(fed)].any()
                assert torch.allclose(fed, 10.0 * unit.expand_as(fed), atol=1e-9)
                count += len(fed)
    assert steering.acted == [count]
    assert steering.hook_calls == {LAYER: steering.forwards} == {LAYER: len(watched.after)}


def test_beams_are_steered_alike_with_and_without_a_cache_and_alone(demo: LanguageModel) -> None:
    rows = [row_of_prompt(prompt, demo.tokenizer) for prompt in PROMPTS]
    ids, mask = left_padded(rows, 0)
    one = spec(demo, 90.0, where=Where(phase="generated"), schedule="decay", schedule_tokens=8)
    beams: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    with attach(demo, [one], rows=[[], [0], []], test=False):
        cached = demo.model.generate(input_ids=ids, attention_mask=mask, **beams)
        whole = demo.model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **beams)
    assert torch.equal(cached, whole)
    for i, row in enumerate(rows):
        with attach(demo, [one], rows=[[0] if i == 1 else []], test=False):
            alone = demo.model.generate(input_ids=row.input_ids[None], attention_mask=torch.ones(1, len(row)), **beams)
        new, padded = alone[0, len(row) :].tolist(), cached[i, ids.shape[1] :].tolist()
        assert padded[: len(new)] == new
        assert set(padded[len(new) :]) <= {0, 2}  # padding
    with attach(demo, [one], test=False):
        steered = demo.model.generate(input_ids=ids[1:2], attention_mask=mask[1:2], **beams)
    plain = demo.model.generate(input_ids=ids[1:2], attention_mask=mask[1:2], **beams)
    assert steered.tolist() != plain.tolist()


def test_where_it_acts_is_counted_by_hand(demo: LanguageModel) -> None:
    row = row_of_prompt(PROMPTS[0], demo.tokenizer)
    control = int(((row.kind == Kind.CONTROL) | (row.kind == Kind.END_OF_TURN)).sum())
    specs = [
        spec(demo, 1e-9, where=Where(phase="prompt")),
        spec(demo, 1e-9, where=Where(phase="generated")),
        spec(demo, 1e-9, where=Where(kinds=("control", "end_of_turn"), phase="prompt")),
        spec(demo, 1e-9, where=Where(positions=(0, -1))),
        spec(demo, 1e-9, where=Where(roles=("user",))),
        spec(demo, 1e-9, schedule="first_n", schedule_tokens=2),
    ]
    found = generate(demo, PROMPTS[:1], [specs], max_new_tokens=6)
    n = len(found.completions[0].token_ids)
    assert found.acted == (len(row), n - 1, control, 2, int((row.role == Role.USER).sum()), len(row) + min(2, n - 1))
    assert found.completions[0].token_ids == generate(demo, PROMPTS[:1], max_new_tokens=6).completions[0].token_ids


def test_the_public_context_steers_chat_and_ablates(demo: LanguageModel) -> None:
    plain = demo.chat("What is a list?", max_new_tokens=12)
    vector = tuple(torch.randn(demo.d_in, generator=torch.Generator().manual_seed(1)).tolist())
    with chatsae.steer(demo, vector=vector, layer=LAYER, alpha=60.0) as steering:
        assert demo.chat("What is a list?", max_new_tokens=12) != plain
    assert steering.tested is not None
    assert steering.tested["unchanged_bits"]
    assert steering.tested["hook_calls"] == steering.tested["forwards"] == 3
    assert steering.tested["cache_error"] < 1e-9
    assert demo.chat("What is a list?", max_new_tokens=12) == plain
    ablation = chatsae.steer(demo, vector=vector, layer=LAYER, op="ablate")
    with Watched(demo) as watched, ablation:
        watched.late()
        demo.chat("What is a list?", max_new_tokens=3)
    for before, after in zip(watched.before, watched.after, strict=True):
        assert ops.projection(before, torch.tensor(vector)).abs().max() > 0.01
        assert ops.projection(after, torch.tensor(vector)).abs().max() < 1e-9


# --- what cannot be done is said --------------------------------------------------------------------------------------


def test_a_model_that_does_not_take_it_up_is_refused(tiny: LanguageModel) -> None:
    constant = torch.zeros(1, 1, tiny.d_in)
    handle = tiny.blocks[2].register_forward_hook(lambda m, a, out: constant.expand_as(out))
    try:
        with pytest.raises(UserError, match="same logits with the stream changed"):
            attach(tiny, [spec(tiny)])
    finally:
        handle.remove()
    attach(tiny, [spec(tiny)])


def test_forwards_that_cannot_be_placed_are_refused(tiny: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.arange(8)[None]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    phased = spec(tiny, where=Where(phase="generated"))
    cache = cache_argument(tiny.model, cache_of(tiny.model(input_ids=ids, use_cache=True)))
    with attach(tiny, [phased], test=False), pytest.raises(UserError, match="goes on from a cache"):
        tiny.model(input_ids=ids[:, -1:], **cache)
    with attach(tiny, [phased], test=False), pytest.raises(UserError, match="padded on the left"):
        tiny.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1)
    with attach(tiny, [phased], test=False), pytest.raises(UserError, match="needs the attention_mask"):
        tiny.model.generate(input_ids=ids.repeat(2, 1), max_new_tokens=1)
    with attach(tiny, [phased], rows=[[0], []], test=False), pytest.raises(UserError, match="for 2 rows"):
        tiny.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    capsys.readouterr()
    with attach(tiny, [phased], test=False):
        tiny.model(input_ids=ids)
    assert "met no token in 1 forwards" in capsys.readouterr().err


def test_a_plain_forward_is_placed_by_its_mask(tiny: LanguageModel) -> None:
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with Watched(tiny) as watched, attach(tiny, [spec(tiny, where=Where(positions=(1,)))], test=False):
        watched.late()
        tiny.model(input_ids=ids, attention_mask=mask)
    (change,) = watched.differences()
    assert change.abs().sum(-1).nonzero().tolist() == [[0, 3], [1, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer: 1\nvector: [1, 2]\nstrenght: 3", "unknown key 'strenght'; perhaps strength"),
        ("layer: 1\nvector: [1, two]", r"vector\[1\] must be a number, not 'two'"),
        ("vector: [1, 2]", "layer is missing"),
        ("feature: 1", "of which sae"),
        ("layer: 1\nvector: [1]\nop: ad", "op must be one of add, .*'ad'; perhaps add"),
        ("layer: 1\nvector: [1]\nwhere: {roles: [users]}", "where.roles must be one of .*perhaps user"),
        ("layer: 1\nvector: [1]\nwhere: 3", "where must be a mapping"),
        ("layer: 1\nvector: [1]\nunit: rel_norm\nop: ablate", "ablate has no strength"),
        ("[]", "holds no entry"),
        ("a: [", "is not valid YAML"),
        ("feature: 1\nfeature: 2\nsae: one", "'feature' is there twice"),
    ],
)
def test_a_recipe_is_read_or_refused_with_its_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "steer.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_specs(path)
    assert str(path) in str(caught.value)


def test_a_recipe_gives_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "steer.yaml"
    path.write_text(
        "steering:\n- {sae: saes/one, feature: 3, strength: 2, unit: rel_norm,\n"
        "   where: {phase: prompt, positions: [-1]}}\n"
        "- {vector: [1, 0.5], layer: 2, op: ablate, schedule: first_n, schedule_tokens: 4}\n"
    )
    first, second = load_specs(path)
    assert (first.sae, first.feature, first.strength, first.unit) == (str(tmp_path / "saes/one"), 3, 2.0, "rel_norm")
    assert first.where == Where(phase="prompt", positions=(-1,))
    assert (second.vector, second.layer, second.op) == ((1.0, 0.5), 2, "ablate")
    assert (second.schedule, second.schedule_tokens) == ("first_n", 4)
    with pytest.raises(UserError, match=r"does not exist|no SAE|missing"):
        first.loaded()


def test_specs_that_do_not_fit_the_model_are_refused(tiny: LanguageModel) -> None:
    for options, message in (
        ({"vector": torch.ones(5)}, "5 numbers, the stream of .* 32"),
        ({"vector": torch.zeros(32)}, "no direction"),
        ({"layer": 9}, "layer 9 does not exist"),
        ({"unit": "rel_norm"}, "must be made absolute"),
    ):
        with pytest.raises(UserError, match=message):
            attach(tiny, [spec(tiny, **options)], test=False)
