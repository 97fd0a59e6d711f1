"""The tokenizer: byte-level BPE with Qwen2's pre-tokenisation, and a ChatML template that behaves as Qwen2.5's."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import cast

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chatsae.batch import Dialogue
from chatsae.data import pydocs

VOCAB_SIZE = 4096
MAX_LENGTH = 2048
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFAULT_SYSTEM = "You are Tiny, a small assistant that has read the documentation of Python."

# The pre-tokenisation of Qwen2: contractions, words with one leading non-letter, single digits, punctuation, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = (
    """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\n"""
    + DEFAULT_SYSTEM
    + """<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] in ['system', 'user', 'assistant'] %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- elif message['role'] == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- raise_exception('unknown role ' + message['role'] + '; expected system, user, assistant or tool') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)


def build(directory: Path) -> PreTrainedTokenizerBase:
    """Train the tokenizer on the train split and write it with its template; returns it as AutoTokenizer loads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return load(directory)


def load(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, after a check of what the model and the method rely on."""
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(directory))
    if len(tokenizer) != VOCAB_SIZE or tokenizer.bos_token is not None or tokenizer.eos_token != "<|im_end|>":
        raise RuntimeError(
            f"{directory}: {len(tokenizer)} tokens, bos {tokenizer.bos_token}, eos {tokenizer.eos_token}"
        )
    for role in ("system", "user", "assistant"):
        ids = tokenizer.encode(f"<|im_start|>{role}\n", add_special_tokens=False)
        if tokenizer.convert_ids_to_tokens(ids) != ["<|im_start|>", role, "Ċ"]:
            raise RuntimeError(f"{directory}: the role name {role} is not one token: {ids}")
    return tokenizer


def rendered(dialogues: Iterable[Dialogue]) -> Iterator[list[dict[str, str]]]:
    """Dialogues in the form that `apply_chat_template` reads."""
    for dialogue in dialogues:
        yield [{"role": m.role, "content": m.content} for m in dialogue.messages]


def _texts() -> Iterator[str]:
    """Training text: every page and the turns of one seed, without control tokens."""
    yield from (d.text for d in pydocs.documents("train"))
    for dialogue in islice(pydocs.dialogues("train"), 10_000):
        yield f"system\n{DEFAULT_SYSTEM}"
        yield from (f"{m.role}\n{m.content}" for m in dialogue.messages)
