"""A small real byte-level BPE tokenizer with chat templates of several families, built on the spot."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]"]
SPECIAL += ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{{ '<|endoftext|>' }}"
)
_TEXT = ["system user assistant You are kind. Hello there, why is the sky blue? It scatters light.\n\n"] * 4


@cache
def chat_tokenizer(
    template: str = CHATML,
    *,
    bos: str | None = None,
    eos: str | None = "<|im_end|>",
    special: tuple[str, ...] = tuple(SPECIAL),
    words: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer with the given chat template; `bos` and `eos` are among `special`, and each of `words` is a token."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700 if words else 400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_TEXT + ["\n".join(words)] * 4 if words else _TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=eos, additional_special_tokens=list(special), bos_token=bos
    )
    tokenizer.chat_template = template
    return tokenizer
