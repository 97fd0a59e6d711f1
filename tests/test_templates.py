"""Roles, kinds and special ids of many families' templates, in training and in prompts, against patterns by hand."""

import copy
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from chat_tokenizer import chat_tokenizer
from chatsae.batch import Dialogue, Document, Kind, Message, Role, TokenBatch
from chatsae.config import SAEConfig, sae_specs
from chatsae.data.render import render
from chatsae.data.template import DATE, template_facts
from chatsae.errors import UserError
from chatsae.features.judge.client import Request
from chatsae.features.judge.local import LocalHF
from chatsae.lm.facts import planning_facts
from chatsae.lm.load import LanguageModel, demo_model_path, load_tokenizer
from chatsae.recipe import load_recipe
from chatsae.sae.base import SAE
from chatsae.steering.generate import generate
from chatsae.steering.rows import Row, row_of_ids, row_of_prompt
from chatsae.steering.tokens import token_features
from chatsae.training.plan import plan_pass
from chatsae.training.session import train_run
from template_families import FAMILIES
from templates import Family
from tiny_models import tiny_model

Turns = tuple[tuple[str, str], ...]
CHAT: Turns = (("user", "why is the sky"), ("assistant", "blue light"), ("user", "sky"), ("assistant", "It scatters"))
NAMES = ("assistant", "model", "User", "Assistant", "System")
_ROLES = {"none": Role.NONE, "default": Role.DEFAULT_SYSTEM} | {role.name.lower(): role for role in Role}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@cache
def tokenizer_of(family: Family) -> PreTrainedTokenizerBase:
    return chat_tokenizer(
        family.template,
        bos=family.bos,
        eos=family.eos,
        special=tuple(family.special.split()),
        words=("user", "system", *(("ass", "istant") if family.split_names else NAMES)),
    )


def pieces_of(family: Family, turns: Turns, *, prompt: bool) -> list[tuple[Role, str, str]]:
    """Whose, the pattern and the content of every piece that the template writes."""
    head = [piece for piece in family.head if piece[0] == "none" or turns[0][0] != "system"]
    pieces = [(_ROLES[whose], pattern, "") for whose, pattern in head]
    for i, (role, content) in enumerate(turns):
        last = family.last_assistant if i == len(turns) - 1 and role == "assistant" else ""
        pieces.append((_ROLES[role], last or getattr(family, role), content))
    return [*pieces, *([(Role.ASSISTANT, family.opening, "")] if prompt else [])]


def by_hand(family: Family, turns: Turns, *, prompt: bool = False) -> tuple[str, list[tuple[Role, Kind, bool]]]:
    """The text, and the labels of each of its characters."""
    text, labels = "", []
    special = re.compile("|".join(map(re.escape, family.special.split())))
    for whose, pattern, content in pieces_of(family, turns, prompt=prompt):
        names, inside, plain = [], (0, 0), ""
        for part in re.split(r"(\{\w+\}|@)", pattern):
            start = len(plain)
            plain += content if part == "@" else part.strip("{}")
            inside = (start, len(plain)) if part == "@" else inside
            names += [(start, len(plain))] if part.startswith("{") else []
        mine = [(whose, Kind.TEMPLATE_TEXT, False)] * len(plain)
        mine[inside[0] : inside[1]] = [(whose, Kind.CONTENT, False)] * (inside[1] - inside[0])
        for start, stop in names:
            counts = whose in (Role.USER, Role.ASSISTANT)
            mine[start:stop] = [(whose, Kind.ROLE_NAME, counts)] * (stop - start)
        for found in special.finditer(plain):
            lone = found[0] == family.bos and (family.lone_bos or whose == Role.NONE)
            kind = Kind.END_OF_TURN if found[0] in family.closing.split() else Kind.CONTROL
            label = (Role.NONE, Kind.CONTROL, False) if lone else (whose, kind, True)
            mine[found.start() : found.end()] = [label] * len(found[0])
        text, labels = text + plain, labels + mine
    return text, labels


def expected(family: Family, turns: Turns, *, prompt: bool = False) -> list[tuple[str, Role, Kind, bool]]:
    """The tokens and their labels: each has those of its content, where it holds some, else those of its end."""
    tokenizer = tokenizer_of(family)
    text, labels = by_hand(family, turns, prompt=prompt)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        said = [labels[p] for p in range(start, stop) if labels[p][1] == Kind.CONTENT and not text[p].isspace()]
        found.append((tokenizer.decode([token]), *(said[0] if said else labels[stop - 1])))
    token, role, _, special = found[0]
    return [(token, role, Kind.FIRST, special), *found[1:]]


def transformers_text(family: Family, turns: Turns, *, prompt: bool = False) -> str:
    """What transformers makes of the turns, on the day that every date is pinned to."""
    template = re.sub(r"strftime_now\('%d %b %Y'\)", f"'{DATE}'", family.template)
    template = re.sub(r"strftime_now\('%Y-%m-%d'\)", "'2024-07-26'", template)
    chat = [{"role": r, "content": [{"type": "text", "text": c}] if family.parts else c} for r, c in turns]
    return tokenizer_of(family).apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )


def of_batch(batch: TokenBatch, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, Role, Kind, bool]]:
    columns = (batch.input_ids, batch.role, batch.kind, batch.special)
    return [
        (tokenizer.decode([i]), Role(r), Kind(k), s) for i, r, k, s in zip(*(c.tolist() for c in columns), strict=True)
    ]


def of_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, Role, Kind]]:
    columns = (row.input_ids, row.role, row.kind)
    return [(tokenizer.decode([i]), Role(r), Kind(k)) for i, r, k in zip(*(c.tolist() for c in columns), strict=True)]


def trained(family: Family, turns: Turns) -> list[tuple[str, Role, Kind, bool]]:
    messages = tuple(Message(role, content) for role, content in turns)
    (batch,) = render([Dialogue("d", "test", messages)], tokenizer_of(family))
    return of_batch(batch, tokenizer_of(family))


def dialogues_of(family: Family) -> list[Turns]:
    return [CHAT, CHAT[:2], *([(("system", "You are kind"), *CHAT)] if family.system else [])]


def test_the_patterns_are_what_the_template_writes(family: Family) -> None:
    for turns in dialogues_of(family):
        assert by_hand(family, turns)[0] == transformers_text(family, turns)
        assert by_hand(family, turns[:-1], prompt=True)[0] == transformers_text(family, turns[:-1], prompt=True)


def test_special_ids_and_where_an_answer_stops(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    facts = template_facts(tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(facts.special_ids)) == set(family.expected.split())
    assert tokenizer.convert_ids_to_tokens(facts.stop_ids) == family.stop.split()
    assert facts.parts == family.parts


def test_labels_in_training(family: Family) -> None:
    for turns in dialogues_of(family):
        assert trained(family, turns) == expected(family, turns)


def test_labels_of_prompts(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    for turns in dialogues_of(family):
        messages = [{"role": role, "content": content} for role, content in turns[:-1]]
        labelled = [label[:3] for label in expected(family, turns[:-1], prompt=True)]
        assert of_row(row_of_prompt(messages, tokenizer), tokenizer) == labelled


def test_labels_of_prompts_by_their_headers(family: Family) -> None:
    """Token ids alone: what a turn is can be read off its header, where special tokens make it one.

    White space at the end of a content cannot be told from the template's.
    """
    tokenizer = tokenizer_of(family)
    row = row_of_prompt([{"role": r, "content": c} for r, c in CHAT[:-1]], tokenizer)
    found, known = (of_row(r, tokenizer) for r in (row_of_ids(row.input_ids, tokenizer), row))
    assert [token for token, *_ in found] == [token for token, *_ in known]
    if not family.headers:
        return
    start = len(
        tokenizer("".join(text for whose, text in family.head if whose == "user"), add_special_tokens=False).input_ids
    )
    for (token, *mine), (_, *theirs) in list(zip(found, known, strict=True))[start:]:
        if token.isspace() and mine[1] == Kind.CONTENT:
            assert mine[0] == theirs[0]
        else:
            assert mine == theirs, token


REWRITES = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|' + m['role'] + '|>' + c }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("<think>scatters</think>blue light", "blue light"),
        ("<think>blue</think>\n blue <b>light</b>", "blue <b>light</b>"),
        ("<think>scatters</think>", ""),
        ("scatters</think>light", "light"),
    ],
)
def test_contents_that_the_template_cuts_keep_their_roles(answer: str, kept: str) -> None:
    tokenizer, tally = chat_tokenizer(REWRITES), Counter[str]()
    turns = (Message("user", "why is the sky"), Message("assistant", answer))
    (batch,) = render([Dialogue("d", "test", turns)], tokenizer, tally=tally)
    assert not tally
    n = {role: int((batch.role == role).sum()) for role in (Role.USER, Role.ASSISTANT)}
    assert n[Role.USER] == 5
    assert sum(n.values()) == len(batch.input_ids)
    said = batch.input_ids[(batch.role == Role.ASSISTANT) & (batch.kind == Kind.CONTENT)]
    assert tokenizer.decode(said).strip() == kept


def test_thoughts_that_the_template_writes_anew_are_content() -> None:
    """Of an earlier turn they are gone; those of the last turn stand where the message has them."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% set c = m['content'] %}"
        "{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        "{% set c = c.split('</think>')[-1].lstrip('\\n') %}"
        "{% if loop.last %}{{ '<think>\\n' + t + '\\n</think>\\n\\n' }}{% endif %}{% endif %}{{ c + '<|im_end|>\\n' }}"
        "{% endfor %}"
    )
    tokenizer, tally = chat_tokenizer(template), Counter[str]()
    answer = Message("assistant", "<think>\nscatters\n</think>\n\nblue light")
    (batch,) = render([Dialogue("d", "test", (Message("user", "why"), answer) * 2)], tokenizer, tally=tally)
    assert not tally
    content = (batch.role == Role.ASSISTANT) & (batch.kind == Kind.CONTENT)
    assert tokenizer.decode(batch.input_ids[content]) == "blue light<think>\nscatters\n</think>\n\nblue light"


def test_a_prompt_that_begins_an_answer_has_its_user_turn() -> None:
    tokenizer = tokenizer_of(FAMILIES["deepseek_r1"])
    row = row_of_prompt("hi", tokenizer)
    assert tokenizer.decode(row.input_ids) == "<|bos|><|User|>hi<|Assistant|><think>\n"
    assert tokenizer.decode(row.input_ids[row.role == Role.USER]) == "<|User|>hi"
    assert set(row.kind[row.role == Role.ASSISTANT].tolist()) == {Kind.CONTROL, Kind.TEMPLATE_TEXT}


def saved_model(directory: Path, tokenizer: PreTrainedTokenizerBase, **sizes: int) -> LanguageModel:
    """A tiny model that has this tokenizer."""
    tokenizer.save_pretrained(tiny_model(directory, vocab_size=len(tokenizer), **sizes))
    return LanguageModel(directory, [1])


def test_features_of_every_special_token_are_listed(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["smollm2"])
    lm = saved_model(tmp_path, tokenizer)
    (spec,) = sae_specs(SAEConfig(architectures=("standard",)), layers=[1], d_in=lm.d_in)
    sae = SAE.create(spec)
    turns = tuple(Message(role, content) for role, content in CHAT)
    rows = token_features(lm, {"one": sae}, list(render([Dialogue("d", "test", turns)], tokenizer)))["one"]
    counts = {(row.token, row.place): row.occurrences for row in rows}
    assert {token for token, place in counts if place == "template"} == set(FAMILIES["smollm2"].expected.split())
    assert [counts[token, "template"] for token in ("user", "ass", "istant")] == [2, 2, 2]


def test_documents_begin_with_no_token_that_opens_turns() -> None:
    documents = [Document(str(i), "test", "light") for i in range(4)]
    for name, ends in (("smollm2", {"<|endoftext|>"}), ("seed_oss", {"<seed:eos>"}), ("olmo2", {"<|endoftext|>"})):
        tokenizer = tokenizer_of(FAMILIES[name])
        (batch,) = render(documents, tokenizer, method="bt-p", block_size=4)
        control = batch.input_ids[torch.isin(batch.input_ids, torch.tensor(tokenizer.all_special_ids))]
        assert {tokenizer.decode([i]) for i in control.tolist()} == ends


def test_a_date_is_the_same_wherever_a_prompt_is_rendered(tmp_path: Path) -> None:
    lm = saved_model(tmp_path, tokenizer_of(FAMILIES["llama3_2"]))
    row = row_of_prompt("why", lm.tokenizer)
    assert DATE in lm.tokenizer.decode(row.input_ids)
    assert lm.prompt_ids("why")[0].tolist() == row.input_ids.tolist()
    assert lm.prompt_ids([{"role": "user", "content": "why"}])[0].tolist() == row.input_ids.tolist()
    (batch,) = render([Dialogue("d", "test", (Message("user", "why"), Message("assistant", "sky")))], lm.tokenizer)
    assert batch.input_ids[: len(row)].tolist() == row.input_ids.tolist()


def test_answers_stop_where_the_template_ends_them(tmp_path: Path) -> None:
    """The tokenizer's eos, and the model's, is another token."""
    shutil.copytree(demo_model_path(), tmp_path, dirs_exist_ok=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        facts = json.loads((tmp_path / name).read_text())
        facts |= {"eos_token": "<|endoftext|>"} if name == "tokenizer_config.json" else {"eos_token_id": 0}
        (tmp_path / name).write_text(json.dumps(facts))
    lm, demo = (LanguageModel(path, [3], head=True) for path in (tmp_path, demo_model_path()))
    assert lm.tokenizer.eos_token == "<|endoftext|>"
    assert (lm.stop_ids, demo.stop_ids) == ({0, 2}, {2})
    (answer,) = generate(lm, ["Who are you?"], test=False).completions
    assert answer.finish_reason == "stop"
    assert len(answer.token_ids) < 20
    assert answer.text == lm.chat("Who are you?") == demo.chat("Who are you?")
    request = Request(({"role": "user", "content": "Who are you?"},), {"max_tokens": 64})
    assert LocalHF(lm).complete(request).text == answer.text


def test_a_tokenizer_with_named_templates_only(tmp_path: Path) -> None:
    family = FAMILIES["cohere"]
    tokenizer = copy.copy(tokenizer_of(family))
    tokenizer.chat_template = {"rag": family.template, "tool_use": family.template + "{{ eos_token }}"}
    lm = saved_model(tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"only named ones: rag, tool_use; set model\.chat_template to one of them"):
        lm.chat("why")
    named = LanguageModel(tmp_path, [1], chat_template="rag")
    assert named.with_head().tokenizer.chat_template == family.template
    assert template_facts(named.tokenizer).special_ids == template_facts(tokenizer_of(family)).special_ids
    assert load_tokenizer(tmp_path, chat_template="tool_use").chat_template.endswith("{{ eos_token }}")
    with pytest.raises(UserError, match=r"no chat template 'plain'; it has rag, tool_use"):
        load_tokenizer(tmp_path, chat_template="plain")


def test_a_dialogue_is_cut_at_the_models_context(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen2"])
    assert tokenizer.model_max_length > 1e20
    lm = saved_model(tmp_path, tokenizer, max_position_embeddings=64)
    assert lm.tokenizer.model_max_length == load_tokenizer(tmp_path).model_max_length == 64
    items = [Dialogue(str(n), "test", (Message("user", "why " * n), Message("assistant", "sky"))) for n in (3, 90)]
    tally = Counter[str]()
    (batch,) = render(items, lm.tokenizer, tally=tally)
    assert tally == {"cut at 64 tokens, the longest that the model takes": 1}
    assert batch.lengths.tolist()[1] == 64
    assert sum(len(found.tokens.names) for found in lm.harvest([batch])) == 2
    tally.clear()
    list(render(items, lm.tokenizer, max_length=32, tally=tally))
    assert tally == {"cut at 32 tokens": 1}


def test_a_training_goes_on_past_dialogues_longer_than_the_models_context(tmp_path: Path) -> None:
    saved_model(tmp_path / "model", tokenizer_of(FAMILIES["qwen2"]), max_position_embeddings=64)
    with (tmp_path / "chat.jsonl").open("w") as file:
        for n in range(40):
            turns = [{"role": "user", "content": f"{n} why " * (1 + n % 20)}, {"role": "assistant", "content": "sky"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {tmp_path / 'model'}, layers: [1], device: cpu}}\n"
        f"data: {{sources: [{tmp_path / 'chat.jsonl'}], text_sources: [{tmp_path / 'chat.jsonl'}], epochs: 0}}\n"
        "harvest: {token_budget: 256, pool: 32}\nbuffer: {capacity: 400}\n"
        "sae: {architectures: [standard], expansion_factors: [1]}\ntrain: {tokens: 1500, batch_size: 50}\n"
    )
    config = load_recipe(tmp_path / "recipe.yaml")
    assert train_run(config, tmp_path / "run").ending == "done"
    dropped = json.loads((tmp_path / "run" / "summary.json").read_text())["dropped"]
    assert dropped["cut at 64 tokens, the longest that the model takes"] > 3
    facts = planning_facts(config.model.name)
    assert plan_pass("r", config, facts).context.startswith("dialogues are cut at 64 tokens, the context of")
    blocks = replace(config, data=replace(config.data, method="bt-f"))
    assert "block_size is 2,048, the context of" in plan_pass("r", blocks, facts).context
    with pytest.raises(UserError, match=r"data.block_size is 2048, the context of .* is 64"):
        train_run(blocks, tmp_path / "blocks")
