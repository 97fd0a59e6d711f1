"""One pass gives what a whole forward per SAE and per ablation gives."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from chatsae.batch import Dialogue, Message, Role, TokenBatch
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.evals import loss
from chatsae.evals.evaluate import evaluate, evaluate_tokens
from chatsae.evals.loss import constant_losses
from chatsae.evals.report import Report, paired_test
from chatsae.evals.resume import Trunk
from chatsae.evals.schema import VERSION, report_schema
from chatsae.lm.harvest import isolation_error
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import splice
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae
from sae_samples import constant_sae, identity_sae, spec
from tiny_models import DECODERS, MULTIMODAL, random_tokens, tiny_model, tiny_tokenizer

TEXTS = ("Hello", "What is a user?", "I am a user and an assistant.", "x" * 40, "one two three", "")
FAMILIES = (*DECODERS, "llama-dynamic", "phi3-longrope", "minicpm3", "gpt2", "mistral", "phi", "olmo2", "gpt-oss")
FAMILIES += ("phimoe", "bloom", "mamba", *MULTIMODAL)


def dialogues(n: int = 9) -> list[Dialogue]:
    def said(i: int) -> str:
        return TEXTS[i % len(TEXTS)] + "." * (i % 4)

    return [
        Dialogue(
            str(i),
            "test",
            tuple(Message(("user", "assistant")[t % 2], said(i * 3 + t) + "!") for t in range(2 + i % 3)),
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """In float64, so that what is left of a difference is not rounding."""
    lm = LanguageModel(tiny_tokenizer(tiny_model(tmp_path_factory.mktemp("qwen2"))), [1, 2])
    full = lm.with_head()
    full.model.double()
    lm.dtype = full.dtype = torch.float64
    return lm


def some_saes(d_in: int) -> dict[str, SAE]:
    """Two SAEs of one layer and one of another."""
    saes = {}
    for i, (layer, architecture) in enumerate([(1, "standard"), (1, "jumprelu"), (2, "standard")]):
        made = spec(d_in, layer=layer, architecture=architecture)
        saes[made.name] = init_sae(made, torch.Generator().manual_seed(i)).double()
    return saes


@torch.inference_mode()
def naive(sae: SAE, lm: LanguageModel, sequences: list[TokenBatch]) -> dict[str, float]:
    """Every figure that needs the model, one dialogue and one whole forward at a time."""
    full, layer = lm.with_head(), sae.spec.layer

    def run(ids: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        with splice(full, layer, replace):
            return full.model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)

    found: list[Tensor] = []
    for tokens in sequences:
        run(tokens.input_ids, lambda x: found.append(x[0]) or x)
    mean = torch.cat(found).mean(0)
    sums: dict[str, Tensor] = {}
    for tokens in sequences:
        ids, targets = tokens.input_ids, tokens.input_ids[1:, None]
        own, spliced = run(ids, lambda x: x), run(ids, sae)
        zero, average = run(ids, torch.zeros_like), run(ids, lambda x: mean.expand_as(x))
        losses = [-logits.gather(1, targets)[:, 0] for logits in (own, spliced, zero, average)]
        kl = (own.exp() * (own - spliced)).sum(-1)
        top = (own.argmax(-1) == spliced.argmax(-1)).double()
        values = torch.stack([*losses, kl, top, torch.ones_like(kl)], dim=1)
        for suffix, chosen in (("", values), ("_assistant", values[tokens.role[1:] == int(Role.ASSISTANT)])):
            sums[suffix] = sums.get(suffix, 0) + chosen.sum(0)
    figures = {}
    for suffix, total in sums.items():
        own, spliced, zero, average, kl, top = (total[:-1] / total[-1]).tolist()
        figures |= {f"loss{suffix}": own, f"delta_loss{suffix}": spliced - own, f"kl{suffix}": kl}
        figures |= {f"delta_loss_percent{suffix}": 100 * (spliced - own) / own, f"top1_agreement{suffix}": top}
        figures |= {f"loss_zero_ablation{suffix}": zero, f"loss_mean_ablation{suffix}": average}
        for name, ablated in (("zero", zero), ("mean", average)):
            figures[f"ce_recovered_{name}{suffix}"] = (ablated - spliced) / (ablated - own) if ablated > own else None
    return figures


def alone(lm: LanguageModel, items: list[Dialogue]) -> list[TokenBatch]:
    return [batch.select([i]) for batch in render(items, lm.tokenizer) for i in range(len(batch))]


def test_one_pass_equals_a_whole_forward_for_everything(lm: LanguageModel) -> None:
    saes = some_saes(lm.d_in)
    report = evaluate(saes, lm, dialogues(), resamples=50)
    for name, sae in saes.items():
        expected = naive(sae, lm, alone(lm, dialogues()))
        assert len(expected) == 18
        for figure, value in expected.items():
            assert report.rows[name][figure] == (None if value is None else pytest.approx(value, rel=1e-8)), figure


def flat(value: object, path: str = "") -> dict[str, object]:
    """All leaves of a report's rows, by their place."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{path}/{i}").items()}
    return {path: value}


def test_batches_order_padding_and_shortcuts_change_nothing(lm: LanguageModel) -> None:
    saes = some_saes(lm.d_in)
    said = dialogues()
    base = evaluate(saes, lm, said, resamples=50)
    others = [evaluate(saes, lm, said, token_budget=budget, resamples=50) for budget in (1, 70, 100_000)]
    others.append(evaluate(saes, lm, said[::-1], resamples=50))
    others.append(evaluate(saes, lm, said, shortcuts=False, resamples=50))
    expected = flat(base.rows)
    assert len(expected) > 1000
    for other in others:
        found = flat(other.rows)
        assert list(found) == list(expected)
        for place, value in expected.items():
            exact = isinstance(value, str | int) or value is None
            assert found[place] == (value if exact else pytest.approx(value, rel=1e-6, abs=1e-12)), place


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_from_a_layer_exactly(tmp_path: Path, family: str) -> None:
    full = LanguageModel(tiny_model(tmp_path, family), [1], head=True)
    trunk, whole = Trunk(full, [0, 1, 3]), Trunk(full, [0, 1, 3], shortcuts=False)
    assert trunk.headless
    assert trunk.resumed == trunk.constant == whole.constant == {0, 1, 3}
    assert not whole.headless
    assert not whole.resumed
    tokens = random_tokens([31, 17, 2], seed=5)
    ids = tokens.padded()
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        states, residuals = trunk.clean(ids)
        logits, same = whole.clean(ids)
        for layer in trunk.layers:
            assert torch.equal(residuals[layer], same[layer])
            other = residuals[layer] * (1 + 0.3 * torch.randn(residuals[layer].shape, generator=generator))
            expected = whole.spliced(layer, other, ids)
            got = trunk.spliced(layer, other, ids)
            assert not torch.allclose(expected[:, 3:], logits[:, 3:], rtol=1e-3)
            assert torch.allclose(trunk.logits(got.flatten(0, 1)), expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
            assert torch.equal(trunk.spliced(layer, residuals[layer], ids), states)
        vector = torch.randn(full.d_in, generator=generator)
        once = constant_losses(trunk, 1, vector, tokens)
        row = whole.spliced(1, vector.expand(*ids.shape, -1), ids)
        for i, (part, losses) in enumerate(
            zip(tokens.input_ids.split([31, 17, 2]), once.split([31, 17, 2]), strict=True)
        ):
            own = torch.nn.functional.cross_entropy(row[i, : len(part) - 1], part[1:], reduction="none")
            assert losses[0] == 0
            assert torch.allclose(losses[1:].float(), own, rtol=1e-4, atol=1e-4)
    assert not any(block._forward_hooks or "forward" in block.__dict__ for block in full.blocks)


def test_only_later_blocks_run_when_going_on(lm: LanguageModel) -> None:
    full = lm.with_head()
    trunk = Trunk(full, [1])
    ids = random_tokens([7]).padded()
    ran: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, block in enumerate(full.blocks)
    ]
    with torch.inference_mode():
        _, residuals = trunk.clean(ids)
        assert ran == [0, 1, 2, 3]
        trunk.spliced(1, residuals[1], ids)
    assert ran == [0, 1, 2, 3, 2, 3]
    for handle in handles:
        handle.remove()


def test_each_sae_costs_the_blocks_after_its_layer_and_ablations_one_sequence_for_all(lm: LanguageModel) -> None:
    """1 + M (1 - l / L) forwards, and two of one dialogue."""
    full, sae = lm.with_head(), some_saes(lm.d_in)["L1-2x-standard"]
    ran: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda m, a, o: ran.append(o.shape[0] * o.shape[1])) for block in full.blocks
    ]
    cost = []
    for n in (0, 1, 3):
        ran.clear()
        if n:
            report = evaluate({str(i): sae for i in range(n)}, lm, dialogues(), token_budget=1, resamples=20)
        else:
            Trunk(full, [1])
            isolation_error(lm)
        cost.append(sum(ran))
    for handle in handles:
        handle.remove()
    n_tokens = report.rows["0"]["n_tokens"]
    longest = max(len(t.input_ids) for t in alone(lm, dialogues()))
    later = 2  # blocks after layer 1 of the 4
    assert cost[2] - cost[1] == 2 * later * n_tokens
    assert cost[1] - cost[0] == (4 + later) * n_tokens + 2 * later * longest


def test_logits_are_made_of_a_few_tokens_at_a_time(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    saes = some_saes(lm.d_in)
    expected = flat(evaluate(saes, lm, dialogues(), resamples=20).rows)
    monkeypatch.setattr(loss, "_CELLS", 1)
    monkeypatch.setattr(loss, "_LEAST_ROWS", 20)
    made: list[int] = []
    head = lm.with_head().model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, a, o: made.append(o.shape[0] * o.shape[1]))
    found = flat(evaluate(saes, lm, dialogues(), resamples=20).rows)
    handle.remove()
    assert max(made) == 20
    assert sum(made) > 3 * len(saes) * 20
    for place, value in expected.items():
        assert found[place] == (pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value), place


class Remembering(nn.Module):
    """A block that also sees what the first block saw, as architectures with shared values do."""

    def __init__(self, block: nn.Module, seen: list[Tensor], writes: bool) -> None:
        super().__init__()
        self.block, self.seen, self.writes = block, seen, writes

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        if self.writes:
            self.seen[:] = [hidden_states]
        out = self.block(hidden_states, **kwargs)
        return out if self.writes else out + self.seen[0]


def test_a_model_that_looks_back_past_the_layer_is_run_whole_and_says_what_it_cannot_tell(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_tokenizer(tiny_model(tmp_path)), [1], head=True)
    seen: list[Tensor] = []
    lm.blocks[0] = Remembering(lm.blocks[0], seen, writes=True)
    lm.blocks[3] = Remembering(lm.blocks[3], seen, writes=False)
    trunk = Trunk(lm, [1])
    assert trunk.headless
    assert not trunk.resumed
    assert not trunk.constant
    sae = init_sae(spec(lm.d_in), torch.Generator().manual_seed(1))
    row = evaluate({"sae": sae}, lm, dialogues(4), resamples=20).rows["sae"]
    expected = naive(sae, lm, alone(lm, dialogues(4)))
    assert row["delta_loss"] == pytest.approx(expected["delta_loss"], rel=1e-3)
    assert row["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    for name in ("ce_recovered_zero", "ce_recovered_mean", "loss_zero_ablation", "loss_mean_ablation_assistant"):
        assert row[name] is None
        assert row["intervals"][name] is None
        assert "more than position" in row["reasons"][name]


def test_an_identity_recovers_all_a_zero_sae_and_the_mean_nothing_of_their_ablation() -> None:
    lm = LanguageModel("demo", [2])
    said = [
        Dialogue(str(i), "t", (Message("user", f"What is {w}?"), Message("assistant", "A module.")))
        for i, w in enumerate(("os", "re", "json"))
    ]
    row = evaluate({"identity": identity_sae(lm.d_in, layer=2)}, lm, said, resamples=20).rows["identity"]
    recovered = ("ce_recovered_zero", "ce_recovered_mean", "ce_recovered_zero_assistant", "ce_recovered_mean_assistant")
    assert {name: row[name] for name in recovered} == dict.fromkeys(recovered, 1)
    zero = {"zero": constant_sae(torch.zeros(lm.d_in), layer=2)}
    row = evaluate(zero, lm, said, resamples=20).rows["zero"]
    assert row["ce_recovered_zero"] == pytest.approx(0, abs=1e-5)
    assert row["l2_ratio"] == 0
    assert row["fvu"] > 1
    with torch.inference_mode():
        x = torch.cat([Trunk(lm.with_head(), [2]).clean(t.input_ids[None])[1][2][0] for t in alone(lm, said)])
    row = evaluate({"mean": constant_sae(x.mean(0), layer=2)}, lm, said, resamples=20).rows["mean"]
    assert row["ce_recovered_mean"] == pytest.approx(0, abs=1e-4)
    assert row["fvu"] == pytest.approx(1, abs=1e-6)


def test_an_sae_of_another_model_or_layer_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"wide: d_in is 48, the residual stream of .* has 32; is it an SAE of another"):
        evaluate({"wide": identity_sae(48)}, lm, dialogues(2))
    for layer in (4, -1):
        with pytest.raises(UserError, match=rf"deep: layer is {layer}, .* has layers 0..3"):
            evaluate({"deep": identity_sae(lm.d_in, layer=layer)}, lm, dialogues(2))
    with pytest.raises(UserError, match="no SAE"):
        evaluate({}, lm, dialogues(2))
    with pytest.raises(UserError, match="no dialogue"):
        evaluate_tokens({"identity": identity_sae(lm.d_in)}, lm, [])


def test_an_sae_that_was_trained_on_another_model_is_warned_of(
    lm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = identity_sae(lm.d_in).double()
    sae.metadata["model_name"] = lm.name
    evaluate({"sae": sae}, lm, dialogues(2), resamples=20)
    assert "trained on" not in capsys.readouterr().err
    sae.metadata["model_name"] = "other"
    evaluate({"sae": sae}, lm, dialogues(2), resamples=20)
    assert "sae was trained on other and is evaluated on" in capsys.readouterr().err


def test_a_model_without_layers_of_its_own_reads_one_dialogue_at_a_time(tmp_path: Path) -> None:
    path = tiny_tokenizer(tiny_model(tmp_path))
    sae = init_sae(spec(32), torch.Generator().manual_seed(1))
    rows = [
        evaluate({"sae": sae}, m, dialogues(4), resamples=20).rows["sae"]
        for m in (LanguageModel(path), LanguageModel(path, [1]))
    ]
    for name in ("mse", "delta_loss", "fvu", "kl"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4)


def test_dialogues_that_the_model_cannot_take_are_named(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"dialogue '0' has 300 tokens, the context of .* is 256"):
        evaluate_tokens({"identity": identity_sae(lm.d_in)}, lm, [random_tokens([300])])


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_tokenizer(tiny_model(tmp_path)), [1], head=True)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer.convert_tokens_to_ids("q")] = torch.inf
    said = [
        Dialogue(n, "t", (Message("user", text), Message("assistant", "No.")))
        for n, text in (("good", "a"), ("bad", "bq"))
    ]
    with pytest.raises(UserError, match=r"layer 1, dialogue 'bad': NaN or infinite activations at \d+ of \d+ tokens"):
        evaluate({"identity": identity_sae(lm.d_in)}, lm, said)
    broken = identity_sae(lm.d_in)
    with torch.no_grad():
        broken.b_dec[0] = torch.nan
    with pytest.raises(UserError, match="broken: its reconstruction of layer 1 holds NaN"):
        evaluate({"broken": broken}, lm, said[:1])


def test_no_special_token_gives_null_and_the_reason(lm: LanguageModel) -> None:
    """Tokens that no template wrote."""
    tokens = random_tokens([12, 30], vocab=150)
    tokens.input_ids.add_(90)  # past the letters of the roles' names, which are tokens here
    sae = some_saes(lm.d_in)["L1-2x-standard"]
    row = evaluate_tokens({"sae": sae}, lm, [tokens], resamples=20).rows["sae"]
    for name in ("mse_st", "mse_st_template", "mse_st_no_first", "mse_st_no_prefix", "loss_assistant"):
        assert row[name] is None
        assert row["reasons"][name]
        assert row["intervals"][name] is None
    assert "special" not in row["groups"]
    assert Report({"sae": row}, {}).table().count(" - ") >= 2


def check(value: object, schema: dict, place: str = "") -> None:
    """The part of JSON schema that `report_schema` uses."""
    if "$ref" in schema:
        schema = report_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if "const" in schema:
        assert value == schema["const"], place
        return
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    allowed = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert any(isinstance(value, kinds[kind]) for kind in allowed), (place, value)
    if isinstance(value, dict) and ("properties" in schema or "additionalProperties" in schema):
        assert set(schema.get("required", ())) <= set(value), place
        for key, inner in value.items():
            rest = schema.get("additionalProperties", {})
            below = schema.get("properties", {}).get(key, rest)
            assert below is not False, f"{place}/{key} is not in the schema"
            check(inner, below, f"{place}/{key}")
    if isinstance(value, list):
        assert schema["minItems"] <= len(value) <= schema["maxItems"], place
        for inner in value:
            check(inner, schema["items"], place)


def refuse_constants(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_a_report_is_what_its_schema_says_and_every_null_has_a_reason(tmp_path: Path, lm: LanguageModel) -> None:
    evaluate(some_saes(lm.d_in), lm, dialogues(1), resamples=20).save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse_constants)
    check(data, report_schema())
    nulls = 0
    for row in data["saes"].values():
        for place, value in flat({k: v for k, v in row.items() if k != "reasons"}).items():
            if value is None:
                nulls += 1
                key = place[1:].removeprefix("groups/")
                assert key in row["reasons"] or key.removeprefix("intervals/") in row["reasons"], place
    assert nulls > 10
    with pytest.raises(AssertionError, match="not in the schema"):
        check(data | {"more": 1}, report_schema())


def test_the_schema_in_the_documentation_is_the_one_in_force() -> None:
    path = Path(__file__).parents[1] / "docs" / "report-schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == report_schema()


def test_reports_keep_their_sums_by_dialogue_and_test_methods_against_each_other(
    tmp_path: Path, lm: LanguageModel
) -> None:
    made = spec(lm.d_in, name="sae")
    reports = []
    for seed, said in ((1, dialogues()), (2, dialogues()[::-1])):
        sae = init_sae(made, torch.Generator().manual_seed(seed)).double()
        evaluate({"sae": sae}, lm, said, resamples=20).save(tmp_path / f"{seed}.json")
        reports.append(Report.load(tmp_path / f"{seed}.json"))
    a, b = reports
    for figure in ("mse", "fvu", "delta_loss", "mse_st"):
        test = paired_test(a, b, "sae", figure)
        assert test is not None
        assert test.difference == pytest.approx(a.rows["sae"][figure] - b.rows["sae"][figure], rel=1e-6)
        assert test.n_dialogues == 9
        assert test.interval[0] <= test.difference <= test.interval[1]
    same = paired_test(a, a, "sae", "mse")
    assert same is not None
    assert (same.difference, same.p_value) == (0, 1)
    with pytest.raises(UserError, match="no SAE 'other'"):
        paired_test(a, b, "other", "mse")
    with pytest.raises(UserError, match="'gamma' is no figure"):
        paired_test(a, b, "sae", "gamma")
    fewer = evaluate({"sae": sae}, lm, dialogues(4), resamples=20)
    with pytest.raises(UserError, match="different dialogues"):
        paired_test(a, fewer, "sae", "mse")
    with pytest.raises(UserError, match="no sums by dialogue"):
        paired_test(a, Report(a.rows, a.facts), "sae", "mse")
    Report(a.rows, a.facts).save(tmp_path / "1.json")
    assert not (tmp_path / "1.parquet").exists()
    (tmp_path / "2.parquet").write_text("no")
    with pytest.raises(UserError, match=r"2.parquet is damaged"):
        Report.load(tmp_path / "2.json")


def test_the_sums_of_a_dialogue_are_its_own(lm: LanguageModel) -> None:
    """But for those that depend on the mean of all dialogues."""
    saes = {"sae": some_saes(lm.d_in)["L1-2x-jumprelu"]}
    whole = evaluate(saes, lm, dialogues(), token_budget=90, resamples=20).dialogues
    assert whole is not None
    assert whole.keys == sorted(whole.keys)
    for said in dialogues():
        own = evaluate(saes, lm, [said], resamples=20).dialogues
        assert own is not None
        at = whole.keys.index(own.keys[0])
        for column, values in own.tables["sae"].items():
            if column not in ("variance", "loss_mean", "loss_mean_assistant"):
                assert whole.tables["sae"][column][at] == pytest.approx(values[0], rel=1e-8), column


def test_older_and_later_reports(tmp_path: Path) -> None:
    old = {"facts": {"model": "m"}, "saes": {"sae": {"mse": 1.0, "log2_mse": 0.0, "l0": 3.0}}}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(old))
    report = Report.load(path)
    assert report.rows == old["saes"]
    assert report.dialogues is None
    assert "1 (0)" in report.table()
    path.write_text(json.dumps(old | {"schema": VERSION + 1}))
    with pytest.raises(UserError, match=f"schema is {VERSION + 1}; this chatsae reads up to {VERSION}"):
        Report.load(path)


def test_more_figures_take_the_place_of_their_reason() -> None:
    report = Report({"a": {"gsnr": None, "reasons": {"gsnr": "not measured", "mse": "why"}}, "b": {"reasons": {}}}, {})
    found = report.with_figures({"a": {"gsnr": {"unit": "token"}, "reasons": {"other": "because"}}})
    assert found.rows["a"] == {"gsnr": {"unit": "token"}, "reasons": {"mse": "why", "other": "because"}}
    assert found.rows["b"] == {"reasons": {}}
