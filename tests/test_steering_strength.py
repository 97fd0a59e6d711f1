"""Strength in units, chosen by a bound, guarded; and the features of special tokens."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch

from chatsae import console
from chatsae.batch import Role, TokenBatch
from chatsae.cli import main
from chatsae.config import RunConfig, SAEConfig, SAESpec, sae_specs
from chatsae.data.reading import read
from chatsae.data.render import render
from chatsae.data.template import template_facts
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.steering.generate import generate
from chatsae.steering.guard import Guard, Watch, repetition
from chatsae.steering.hooks import Steering
from chatsae.steering.rows import Row, rows_of_dialogues, spread_rows
from chatsae.steering.spec import SteerSpec, Where
from chatsae.steering.strength import FORWARDS, Calibration, absolute, auto_alpha, measure_scale
from chatsae.steering.tokens import token_features, token_table
from sae_samples import spec as sae_spec

LAYER = 3


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel("demo", [LAYER], head=True)


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> SAE:
    """Random features that fire on about half of the tokens."""
    made = SAE.create(sae_spec(lm.d_in, factor=1, layer=LAYER, name="L3-1x-standard"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(made.W_enc.shape, generator=generator) / lm.d_in**0.5)
        made.W_dec.copy_(torch.nn.functional.normalize(torch.randn(made.W_dec.shape, generator=generator)))
    return made


@pytest.fixture(scope="module")
def dialogues(lm: LanguageModel) -> TokenBatch:
    return TokenBatch.concat(list(render(islice(read("pydocs", split="steer"), 360), lm.tokenizer)))


@pytest.fixture(scope="module")
def split(lm: LanguageModel, dialogues: TokenBatch) -> tuple[list[Row], list[Row]]:
    return spread_rows(rows_of_dialogues(dialogues, 160))


def test_units_are_multiples_of_norm_and_maximum(lm: LanguageModel, sae: SAE, dialogues: TokenBatch) -> None:
    some = dialogues.select(range(6))
    scale = measure_scale(lm, some, LAYER, sae)
    x = torch.cat([batch.acts[0] for batch in lm.harvest([some])])
    assert scale.median_norm == pytest.approx(float(x.norm(dim=1).median()), rel=1e-5)
    assert scale.max_acts is not None
    most = float(sae.encode(x)[:, 7].detach().max())
    assert float(scale.max_acts[7]) == pytest.approx(most, rel=1e-4)
    two = SteerSpec(sae=sae, feature=7, strength=2.0, unit="rel_norm")
    assert absolute(two, scale).strength == pytest.approx(2 * scale.median_norm)
    half = absolute(SteerSpec(sae=sae, feature=7, strength=0.5, unit="rel_maxact"), scale)
    assert half.strength == pytest.approx(most / 2, rel=1e-4)  # decoder rows have length 1 here
    shown = scale.relative(half)
    assert (shown["rel_norm"], shown["rel_maxact"]) == (
        pytest.approx(half.strength / scale.median_norm),
        pytest.approx(0.5),
    )
    with pytest.raises(UserError, match="auto_alpha"):
        absolute(SteerSpec(sae=sae, feature=7, unit="auto"), scale)
    with pytest.raises(UserError, match="largest activation is not known"):
        absolute(SteerSpec(vector=torch.ones(lm.d_in), layer=1, strength=1.0, unit="rel_maxact"), scale)


def test_an_effect_is_that_of_one_answer_at_a_time(lm: LanguageModel, split: tuple[list[Row], list[Row]]) -> None:
    rows = split[0][:3]
    spec = SteerSpec(vector=torch.ones(lm.d_in), layer=LAYER, strength=15.0, where=Where(phase="generated"))
    calibration = Calibration(lm, rows, tokens=1000, batch_tokens=200)
    found = calibration.effect([spec])
    kl, ratio, n = 0.0, 0.0, 0
    for row in rows:
        logits = []
        for specs in ([], [spec]):
            steering = Steering(lm, specs)
            with torch.inference_mode(), steering, steering.prompts([row]):
                logits.append(
                    lm.model(input_ids=row.input_ids[None], use_cache=False).logits[0].double().log_softmax(-1)
                )
        for t in range(row.n_prompt, len(row)):
            base, steered = logits[0][t - 1], logits[1][t - 1]
            kl += float((steered.exp() * (steered - base)).sum())
            ratio += float(base[row.input_ids[t]] - steered[row.input_ids[t]])
            n += 1
    assert calibration.n_predictions == n
    assert calibration.forwards == 2
    assert found.kl == pytest.approx(kl / n, rel=1e-4)
    assert found.log_ratio == pytest.approx(ratio / n, rel=1e-3)


def test_an_automatic_strength_keeps_its_bound_on_answers_it_has_not_seen(
    lm: LanguageModel, sae: SAE, split: tuple[list[Row], list[Row]]
) -> None:
    """tools/steering_bound.py measures it for more features of a trained SAE."""
    calibration, held_out = Calibration(lm, split[0]), Calibration(lm, split[1][::2])
    spec = SteerSpec(sae=sae, feature=0)
    found = auto_alpha(calibration, spec, bound=0.5, start=10.0)
    assert 0.9 * 0.5 <= found.effect.kl <= 0.5
    assert calibration.forwards == found.forwards == len(found.tried) + 1 <= FORWARDS
    assert found.alpha == max(alpha for alpha, kl in found.tried if kl <= 0.5)
    assert abs(held_out.effect([spec.at(found.alpha)]).kl / 0.5 - 1) < 0.2
    few = Calibration(lm, split[0][:8], tokens=8)
    by_ratio = auto_alpha(few, spec, bound=1.5, measure="perplexity", start=500.0)
    assert 0 < by_ratio.effect.log_ratio <= math.log(1.5) < by_ratio.tried[0][1]
    with pytest.raises(UserError, match="one of add"):
        auto_alpha(calibration, SteerSpec(sae=sae, feature=1, op="set"))
    with pytest.raises(UserError, match="above 1 is needed"):
        auto_alpha(calibration, spec, bound=1.0, measure="perplexity")


def test_a_guard_lowers_what_repeats_and_leaves_the_rest(lm: LanguageModel) -> None:
    guard = Guard(window=6, ngram=2, max_repetition=0.5, max_kl=1.0, min_entropy=0.0)
    watch = Watch(guard, 3)
    sharp, flat = torch.zeros(3, 5), torch.zeros(3, 5)
    sharp[2, 0] = 30.0  # row 2 is far from the unsteered model, whose KL is log 5
    for step in range(6):
        assert watch.factors.tolist() == [1, 1, 1]
        factors = watch.see(sharp, flat, [4, step, step if step < 6 else None])
    assert factors.tolist() == [0.5, 1, 0.5]
    assert [[event.sign for event in row] for row in watch.events] == [["repetition"], [], ["kl"]]
    assert watch.events[2][0].value == pytest.approx(math.log(5), rel=1e-4)
    assert watch.events[0][0].value == pytest.approx(0.8)
    for _ in range(5):
        assert watch.see(sharp, flat, [4, None, None]).tolist() == [0.5, 1, 0.5]
    assert watch.see(sharp, flat, [4, None, None]).tolist() == [0.25, 1, 0.5]
    assert repetition([1, 2, 1, 2, 1], 2) == 0.5
    assert repetition([1], 2) == 0.0
    strong = SteerSpec(vector=torch.ones(lm.d_in), layer=LAYER, strength=60.0)
    off = Guard(window=4, max_kl=0.3, min_entropy=0.0, decay=0.0)
    both = generate(lm, ["What is a list?"] * 2, [[strong], []], max_new_tokens=16, guard=off, test=False)
    (event,) = both.completions[0].events
    assert (event.token, event.sign, event.factor) == (4, "kl", 0.0)
    assert not both.completions[1].events
    plain = generate(lm, ["What is a list?"], max_new_tokens=16, test=False)
    assert both.completions[1].token_ids == plain.completions[0].token_ids
    unguarded = generate(lm, ["What is a list?"], [[strong]], max_new_tokens=16, test=False)
    assert unguarded.completions[0].token_ids != both.completions[0].token_ids
    assert unguarded.completions[0].token_ids[:4] == both.completions[0].token_ids[:4]


def test_features_of_special_tokens_are_those_counted_one_by_one(
    lm: LanguageModel, sae: SAE, dialogues: TokenBatch
) -> None:
    some = dialogues.select(range(5))
    rows = token_features(lm, {"one": sae}, [some], top=3)["one"]
    acts, tokens = [], []
    for batch in lm.harvest([some]):
        acts.append(sae.encode(batch.acts[0]).detach().double())
        tokens.append(batch.tokens)
    found, seen = torch.cat(acts), TokenBatch.concat(tokens)
    facts = template_facts(lm.tokenizer)
    assert {row.token_id for row in rows} == set(facts.special_ids)
    for row in rows:
        here = []
        for n, token in enumerate(seen.input_ids.tolist()):
            place = Role(int(seen.role[n])).name.lower()
            fits = row.place in ("id", "template") or row.place == place
            here.append(token == row.token_id and fits and (row.place == "id" or bool(seen.special[n])))
        mask = torch.tensor(here)
        assert row.occurrences == int(mask.sum())
        mean, elsewhere = found[mask].mean(0), found[~mask].mean(0)
        assert [f.feature for f in row.features] == mean.topk(3).indices.tolist()
        for f in row.features:
            assert f.mean == pytest.approx(float(mean[f.feature]), rel=1e-4)
            assert f.elsewhere == pytest.approx(float(elsewhere[f.feature]), rel=1e-4)
            assert f.density == pytest.approx(float((found[mask, f.feature] > 0).double().mean()))
            assert f.exclusivity == pytest.approx(f.mean / (f.mean + f.elsewhere))
    assert {row.place for row in rows} >= {"id", "template", "user", "assistant", "default_system"}
    assert "<|im_end|>" in token_table("one", rows)
    other = SAE.create(SAESpec(**{f: getattr(sae.spec, f) for f in sae.spec.__dataclass_fields__} | {"layer": 5}))
    with pytest.raises(UserError, match="of layer 5; demo reads 3"):
        token_features(lm, {"one": other}, [some])


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, list[float]]]:
    """What progress bars are told: by task the total, and each advance."""
    told: dict[str, tuple[float, list[float]]] = {}

    @contextmanager
    def progress(task: str, total: int) -> Iterator[Callable[..., None]]:
        told[task] = (total, [])
        yield lambda n=1, note="": told[task][1].append(n)

    monkeypatch.setattr(console, "progress", progress)
    return told


def test_the_verbs_print_and_write_what_they_find(
    tmp_path: Path, sae: SAE, capsys: pytest.CaptureFixture[str], bars: dict[str, tuple[float, list[float]]]
) -> None:
    config = RunConfig(sae=SAEConfig(architectures=("standard",), expansion_factors=(1,)))
    Run.open(tmp_path, config).close()
    (named,) = sae_specs(config.sae, layers=(LAYER,), d_in=sae.spec.d_in)
    sae.save(tmp_path / "saes" / named.name)
    few = ["--dialogues", "24", "--json"]
    asked = ["--feature", "3", "--alpha", "0", "150", "--prompt", "Hi", "--max-new-tokens", "6"]
    assert main(["steer", str(tmp_path), *asked, *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "steer" / f"{named.name}-3.json").read_text())
    assert [row["alpha"] for row in found["strengths"]] == [0, 150]
    assert found["strengths"][1]["kl"] > found["strengths"][0]["kl"] == 0
    still, moved = found["examples"]
    assert still["steered"] == still["base"] == moved["base"]
    assert moved["token_ids"] != still["token_ids"]
    assert found["hook_calls"] == found["forwards"]
    steps = ["read held-out dialogues", "measure the layer", "unsteered answers", "effect on held-out answers"]
    assert list(bars) == [*steps, "answers"]
    assert len(bars["answers"][1]) == 6  # every token of the answers, not every answer
    assert main(["tokens", str(tmp_path), *few]) == 0
    assert all(sum(advances) == pytest.approx(total) for total, advances in bars.values())
    assert bars["special tokens"][0] == 24
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "special_tokens.json").read_text())
    assert {row["token"] for row in found["saes"][named.name]} == {"<|im_start|>", "<|im_end|>", "user", "assistant"}
    assert all(len(row["features"]) == 5 for row in found["saes"][named.name])
    for wrong, message in (
        (["steer", str(tmp_path), "--feature", "9999"], "feature 9999 does not exist"),
        (["steer", str(tmp_path), "--feature", "1", "--alpha", "much"], "--alpha takes numbers or auto, not 'much'"),
        (["tokens", str(tmp_path), "--dialogues", "0"], "must be at least 1"),
        (["tokens", str(tmp_path), "--sae", "none"], "has no SAE 'none'"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
