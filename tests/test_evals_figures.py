"""Figures of known answer, from sums to the rows of a report."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chatsae.batch import Kind, Role, TokenBatch
from chatsae.evals import reconstruction
from chatsae.evals.features import duplicate_figures, firing_figures, l0_quantiles
from chatsae.evals.figures import COLUMNS, dialogue_table, ratios, sae_row
from chatsae.evals.groups import NAMES, PARTITIONS, SPECIAL, VARIANTS, WHOLE, membership, turns
from chatsae.evals.loss import Predictions
from chatsae.evals.reconstruction import TOKEN_SUMS, Labelled, Reconstruction, Stream
from chatsae.lm.harvest import bare_tokens
from chatsae.statistics import ratio

SPECIAL_ID = 7


def tokens_of(lengths: list[int], *, by_id: list[int] = (), template: list[int] = (), prefix: int = 0) -> TokenBatch:
    """Sequences with some tokens special, by their place in the batch."""
    batch = bare_tokens([torch.zeros(n, dtype=torch.int64) for n in lengths])
    batch.input_ids[list(by_id)] = SPECIAL_ID
    batch.special[list(template)] = True
    return replace(batch, kind=batch.kind.clone(), prefix=batch.position < prefix)


def added(batches: list[tuple[TokenBatch, Tensor, Tensor, Tensor]], d_in: int, d_sae: int) -> dict:
    """The row of an SAE that made these reconstructions and activations of these streams, without losses."""
    sums, stream, columns = Reconstruction(d_in, d_sae), Stream(d_in), {name: [] for name in COLUMNS}
    for tokens, x, sae_out, acts in batches:
        batch = Labelled.of(tokens, [SPECIAL_ID])
        where = stream.add(x.double(), batch)
        totals, errors = sums.add(x.double(), sae_out, acts, batch, where)
        columns["n_tokens"].append(tokens.lengths.double())
        columns["squared_error"].append(totals[:, 0] / d_in)
        columns["mse"].append(errors[:, NAMES.index((WHOLE, ""))])
        for name in VARIANTS:
            columns[name].append(errors[:, NAMES.index((SPECIAL, name))])
        for i, name in enumerate(TOKEN_SUMS[3:], start=3):
            columns[name].append(totals[:, i])
    n = sum(len(b[0]) for b in batches)
    made = {name: torch.cat(parts) if parts else torch.zeros(n, dtype=torch.float64) for name, parts in columns.items()}
    return sae_row(sums, stream, dialogue_table(made, stream, d_in), torch.eye(d_sae, d_in), constant=True)


def test_explained_variance_of_a_worked_example() -> None:
    x, sae_out = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    acts = torch.tensor([[1.0, 0, 0], [1, 0, 2]])
    row = added([(tokens_of([2], by_id=[0], template=[1]), x, sae_out, acts)], 2, 3)
    exact = {
        "explained_variance": 0.8,
        "fvu": 0.2,
        "mse": 0.5,
        "mse_token": 0.5,
        "mse_sum": 1.0,
        "log2_mse": -1.0,
        "mse_st": 0.5,
        "normalized_mse": (1 / 4 + 1 / 16) / 2,
        "cosine": (2 / math.sqrt(5) + 1) / 2,
        "l2_ratio": (math.sqrt(5) / 2 + 3 / 4) / 2,
        "relative_bias": 14 / 16,
        "gamma": math.sqrt(5 / (10 - 5)),
        "l0": 1.5,
        "l1": 2.0,
        "l0_median": 1,
        "l0_p95": 2,
        "dead_fraction": 1 / 3,
        "dense_10pct": 2 / 3,
        "sink_share": 0.0,
    }
    assert {name: row[name] for name in exact} == pytest.approx(exact, abs=1e-12)
    assert row["n_tokens"] == row["dead_tokens"] == 2
    assert row["mse_st_no_first"] == 0.5
    assert row["groups"]["special"]["mse_st"]["n_tokens"] == 1


def test_eq_7_averages_within_a_dialogue_first() -> None:
    x, sae_out = torch.ones(4, 1), torch.tensor([[2.0], [3.0], [1.0], [3.0]])
    row = added([(tokens_of([1, 3], by_id=[1, 2]), x, sae_out, torch.ones(4, 1))], 1, 1)
    assert row["mse"] == pytest.approx((1 + 8 / 3) / 2, abs=1e-12)
    assert row["mse_token"] == pytest.approx(9 / 4, abs=1e-12)
    assert row["mse_st"] == pytest.approx(2.0, abs=1e-12)  # only the second dialogue has special tokens
    assert row["mse_st_template"] is None
    assert row["reasons"]["mse_st_template"] == "the evaluation set has no special token"
    assert row["reasons"]["log2_mse_st_template"] == "the evaluation set has no special token"
    assert row["fvu"] is None
    assert row["reasons"]["explained_variance"] == "the activations do not vary"
    assert row["groups"]["position"]["0"]["mse"] == pytest.approx((1 + 4) / 2)
    assert row["groups"]["position"]["1-7"]["mse"] == pytest.approx(2.0)


def test_sums_of_half_precision_activations_are_exact() -> None:
    """981 active features have no bfloat16 of their own."""
    acts = torch.zeros(2, 1000, dtype=torch.bfloat16)
    acts[0, :981] = 1
    row = added([(tokens_of([2]), torch.eye(2), torch.eye(2), acts)], 2, 1000)
    assert row["l0"] == 981 / 2
    assert row["l1"] == 981 / 2
    assert row["l0_p95"] == 981
    assert row["dead_fraction"] == 19 / 1000


def test_the_variants_of_mse_st_leave_out_what_they_say() -> None:
    errors = torch.tensor([1.0, 2, 3, 4, 5, 6])
    tokens = tokens_of([6], by_id=[0, 5], template=[0, 1, 2, 4], prefix=2)
    row = added(
        [(tokens, torch.arange(6.0)[:, None], torch.arange(6.0)[:, None] + errors[:, None].sqrt(), errors[:, None])],
        1,
        1,
    )
    expected = {
        "mse_st": (1 + 6) / 2,
        "mse_st_template": (1 + 2 + 3 + 5) / 4,
        "mse_st_no_first": (2 + 3 + 5) / 3,
        "mse_st_no_prefix": (3 + 5) / 2,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_sums_in_float64_survive_a_large_mean_and_any_batching() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(512, 8, generator=generator) + 3000).bfloat16().float()
    sae_out = x + torch.randn(512, 8, generator=generator)
    exact = 1 - float((sae_out - x).double().square().sum() / (x - x.double().mean(0)).square().sum())
    rows = []
    for size in (1, 7, 512):
        parts = zip(x.split(size), sae_out.split(size), strict=True)
        rows.append(added([(tokens_of([1] * len(a)), a, b, torch.ones(len(a), 1)) for a, b in parts], 8, 1))
        assert rows[-1]["explained_variance"] == pytest.approx(exact, rel=1e-9)
    for row in rows[1:]:
        for name in ("fvu", "mse_token", "l2_ratio", "cosine"):
            assert row["groups"]["sink"]["no"][name] == pytest.approx(rows[0]["groups"]["sink"]["no"][name], rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_parts_of_every_partition_add_up_to_the_whole(data: st.DataObject, lengths: list[int]) -> None:
    n = sum(lengths)
    tokens = tokens_of(lengths, prefix=data.draw(st.integers(0, 3)))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    tokens.role[:] = torch.randint(len(Role), (n,), generator=draw).to(torch.uint8)
    tokens.kind[:] = torch.randint(len(Kind), (n,), generator=draw).to(torch.uint8)
    x = torch.randn(n, 3, generator=draw) * torch.where(torch.rand(n, 1, generator=draw) < 0.2, 100.0, 1.0)
    sae_out, acts = x + torch.randn(n, 3, generator=draw), torch.randn(n, 5, generator=draw).relu()
    row = added([(tokens, x, sae_out, acts)], 3, 5)
    for partition in (*PARTITIONS, "sink"):
        parts = row["groups"][partition].values()
        assert sum(part["n_tokens"] for part in parts) == n
        for name in ("mse_token", "l0", "l1", "normalized_mse", "cosine", "l2_ratio"):
            total = sum(part[name] * part["n_tokens"] for part in parts)
            assert total == pytest.approx(row[name] * n, rel=1e-9), (partition, name)


def test_groups_hold_the_figures_of_their_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = tokens_of([40, 60])
    tokens.role[:] = torch.randint(3, 5, (100,), generator=generator).to(torch.uint8)
    x = torch.randn(100, 4, generator=generator)
    sae_out, acts = x * 0.8, x.relu()
    row = added([(tokens, x, sae_out, acts)], 4, 4)
    for role, part in (("user", Role.USER), ("assistant", Role.ASSISTANT)):
        chosen = tokens.role == int(part)
        x_in = x[chosen].double()
        fvu = float((0.2 * x_in).square().sum() / (x_in - x_in.mean(0)).square().sum())
        found = row["groups"]["role"][role]
        assert found["fvu"] == pytest.approx(fvu, rel=1e-5)
        assert found["l2_ratio"] == pytest.approx(0.8, rel=1e-6)
        assert found["relative_bias"] == pytest.approx(0.8, rel=1e-6)
        per_dialogue = [(0.2 * x[chosen & (tokens.sequence == s)]).square().mean() for s in (0, 1)]
        assert found["mse"] == pytest.approx(float(sum(per_dialogue)) / 2, rel=1e-5)


def test_norm_sinks_are_found_whatever_the_order_and_carry_what_they_carry() -> None:
    """Of the note: 0.1 % of the tokens at 100 times the norm carry 91 % of the squared norm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(2000, 8, generator=generator), dim=1)
    x[[3, 1500]] *= 100
    x[700] *= 9  # long, but no sink
    rows = []
    for order in (torch.arange(2000), torch.arange(1999, -1, -1)):
        parts = [(tokens_of([100]), x[i], x[i] * 0.9, torch.ones(100, 1)) for i in order.split(100)]
        rows.append(added(parts, 8, 1))
    row = rows[0]
    assert row["sink_share"] == 2 / 2000
    assert row["sink_norm_share"] == pytest.approx(20_000 / (20_000 + 81 + 1997), rel=1e-6)
    keep = torch.ones(2000, dtype=torch.bool)
    keep[[3, 1500]] = False
    rest = x[keep].double()
    fvu = float((rest * 0.1).square().sum() / (rest - rest.mean(0)).square().sum())
    assert row["fvu_no_sinks"] == pytest.approx(fvu, rel=1e-5)
    assert row["explained_variance_no_sinks"] == 1 - row["fvu_no_sinks"]
    assert row["mse_no_sinks"] == pytest.approx(float((rest * 0.1).square().mean()), rel=1e-5)
    assert row["l0_no_sinks"] == 1
    assert row["groups"]["sink"]["yes"]["n_tokens"] == 2
    assert row["groups"]["sink"]["yes"]["mse"] is None
    assert "only at the end" in row["reasons"]["sink/yes/mse"]
    for name in ("sink_share", "sink_norm_share", "fvu_no_sinks", "mse_no_sinks", "gamma"):
        assert rows[1][name] == pytest.approx(row[name], rel=1e-9)


@given(st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=5))
def test_marks_are_counted_anew_in_each_sequence(marks: list[list[bool]]) -> None:
    flat = torch.tensor([mark for row in marks for mark in row], dtype=torch.bool)
    expected = [sum(row[: i + 1]) for row in marks for i in range(len(row))]
    assert tokens_of(list(map(len, marks))).begun(flat).tolist() == expected


def test_turns_begin_with_the_messages() -> None:
    R = Role
    roles = [R.NONE, R.DEFAULT_SYSTEM, R.USER, R.USER, R.NONE, R.ASSISTANT, R.USER, R.NONE, R.USER]
    tokens = tokens_of([9, 2])
    tokens.role[:9] = torch.tensor([int(r) for r in roles], dtype=torch.uint8)
    tokens.role[9:] = int(R.USER)
    assert turns(tokens).tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3, 1, 1]


def test_the_first_token_of_an_answer_is_a_kind_of_its_own() -> None:
    tokens = tokens_of([6])
    tokens.role[:] = torch.tensor([3, 4, 4, 4, 3, 4], dtype=torch.uint8)
    tokens.kind[:] = torch.tensor([0, 2, 0, 0, 0, 0], dtype=torch.uint8)
    start = NAMES.index(("kind", "content"))
    found = membership(tokens, [])[:, start : start + 7].argmax(1)
    assert [PARTITIONS["kind"][i] for i in found] == [
        "content",
        "control",
        "first_assistant",
        "content",
        "content",
        "first_assistant",
    ]


def test_undefined_ratios_are_left_out_and_said() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    row = added([(tokens_of([2]), x, torch.zeros(2, 2), torch.zeros(2, 2))], 2, 2)
    assert row["normalized_mse"] == 1  # the token that is not zero
    assert row["l2_ratio"] == 0
    for name in ("cosine", "relative_bias", "loss", "kl_assistant", "ce_recovered_zero"):
        assert row[name] is None
        assert row["reasons"][name]
    assert row["dead_fraction"] == 1
    low, high = row["intervals"]["dead_fraction"]
    assert 0 < low < high == 1


def test_features_are_dead_rare_or_dense() -> None:
    values, intervals = firing_figures(torch.tensor([0, 1, 2, 20_000, 200_000]), 1_000_000)
    assert values == {
        "dead_fraction": 0.2,
        "rare_1e-6": 0.2,
        "rare_1e-5": 0.6,
        "dense_1pct": 0.4,
        "dense_10pct": 0.2,
        "dead_tokens": 1_000_000,
    }
    assert intervals["dead_fraction"] == pytest.approx((0.0362, 0.6245), abs=1e-3)


def test_quantiles_of_l0_are_those_of_the_tokens() -> None:
    l0 = torch.randint(0, 40, (1001,), generator=torch.Generator().manual_seed(0))
    values = l0_quantiles(torch.bincount(l0, minlength=64))
    ordered = l0.sort().values
    assert values == {"l0_median": int(ordered[500]), "l0_p95": int(ordered[math.ceil(0.95 * 1001) - 1])}


def test_duplicate_features_have_a_cosine_of_one() -> None:
    rows = torch.eye(6)
    assert duplicate_figures(rows)[0] == {"duplicate_cosine": 0, "duplicate_fraction": 0}
    rows[5] = 3 * rows[0]
    assert duplicate_figures(rows)[0] == pytest.approx({"duplicate_cosine": 2 / 6, "duplicate_fraction": 2 / 6})
    values, reasons = duplicate_figures(torch.zeros(4, 3))
    assert values["duplicate_cosine"] is None
    assert set(reasons) == set(values)


def test_predictions_against_others_are_entropies() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 30, 11, generator=generator, dtype=torch.float64) * 3
    targets = torch.randint(11, (30,), generator=generator)
    own = Predictions(p, targets)
    loss, kl, top = own.against(q).T
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True)
    assert torch.allclose(kl, expected.sum(-1), atol=1e-12)
    assert torch.allclose(own.losses, torch.nn.functional.cross_entropy(p, targets, reduction="none"))
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(q, targets, reduction="none"))
    assert torch.equal(top.bool(), p.argmax(-1) == q.argmax(-1))
    assert 0 < float(top.mean()) < 1
    same = own.against(p.clone())
    assert torch.equal(same[:, 0], own.losses)
    assert torch.equal(same[:, 1], torch.zeros(30, dtype=torch.float64))


def test_the_sums_of_a_dialogue_are_named() -> None:
    columns = {name: np.ones(3) for name in COLUMNS}
    parts = ratios(columns)
    assert ratio(parts["delta_loss"]) == 0
    assert ratio(parts["ce_recovered_zero"]) is None  # nothing to recover
    assert reconstruction.TOKEN_SUMS[3:] == tuple(c for c in COLUMNS if c in TOKEN_SUMS)
