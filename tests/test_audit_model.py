"""An audit finds what was planted in a model: a behaviour, the feature behind it, and who a text is from."""

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chatsae.audit.causal import Bench, ablate, ablation, clamp, clamping, like_density, mcnemar, span
from chatsae.audit.command import densities
from chatsae.audit.places import feature_places, read_ends, render_pairs, stream_places
from chatsae.audit.report import text as tables
from chatsae.audit.roles import FIRST, LATER, PLAIN, imitations, mean_acts, role_features
from chatsae.audit.separation import choose, confirm
from chatsae.audit.sets import Pair, PromptSet, load_sets
from chatsae.batch import Dialogue, Message, TokenBatch
from chatsae.cli import main
from chatsae.config import RunConfig, SAEConfig, sae_specs
from chatsae.data.render import render
from chatsae.data.template import control_ids
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.steering.hooks import Steering
from chatsae.steering.rows import Row, rows_of_dialogues
from chatsae.steering.strength import Calibration
from sae_samples import spec as sae_spec
from tiny_models import tiny_model, tiny_tokenizer

LAYER, PLANTED, SIZE = 1, 7, 60.0
MARKER, ANSWER = "Z", "Y"


def written(tokenizer: Any, text: str) -> int:
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


class Planted:
    """A direction that a block adds to the stream of some tokens, told by the ids that the model is given."""

    def __init__(self, lm: LanguageModel, where: Any) -> None:
        self.where, self.ids = where, torch.empty(0)
        v = torch.randn(lm.d_in, generator=torch.Generator().manual_seed(1))
        self.v = v / v.norm()
        lm.decoder.register_forward_pre_hook(self.keep, with_kwargs=True)
        lm.blocks[LAYER].register_forward_hook(self.add)

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ids = kwargs["input_ids"]

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        changed = x + SIZE * self.where(self.ids)[..., None] * self.v
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tiny_model(tmp_path_factory.mktemp("audit")))


@pytest.fixture(scope="module")
def obeying(directory: Path) -> tuple[LanguageModel, SAE]:
    """After a marker the stream holds a direction, because of which the model says Y."""
    lm = LanguageModel(directory, [LAYER], head=True)
    marker = written(lm.tokenizer, MARKER)
    planted = Planted(lm, lambda ids: ((ids == marker).cumsum(1) > 0).float())
    with torch.no_grad():
        lm.model.lm_head.weight[written(lm.tokenizer, ANSWER)] = 2 * planted.v
    return lm, planted_sae(lm, planted.v)


def planted_sae(lm: LanguageModel, v: Tensor) -> SAE:
    """Feature 7 reads and writes v; the others random directions at right angles to it."""
    sae = SAE.create(sae_spec(lm.d_in, layer=LAYER, factor=4))
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(sae.spec.d_sae, lm.d_in, generator=generator)
    rows = torch.nn.functional.normalize(rows - (rows @ v)[:, None] * v)
    rows[PLANTED] = v
    with torch.no_grad():
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(rows)
        sae.b_enc[PLANTED] = -SIZE / 2
    return sae


WORDS = ["tea", "cup", "sea", "sky", "red", "old", "big", "day", "sun", "ink", "map", "pen", "box", "cat", "dog", "key"]


def prompt_set() -> PromptSet:
    texts = [(f"{a} {MARKER} {b}", f"{a} {b}") for a in WORDS[:8] for b in WORDS[8:13]]
    pairs = tuple(Pair(str(i), (Message("user", p),), (Message("user", n),)) for i, (p, n) in enumerate(texts))
    return PromptSet("planted", "planted", pairs, (ANSWER,))


@pytest.fixture(scope="module")
def dialogues(obeying: tuple[LanguageModel, SAE]) -> TokenBatch:
    lm, _ = obeying
    made = []
    for i in range(40):
        words = [WORDS[(i + 3 * j) % 16] for j in range(6)]
        turns = (Message("user", " ".join(words[:3])), Message("assistant", " ".join(words)))
        made.append(Dialogue(str(i), "test", turns))
    return TokenBatch.concat(list(render(made, lm.tokenizer)))


@pytest.fixture(scope="module")
def bench(obeying: tuple[LanguageModel, SAE], dialogues: TokenBatch) -> Bench:
    lm, _ = obeying
    prompts = render_pairs(prompt_set(), lm.tokenizer)
    guard = Calibration(lm, rows_of_dialogues(dialogues)[:8])
    return Bench(lm, prompts.positive[20:], prompts.negative[20:], guard, prefixes=(ANSWER,), max_new_tokens=2)


# --- features ---------------------------------------------------------------------------------------------------------


def test_the_stream_is_read_at_the_last_tokens_of_each_prompt(obeying: tuple[LanguageModel, SAE]) -> None:
    lm, sae = obeying
    prompts = render_pairs(prompt_set(), lm.tokenizer)
    rows, n = prompts.positive[:5], len(prompts.tokens)
    ends = read_ends(lm, rows, n)
    for s, row in enumerate(rows):
        (alone,) = read_ends(lm, [row], len(row))[0]
        assert torch.allclose(ends[0, s], alone[-n:], atol=1e-4)
    acts, stream = feature_places(sae, ends[0], chunk=2), stream_places(ends[0])
    expected = sae.encode(ends[0]).detach()
    assert torch.allclose(acts[:, :n], expected)
    assert torch.allclose(acts[:, n], expected.mean(1))
    assert torch.allclose(stream[:, n], ends[0].mean(1))
    assert acts.shape[1] == len(prompts.places)


def test_the_planted_feature_is_found_and_no_other_holds(obeying: tuple[LanguageModel, SAE]) -> None:
    lm, sae = obeying
    prompts = render_pairs(prompt_set(), lm.tokenizer)
    n = len(prompts.tokens)
    acts = [
        feature_places(sae, read_ends(lm, side, n)[0])[:, -1].numpy() for side in (prompts.positive, prompts.negative)
    ]
    chosen = choose(acts[0][:20], acts[1][:20], top=3, draws=199)
    assert chosen[0].column == PLANTED
    columns = [c.column for c in chosen]
    found = confirm(acts[0][20:][:, columns], acts[1][20:][:, columns], [c.auroc > 0.5 for c in chosen])
    assert found[0].auroc == 1
    assert found[0].significant
    assert found[0].negative_mean == 0


# --- what causes the behaviour ----------------------------------------------------------------------------------------


def test_ablating_the_planted_feature_ends_the_behaviour_and_random_features_do_not(
    bench: Bench, obeying: tuple[LanguageModel, SAE], dialogues: TokenBatch
) -> None:
    lm, sae = obeying
    controls = like_density([PLANTED], densities(lm, {"a": sae}, dialogues)["a"], 19, seed=0)
    steps: list[float] = []
    bench.advance = steps.append
    found = ablate(bench, sae, [PLANTED], controls)
    assert (found.before.hits, found.after.hits, found.before.n) == (20, 0, 20)
    assert [one.hits for one in found.controls] == [20] * 19
    assert found.rank_p == 1 / 20
    assert found.p_value == 2 / 2**20
    assert found.acts
    assert sum(steps) == pytest.approx(20)  # its own answers and those of 19 controls
    assert len(steps) > 20
    random = ablate(bench, sae, controls[0], controls[1:4])
    assert random.after.hits == 20
    assert random.p_value == 1
    assert not random.acts


def test_clamping_it_brings_the_behaviour_and_the_same_push_along_others_does_not(
    bench: Bench, obeying: tuple[LanguageModel, SAE], dialogues: TokenBatch
) -> None:
    lm, sae = obeying
    prompts = render_pairs(prompt_set(), lm.tokenizer)
    n = len(prompts.tokens)
    ends = tuple(read_ends(lm, side[:20], n)[0] for side in (prompts.positive, prompts.negative))
    controls = like_density([PLANTED], densities(lm, {"a": sae}, dialogues)["a"], 5, seed=0)
    found = clamp(bench, sae, [PLANTED], controls, (ends[0], ends[1]))
    assert (found.before.hits, found.after.hits) == (0, 20)
    assert max(one.hits for one in found.controls) <= 2  # any answer begins with Y by chance
    assert found.rank_p == 1 / 6
    assert found.acts == found.within


def test_a_change_that_breaks_the_model_does_not_count(
    obeying: tuple[LanguageModel, SAE], dialogues: TokenBatch
) -> None:
    lm, sae = obeying
    prompts = render_pairs(prompt_set(), lm.tokenizer)
    rows = rows_of_dialogues(dialogues)[:4]
    guard = Calibration(lm, rows)
    strict = Bench(
        lm, prompts.positive[20:24], prompts.negative[20:24], guard, prefixes=(ANSWER,), max_perplexity_ratio=0.5
    )
    found = ablate(strict, sae, [PLANTED], [])
    specs = ablation(sae, [PLANTED])
    assert found.perplexity_ratio == pytest.approx(np.exp(Calibration(lm, rows).effect(specs).log_ratio))
    assert found.perplexity_ratio > 0.5
    assert not found.within
    assert not found.acts
    assert found.control_perplexity_ratio is None
    assert found.rank_p == 1


def test_ablation_leaves_nothing_of_the_span_and_clamping_acts_on_the_template_tokens(
    obeying: tuple[LanguageModel, SAE],
) -> None:
    lm, sae = obeying
    features = [PLANTED, 3, 4]
    rows = span(sae, features)
    assert torch.allclose(rows @ rows.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(sae.W_dec[features].double() @ rows.T @ rows, sae.W_dec[features].double(), atol=1e-6)
    assert len(span(sae, [3, 3])) == 1
    prompts = render_pairs(prompt_set(), lm.tokenizer)
    row, n = prompts.negative[0], len(prompts.tokens)
    seen: list[Tensor] = []
    keep = lm.blocks[LAYER + 1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        floors = np.full((n, 1), 5.0)
        floors[-1] = -100  # already above it
        with torch.inference_mode():
            lm.model(input_ids=row.input_ids[None], use_cache=False)
            for specs in (ablation(sae, features), clamping(sae, [PLANTED], floors)):
                with Steering(lm, specs) as steering, steering.prompts([row]):
                    lm.model(input_ids=row.input_ids[None], use_cache=False)
    finally:
        keep.remove()
    plain, ablated, clamped = (x[0].double() for x in seen)
    assert (ablated @ sae.W_dec[features].double().T).abs().max() < 1e-4
    assert torch.allclose(ablated, plain - plain @ rows.T @ rows, atol=1e-4)
    v = sae.W_dec[PLANTED].double()
    assert torch.equal(clamped[:-n], plain[:-n])
    assert torch.equal(clamped[-1], plain[-1])
    assert torch.allclose(clamped[-n:-1] @ v, (plain[-n:-1] @ v).clamp(min=5), atol=1e-4)


def test_controls_are_other_live_features_of_like_density() -> None:
    density = torch.cat([torch.zeros(10), torch.full((30,), 0.1), torch.full((30,), 0.001)]).double()
    draws = like_density([12, 45], density, 50, seed=1)
    assert len(draws) == 50
    assert draws == like_density([12, 45], density, 50, seed=1)
    assert len(set(draws)) > 30
    for first, second in draws:
        assert 10 <= first < 40 <= second < 70
        assert first != 12
        assert second != 45
    few = like_density([0], torch.tensor([0.5, 0.01, 0.0]), 3, seed=0)
    assert few == [(1,)] * 3  # the closest there is, never one that does not fire
    assert like_density([0], torch.tensor([0.5, 0.0]), 3, seed=0) == []


def test_mcnemar_is_the_binomial_test_of_the_answers_that_changed_sides() -> None:
    assert mcnemar([True] * 6, [False] * 6) == 2 / 2**6
    assert mcnemar([True, False, True], [True, False, True]) == 1
    before, after = [True] * 8 + [False] * 2, [False] * 7 + [True] * 2 + [False]
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 8) / 2**8)


# --- who speaks -------------------------------------------------------------------------------------------------------


def in_user_turn(tokenizer: Any) -> Any:
    """1 after the special token that opens a turn and the u of user, until the next special token."""
    opens, u = written(tokenizer, "<|im_start|>"), written(tokenizer, "u")
    control = control_ids(tokenizer)

    def where(ids: Tensor) -> Tensor:
        found = torch.zeros(ids.shape)
        for b, row in enumerate(ids.tolist()):
            inside = False
            for p, token in enumerate(row):
                inside = False if token in control else inside or (token == u and p > 0 and row[p - 1] == opens)
                found[b, p] = inside
        return found

    return where


@pytest.fixture(scope="module")
def listening(directory: Path) -> tuple[LanguageModel, SAE]:
    """The stream of a user's turn holds a direction: of one that special tokens open, not of its letters."""
    lm = LanguageModel(directory, [LAYER], head=True)
    return lm, planted_sae(lm, Planted(lm, in_user_turn(lm.tokenizer)).v)


def test_the_texts_are_the_same_in_every_condition_and_stand_at_the_same_place(
    listening: tuple[LanguageModel, SAE], dialogues: TokenBatch
) -> None:
    lm, _ = listening
    found = imitations(lm, dialogues, 30)
    assert found.conditions == (
        FIRST,
        LATER,
        *(f"{c}: {f}" for c in ("document", "tool") for f in ("plain", "text", "special")),
    )
    control = control_ids(lm.tokenizer)
    rows = dict(zip(found.conditions, found.ids, strict=True))
    for s, n in enumerate(found.lengths):
        assert len({tuple(ids[s][-n:].tolist()) for ids in found.ids}) == 1
        texts = {name: str(lm.tokenizer.decode(ids[s])) for name, ids in rows.items()}
        real = str(lm.tokenizer.decode(dialogues.input_ids[dialogues.cu_seqlens[s] : dialogues.cu_seqlens[s + 1]]))
        assert real.startswith(texts[FIRST])
        said = str(lm.tokenizer.decode(rows[FIRST][s][-n:]))
        assert texts["document: text"].endswith(f"<|im_start|>user\n{said}")
        assert texts["document: special"].endswith(f"<|im_start|>user\n{said}")
        assert "<|im_start|>" not in texts[PLAIN]
        assert texts[LATER].endswith(f"<|im_start|>user\n{said}")
        assert "<|im_start|>assistant" in texts[LATER]
        assert texts["tool: plain"].endswith(f"<|im_start|>tool\n{said}")
        assert not control & set(rows["document: text"][s].tolist())
        assert control & set(rows["document: special"][s].tolist())
    assert found.start[PLAIN] == found.start[FIRST] == found.start["document: special"]
    tally: Counter[str] = Counter()
    with pytest.raises(UserError, match="12 dialogues have a user text"):
        imitations(lm, dialogues.select(range(12)), 30, tally)


def test_a_feature_of_user_turns_is_found_and_fires_on_forged_tokens_only(
    listening: tuple[LanguageModel, SAE], dialogues: TokenBatch
) -> None:
    lm, sae = listening
    found = imitations(lm, dialogues, 40)
    acts = mean_acts(lm, {"a": sae}, found)["a"]
    c, s = found.conditions.index("tool: text"), 11
    alone = read_ends(lm, [_bare(found.ids[c][s])], found.lengths[s])[0]
    assert torch.allclose(acts[c, s], sae.encode(alone[0]).detach().mean(0), atol=1e-3)
    features = role_features(found.conditions, acts.numpy(), top=3, draws=199)
    assert features[0].feature == PLANTED
    assert features[0].separation.auroc == 1
    assert features[0].separation.significant
    reach = {name: share for name, (share, _) in features[0].reach.items()}
    assert reach[FIRST] == pytest.approx(1, abs=0.05)
    assert reach[LATER] == pytest.approx(1, abs=0.05)
    assert reach["document: special"] == pytest.approx(1, abs=0.05)
    assert reach["tool: special"] == pytest.approx(1, abs=0.05)
    for name in ("document: text", "tool: plain", "tool: text"):
        assert reach[name] == pytest.approx(0, abs=1e-6)
        assert features[0].auroc[name][0] == 0.5


def _bare(ids: Tensor) -> Any:
    zeros = torch.zeros(len(ids), dtype=torch.uint8)
    return Row(ids, zeros, zeros, len(ids))


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_audits_a_run_of_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An SAE whose feature 5 reads the difference of the shipped prompts; it is found, and its ablation acts."""
    lm = LanguageModel("demo", [3], head=True)
    config = RunConfig(sae=SAEConfig(architectures=("standard",), expansion_factors=(1,)))
    Run.open(tmp_path, config).close()
    (named,) = sae_specs(config.sae, layers=(3,), d_in=lm.d_in)
    prompts = render_pairs(load_sets(["import"], pairs=200)[0], lm.tokenizer)
    ends = read_ends(lm, [*prompts.positive[:40], *prompts.negative[:40]], 1)[0, :, 0].split(40)
    v = torch.nn.functional.normalize(ends[0].mean(0) - ends[1].mean(0), dim=0)
    sae = SAE.create(named)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(lm.d_in, lm.d_in, generator=torch.Generator().manual_seed(0)))
        rows[5] = v
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(rows)
        sae.b_enc[5] = -float((torch.cat(ends) @ v).mean())
    sae.save(tmp_path / "saes" / named.name)
    few = [
        "--sets",
        "import",
        "polite",
        "--dialogues",
        "40",
        "--controls",
        "3",
        "--top",
        "3",
        "--ablate",
        "1",
        "--draws",
        "99",
    ]
    assert main(["audit", str(tmp_path), *few, "--max-new-tokens", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert found["schema_version"] == 1
    assert found["sets"]["import"]["n_report"] == 40
    assert found["sets"]["import"]["template_tokens"] == ["<|im_end|>", "\\n", "<|im_start|>", "assistant", "\\n"]
    assert found["sets"]["import"]["behaviour"]["positive"]["hits"] > 30
    one = found["saes"][named.name]
    best = one["sets"]["import"]["features"][0]
    assert (best["feature"], best["significant"]) == (5, True)
    assert best["auroc"] > 0.9
    assert {row["name"] for row in one["sets"]["import"]["probes"]["pooled"]} >= {"1 feature", "stream, dense"}
    ablated, clamped = one["sets"]["import"]["causal"]["interventions"]
    assert (ablated["name"], clamped["name"], ablated["features"]) == ("ablate", "clamp", [5])
    assert ablated["after"]["hits"] < ablated["before"]["hits"] / 2
    assert len(ablated["controls"]) == 3
    assert one["roles"]["conditions"][:2] == [FIRST, LATER]
    assert one["roles"]["features"]
    polite = one["sets"]["polite"]["causal"]
    assert polite["interventions"] == []
    assert polite["skipped"] == ["no intervention: none of the 40 answers to positive prompts begins as the set says"]
    text = tables(found)
    assert polite["skipped"][0] in text
    for words in ("features that tell the prompts apart", "stream, dense", "do features cause it?", "imitates"):
        assert words in text
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
        example = importlib.import_module("audit_page").page(found)
    share = ablated["after"]["share"]
    assert f"| import | ablate 5 | {ablated['before']['share']:.2f} " in example
    assert f" | {share:.2f} (" in example
    assert "polite: no intervention" in example
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    schema = page[page.index("## RUN/audit.json") :]
    assert {key for key in keys(found) if f"`{key}`" not in schema} == set()
    assert main(["audit", str(tmp_path), "--sae", "none"]) == 2
    assert "has no SAE 'none'" in capsys.readouterr().err


NAMED = ("settings", "sets", "saes", "probes", "start", "means", "reach", "median_reach")


def keys(value: Any, named: bool = False) -> set[str]:
    """The keys of a JSON value, those apart that are names of something."""
    if isinstance(value, list):
        return {key for one in value for key in keys(one)}
    if not isinstance(value, dict):
        return set()
    own = set() if named else set(value)
    inner = [
        keys(one, named=key in NAMED or (key in ("auroc", "skipped") and isinstance(one, dict)))
        for key, one in value.items()
    ]
    return own.union(*inner)
