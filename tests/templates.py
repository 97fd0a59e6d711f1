"""Chat templates, copied in short, and by hand what each of them writes around a content: those with named turns.

In the patterns `@` is the content and `{user}` a role's name; whatever else is no special token is template text.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """A template, and what it writes.

    special: its tokenizer's special tokens. head: what comes before the first turn, each piece with whose it is (none,
    default: a system turn of the template's own, user). expected: the tokens of the paper's MSE_st. closing: tokens
    that end turns. lone_bos: bos belongs to nobody wherever it stands. shown: a content as the template leaves it in an
    earlier turn. headers: roles can be told from the headers alone.
    """

    template: str
    special: str
    user: str
    assistant: str
    opening: str
    expected: str
    closing: str = ""
    stop: str = ""
    head: tuple[tuple[str, str], ...] = ()
    system: str = ""
    tool: str = ""
    bos: str | None = None
    eos: str | None = None
    lone_bos: bool = True
    split_names: bool = False
    headers: bool = True
    no_system: str = ""
    last_assistant: str = ""
    parts: bool = False


def each(**by_role: str) -> str:
    """A loop that writes a text of its own for every role; `@` is the content."""
    branches = []
    for role, text in by_role.items():
        before, after = (repr(part) for part in text.split("@"))
        word = "if" if not branches else "elif"
        branches.append(f"{{% {word} m['role'] == '{role}' %}}{{{{ {before} + m['content'] + {after} }}}}")
    return "{% for m in messages %}" + "".join(branches) + "{% endif %}{% endfor %}"


def ask(text: str) -> str:
    return "{% if add_generation_prompt %}{{ " + repr(text) + " }}{% endif %}"


def default(text: str) -> str:
    return "{% if messages[0]['role'] != 'system' %}{{ " + repr(text) + " }}{% endif %}"


_LOOP = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
TURN = {role: f"<|im_start|>{{{role}}}\n@<|im_end|>\n" for role in ("system", "user", "assistant")}
_KIND = "<|im_start|>system\nYou are kind.<|im_end|>\n"
_HEADED = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}" + ask("<|start_header_id|>assistant<|end_header_id|>\n\n")
)
_HEADED_TURN = {
    role: f"<|start_header_id|>{{{role}}}<|end_header_id|>\n\n@<|eot_id|>" for role in ("system", "user", "assistant")
}
_HEADED_OPENING = "<|start_header_id|>{assistant}<|end_header_id|>\n\n"
CHATML_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|>"
CHATML_IDS = "<|im_start|> <|im_end|> user assistant"
CHATML_OPENING = "<|im_start|>{assistant}\n"

TURNED = {
    # ChatML: qwen2, qwen2_moe, arcee, helium, yi, internlm3, zamba2, olmo3, afmoe, minicpm ...
    "qwen2": Family(
        template=default(_KIND) + _LOOP + ask("<|im_start|>assistant\n"),
        special=CHATML_SPECIAL,
        eos="<|im_end|>",
        head=(("default", _KIND.replace("system", "{system}", 1)),),
        **TURN,
        opening=CHATML_OPENING,
        expected=CHATML_IDS,
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    # bos is the token that opens turns, and "assistant" is two tokens
    "smollm2": Family(
        template="{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
        + repr(_KIND)
        + " }}{% endif %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        + ask("<|im_start|>assistant\n"),
        special=CHATML_SPECIAL,
        bos="<|im_start|>",
        eos="<|im_end|>",
        lone_bos=False,
        split_names=True,
        head=(("default", _KIND.replace("system", "{system}", 1)),),
        **TURN,
        opening=CHATML_OPENING,
        expected="<|im_start|> <|im_end|> user ass istant",
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    "smollm": Family(
        template=_LOOP + ask("<|im_start|>assistant\n"),
        special=CHATML_SPECIAL,
        bos="<|im_start|>",
        eos="<|endoftext|>",  # not what ends a turn
        lone_bos=False,
        **TURN,
        opening=CHATML_OPENING,
        expected=CHATML_IDS,
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    "lfm2": Family(
        template="{{ bos_token }}" + _LOOP + ask("<|im_start|>assistant\n"),
        special="<|startoftext|> " + CHATML_SPECIAL,
        bos="<|startoftext|>",
        eos="<|im_end|>",
        head=(("none", "<|startoftext|>"),),
        **TURN,
        opening=CHATML_OPENING,
        expected=CHATML_IDS,
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    "seed_oss": Family(
        template="{% for m in messages %}{{ bos_token + m['role'] + '\\n' + m['content'] + eos_token }}{% endfor %}"
        + ask("<seed:bos>assistant\n"),
        special="<seed:bos> <seed:eos>",
        bos="<seed:bos>",
        eos="<seed:eos>",
        lone_bos=False,
        **{role: f"<seed:bos>{{{role}}}\n@<seed:eos>" for role in ("system", "user", "assistant")},
        opening="<seed:bos>{assistant}\n",
        expected="<seed:bos> <seed:eos> user assistant",
        closing="<seed:eos>",
        stop="<seed:eos>",
    ),
    "phi4": Family(
        template=each(**{r: f"<|im_start|>{r}<|im_sep|>@<|im_end|>" for r in ("system", "user", "assistant")})
        + ask("<|im_start|>assistant<|im_sep|>"),
        special=CHATML_SPECIAL + " <|im_sep|>",
        bos="<|endoftext|>",
        eos="<|im_end|>",
        **{r: f"<|im_start|>{{{r}}}<|im_sep|>@<|im_end|>" for r in ("system", "user", "assistant")},
        opening="<|im_start|>{assistant}<|im_sep|>",
        expected=CHATML_IDS + " <|im_sep|>",
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    # thoughts of earlier turns are cut out, and the last answer gets empty ones
    "qwen3": Family(
        template="{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
        "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ c + '<|im_end|>\\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + c + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        + ask("<|im_start|>assistant\n"),
        special=CHATML_SPECIAL,
        eos="<|im_end|>",
        **TURN,
        last_assistant="<|im_start|>{assistant}\n<think>\n\n</think>\n\n@<|im_end|>\n",
        opening=CHATML_OPENING,
        expected=CHATML_IDS,
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    "llama3": Family(
        template="{{ bos_token }}" + _HEADED,
        special="<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",  # beside the token that ends a turn
        head=(("none", "<|begin_of_text|>"),),
        **_HEADED_TURN,
        opening=_HEADED_OPENING,
        expected="<|start_header_id|> <|end_header_id|> <|eot_id|> user assistant",
        closing="<|eot_id|>",
        stop="<|eot_id|>",
    ),
    "llama3_2": Family(
        template="{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: '"
        " + strftime_now('%d %b %Y') + '\\n\\n' }}{% if messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}" + _HEADED,
        special="<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        head=(
            ("none", "<|begin_of_text|>"),
            ("default", "<|start_header_id|>{system}<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"),
        ),
        user=_HEADED_TURN["user"],
        assistant=_HEADED_TURN["assistant"],
        system="<|start_header_id|>{system}<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n@<|eot_id|>",
        opening=_HEADED_OPENING,
        expected="<|start_header_id|> <|end_header_id|> <|eot_id|> user assistant",
        closing="<|eot_id|>",
        stop="<|eot_id|>",
    ),
    "llama4": Family(
        template="{{ bos_token }}"
        + _HEADED.replace("start_header_id", "header_start")
        .replace("end_header_id", "header_end")
        .replace("eot_id", "eot"),
        special="<|begin_of_text|> <|header_start|> <|header_end|> <|eot|>",
        bos="<|begin_of_text|>",
        eos="<|eot|>",
        head=(("none", "<|begin_of_text|>"),),
        **{r: f"<|header_start|>{{{r}}}<|header_end|>\n\n@<|eot|>" for r in ("system", "user", "assistant")},
        opening="<|header_start|>{assistant}<|header_end|>\n\n",
        expected="<|header_start|> <|header_end|> <|eot|> user assistant",
        closing="<|eot|>",
        stop="<|eot|>",
    ),
}
