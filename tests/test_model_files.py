"""Whatever stands in a config.json or a chat template: one line that names it, within seconds."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from chatsae.data.bounded import problem_of
from chatsae.data.template import template_facts
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel, load_tokenizer, model_facts
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2") / "config.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 7},
        {"hidden_size": "32"},
        {"hidden_size": 64.5},
        {"hidden_size": 0},
        {"hidden_size": -32},
        {"hidden_size": None},
        {"hidden_size": 10**30},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2.0},
        {"num_attention_heads": None},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"vocab_size": "many"},
        {"vocab_size": -1},
        {"rope_parameters": []},
        {"hidden_act": "magic"},
        {"model_type": ["qwen2"]},
        {"model_type": 5},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_is_refused_in_a_line(config: Path, changes: dict[str, Any]) -> None:
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | changes))
    try:
        for read in (model_facts, lambda path: LanguageModel(path, [1])):
            with pytest.raises(UserError) as error:
                read(config.parent)
            assert str(error.value).startswith(f"{config.parent}: ")
            assert "\n" not in str(error.value)
    finally:
        config.write_text(whole)


@pytest.mark.parametrize("text", ["[1]", "null", '"x"', "[" * 100_000, "", "{}"])
def test_a_configuration_that_is_none_is_refused(config: Path, text: str) -> None:
    whole = config.read_text()
    config.write_text(text)
    try:
        with pytest.raises(UserError, match=r"config\.json cannot be used"):
            model_facts(config.parent)
    finally:
        config.write_text(whole)


def test_what_transformers_says_of_a_field_is_passed_on(config: Path) -> None:
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | {"hidden_size": "32"}))
    try:
        with pytest.raises(UserError, match=r"field 'hidden_size': TypeError: .*expected int, got str"):
            model_facts(config.parent)
    finally:
        config.write_text(whole)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = "does not end within 2 seconds of processor time"
MEMORY = "takes more than 1 GiB of memory"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 // 0 }}", "refuses a plain dialogue .*by zero"),
        ("{{ 1 % 0 }}", "refuses a plain dialogue .*zero"),
        ("{{ 2.0 ** 99999 }}", "refuses a plain dialogue .*"),
        ("{{ range(10 ** 9) }}", "refuses a plain dialogue .*Range too big"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "refuses a plain dialogue .*recursion"),
        ("{{ messages[5].content }}", "refuses a plain dialogue"),
        ("{% for m in messages %}", "refuses a plain dialogue"),
        ("{{ 'x' * 99999999999 }}", MEMORY),
        ("{{ 'x' * 2000000000 }}", MEMORY),
        ("{{ 'x' * 200000 }}", MEMORY),
        ("{{ 9 ** (9 ** 9) }}", ENDLESS),
        (LOOPS, ENDLESS),
    ],
    ids=lambda text: text[:40],
)
def test_a_template_that_does_not_render_is_refused_within_seconds(tmp_path: Path, template: str, message: str) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    start = time.process_time()
    with pytest.raises(UserError, match=message) as error:
        template_facts(tokenizer)
    assert time.process_time() - start < 3  # of this process: the seconds of the trial are its child's
    assert "the chat template of" in str(error.value)
    assert "\n" not in str(error.value)


def test_work_that_ends_is_no_problem() -> None:
    assert problem_of(lambda: None) is None
    assert problem_of(lambda: 1 // 0) is None
    assert problem_of(lambda: bytearray(1 << 24)) is None
    assert problem_of(lambda: os.kill(os.getpid(), signal.SIGKILL)) == "it is stopped by signal 9"
