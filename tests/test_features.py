"""Contexts of features whose answer is known, kept, shown and stored."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import chatsae
from chatsae.batch import Dialogue, Kind, Message, Role
from chatsae.cli import main
from chatsae.data.render import render
from chatsae.errors import UserError
from chatsae.features import collect as collect_module
from chatsae.features.build import build, select
from chatsae.features.collect import Reading, collect, gather
from chatsae.features.directions import logit_lens
from chatsae.features.records import Options
from chatsae.features.session import Ask, feature_stores
from chatsae.features.store import FeatureStore
from chatsae.lm.load import LanguageModel
from feature_samples import DEAD, FIRST, RARE, START, TOKEN, TWICE, planted, planted_run, rendered, said
from shared_data import shared_data

pytest_plugins = ["feature_fixtures"]

NAME = "L1-1x-standard"


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Path:
    return planted_run(tmp_path / "of", model)


def same(a: FeatureStore, b: FeatureStore) -> bool:
    """Whether two stores hold the same, but for how the model was read."""
    facts = [{k: v for k, v in s.facts.items() if k != "reading"} for s in (a, b)]
    return facts[0] == facts[1] and a.table.equals(b.table) and a.context_table.equals(b.context_table)


@pytest.mark.parametrize(("index", "text"), [(TOKEN, "<|im_end|>"), (START, "<|im_start|>"), (RARE, "Z")])
def test_a_feature_planted_on_a_token_gets_that_token(store, tokens, lm, index, text):
    here = tokens.input_ids == lm.tokenizer.convert_tokens_to_ids(text)
    feature = store.feature(index)
    assert feature.density == pytest.approx(float(here.double().mean()))
    assert feature.max_act == pytest.approx(1, rel=1e-3)  # 4 x 1 - 3
    dialogues = sorted(set(tokens.sequence[here].tolist()))  # equal activations: the first dialogues, one context each
    assert [c.index for c in feature.contexts] == dialogues[:8]
    assert [c.dialogue for c in feature.contexts] == [f"d{i}" for i in dialogues[:8]]
    for context in (*feature.contexts, *feature.sampled):
        assert context.tokens[context.peak] == text
        assert [a > 0 for a in context.acts] == [t == text for t in context.tokens]
        assert context.acts[context.peak] == context.value


def test_contexts_are_windows_of_their_dialogues_with_roles(store, tokens):
    for feature in map(store.feature, store.indices.tolist()):
        for context in (*feature.contexts, *feature.sampled):
            whole = tokens.select([context.index])
            stop = context.start + len(context)
            assert min(context.start, context.peak) >= 0
            assert context.peak < len(context) == min(16, len(whole.input_ids))
            for name in ("input_ids", "role", "kind", "prefix"):
                assert list(getattr(context, name)) == getattr(whole, name)[context.start : stop].tolist()


def test_a_feature_planted_on_position_0_gets_it(store):
    feature = store.feature(FIRST)
    assert [c.start + c.peak for c in (*feature.contexts, *feature.sampled)] == [0] * 13
    assert feature.position_counts == (30, 0, 0, 0, 0)
    assert feature.position_means[0] == pytest.approx(1, rel=1e-3)
    assert feature.kind_counts[Kind.FIRST] == 30
    assert sum(feature.role_counts) == 30
    assert feature.role_counts[Role.USER] == 30


def test_stronger_activations_come_first(store, tokens, lm):
    feature = store.feature(TWICE)
    sae, ids = planted(lm), lm.tokenizer.convert_tokens_to_ids("e")
    stream = torch.cat([a.acts[0] for a in lm.harvest([tokens], token_budget=1, pool=1)])
    acts = sae.encode(stream)[:, TWICE].detach()
    assert ((acts > 0) == (tokens.input_ids == ids)).all()
    best = sorted(((float(acts[tokens.sequence == d].max()), -d) for d in range(30)), reverse=True)[:8]
    assert [c.value for c in feature.contexts] == pytest.approx([value for value, _ in best], rel=3e-4)
    assert feature.mean_act == pytest.approx(float(acts.mean()), rel=1e-3)
    assert sum(feature.value_counts) == int((acts > 0).sum())
    sampled = [c.value for c in feature.sampled]
    assert sampled == sorted(sampled)
    exact = [float((acts[acts > 0] < value - 1e-4).double().mean()) for value in sampled]
    assert [c.quantile for c in feature.sampled] == pytest.approx(exact, abs=0.25)


def test_a_feature_that_never_fires_and_one_that_fires_rarely(store):
    dead, rare = store.feature(DEAD), store.feature(RARE)
    assert (dead.density, dead.max_act, dead.mean_act, dead.contexts, dead.sampled) == (0, 0, 0, (), ())
    assert DEAD not in store.live
    assert [c.dialogue for c in rare.contexts] == ["d3", "d13", "d23"]
    assert len(rare.sampled) == 3
    assert store.contexts(RARE, 2) == rare.contexts[:2]
    assert store.contexts(TOKEN, 2, top=False) == (store.feature(TOKEN).sampled[0], store.feature(TOKEN).sampled[-1])
    with pytest.raises(UserError, match=r"features 0\.\.127; 128 is not one"):
        store.feature(128)


def test_directions_say_what_was_planted(store, lm):
    feature = store.feature(TOKEN)
    assert feature.promoted[0][0] == "Z"  # its decoder direction is that token's embedding, and the head is tied
    assert feature.promoted[0][1] == pytest.approx(1, abs=1e-5)
    assert feature.decoder_neighbours[0][0] == DEAD
    sae, head = planted(lm), lm.with_head().model.get_output_embeddings().weight
    logits = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1) @ head[: len(lm.tokenizer)].T
    found = logit_lens(lm, sae.W_dec, k=3)
    assert found is not None
    (best, most), (worst, least) = found
    assert torch.equal(torch.from_numpy(best), logits.topk(3).indices)
    assert torch.equal(torch.from_numpy(worst), logits.topk(3, largest=False).indices)
    assert least == pytest.approx(logits.topk(3, largest=False).values.numpy(), abs=1e-6)
    assert most[:, 0] == pytest.approx(logits.max(dim=1).values.numpy(), abs=1e-6)


def test_several_contexts_of_one_dialogue_where_asked(lm, tokens):
    options = Options(features=(TOKEN,), contexts=6, sampled=0, window=8, one_per_dialogue=False)
    feature = build({NAME: planted(lm)}, lm, tokens, options, reading=Reading.of(lm))[NAME].feature(TOKEN)
    ends = tokens.input_ids == lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    first = [(int(tokens.sequence[i]), int(tokens.position[i])) for i in ends.nonzero().squeeze(1)[:6].tolist()]
    assert [(c.index, c.start + c.peak) for c in feature.contexts] == first
    assert feature.sampled == ()


@pytest.mark.parametrize("token_budget", [333, 10**6])
def test_what_is_found_does_not_depend_on_the_batches(lm, store, token_budget):
    options = Options(features=(TOKEN, START, RARE, FIRST, DEAD, TWICE), kept=9, contexts=8, sampled=5, window=16)
    again = chatsae.contexts({NAME: planted(lm)}, lm, said(30), options=options, token_budget=token_budget)[NAME]
    assert same(again, store)
    assert all((again.kept[name] == array).all() for name, array in store.kept.items())


def test_a_dialogue_shorter_than_the_window_is_shown_whole(lm):
    short = [Dialogue("short", "", (Message("user", "Z"),)), *said(2)]
    options = Options(features=(RARE,), window=30)
    (context,) = chatsae.contexts({NAME: planted(lm)}, lm, short, options=options)[NAME].contexts(RARE)
    assert "".join(context.tokens) == "<|im_start|>user\nZ<|im_end|>\n"
    assert (context.start, context.tokens[context.peak]) == (0, "Z")


def test_a_store_is_read_as_it_was_written(store, tmp_path):
    store.save(tmp_path / "a" / NAME)
    store.save(tmp_path / "a" / NAME)  # over another one
    assert [p.name for p in (tmp_path / "a").iterdir()] == [NAME]
    again = FeatureStore.load(tmp_path / "a" / NAME)
    assert same(again, store)
    assert again.facts == store.facts == json.loads((tmp_path / "a" / NAME / "facts.json").read_text())
    assert again.feature(TOKEN) == store.feature(TOKEN)
    assert again.indices.tolist() == [TOKEN, START, RARE, FIRST, DEAD, TWICE]
    assert again.columns["role_counts"].shape == (128, 6)
    assert again.means("role")[TOKEN, Role.USER] == store.feature(TOKEN).role_means[Role.USER] > 0
    facts = tmp_path / "a" / NAME / "facts.json"
    facts.write_text(facts.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(UserError, match="schema 99"):
        FeatureStore.load(facts.parent)
    facts.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        FeatureStore.load(facts.parent)
    with pytest.raises(UserError, match="holds no features"):
        FeatureStore.load(tmp_path)


def test_names_that_stand_twice_are_told_apart(lm):
    tokens = gather([rendered(lm, 3), rendered(lm, 2)], 4)
    assert tokens.names == ("d0 #0", "d1", "d2", "d0 #3")
    with pytest.raises(UserError, match="no dialogue"):
        gather([])


def test_more_features_include_those_that_fewer_had():
    kept = {"values": np.ones((50, 3), np.uint32)}
    kept["values"][::5] = 0
    few, many = (set(select(kept, Options(features=n)).tolist()) for n in (10, 25))
    assert len(few) == 10
    assert few < many < set(select(kept, Options(features=0)).tolist()) == set(np.flatnonzero(kept["values"].any(1)))
    assert few != set(select(kept, Options(features=10, seed=1)).tolist())
    assert set(select(kept, Options(features=10, also=(0,))).tolist()) == few | {0}


def test_an_interrupted_pass_goes_on_to_the_same_bits(lm, tokens, tmp_path, monkeypatch):
    options, reading = Options(kept=5, contexts=5, sampled=4), Reading.of(lm, 100)
    whole, _ = collect({NAME: planted(lm)}, lm, tokens, options, reading=reading)
    saved = []

    def stop_after_three(*args):
        saved.append(original(*args))
        if len(saved) == 3:
            raise KeyboardInterrupt

    original = collect_module.save_state
    monkeypatch.setattr(collect_module, "save_state", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        collect({NAME: planted(lm)}, lm, tokens, options, reading=reading, folder=tmp_path, seconds=0.0)
    done = json.loads((tmp_path / "state.json").read_text())["done"]
    assert done == 3
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["state-3.safetensors"]
    forwards = []
    monkeypatch.setattr(collect_module, "save_state", lambda *args: forwards.append(args[3]))
    again, _ = collect({NAME: planted(lm)}, lm, tokens, options, reading=reading, folder=tmp_path, seconds=0.0)
    assert forwards[0] == 4  # the first three are not done again
    for name, array in whole[NAME].state().items():
        assert (again[NAME].state()[name] == array).all(), name


def test_the_state_of_another_pass_or_a_damaged_one_is_not_gone_on_from(lm, tokens, tmp_path, capsys):
    options, reading = Options(kept=5, contexts=5, sampled=4), Reading.of(lm, 100)
    keepers, _ = collect({NAME: planted(lm)}, lm, tokens, options, reading=reading, folder=tmp_path, seconds=0.0)
    what = collect_module.identity({NAME: planted(lm)}, lm, tokens, options)
    assert collect_module.load_state(tmp_path, what, keepers) is not None
    assert collect_module.load_state(tmp_path, what | {"seed": 1}, keepers) is None
    (file,) = tmp_path.glob("state-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x00\x01")
    assert collect_module.load_state(tmp_path, what, keepers) is None
    assert "starts anew" in capsys.readouterr().err


def test_kill_9_and_the_same_command_end_in_the_same_files(run, tmp_path):
    code = (
        "import os, sys, signal\n"
        "from chatsae.features import collect\n"
        "write, n = collect.save_state, []\n"
        "collect.collect.__kwdefaults__['seconds'] = 0\n"
        "def killed(*args):\n"
        "    write(*args)\n"
        "    n.append(1)\n"
        "    if len(n) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "collect.save_state = killed\n"
        "from chatsae.cli import main\n"
        f"main(['features', {str(run)!r}])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert json.loads((run / "features" / ".pass" / "state.json").read_text())["done"] == 2
    assert not (run / "features" / NAME).exists()
    assert main(["features", str(run)]) == 0
    resumed = {p.name: p.read_bytes() for p in (run / "features" / NAME).iterdir()}
    assert not (run / "features" / ".pass").exists()
    assert main(["features", str(run), "--rebuild"]) == 0
    assert resumed == {p.name: p.read_bytes() for p in (run / "features" / NAME).iterdir()}
    assert set(resumed) == {"contexts.parquet", "facts.json", "features.parquet", "pass.safetensors"}


def test_saes_and_features_that_do_not_fit_are_refused(lm, tokens, model):
    with pytest.raises(UserError, match="no SAE"):
        build({}, lm, tokens, Options(), reading=Reading.of(lm))
    other = LanguageModel(model, [2], head=True)
    with pytest.raises(UserError, match="was loaded to read layers 2"):
        build({NAME: planted(other)}, other, tokens, Options(), reading=Reading.of(other))
    broken = planted(lm)
    with torch.no_grad():
        broken.W_enc[0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        build({NAME: broken}, lm, tokens, Options(), reading=Reading.of(lm))
    with pytest.raises(UserError, match="300 is not one"):
        build({NAME: planted(lm)}, lm, tokens, Options(features=(300,)), reading=Reading.of(lm))


def test_a_store_is_built_once_and_shown_anew_without_a_pass(run, monkeypatch, capsys):
    built = feature_stores(run, Ask(features=3))[NAME]
    assert built.facts["split"] == "interpret"
    assert built.facts["n_dialogues"] > 20
    written = (run / "features" / NAME / "facts.json").stat().st_mtime_ns
    assert len(feature_stores(run)[NAME]) == 3
    assert (run / "features" / NAME / "facts.json").stat().st_mtime_ns == written
    monkeypatch.setattr("chatsae.features.session.build", None)  # no further pass
    more = feature_stores(run, Ask(only=(DEAD, TOKEN), window=8))[NAME]
    assert set(more.indices.tolist()) == {*built.indices.tolist(), DEAD, TOKEN}
    assert len(more.contexts(TOKEN)[0]) == 8
    assert all((more.kept[name] == array).all() for name, array in built.kept.items())
    assert len(feature_stores(run, Ask(only=(DEAD,)))[NAME]) == len(more)


def test_a_store_of_other_weights_says_how_to_rebuild_it(run, lm, capsys):
    feature_stores(run)
    changed = planted(lm)
    with torch.no_grad():
        changed.b_enc[RARE] = -100
    changed.save(run / "saes" / NAME)
    assert main(["features", str(run)]) == 2
    error = capsys.readouterr().err
    assert "other weights" in error
    assert "--rebuild" in error
    assert feature_stores(run, Ask(rebuild=True))[NAME].feature(RARE).density == 0


def test_the_command_answers_each_question(run, capsys):
    assert main(["features", str(run), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)[NAME]
    rows = {row["feature"]: row for row in answer["features"]}
    assert set(rows) == {TOKEN, START, RARE, FIRST, TWICE}  # those that fire
    assert rows[FIRST]["position"] == "0"
    assert rows[TOKEN]["kind"] == "end_of_turn"
    assert "«<|im_end|>»" in rows[TOKEN]["example"]
    assert answer["facts"]["n_live"] == 5
    assert main(["features", str(run), "--rows", "2"]) == 0
    shown = capsys.readouterr()
    assert "5 of 5 live features" in shown.err
    assert "«<|im_end|>»" in shown.out
    assert "3 more with --rows" in shown.out
    assert main(["features", str(run), "--token", "<|im_end|>", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)[NAME][0]
    assert (first["feature"], first["active_on_token"]) == (TOKEN, 1)
    assert first["mean_on_token"] == pytest.approx(1, rel=1e-3)
    assert first["mean_everywhere"] == pytest.approx(rows[TOKEN]["mean_act"])
    assert main(["features", str(run), "--like", str(TOKEN), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[NAME]["decoder"][0]["feature"] == DEAD
    for question in (["--token", "<|im_end|>"], ["--like", "0"], ["--text", "Zed"], ["--only", "4", "0"]):
        assert main(["features", str(run), *question]) == 0
        assert NAME in capsys.readouterr().out


def test_a_text_is_read_as_a_turn_or_as_it_is(run, capsys):
    assert main(["features", str(run), "--text", "Ze", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)[NAME]
    assert "".join(row["token"] for row in rows) == "<|im_start|>user\nZe<|im_end|>\n"
    found = {row["token"]: [f["feature"] for f in row["features"]] for row in rows[1:]}
    assert found["Z"] == [RARE]
    assert found["<|im_end|>"] == [TOKEN]
    assert {f["feature"] for f in rows[0]["features"]} == {FIRST, START}
    assert main(["features", str(run), "--text", "<|im_end|>Z", "--raw", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)[NAME]
    found = [[f["feature"] for f in row["features"]] for row in rows]
    assert [sorted(row) for row in found] == [[TOKEN, FIRST], [RARE]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sae", "L9"], "has no SAE 'L9'; it has L1-1x-standard"),
        (["--token", "Zed"], "'Zed' is 3 tokens of this model, not one: 'Z' 'e' 'd'"),
        (["--token", "~"], "is in none of the"),
        (["--like", "128"], "features 0..127; 128 is not one"),
        (["--only", "-1"], "--only must be at least 0, not -1"),
        (["--dialogues", "0"], "at least 1"),
        (["--rows", "0"], "at least 1"),
        (["--token", "e", "--like", "2"], "one at a time"),
        (["--raw"], "give a --text"),
        (["--text", "", "--raw"], "empty"),
        (["--text", "<|im_end|>"], "with --raw"),
    ],
)
def test_mistakes_are_explained(shared_run, capsys, flags, message):
    assert main(["features", str(shared_run), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return planted_run(tmp_path_factory.mktemp("shared") / "of", model)


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    assert main(["features", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama3.1", "qwen2.5"])
def test_pieces_are_the_text_and_messages_are_numbered_in_real_templates(family):
    from transformers import AutoTokenizer

    from chatsae.features.text import TokenText, message_index

    tokenizer = AutoTokenizer.from_pretrained(shared_data("tokenizers", family))
    contents = [("system", "Sei nett."), ("user", "Ünïcode 你好 🤷🏽‍♀️ 𒀀𒁀?"), ("assistant", "Ja.\n"), ("user", "ok")]
    for turns in (contents, contents[1:]):
        (tokens,) = render([Dialogue("d", "", tuple(Message(r, c) for r, c in turns))], tokenizer)
        pieces = TokenText(tokenizer).of(tokens.input_ids.tolist())
        assert "".join(pieces) == tokenizer.decode(tokens.input_ids, clean_up_tokenization_spaces=False)
        assert not any("\ufffd" in piece for piece in pieces)
        index = message_index(tokens)
        for i, (_, content) in enumerate(turns):
            inside = "".join(p for p, j in zip(pieces, index.tolist(), strict=True) if j == i)
            assert content.strip() in inside
            assert inside.count("<|start_header_id|>" if "llama" in family else "<|im_start|>") == 1
        own = tokens.role == int(Role.DEFAULT_SYSTEM)
        assert (index[own] == -1).all()
