"""A sweep measures what it says, keeps what it has, and its window follows from what holds."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae import console
from chatsae.cli import main
from chatsae.errors import UserError
from chatsae.features.judge.asking import Asker
from chatsae.features.judge.openai import OpenAICompat
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.steering import ops, sweep
from chatsae.steering.generate import generate
from chatsae.steering.hooks import Steering
from chatsae.steering.measures import MEASURES, Written, against_base, distinct, read_answers
from chatsae.steering.rows import row_of_prompt
from chatsae.steering.spec import SteerSpec, Where
from chatsae.steering.sweep import (
    ARMS,
    UNSTEERED,
    Experiment,
    Job,
    Kept,
    jobs,
    other_features,
    question_sets,
    random_direction,
    strengths,
    write_answers,
)
from chatsae.steering.sweep_show import side_by_side
from chatsae.steering.sweep_summary import Answers, numbers
from chatsae.steering.sweep_window import Quality, ends_apart, window
from chatsae.steersweep.grading import ASPECTS, graded, grades, harmonic_mean
from feature_samples import FIRST, RARE, START, TOKEN, plain_model, planted, planted_run
from judge_server import Served, said, serve


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def lm(model: Path) -> LanguageModel:
    """Its stream is the token's embedding and the position's; it says the token that it has just read."""
    return LanguageModel(model, [1], head=True)


@pytest.fixture(scope="module")
def sae(lm: LanguageModel) -> SAE:
    """The feature RARE fires on Z, and its decoder row is the unembedding of Z."""
    made = planted(lm)
    embedding = lm.with_head().model.transformer.wte.weight
    with torch.no_grad():
        made.W_dec[RARE] = torch.nn.functional.normalize(embedding[lm.tokenizer.convert_tokens_to_ids("Z")], dim=0)
    return made


def experiment(lm: LanguageModel, sae: SAE, n: int = 6) -> Experiment:
    prompts = tuple(row_of_prompt(text, lm.tokenizer) for text in ("Who are you?", "Number 3, please"))
    return Experiment(lm, sae, RARE, prompts, (START, FIRST), max_new_tokens=n)


# --- what is measured of an answer ------------------------------------------------------------------------------------


def test_distinct_n_by_hand() -> None:
    assert distinct([1, 2, 3, 1], 1) == 0.75
    assert distinct([1, 2, 1, 2, 1], 2) == 0.5
    assert distinct([7, 7, 7, 7], 1) == 0.25
    assert distinct([7], 2) is None
    assert distinct([], 1) is None


def test_counts_leave_out_the_token_that_ended_the_answer(lm: LanguageModel, sae: SAE) -> None:
    prompt = row_of_prompt("Hi", lm.tokenizer)
    ids = tuple(lm.tokenizer("abcabc", add_special_tokens=False)["input_ids"])
    end = lm.tokenizer.eos_token_id
    answers = [(ids, False), ((*ids, end), True), ((end,), True)]
    written = [Written(prompt, token_ids, stopped, (), RARE, START) for token_ids, stopped in answers]
    whole, ended, empty = read_answers(lm, sae, written)
    assert (whole["length"], whole["stopped"], whole["distinct_1"], whole["distinct_2"]) == (6, 0, 0.5, 0.6)
    assert whole["repetition"] == 0.25  # abc, bca, cab, and abc again
    same = ("length", "distinct_1", "distinct_2", "repetition", "reread_mean", "reread_share")
    assert {name: ended[name] for name in same} == {name: whole[name] for name in same}
    assert (ended["stopped"], ended["log_perplexity"]) != (whole["stopped"], whole["log_perplexity"])
    assert (empty["length"], empty["stopped"]) == (0, 1)
    assert all(empty[name] is None for name in ("distinct_1", "repetition", "reread_mean", "reread_share"))
    assert set(against_base(whole, ids, empty, (end,))) == set(MEASURES)


WHERES: list[dict[str, Any]] = [{}, {"where": Where(phase="generated")}, {"where": Where(kinds=("control",))}]


@pytest.mark.parametrize("options", WHERES)
def test_answers_read_together_are_those_read_alone(lm: LanguageModel, sae: SAE, options: dict[str, Any]) -> None:
    """Against two plain forwards per answer, in float64, without padding."""
    spec = SteerSpec(sae=sae, feature=RARE, strength=1.5, **options)
    texts, specs = ("Hi", "Number 3, please, and then there", "Zero"), ((spec,), (), (spec,))
    prompts = [row_of_prompt(text, lm.tokenizer) for text in texts]
    done = generate(lm, prompts, specs, max_new_tokens=5, test=False).completions
    written = [
        Written(prompt, c.token_ids[: 5 - i], False, own, RARE, TOKEN)
        for i, (prompt, c, own) in enumerate(zip(prompts, done, specs, strict=True))
    ]
    for answer, found in zip(written, read_answers(lm, sae, written), strict=True):
        ids = torch.cat([answer.prompt.input_ids, torch.tensor(answer.token_ids)])[None]
        logits = []
        for own in ((), answer.specs):
            steering = Steering(lm, own, quiet=True)
            with torch.inference_mode(), steering, steering.prompts([answer.prompt]):
                logits.append(lm.with_head().model(input_ids=ids).logits[0].double().log_softmax(-1))
        kl, loss = [], []
        for i, token in enumerate(answer.token_ids):
            clean, steered = (one[len(answer.prompt) - 1 + i] for one in logits)
            kl.append(float((steered.exp() * (steered - clean)).sum()))
            loss.append(-float(clean[token]))
        assert found["kl_first"] == pytest.approx(kl[0], rel=1e-4, abs=1e-9)
        assert found["kl_mean"] == pytest.approx(sum(kl) / len(kl), rel=1e-4, abs=1e-9)
        assert found["log_perplexity"] == pytest.approx(sum(loss) / len(loss), rel=1e-4)
        if not answer.specs:
            assert found["kl_mean"] == found["kl_first"] == 0
    z = lm.tokenizer.convert_tokens_to_ids("Z")
    again = Written(prompts[0], (z, z, int(prompts[0].input_ids[1]), z), False, (spec,), RARE, TOKEN)
    (values,) = read_answers(lm, sae, [again])
    assert (values["reread_share"], values["other_reread_mean"]) == (0.75, 0)
    assert values["reread_max"] == pytest.approx(1, abs=1e-4)  # 4 x 1 - 3, by the unsteered model
    assert values["reread_mean"] == pytest.approx(0.75, abs=1e-4)


# --- known answers of a whole sweep -----------------------------------------------------------------------------------


def test_a_direction_towards_a_token_shows_and_controls_of_the_same_norm_do_not(lm: LanguageModel, sae: SAE) -> None:
    made = experiment(lm, sae)
    todo = jobs(strengths((0.0, 8.0), (), None, 1.0), 2)
    assert len(todo) == 2 + 3 * 2
    answers = Answers(made.answer(todo, test=True), (0.0, 8.0), Quality())
    for row in answers.of("feature", 1):
        assert row["text"] == "Z" * 6
        assert row["measures"]["reread_share"] == 1
        assert row["measures"]["repetition"] == 0.75
        assert row["measures"]["kl_first"] > 1
        assert row["measures"]["changed"] == 1
    for arm in ARMS:
        for row in answers.of(arm, 0):
            values = row["measures"]
            assert row["holds"]
            assert values["kl_first"] == values["kl_mean"] == values["changed"] == values["log_perplexity_ratio"] == 0
            assert values["reread_share"] == 0
    assert all(row["measures"]["reread_share"] == 0 for arm in ("random", "other") for row in answers.of(arm, 1))
    plain = generate(lm, made.prompts, max_new_tokens=6, test=False).completions
    assert [row["token_ids"] for row in answers.of("feature", 0)] == [list(c.token_ids) for c in plain]


def test_every_arm_moves_the_stream_by_the_same_length(lm: LanguageModel, sae: SAE) -> None:
    made = experiment(lm, sae)
    x = torch.randn(5, lm.d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []
    for arm in ARMS:
        for question in (0, 1):
            (spec,) = made.specs(Job(arm, 7.0, question))
            moved = ops.steered(x, spec.op, spec.direction(), spec.strength) - x
            assert torch.allclose(moved.norm(dim=1), torch.full((5,), 7.0, dtype=torch.float64))
            seen.append((arm, spec.direction() / spec.direction().norm()))
    assert made.specs(Job(UNSTEERED, 0.0, 0)) == ()
    assert made.specs(Job("feature", 7.0, 0))[0] is made.specs(Job("feature", 7.0, 1))[0]  # a batch is told it once
    first, second = (d for arm, d in seen if arm == "random")
    assert abs(float(first @ second)) < 0.4  # random in 128 dimensions
    assert torch.equal(first, random_direction(lm.d_in, 0, 0))
    assert not torch.equal(first, random_direction(lm.d_in, 1, 0))


def test_other_features_fire_and_are_others() -> None:
    acts = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0, 0.5])
    drawn = other_features(acts, 2, 3, seed=4)
    assert sorted(drawn) == [1, 4, 5]
    assert drawn == other_features(acts, 2, 3, seed=4)
    assert len(other_features(acts, 2, 5, seed=4)) == 5
    with pytest.raises(UserError, match="no feature but 1 fires"):
        other_features(torch.tensor([0.0, 1.0]), 1, 1, seed=0)


def test_strengths_are_ascending_and_equal_ones_are_one() -> None:
    found = strengths((0.0, 25.0, 15.0), (0.5, 1.0), 20.0, 50.0)
    assert [s.alpha for s in found] == [0, 15, 20, 25, 50]
    assert [s.label for s in found] == ["0", "15", "auto", "25 = 0.5 norm", "1 norm"]
    assert found[3].grids == ("paper", "relative")
    with pytest.raises(UserError, match="--relative: a sweep takes strengths of at least 0, not -1"):
        strengths((), (-1.0,), None, 1.0)


def test_the_package_has_ten_questions_of_each_set() -> None:
    assert {name: len(set(own)) for name, own in question_sets().items()} == {"general": 10, "python": 10}


def test_what_was_answered_is_kept_whatever_happens(
    lm: LanguageModel, sae: SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = experiment(lm, sae, 2)
    todo = jobs(strengths((0.0, 1.0, 2.0), (), None, 1.0), 2)
    monkeypatch.setattr(sweep, "_ROWS", 4)
    with_ = {"feature": RARE, "seed": 0}
    path = tmp_path / "sweep.json"

    def tired(self: Experiment, part: Any, **how: Any) -> list[dict[str, Any]]:
        tired.batches += 1
        if tired.batches == 3:
            raise KeyboardInterrupt
        return answer(self, part, **how)

    answer, tired.batches = Experiment.answer, 0
    monkeypatch.setattr(Experiment, "answer", tired)
    with pytest.raises(KeyboardInterrupt):
        write_answers(made, todo, Kept(path, with_))
    monkeypatch.setattr(Experiment, "answer", answer)
    kept = Kept(path, with_)
    assert list(kept.answers) == todo[:8]
    assert not path.exists()
    found = write_answers(made, todo, kept)
    assert "8 of 14 answers are there already" in capsys.readouterr().err
    kept.finish({"made_with": with_, "answers": found})
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]
    assert found == write_answers(made, todo, Kept(tmp_path / "other.json", with_))
    assert not Kept(path, with_ | {"seed": 1}).answers
    assert "answers of another sweep (seed)" in capsys.readouterr().err
    path.write_text("{")
    assert not Kept(path, with_).answers
    assert "is damaged" in capsys.readouterr().err


def test_ctrl_c_ends_after_a_batch_that_is_kept(
    lm: LanguageModel, sae: SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = jobs(strengths((0.0, 1.0), (), None, 1.0), 2)
    monkeypatch.setattr(sweep, "_ROWS", 4)

    class Stopped:
        def is_set(self) -> bool:
            return True

    class Context:
        def __enter__(self) -> Stopped:
            return Stopped()

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(console, "stop_requested", lambda what: Context())
    with pytest.raises(KeyboardInterrupt):
        write_answers(experiment(lm, sae, 2), todo, Kept(tmp_path / "s.json", {}))
    assert list(Kept(tmp_path / "s.json", {}).answers) == todo[:4]


# --- the window -------------------------------------------------------------------------------------------------------

ALPHAS = np.array([0.0, 10.0, 20.0, 30.0, 40.0])


def below(thresholds: list[float]) -> np.ndarray:
    """Whether each strength is at most each question's threshold."""
    return ALPHAS[:, None] <= np.array(thresholds)[None]


def test_a_window_from_a_hand_made_curve() -> None:
    holds = below([20, 20, 20, 30, 10])
    changed = ~below([0, 0, 10, 20, 40])
    quality = Quality(share=0.8, acts=0.6)
    found = window(ALPHAS, holds, changed, quality)
    assert (found.start, found.end) == (20, 20)  # 3 of 5 differ from 20 on, 4 of 5 hold up to 20
    assert found.facts(10.0)["open"]
    assert (found.facts(10.0)["rel_from"], found.facts(10.0)["rel_to"]) == (2, 2)
    strict = window(ALPHAS, holds, changed, Quality(share=1.0, acts=1.0))
    assert (strict.start, strict.end) == (None, 10)
    assert not strict.facts(1.0)["open"]
    gap = holds.copy()
    gap[1, :3] = False  # what holds again above a gap is not in the window
    assert window(ALPHAS, gap, changed, quality).end == 0
    assert ends_apart(ALPHAS, holds, below([10] * 5), 0.8)["difference"] == 10
    alone = window(ALPHAS, below([20]), changed[:, :1], quality)
    assert alone.end == 20
    assert alone.end_interval is alone.start_interval is None


@given(st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=6), st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_a_window_is_its_slow_twin(columns: list[tuple[bool, ...]], share: float) -> None:
    holds = np.array([[True] * len(columns), *zip(*columns, strict=True)])
    end = 0.0
    for s, alpha in enumerate(ALPHAS):
        if sum(holds[s]) / len(columns) < share - 1e-9:
            break
        end = alpha
    start = next((a for s, a in enumerate(ALPHAS) if sum(~holds[s]) / len(columns) >= share - 1e-9), None)
    found = window(ALPHAS, holds, ~holds, Quality(share=share, acts=share))
    assert (found.start, found.end) == (start, end)
    if found.end_interval is not None:
        assert set(found.end_interval) <= set(ALPHAS)


def test_the_interval_covers_the_window_of_all_questions() -> None:
    """Questions whose thresholds are drawn from a known law: 80 % of all questions hold up to 20, and no further."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        thresholds = rng.choice([0, 10, 20, 30, 40], p=[0.03, 0.07, 0.4, 0.3, 0.2], size=10).tolist()
        low, high = window(ALPHAS, below(thresholds), ~below(thresholds), Quality(), seed=seed).end_interval or (0, 0)
        covered += low <= 20 <= high
    assert covered >= 90


def test_quality_is_set_against_the_unsteered_answer() -> None:
    base = {"repetition": 0.3, "length": 5.0}
    values = {"log_perplexity_ratio": math.log(2), "repetition": 0.5, "length": 5.0}
    quality = Quality(max_perplexity_ratio=2.0, max_repetition=0.2)
    assert quality.holds(values, base)
    assert not quality.holds(values | {"log_perplexity_ratio": math.log(2.1)}, base)
    assert not quality.holds(values | {"repetition": 0.51}, base)
    assert not quality.holds(values | {"length": 0.0, "repetition": None}, base)
    assert quality.holds(values | {"length": 0.0, "repetition": None}, {"length": 0.0, "repetition": None})
    for wrong in ({"max_perplexity_ratio": 0.5}, {"max_repetition": 2.0}, {"share": 0.0}, {"acts": 1.5}):
        with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
            Quality(**wrong)


def made_up(feature: float, control: float) -> list[dict[str, Any]]:
    """Answers to four questions: KL is alpha times a factor of the arm, plus the question."""
    values = dict.fromkeys(MEASURES, 1.0) | {"log_perplexity": 1.0, "repetition": 0.0, "length": 3.0}
    rows = [{"arm": UNSTEERED, "alpha": 0.0, "question": q, "token_ids": [q], "text": "a"} for q in range(4)]
    factors = {"feature": feature, "random": control, "other": control}
    rows += [
        {"arm": arm, "alpha": a, "question": q, "token_ids": [9], "text": "b"}
        for arm in ARMS
        for a in (1.0, 2.0)
        for q in range(4)
    ]
    for row in rows:
        kl = row["alpha"] * factors.get(row["arm"], 0) + row["question"]
        row |= {"finish_reason": "stop", "measures": values | {"kl_mean": kl, "distinct_2": None}}
    return rows


def test_means_and_differences_are_over_questions() -> None:
    steps = [{"alpha": a, "label": str(a)} for a in (0.0, 1.0, 2.0)]
    found = numbers(made_up(3.0, 1.0), steps, ["q"] * 4, Quality(), 1.0)
    rows = {(row["arm"], row["strength"]): row for row in found["summary"]}
    assert rows["feature", 2]["measures"]["kl_mean"]["mean"] == 6 + 1.5
    low, high = rows["feature", 2]["measures"]["kl_mean"]["interval"]
    assert 6 <= low < 7.5 < high <= 9
    assert rows["feature", 2]["measures"]["distinct_2"] == {"mean": None, "interval": None, "n": 0}
    assert rows["random", 0]["measures"]["kl_mean"] == rows["feature", 0]["measures"]["kl_mean"]
    assert rows["other", 1]["finish"] == {"stop": 4}
    assert rows["other", 1]["holds"]["mean"] == 1
    against = {(row["control"], row["strength"]): row["measures"]["kl_mean"] for row in found["against"]}
    assert against["random", 2]["difference"] == 4
    assert against["random", 2]["interval"] == pytest.approx([4, 4])
    assert against["other", 1]["n"] == 4
    assert found["windows"]["feature"]["to"] == 2
    assert [e["label"] for e in found["examples"]] == ["alpha 1.0"] * 4 + ["alpha 2.0"] * 4
    assert found["examples"][0] == {"label": "alpha 1.0", "prompt": "q", "base": "a", "steered": "b"}


# --- a language model grades ------------------------------------------------------------------------------------------


def test_a_harmonic_mean_by_hand() -> None:
    assert harmonic_mean({"concept": 2, "instruction": 2, "fluency": 2}) == 2
    assert harmonic_mean({"concept": 1, "instruction": 2, "fluency": 2}) == pytest.approx(1.5)
    assert harmonic_mean({"concept": 0, "instruction": 2, "fluency": 2}) == 0
    assert harmonic_mean({"concept": None, "instruction": 2, "fluency": 2}) is None


SWEEP: dict[str, Any] = {
    "questions": ["first?", "second?"],
    "strengths": [{"label": "0"}, {"label": "15"}],
    "answers": [
        {"arm": arm, "strength": s, "question": q, "text": f"{arm} {q}"}
        for arm, s in ((UNSTEERED, 0), ("feature", 1), ("random", 1), ("other", 1))
        for q in (0, 1)
    ],
}


@pytest.fixture
def served() -> Iterator[Served]:
    def script(body: dict[str, Any], number: int) -> Any:
        asked = body["messages"][-1]["content"]
        if "random 1" in asked and "fluent" not in asked and "Concept:" not in asked:
            return said("I would say it is quite good.")
        if "other 0" in asked and "Concept:" in asked:
            return said('{"rating": 3}')
        rating = 2 if "Concept: the letter Z" in asked or "Instruction: " in asked else 1
        return said(f'Well: {{"rating": {rating}}}')

    with serve(script) as found:
        yield found


def test_a_grade_that_cannot_be_read_is_missing_with_its_reason(served: Served) -> None:
    client = OpenAICompat(served.url, "judge")
    with closing(Asker(client)) as asker:
        found = grades(asker, SWEEP, "the letter Z", {"temperature": 0})
        assert asker.usage.unreadable == 2
    by_text = {row["text"]: own for row, own in zip(SWEEP["answers"], found, strict=True)}
    good = by_text["feature 0"]
    assert [good[aspect] for aspect in ASPECTS] == [2, 2, 1]
    assert good["harmonic_mean"] == pytest.approx(1.5)
    bad = by_text["random 1"]
    assert (bad["concept"], bad["instruction"], bad["harmonic_mean"]) == (2, None, None)
    assert bad["reasons"] == {"instruction": "unreadable: no JSON object with a rating"}
    assert by_text["other 0"]["reasons"] == {"concept": "unreadable: a rating of 3"}
    done = graded(SWEEP, found, judge="judge", concept="the letter Z")["grades"]
    means = {(row["arm"], row["strength"]): row for row in done["means"]}
    assert means["random", 1]["instruction"] == {"mean": 2.0, "interval": None, "n": 1}
    assert means["feature", 1]["harmonic_mean"]["n"] == 2
    assert means["other", 0] == means["feature", 0] | {"arm": "other"}
    assert done["missing"] == {"unreadable: no JSON object with a rating": 1, "unreadable: a rating of 3": 1}
    assert done["chosen"] == {"strength": 1, "halves": [pytest.approx(1.5), pytest.approx(1.5)], "n": [1, 1]}
    alone = [body for body in served.bodies if "How fluent" in body["messages"][-1]["content"]]
    assert len(alone) == len(SWEEP["answers"])  # once per text
    assert all("first?" not in body["messages"][-1]["content"] for body in alone)


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_run(tmp_path_factory.mktemp("run") / "made", model)


ASKED = ["--feature", str(TOKEN), "--sweep", "--alpha", "0", "3", "--relative", "0.5", "--max-new-tokens", "4"]
ASKED += ["--prompt", "Who are you?", "Number 3, please", "--dialogues", "40"]


def test_the_verb_writes_prints_and_draws_a_sweep(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "run"
    shutil.copytree(run, here)
    assert main(["steer", str(here), *ASKED, "--json", "--figure", str(tmp_path / "alpha.svg")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((here / "steer" / f"L1-1x-standard-{TOKEN}-sweep.json").read_text())
    assert found["strengths"][0]["alpha"] == 0
    assert [s["alpha"] for s in found["strengths"]] == sorted(s["alpha"] for s in found["strengths"])
    assert {g for s in found["strengths"] for g in s["grids"]} == {"paper", "relative", "auto"}
    assert found["auto"]["kl"] <= found["auto"]["bound"]
    assert len(found["answers"]) == 2 + 2 * 3 * (len(found["strengths"]) - 1)
    assert TOKEN not in found["others"]
    assert len(found["summary"]) == 3 * len(found["strengths"])
    assert set(found["windows"]) == set(ARMS)
    assert (tmp_path / "alpha.svg").stat().st_size > 5000
    before = (tmp_path / "alpha.svg").read_bytes()
    assert main(["steer", str(here), *ASKED, "--figure", str(tmp_path / "alpha.svg")]) == 0
    out, err = capsys.readouterr()
    n = len(found["answers"])
    assert f"{n} of {n} answers are there already" in err
    assert (tmp_path / "alpha.svg").read_bytes() == before
    for words in ("Answers whose quality holds, of 2", "Window:", "auto: alpha", "> Number 3, please", "unsteered │"):
        assert words in out


def test_a_sweep_is_graded_where_a_judge_is_named(
    run: Path, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "run"
    shutil.copytree(run, here)
    judge = ["--judge", "openai", "--model", "judge", "--base-url", served.url]
    assert main(["steer", str(here), *ASKED, *judge]) == 2
    assert f"explains feature {TOKEN}" in capsys.readouterr().err
    assert not served.bodies
    judge += ["--concept", "the letter Z"]
    assert main(["steer", str(here), *ASKED, *judge, "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "grading would take" in err
    assert json.loads(out)["grades"] is None
    assert not served.bodies
    assert main(["steer", str(here), *ASKED, *judge, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((here / "steer" / f"L1-1x-standard-{TOKEN}-sweep.json").read_text())
    assert all(row["grades"]["harmonic_mean"] == pytest.approx(1.5) for row in found["answers"])
    assert found["grades"]["missing"] == {}
    asked = len(served.bodies)
    assert main(["steer", str(here), *ASKED, *judge]) == 0
    out, err = capsys.readouterr()
    assert len(served.bodies) == asked  # every grade is kept
    assert "Grades by openai-judge, 0 to 2; concept: the letter Z" in out


def test_what_a_model_writes_cannot_steer_the_terminal() -> None:
    answers = [
        {"arm": arm, "strength": s, "question": 0, "text": "a\x1b[31m\nb" + "c" * 99, "finish_reason": "stop"}
        for arm, s in ((UNSTEERED, 0), *((arm, 1) for arm in ARMS))
    ]
    facts = {"questions": ["?"], "strengths": [{"label": "0"}, {"label": "15"}], "answers": answers}
    lines = side_by_side(facts)
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert lines[1].endswith("…")
    assert len({len(cell) for cell in lines[3].split(" │ ")[1:]}) == 1


def test_flags_that_do_not_go_together_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--seed", "1"], "--seed is about the sweep"),
        (["--sweep", "--guard"], "--guard changes strengths"),
        (["--sweep", "--model", "m"], "--model is about the judge"),
        (["--sweep", "--judge", "pattern"], "must be a language model"),
        (["--sweep", "--questions", "general", "--prompt", "Hi"], "give one of them"),
        (["--sweep", "--alpha", "-3"], "at least 0, not -3"),
        (["--sweep", "--figure", "a.pdf"], "only .png and .svg"),
        (["--sweep", "--share", "2"], "--share must be"),
        (["--sweep", "--feature", "9999"], "feature 9999 does not exist"),
    ):
        feature = [] if "--feature" in words else ["--feature", "1"]
        assert main(["steer", str(run), *feature, *words]) == 2
        assert message in capsys.readouterr().err
