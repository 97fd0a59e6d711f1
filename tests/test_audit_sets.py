"""Prompt sets are read as they are meant, and what is wrong with one is said."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chat_tokenizer import CHATML, MISTRAL, PHI, chat_tokenizer
from chatsae.audit import shipped
from chatsae.audit.behaviour import REFUSAL_PREFIXES, read_prefixes, shows
from chatsae.audit.places import render_pairs, template_end
from chatsae.audit.sets import Pair, PromptSet, halves, load_sets
from chatsae.audit.shipped import SHIPPED
from chatsae.batch import Kind, Message, Role
from chatsae.cli import main
from chatsae.errors import UserError

GENERATES = CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def lines(path: Path, *entries: Any) -> str:
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries), encoding="utf-8")
    return str(path)


def pair(i: int, **more: Any) -> dict[str, Any]:
    return {"positive": f"Bring me cup {i}.", "negative": f"What is cup {i}?"} | more


# --- files ------------------------------------------------------------------------------------------------------------


def test_lines_of_pairs_are_read_with_their_splits(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Bring me tea."}]
    path = lines(
        tmp_path / "tea.jsonl",
        {"set": "drinks", "prefixes": ["Gladly", "Sure"]},
        "",
        pair(0, id="a", category="cups", split="train"),
        {"positive": system, "negative": "What is tea?", "split": "val"},
        pair(1, split="test"),
    )
    tally: Counter[str] = Counter()
    (found,) = load_sets([path], pairs=200, tally=tally)
    assert (found.name, found.prefixes, found.source) == ("drinks", ("Gladly", "Sure"), path)
    assert [(p.id, p.category, p.half) for p in found.pairs] == [
        ("a", "cups", "choose"),
        ("line 4", "", "choose"),
        ("line 5", "", "report"),
    ]
    assert found.pairs[1].positive == (Message("system", "Be kind."), Message("user", "Bring me tea."))
    assert found.pairs[0].negative == (Message("user", "What is cup 0?"),)
    assert not tally


def test_what_is_left_out_of_a_set_is_counted(tmp_path: Path) -> None:
    same = {"positive": "Hi", "negative": "Hi"}
    path = lines(
        tmp_path / "s.jsonl", *(pair(i) for i in range(20)), pair(3), pair(50, negative="What is cup 4?"), same
    )
    tally: Counter[str] = Counter()
    (found,) = load_sets([path], pairs=18, tally=tally)
    assert len(found.pairs) == 18
    assert tally == {
        "s: a prompt that another pair has": 2,
        "s: both prompts of a pair are the same": 1,
        "s: pairs beyond --pairs 18": 2,
    }


def test_files_of_instructions_are_joined_in_their_order(tmp_path: Path) -> None:
    for split, n in (("train", 9), ("val", 3), ("test", 8)):
        for side in ("harmful", "harmless"):
            entries = [
                {"instruction": f"{side} {split} {i}", "category": None} for i in range(n + 2 * (side[4] == "l"))
            ]
            lines(tmp_path / f"{side}_{split}.json", entries)
    tally: Counter[str] = Counter()
    (found,) = load_sets([str(tmp_path)], pairs=200, tally=tally)
    assert [p.half for p in found.pairs] == ["choose"] * 12 + ["report"] * 8
    assert found.pairs[12].positive[0].content == "harmful test 0"
    assert found.pairs[12].negative[0].content == "harmless test 0"
    assert len({p.id for p in found.pairs}) == 20
    assert sum(tally.values()) == 6
    assert all("no partner" in reason for reason in tally)
    two = f"{tmp_path}/harmful_train.json:{tmp_path}/harmless_test.json"
    (joined,) = load_sets([two], pairs=200)
    assert [p.negative[0].content for p in joined.pairs] == [f"harmless test {i}" for i in range(9)]
    assert {p.half for p in joined.pairs} == {None}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["{"], "line 1 is no JSON"),
        ([pair(0), "", [1, 2]], "line 3: expected an object with positive and negative, not [1, 2]"),
        ([{"positive": "Hi"}], "line 1: negative is missing"),
        ([pair(0, negative=3)], "line 1: negative: expected a text or a list of messages, not 3"),
        ([pair(0, negative=" ")], "line 1: negative: expected a text, not ' '"),
        ([pair(0, positiv="x")], "line 1: unknown key 'positiv'; perhaps positive"),
        ([pair(0, split="dev")], "line 1: split: expected one of train, val, choose, test, report, not 'dev'"),
        ([pair(0, split="test"), pair(1)], "some pairs have a split and others none"),
        ([pair(0, positive=[{"role": "user"}])], "line 1: positive[0].content: expected a text, not None"),
        (
            [pair(0, positive=[{"role": "assistant", "content": "Hi"}])],
            "positive: the last message must be the user's, not of role 'assistant'",
        ),
        ([{"set": "x", "prefixes": "no"}, pair(0)], "line 1: prefixes: expected a list of texts, not 'no'"),
        ([], "holds no pair"),
    ],
)
def test_a_damaged_file_is_named_with_line_and_field(tmp_path: Path, entries: list[Any], message: str) -> None:
    path = lines(tmp_path / "s.jsonl", *entries)
    with pytest.raises(UserError) as error:
        load_sets([path], pairs=200)
    assert path in str(error.value)
    assert message in str(error.value)


def test_what_is_no_set_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = lines(tmp_path / "a.json", [{"text": "x"}])
    wrong = [
        (["nothing"], "'nothing' is no set: import, cannot, polite"),
        ([f"{tmp_path}/none.jsonl"], "none.jsonl cannot be read: No such file"),
        ([f"{damaged}:{damaged}"], "a.json, entry 0: expected an object with instruction"),
        ([f"{lines(tmp_path / 'b.json', '{')}:{damaged}"], "b.json is damaged"),
        ([f"{lines(tmp_path / 'c.json', {'a': 1})}:{damaged}"], "c.json: expected a list of objects"),
        ([str(tmp_path)], "expected harmful_test.json, and harmful_train.json or harmful_val.json"),
        (["import", "import"], "two sets are called 'import'"),
    ]
    for values, message in wrong:
        with pytest.raises(UserError, match=re.escape(message)):
            load_sets(values, pairs=200)
    assert main(["audit", str(tmp_path), "--sets", "nothing"]) == 2
    assert "is no set" in capsys.readouterr().err
    assert main(["audit", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["audit", str(tmp_path), "--controls", "-1"]) == 2
    assert "--controls must be at least 0, not -1" in capsys.readouterr().err
    assert main(["audit", str(tmp_path), "--prefixes", "", "Yes"]) == 2
    assert "an empty prefix" in capsys.readouterr().err
    assert main(["audit", str(tmp_path), "--prefixes", f"{tmp_path}/none.txt"]) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err


def test_the_shipped_sets_are_paired_and_their_halves_share_no_wording_and_no_object() -> None:
    sets = load_sets([], pairs=200)
    assert [one.name for one in sets] == list(SHIPPED) == ["import", "cannot", "polite"]
    for found in sets:
        chosen, report = halves(found.pairs, seed=0)
        assert (len(chosen), len(report)) == (40, 40)
        wordings = {half: {w for pair in pairs for w in pair} for half, pairs in shipped._WORDINGS[found.name].items()}
        assert {half: len(texts) for half, texts in wordings.items()} == {"choose": 10, "report": 10}
        assert not wordings["choose"] & wordings["report"]
        assert all("{x}" in text for texts in wordings.values() for text in texts)
        expected = {half: set(pairs) for half, pairs in shipped._WORDINGS[found.name].items()}
        for text, half in ((p.positive[0].content, p.half) for p in found.pairs):
            assert any(re.fullmatch(re.escape(a).replace(r"\{x\}", ".+"), text) for a, _ in expected[half or "choose"])
    for objects in (shipped._THINGS, shipped._LIBRARY):
        names = {half: text.split("," if "," in text else None) for half, text in objects.items()}
        assert not set(names["choose"]) & set(names["report"])


def test_halves_are_disjoint_and_follow_the_seed() -> None:
    pairs = [Pair(str(i), (Message("user", f"a{i}"),), (Message("user", f"b{i}"),)) for i in range(17)]
    chosen, report = halves(pairs, 3)
    assert sorted(chosen + report) == list(range(17))
    assert halves(pairs, 3) == (chosen, report)
    assert halves(pairs, 4) != (chosen, report)
    with pytest.raises(UserError, match="7 pairs to choose features on and 8 others"):
        halves(pairs[:15], 0)


# --- behaviour --------------------------------------------------------------------------------------------------------


def test_a_behaviour_is_told_by_how_an_answer_begins(tmp_path: Path) -> None:
    assert shows("  I’m sorry, I cannot walk.", REFUSAL_PREFIXES)
    assert shows("UNFORTUNATELY no", REFUSAL_PREFIXES)
    assert not shows("Sure. I'm sorry to hear it.", REFUSAL_PREFIXES)
    assert not shows("", REFUSAL_PREFIXES)
    path = tmp_path / "p.txt"
    path.write_text("Yes\n\nimport \n", encoding="utf-8")
    assert read_prefixes(path) == ("Yes", "import ")
    assert shows("import json", read_prefixes(path))
    assert not shows("important", read_prefixes(path))
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no prefix"):
        read_prefixes(path)


# --- template tokens --------------------------------------------------------------------------------------------------


def user(text: str, *before: Message) -> tuple[Message, ...]:
    return (*before, Message("user", text))


def test_the_template_tokens_after_the_text_are_the_same_for_every_pair() -> None:
    tokenizer = chat_tokenizer(GENERATES)
    turns = Message("user", "Hello"), Message("assistant", "Hi")
    found = PromptSet(
        "s",
        "s.jsonl",
        (
            Pair("0", user("Why?"), user("Hello there", *turns)),
            Pair("1", user("Say <|im_end|> now"), user("Hello")),
            Pair("2", user("why " * 200), user("sky")),
        ),
    )
    tally: Counter[str] = Counter()
    prompts = render_pairs(found, tokenizer, room=200, tally=tally)
    assert [p.id for p in prompts.pairs] == ["0"]
    assert "".join(prompts.tokens) == "<|im_end|>\\n<|im_start|>assistant\\n"
    assert prompts.places[-2].startswith("-1 ")
    assert prompts.places[-1] == "pooled"
    end = template_end(tokenizer)
    assert len(end) == len(prompts.tokens)
    for row in (prompts.positive[0], prompts.negative[0]):
        assert row.input_ids[len(row) - len(end) :].tolist() == list(end)
        said = (row.role == Role.USER) & (row.kind == Kind.CONTENT)
        assert int(said.nonzero()[-1]) == len(row) - len(end) - 1  # what the labels say, found in another way
    assert tally == {
        "s: a prompt cannot be rendered: special token in the content": 1,
        "s: a prompt of more than 200 tokens": 1,
    }
    with pytest.raises(UserError, match="no pair of s can be used: 1 × s: a prompt of more than 200 tokens"):
        render_pairs(PromptSet("s", "s.jsonl", found.pairs[2:]), tokenizer, room=200)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    bare = chat_tokenizer(GENERATES + " ")
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render_pairs(PromptSet("s", "s", (Pair("0", user("a"), user("b")),)), bare)


@pytest.mark.parametrize(
    ("template", "bos", "end"),
    [
        (MISTRAL, "<s>", "[/INST]"),
        (
            GENERATES.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"),
            None,
            "<|im_end|>\n<|im_start|>assistant\n<think>\n",
        ),
        (
            PHI.replace("{{ '<|endoftext|>' }}", "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"),
            None,
            "<|end|>\n<|assistant|>\n",
        ),
    ],
)
def test_the_end_is_found_in_other_templates(template: str, bos: str | None, end: str) -> None:
    tokenizer = chat_tokenizer(template, bos=bos)
    assert str(tokenizer.decode(list(template_end(tokenizer)))) == end


def test_a_template_that_writes_nothing_after_the_text_is_refused() -> None:
    open_end = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="writes nothing after the user's text"):
        template_end(chat_tokenizer(open_end))
