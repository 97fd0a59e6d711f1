import itertools
import json

import pytest
import torch

import chatsae as cs
from chatsae.batch import Dialogue, Message, Role
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.evals.evaluate import evaluate
from chatsae.evals.report import PAIRED, Report, compare
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import splice
from chatsae.runs import Run
from chatsae.sae.init import init_sae
from sae_samples import constant_sae, identity_sae, spec
from tiny_models import tiny_model, tiny_tokenizer

LAYER = 1
TEXTS = ("Hello", "What is a user?", "I am a user and an assistant.", "x" * 40, "one two three")


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("qwen2")
    return LanguageModel(tiny_tokenizer(tiny_model(directory)), [LAYER])


def dialogues(n: int = 7) -> list[Dialogue]:
    texts = itertools.cycle(TEXTS)
    return [
        Dialogue(str(i), "test", (Message("user", next(texts)), Message("assistant", next(texts)[: 3 * i + 2])))
        for i in range(n)
    ]


def residuals(lm: LanguageModel) -> list[torch.Tensor]:
    """The slow way: one dialogue at a time."""
    tokens = list(render(dialogues(), lm.tokenizer))
    full, found = lm.with_head(), []
    for batch in tokens:
        for row in torch.split(batch.input_ids, batch.lengths.tolist()):
            with splice(full, LAYER, lambda x: found.append(x[0]) or x), torch.no_grad():
                full.model(input_ids=row[None], use_cache=False)
    return found


def test_an_identity_sae_changes_nothing(lm):
    row = evaluate({"identity": identity_sae(lm.d_in)}, lm, dialogues()).rows["identity"]
    nothing = ("mse", "mse_st", "mse_token", "fvu", "normalized_mse", "delta_loss", "delta_loss_percent", "kl")
    assert {name: row[name] for name in nothing} == dict.fromkeys(nothing, 0)
    assert row["log2_mse"] is None
    assert row["reasons"]["log2_mse"] == "the error is exactly 0"
    one = ("explained_variance", "top1_agreement", "relative_bias")
    assert {name: row[name] for name in one} == dict.fromkeys(one, 1)
    for name in ("cosine", "l2_ratio"):
        assert row[name] == pytest.approx(1, abs=1e-12)
    assert row["l0"] == pytest.approx(lm.d_in, rel=0.01)
    assert row["intervals"]["delta_loss"] == [0, 0]


def test_splicing_an_identity_sae_leaves_the_logits_bitwise_equal(lm):
    ids = torch.arange(20)[None] % lm.vocab_size
    full, sae = lm.with_head(), identity_sae(lm.d_in)
    with torch.no_grad():
        plain = full.model(input_ids=ids, use_cache=False).logits
        with splice(full, LAYER, sae):
            spliced = full.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(plain, spliced)


def test_predicting_the_mean_explains_no_variance(lm):
    mean = torch.cat(residuals(lm)).double().mean(0)
    row = evaluate({"mean": constant_sae(mean.float())}, lm, dialogues()).rows["mean"]
    assert row["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert row["l0"] == 0
    assert row["dead_fraction"] == 1
    assert row["delta_loss"] != 0


def test_results_equal_the_slow_way(lm):
    sae = init_sae(spec(lm.d_in), torch.Generator().manual_seed(3))
    x = residuals(lm)
    with torch.no_grad():
        errors = [(sae(r).double() - r.double()).square().mean(-1) for r in x]
    mse = sum(float(e.mean()) for e in errors) / len(errors)
    row = evaluate({"sae": sae}, lm, dialogues()).rows["sae"]
    assert row["mse"] == pytest.approx(mse, rel=1e-6)
    assert row["mse_token"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-6)


def test_delta_loss_equals_the_models_own_loss(lm):
    sae = init_sae(spec(lm.d_in), torch.Generator().manual_seed(3))
    row = evaluate({"sae": sae}, lm, dialogues()).rows["sae"]
    full = lm.with_head()

    def losses(ids: torch.Tensor) -> torch.Tensor:
        logits = full.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double()

    clean, spliced, assistant = [], [], []
    with torch.no_grad():
        for batch in render(dialogues(), lm.tokenizer):
            lengths = batch.lengths.tolist()
            for ids, role in zip(torch.split(batch.input_ids, lengths), torch.split(batch.role, lengths), strict=True):
                clean.append(losses(ids))
                with splice(full, LAYER, sae):
                    spliced.append(losses(ids))
                assistant.append(role[1:] == Role.ASSISTANT)
                own = full.model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
                assert float(own) == pytest.approx(float(clean[-1].mean()), rel=1e-5)
    before, after, chosen = torch.cat(clean), torch.cat(spliced), torch.cat(assistant)
    assert 0 < int(chosen.sum()) < len(chosen)
    for suffix, mask in (("", torch.ones_like(chosen)), ("_assistant", chosen)):
        x, y = float(before[mask].mean()), float(after[mask].mean())
        assert row[f"loss{suffix}"] == pytest.approx(x, rel=1e-5)
        assert row[f"delta_loss{suffix}"] == pytest.approx(y - x, rel=1e-4)
        assert row[f"delta_loss_percent{suffix}"] == pytest.approx(100 * (y - x) / x, rel=1e-4)


def test_special_tokens_by_id_and_by_template_differ_inside_content():
    lm = LanguageModel("demo", [2])
    sae = constant_sae(torch.zeros(lm.d_in), layer=2)
    said = [Dialogue("a", "test", (Message("user", "user user user"), Message("assistant", "No.")))]
    row = evaluate({"zero": sae}, lm, said).rows["zero"]
    assert row["mse_st"] != row["mse_st_template"]
    plain = [Dialogue("a", "test", (Message("user", "abs"), Message("assistant", "No.")))]
    row = evaluate({"zero": sae}, lm, plain).rows["zero"]
    assert row["mse_st"] == row["mse_st_template"]


def test_the_facts_tell_dialogues_apart(lm):
    sae, said = {"zero": constant_sae(torch.zeros(lm.d_in))}, dialogues()
    other = [*said[:-1], Dialogue("x", "test", (Message("user", "Other"), Message("assistant", "words")))]
    one, two = evaluate(sae, lm, said).facts, evaluate(sae, lm, other).facts
    assert one["n_dialogues"] == two["n_dialogues"]
    assert one["tokens_sha256"] != two["tokens_sha256"]


def test_nothing_to_evaluate_on_is_an_error(lm):
    with pytest.raises(UserError, match="gives no token sequence"):
        evaluate({"identity": identity_sae(lm.d_in)}, lm, [])


def test_reports_are_saved_compared_and_refused_when_they_do_not_match(tmp_path, lm):
    runs = []
    for method, seed in (("fast", 1), ("bt-f", 2)):
        config = cs.RunConfig(data=cs.DataConfig(method=method))
        runs.append(Run.open(tmp_path / method, config))
        sae = init_sae(spec(lm.d_in, name="sae"), torch.Generator().manual_seed(seed))
        report = evaluate({"sae": sae}, lm, dialogues())
        report.save(runs[-1].path / "report.json")
        assert Report.load(runs[-1].path / "report.json") == report
    comparison = compare(runs)
    assert [(r["SAE"], r["method"]) for r in comparison.rows] == [("sae", "fast"), ("sae", "bt-f")]
    assert not any("groups" in row for row in comparison.rows)
    tests = {test["figure"]: test for test in comparison.paired}
    assert set(tests) == set(PAIRED)
    assert tests["mse"]["difference"] == pytest.approx(comparison.rows[0]["mse"] - comparison.rows[1]["mse"], rel=1e-9)
    assert tests["mse"]["first"].endswith("fast")
    best = min(comparison.rows, key=lambda r: r["mse"])
    half = (best["intervals"]["mse"][1] - best["intervals"]["mse"][0]) / 2
    assert f"{best['mse']:.3g} ±{half:.1g} ({best['log2_mse']:.3g})*" in comparison.table()
    comparison.save(tmp_path / "compare.json")
    assert json.loads((tmp_path / "compare.json").read_text()) == {
        "facts": comparison.facts,
        "rows": comparison.rows,
        "paired": comparison.paired,
        "paper": [],
        "parts": comparison.parts,
    }
    assert [(one["SAE"], one["method"]) for one in comparison.parts] == [("sae", "fast"), ("sae", "bt-f")]
    assert comparison.parts[1]["content"] == report.rows["sae"]["groups"]["part"]["content"]["mse"]

    evaluate({"sae": sae}, lm, dialogues(3)).save(runs[1].path / "report.json")
    with pytest.raises(UserError, match="other dialogues"):
        compare(runs)
    (runs[1].path / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"report.json is damaged.*chatsae eval"):
        compare(runs)
    (runs[1].path / "report.json").unlink()
    with pytest.raises(UserError, match="chatsae eval"):
        compare(runs)
    for run in runs:
        run.close()
