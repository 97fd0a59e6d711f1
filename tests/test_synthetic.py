"""Synthetic chat activations and the scores against their true dictionary: known answers, and slow twins."""

import sys
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatsae.batch import Kind, Role
from chatsae.buffer import mix
from chatsae.config import SAEConfig, SAESpec, TrainConfig, sae_specs
from chatsae.errors import UserError
from chatsae.evals.dictionary import CoFirings, cosines, dictionary_scores, judge, match, mcc
from chatsae.evals.synthetic import (
    END,
    GROUPS,
    SPECIAL_IDS,
    START,
    Sample,
    SyntheticChat,
    SyntheticConfig,
    SyntheticStream,
)
from chatsae.sae.base import SAE
from chatsae.sae.grid import build_grid
from chatsae.training.loop import train

WORLD = SyntheticConfig(topics=12, words=20, d_in=16, prefix_length=12, block_size=100, seed=3)
READINGS = ("fast", "bt-f", "bt-p")


@pytest.fixture(scope="module")
def chat() -> SyntheticChat:
    return SyntheticChat(WORLD)


def dialogue_starts(sample: Sample) -> torch.Tensor:
    return sample.tokens.cu_seqlens[:-1].long()


@pytest.mark.parametrize("reading", READINGS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_other_ones(reading):
    a, b, c = (SyntheticChat(WORLD).read(reading, 9, seed) for seed in (5, 5, 6))
    assert torch.equal(a.acts, b.acts)
    assert torch.equal(a.features(), b.features())
    assert len(a.acts) != len(c.acts) or not torch.equal(a.acts, c.acts)
    assert not torch.equal(SyntheticChat(replace(WORLD, seed=4)).dictionary, SyntheticChat(WORLD).dictionary)


@pytest.mark.parametrize("reading", READINGS)
def test_activations_are_features_times_dictionary_plus_noise(reading):
    noise = {}
    for level in (0.0, 0.5):
        world = SyntheticChat(replace(WORLD, noise=level))
        sample = world.read(reading, 40, 1)
        assert (sample.values >= 0).all()
        noise[level] = sample.acts - sample.features() @ world.dictionary
        rows = slice(3, 17)
        torch.testing.assert_close(sample.features(rows), sample.features()[rows], rtol=0, atol=0)
    assert noise[0.0].abs().max() < 1e-4
    assert noise[0.5].std() == pytest.approx(0.5, rel=0.03)


def test_groups_part_the_dictionary_and_the_prefix_moves_no_other(chat):
    bounds = [chat.groups[name] for name in GROUPS]
    assert [b.start for b in bounds] == [0, *[b.stop for b in bounds[:-1]]]
    assert bounds[-1].stop == len(chat.dictionary)
    assert chat.dictionary.norm(dim=1).allclose(torch.ones(len(chat.dictionary)))
    longer = SyntheticChat(replace(WORLD, prefix_length=30))
    assert torch.equal(longer.dictionary[: bounds[-1].start], chat.dictionary[: bounds[-1].start])
    assert longer.groups["prefix"].stop - longer.groups["prefix"].start == 30


def test_dialogues_have_the_shape_of_a_template_and_labels_to_match(chat):
    sample = chat.dialogues(30, 0)
    tokens = sample.tokens
    ids = tokens.input_ids
    assert len(tokens) == 30
    assert torch.equal(ids == START, torch.isin(ids, torch.tensor([START])))
    assert (ids[dialogue_starts(sample)] == START).all()
    assert (ids[tokens.cu_seqlens[1:].long() - 2] == END).all()
    assert torch.equal(tokens.special, torch.isin(ids, torch.tensor(SPECIAL_IDS)))
    assert torch.equal(tokens.prefix, tokens.position < WORLD.prefix_length)
    assert torch.equal(tokens.position == 0, tokens.kind == int(Kind.FIRST))
    assert set(tokens.role.tolist()) == {int(Role.DEFAULT_SYSTEM), int(Role.USER), int(Role.ASSISTANT)}
    for part in torch.split(torch.stack([ids, tokens.role.long()]), tokens.lengths.tolist(), dim=1):
        turns = part[1, part[0] == START].tolist()
        assert turns[0] == Role.DEFAULT_SYSTEM
        assert turns[1:] == [int(Role.USER), int(Role.ASSISTANT)] * (len(turns) // 2)
        assert (part[0] == END).sum() == len(turns)


def test_the_prefix_is_the_same_vector_in_every_dialogue_and_content_is_not(chat):
    sample = chat.dialogues(30, 0)
    at = dialogue_starts(sample)[:, None] + torch.arange(WORLD.prefix_length)
    prefix = sample.acts[at]
    torch.testing.assert_close(prefix, prefix[:1].expand_as(prefix), rtol=0, atol=1e-5)
    after = sample.acts[dialogue_starts(sample) + WORLD.prefix_length]
    assert (after - after[0]).norm(dim=1)[1:].min() > 0.5


def test_only_position_0_carries_the_sink_and_its_length_is_that_of_the_configuration(chat):
    for reading in READINGS:
        sample = chat.read(reading, 30, 0)
        sink = sample.features()[:, chat.groups["sink"]][:, 0]
        assert torch.equal(sink > 0, sample.tokens.position == 0)
        torch.testing.assert_close(sink[sink > 0], torch.full_like(sink[sink > 0], 10 * chat.typical_norm))
    plain = SyntheticChat(replace(WORLD, sink_norm=0.0)).dialogues(5, 0)
    assert plain.features()[:, chat.groups["sink"]].abs().max() == 0


def test_the_typical_norm_is_that_of_content(chat):
    wide = SyntheticChat(replace(WORLD, d_in=512, noise=0.0))
    sample = wide.dialogues(60, 0)
    content = (sample.tokens.kind == int(Kind.CONTENT)) & ~sample.tokens.prefix
    assert sample.acts[content].square().sum(1).mean().sqrt() == pytest.approx(wide.typical_norm, rel=0.05)


def test_topics_are_few_and_stay_while_words_change(chat):
    sample = chat.dialogues(40, 0)
    features, tokens = sample.features(), sample.tokens
    topics = features[:, chat.groups["topic"]] > 0
    assert not topics[tokens.prefix].any()
    for rows in torch.split(topics, tokens.lengths.tolist()):
        assert rows.any(0).sum() <= WORLD.topics_per_dialogue
    rest = topics[~tokens.prefix]
    same = (tokens.sequence[1:] == tokens.sequence[:-1])[~tokens.prefix[1:]][1:]
    on, stays = rest[:-1][same], (rest[:-1] & rest[1:])[same]
    assert stays.sum() / on.sum() > 0.9  # 0.7 if every token were drawn anew
    content = tokens.kind == int(Kind.CONTENT)
    words = features[:, chat.groups["content"]] > 0
    assert (words[content].sum(1) == 1).all()
    assert not words[~content & ~tokens.special & (tokens.input_ids < 6)].any()


def test_without_leakage_a_block_differs_from_its_dialogues_only_by_sinks_and_cuts():
    chat = SyntheticChat(replace(WORLD, leakage=0.0))
    alone, blocks = chat.dialogues(30, 7), chat.blocks(30, 7)
    assert torch.equal(alone.tokens.input_ids, blocks.tokens.input_ids)
    index = torch.arange(len(alone.acts))
    starts = torch.repeat_interleave(dialogue_starts(alone), alone.tokens.lengths.long())
    uncut = starts >= index - blocks.tokens.position
    inner = uncut & (alone.tokens.position > 0) & (blocks.tokens.position > 0)
    assert 0.2 < inner.double().mean() < 1
    torch.testing.assert_close(alone.acts[inner], blocks.acts[inner])
    own, other = alone.features(), blocks.features()
    sink, prefix = chat.groups["sink"], chat.groups["prefix"]
    assert (other[~uncut][:, prefix] == 0).all()
    own[:, sink], other[:, sink] = 0, 0
    assert (other <= own + 1e-6).all()  # a cut takes features away and adds none
    assert (own[~uncut] != other[~uncut]).any()


def test_leakage_moves_that_share_of_a_foreign_token_in_and_of_the_own_context_out():
    strength = 0.25
    chat = SyntheticChat(replace(WORLD, leakage=strength, noise=0.0))
    pure, mixed = SyntheticChat(replace(WORLD, leakage=0.0, noise=0.0)).blocks(20, 2), chat.blocks(20, 2)
    alone = chat.dialogues(20, 2)
    a, b = pure.features(), mixed.features()
    block = torch.arange(len(a)) - mixed.tokens.position
    start = torch.repeat_interleave(dialogue_starts(alone), alone.tokens.lengths.long())
    exposed = start > block
    torch.testing.assert_close(a[~exposed], b[~exposed])
    contextual = torch.zeros(a.shape[1])
    for name in ("role", "topic"):
        contextual[chat.groups[name]] = 1
    given_away = torch.where(contextual.bool(), 1 - strength, 1.0)
    lent = torch.ones(a.shape[1])
    lent[chat.groups["sink"]] = lent[chat.groups["prefix"]] = 0
    for i in torch.nonzero(exposed)[::17, 0].tolist():
        got = b[i] - a[i] * given_away
        candidates = strength * a[block[i] : start[i]] * lent
        assert (candidates - got).abs().amax(dim=1).min() < 1e-5
    assert exposed.any()


def test_documents_have_no_template_and_other_frequencies(chat):
    sample = chat.documents(60, 0)
    features, other = sample.features(), chat.dialogues(200, 0)
    for name in ("role", "template", "prefix"):
        assert (features[:, chat.groups[name]] == 0).all()
    assert set(sample.tokens.kind.tolist()) == {int(Kind.FIRST), int(Kind.CONTENT)}
    assert not sample.tokens.special.any()
    assert not sample.tokens.prefix.any()
    content = ~other.tokens.prefix & (other.tokens.kind == int(Kind.CONTENT))
    shares = [(f[:, chat.groups["content"]] > 0).double().mean(0) for f in (features, other.features()[content])]
    assert np.corrcoef(*shares)[0, 1] < 0.8


def test_blocks_are_of_the_given_size(chat):
    for reading in ("bt-f", "bt-p"):
        lengths = chat.read(reading, 20, 0).tokens.lengths
        assert (lengths[:-1] == WORLD.block_size).all()
        assert 0 < lengths[-1] <= WORLD.block_size


def test_a_prefix_of_three_tokens_is_the_header_of_the_user():
    chat = SyntheticChat(replace(WORLD, prefix_length=3))
    tokens = chat.dialogues(10, 0).tokens
    assert set(tokens.role.tolist()) == {int(Role.USER), int(Role.ASSISTANT)}
    assert tokens.prefix.sum() == 30


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prefix_length", 8),
        ("leakage", 1.5),
        ("leakage", -0.1),
        ("sink_norm", -1.0),
        ("block_size", 1),
        ("noise", -1.0),
        ("topics_per_dialogue", 13),
    ],
)
def test_an_impossible_world_is_refused_by_its_field(field, value):
    with pytest.raises(UserError, match=f"^{field}: {value} given"):
        replace(WORLD, **{field: value})


def test_a_stream_gives_new_dialogues_in_every_batch_and_repeats_by_seed(chat):
    batches = [next_two(SyntheticStream(chat, "bt-f", seed=s, at_once=4)) for s in (1, 1, 2)]
    assert torch.equal(batches[0][1].acts, batches[1][1].acts)
    lasts = [b.acts[0, -5:] for pair in (batches[0], batches[2]) for b in pair]
    assert all(not torch.equal(a, b) for a, b in permutations(lasts, 2))


def next_two(stream):
    found = iter(stream)
    return [next(found), next(found)]


def perfect(chat: SyntheticChat) -> SAE:
    """An SAE whose code is the true one where the dictionary is orthogonal."""
    n, d = chat.dictionary.shape
    spec = SAESpec(name="true", architecture="standard", form="v6", layer=0, d_in=d, d_sae=n, coefficient=0.0, lr=1e-3)
    sae = SAE.create(spec)
    with torch.no_grad():
        sae.W_dec.copy_(chat.dictionary)
        sae.W_enc.copy_(torch.linalg.pinv(chat.dictionary))
        sae.b_enc.fill_(-1e-3)  # rounding is no firing
    return sae


def test_the_true_dictionary_scores_1_everywhere():
    chat = SyntheticChat(replace(WORLD, d_in=64, noise=0.0))  # 54 features: independent
    judged = judge(perfect(chat), chat.dialogues(20, 0), chat.dictionary, chat.groups)
    for scores in judged.groups.values():
        for name in ("mcc", "mmcs", "precision", "recall", "f1", "best_f1", "covered"):
            assert scores[name] == pytest.approx(1, abs=1e-6), name
    assert judged.groups["all"]["uniqueness"] == 1
    assert judged.figures["l0"] == pytest.approx(judged.figures["true_l0"], abs=1e-9)
    assert judged.figures["explained_variance"] == pytest.approx(1, abs=1e-5)
    assert judged.figures["mse"] < 1e-6


def test_a_random_dictionary_scores_what_chance_gives():
    """E[max of m cosines] from the distribution of one: its density is proportional to (1 - cos²)^((d - 3) / 2)."""
    d, m, n = 24, 400, 300
    grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    density = (1 - grid**2).clamp_min(0) ** ((d - 3) / 2)
    below = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, grid)])
    below = below / below[-1].clone()
    expected = float(1 - torch.trapezoid(below**m, grid))
    positive = grid[10000:]
    expected_abs = float(1 - torch.trapezoid((2 * below[10000:] - 1) ** m, positive))
    generator = torch.Generator().manual_seed(0)
    W_dec, truth = (torch.randn(k, d, generator=generator) for k in (m, n))
    scores = dictionary_scores(W_dec, truth, CoFirings(m, n), {})["all"]
    assert scores["mmcs"] == pytest.approx(expected, abs=0.01)
    cosine = cosines(W_dec, truth).abs()
    assert float(cosine.amax(dim=0).mean()) == pytest.approx(expected_abs, abs=0.01)
    for i in range(n):  # taking the best that is left is a matching, if not the best one
        best = int(cosine[:, i].argmax())
        greedy = cosine[best, i] if i == 0 else greedy + cosine[best, i]
        cosine[best] = -1
    assert 0.35 < float(greedy) / n <= scores["mcc"] < expected_abs + 0.01
    assert (scores["f1"], scores["n_firing"]) == (None, 0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_matching_is_the_best_of_all_permutations(n_latents, n_features, seed):
    cosine = torch.rand(n_latents, n_features, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    small, large = sorted((n_latents, n_features))
    table = cosine.abs() if n_latents <= n_features else cosine.abs().T
    best = max(sum(float(table[i, p[i]]) for i in range(small)) for p in permutations(range(large), small))
    found = match(cosine)
    pairs = [(int(latent), j) for j, latent in enumerate(found) if latent >= 0]
    assert len(pairs) == len({latent for latent, _ in pairs}) == small
    assert sum(float(cosine[i, j].abs()) for i, j in pairs) == pytest.approx(best, abs=1e-12)


def test_co_firings_are_those_of_a_loop_and_do_not_know_batches():
    generator = torch.Generator().manual_seed(1)
    acts = torch.rand(60, 5, generator=generator) * (torch.rand(60, 5, generator=generator) < 0.4)
    true = torch.rand(60, 4, generator=generator) * (torch.rand(60, 4, generator=generator) < 0.3)
    acts[:, 4] = 0
    true[:, 3] = 0
    one, many = CoFirings(5, 4), CoFirings(5, 4)
    one.add(acts, true)
    for part in (slice(0, 7), slice(7, 8), slice(8, 60)):
        many.add(acts[part], true[part])
    for i in range(5):
        for j in range(4):
            tp = sum(bool(a > 0 and t > 0) for a, t in zip(acts[:, i], true[:, j], strict=True))
            fp = sum(bool(a > 0 and not t > 0) for a, t in zip(acts[:, i], true[:, j], strict=True))
            fn = sum(bool(t > 0 and not a > 0) for a, t in zip(acts[:, i], true[:, j], strict=True))
            precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
            f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
            for counts in (one, many):
                assert counts.precision()[i, j] == pytest.approx(precision)
                assert counts.recall()[i, j] == pytest.approx(recall)
                assert counts.f1()[i, j] == pytest.approx(f1)
    assert one.n == many.n == 60


def test_a_group_is_scored_by_its_own_features():
    """Two latents: one is the first feature and fires with it, one points away and fires with the second."""
    truth = torch.eye(3)
    W_dec = torch.tensor([[1.0, 0, 0], [0, 0, -2.0], [0.6, 0.8, 0]])
    firings = CoFirings(3, 3)
    true = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    acts = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 1, 0], [0, 0, 0]])
    firings.add(acts, true)
    scores = dictionary_scores(W_dec, truth, firings, {"a": slice(0, 1), "b": slice(1, 2), "c": slice(2, 3)})
    assert scores["a"] | {"mcc": None} == {
        **{"n_features": 1, "n_firing": 1, "mcc": None, "mmcs": 1.0, "covered": 1.0},
        **{"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "best_f1": pytest.approx(2 / 3)},
    }
    assert (scores["b"]["mmcs"], scores["b"]["mcc"]) == (pytest.approx(0.8), pytest.approx(0.8))
    assert (scores["b"]["f1"], scores["b"]["best_f1"]) == (0.0, 1.0)  # the latent that points at it never fires
    assert (scores["c"]["mmcs"], scores["c"]["mcc"], scores["c"]["f1"]) == (0.0, 1.0, None)
    assert scores["all"]["mcc"] == pytest.approx((1 + 0.8 + 1) / 3) == mcc(W_dec, truth)
    assert scores["all"]["uniqueness"] == 1.0
    assert scores["all"]["latent_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert cosines(torch.zeros(1, 3), truth).abs().max() == 0


def test_a_trained_miniature_passes_a_floor_that_its_initial_weights_do_not():
    chat = SyntheticChat(replace(WORLD, d_in=32, seed=1))
    config = SAEConfig(
        expansion_factors=(4,), l1_coefficients=(0.5,), l0_coefficients=(0.1,), bandwidth=0.5, init_threshold=0.1,
        lrs=(3e-3,),
    )  # fmt: skip
    saes = build_grid(sae_specs(config, layers=(0,), d_in=32), seed=1)
    sample = chat.dialogues(60, 2**20)
    before = {name: judge(sae, sample, chat.dictionary, chat.groups) for name, sae in saes.items()}
    acts = mix(SyntheticStream(chat, "fast", seed=1), capacity=8192, batch_size=128, seed=1)
    train(saes, acts, TrainConfig(tokens=100_000, step="plain", seed=1))
    floors = {
        "standard": {"mcc": 0.75, "f1": 0.5, "best_f1": 0.6},
        "jumprelu": {"mcc": 0.6, "f1": 0.45, "best_f1": 0.7},
    }
    for name, sae in saes.items():
        judged = judge(sae, sample, chat.dictionary, chat.groups)
        scores, untrained = judged.groups["all"], before[name].groups["all"]
        for figure, floor in floors[sae.spec.architecture].items():
            assert scores[figure] > floor > 1.2 * untrained[figure]
        assert judged.figures["explained_variance_no_prefix"] > 0.9


def test_figures_do_not_hang_on_how_tokens_are_batched(chat, monkeypatch):
    sae = build_grid(sae_specs(SAEConfig(architectures=("standard",)), layers=(0,), d_in=16), seed=0)["L0-8x-standard"]
    sample = chat.dialogues(30, 0)
    whole = judge(sae, sample, chat.dictionary, chat.groups)
    monkeypatch.setattr("chatsae.evals.dictionary._TOKENS", 1)
    single = judge(sae, sample, chat.dictionary, chat.groups)
    assert single.groups == whole.groups
    assert single.figures == pytest.approx(whole.figures, rel=1e-9)
    x, n = sample.acts.double(), sample.tokens.lengths.tolist()
    errors = (sae(sample.acts).detach().double() - x).square().mean(1)
    by_hand = sum(part.mean() for part in errors.split(n)) / len(n)
    assert whole.figures["mse"] == pytest.approx(float(by_hand), rel=1e-9)
    parts = [
        part[inside].mean()
        for part, inside in zip(errors.split(n), (sample.tokens.special & ~sample.tokens.prefix).split(n), strict=True)
    ]
    assert whole.figures["mse_st_no_prefix"] == pytest.approx(float(sum(parts) / len(parts)), rel=1e-9)


def test_without_scipy_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UserError, match="pip install scipy"):
        match(torch.ones(2, 2, dtype=torch.float64))


def test_no_stream_reads_the_dialogues_of_the_evaluation(tool, monkeypatch):

    asked: list[int] = []
    chat = SyntheticChat(WORLD)
    monkeypatch.setattr(chat, "read", lambda reading, n, seed: asked.append(seed) or chat.dialogues(1, 0))
    for seed in (1, 43, 45):
        next_two(SyntheticStream(chat, "fast", seed=seed))
    assert len(set(asked)) == 6
    assert tool[0].EVAL_SEED not in asked


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend("tools")
    import synthetic
    import synthetic_page

    return synthetic, synthetic_page


def made_up(l0s: list[float], mse: float) -> list[dict]:
    """Rows whose mse is 1 / l0 times `mse`, and whose F1 is l0 / 100."""
    return [
        {
            "architecture": architecture,
            "figures": {"l0": l0, "mse": mse / l0, "explained_variance": None, "true_l0": 3.5},
            "groups": {"all": {"f1": 0.5}, "content": {"f1": l0 / 100}},
        }
        for architecture in ("standard", "jumprelu")
        for l0 in l0s
    ]


def test_readings_are_compared_at_equal_l0_and_never_beyond_their_curves(tool):
    _, page = tool
    rows = made_up([9.0, 4.0], mse=36.0)
    found = page.at(rows, "jumprelu", 6.0)  # log 6 is half-way between log 4 and log 9
    assert found["mse"] == pytest.approx((9 + 4) / 2)
    assert found["content/f1"] == pytest.approx(0.065)
    assert found["explained_variance"] is None
    assert page.at(rows, "jumprelu", 9.5) == page.at(rows, "jumprelu", 3.9) == page.at([], "jumprelu", 6.0) == {}


def test_the_page_keeps_what_is_written_by_hand_and_divides_other_by_fast(tool, tmp_path, monkeypatch):
    experiment, page = tool
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "FIGURE", tmp_path / "img" / "figure.svg")
    page.PAGE.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n", encoding="utf-8")
    worse = {"fast": 1.0, "bt-f": 2.0, "bt-p": 5.0}
    found = {job.key: made_up([3.0, 20.0], worse[job.reading]) for job in experiment.jobs([1, 2])}
    page.write_page(found, [1, 2], 60.0)
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{page.BEGIN}")
    assert text.endswith(f"{page.END}\nafter\n")
    assert "\nold\n" not in text
    foreign = text.partition("mse of BT(F) over mse of FAST")[2].partition("###")[0].splitlines()
    assert [line.split(" | ")[1] for line in foreign if line.startswith("| leakage 0.6")] == ["2 ± 0"]
    pretrained = text.partition("mse of BT(P) over mse of FAST")[2].partition("###")[0]
    assert "| base | 5 ± 0 |" in pretrained
    assert "prefix_length" not in pretrained
    first = page.FIGURE.read_bytes()
    page.write_page(found, [1, 2], 60.0)
    assert page.FIGURE.read_bytes() == first
    assert b"<svg" in first


def test_a_job_is_done_once_and_again_when_what_it_was_made_with_changes(tool, tmp_path, monkeypatch):
    experiment, _ = tool
    monkeypatch.setattr(experiment, "TRAIN", replace(experiment.TRAIN, tokens=2560))
    todo = [job for job in experiment.jobs([3]) if job.world.leakage == 0.6 or job.name == "sweep-threshold"]
    assert {(job.name, job.reading) for job in todo} >= {("factors", "bt-f"), ("factors", "bt-p")}
    done: list[str] = []
    monkeypatch.setattr(experiment, "run", lambda job: done.append(job.key) or [{"sae": job.reading}])
    first, _ = experiment.measure(todo, tmp_path)
    again, _ = experiment.measure(todo, tmp_path)
    assert first == again == {job.key: [{"sae": job.reading}] for job in todo}
    assert len(done) == len(todo)
    monkeypatch.setattr(experiment, "EVAL_DIALOGUES", 7)
    experiment.measure(todo, tmp_path)
    assert len(done) == 2 * len(todo)


def test_leakage_changes_no_job_that_reads_dialogues_alone(tool):
    experiment, _ = tool
    todo = experiment.jobs([1])
    assert len({job.key for job in todo}) == len(todo)
    worlds = [job.world.leakage for job in todo if job.reading == "fast" and job.name == "factors"]
    assert len(worlds) == 5  # the base point, two sinks, two prefixes
    assert sum(job.reading == "bt-f" for job in todo) == 7


def test_a_job_trains_the_grid_that_it_names(tool, monkeypatch):
    experiment, _ = tool
    (job,) = [j for j in experiment.jobs([5]) if j.reading == "bt-p" and j.world.sink_norm == 0]
    short = replace(experiment.TRAIN, tokens=1280, step="plain")
    monkeypatch.setattr(experiment, "CAPACITY", 1024)
    rows = experiment.run(job, short, dialogues=3)
    assert [r["coefficient"] for r in rows] == [c for own in experiment.COEFFICIENTS["bt-p"] for c in own]
    assert all(r["figures"]["mse"] > 0 and set(r["groups"]) == {"all", *GROUPS} for r in rows)
    assert rows == experiment.run(job, short, dialogues=3)
