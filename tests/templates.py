"""The chat templates of many families, copied in short, and by hand what each of them writes round a content.

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


def _each(**by_role: str) -> str:
    """A loop that writes a text of its own for every role; `@` is the content."""
    branches = []
    for role, text in by_role.items():
        before, after = (repr(part) for part in text.split("@"))
        word = "if" if not branches else "elif"
        branches.append(f"{{% {word} m['role'] == '{role}' %}}{{{{ {before} + m['content'] + {after} }}}}")
    return "{% for m in messages %}" + "".join(branches) + "{% endif %}{% endfor %}"


def _ask(text: str) -> str:
    return "{% if add_generation_prompt %}{{ " + repr(text) + " }}{% endif %}"


def _default(text: str) -> str:
    return "{% if messages[0]['role'] != 'system' %}{{ " + repr(text) + " }}{% endif %}"


_LOOP = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
_TURN = {role: f"<|im_start|>{{{role}}}\n@<|im_end|>\n" for role in ("system", "user", "assistant")}
_KIND = "<|im_start|>system\nYou are kind.<|im_end|>\n"
_HEADED = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}" + _ask("<|start_header_id|>assistant<|end_header_id|>\n\n")
)
_HEADED_TURN = {
    role: f"<|start_header_id|>{{{role}}}<|end_header_id|>\n\n@<|eot_id|>" for role in ("system", "user", "assistant")
}
_HEADED_OPENING = "<|start_header_id|>{assistant}<|end_header_id|>\n\n"
_CHATML_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|>"
_CHATML_IDS = "<|im_start|> <|im_end|> user assistant"
_CHATML_OPENING = "<|im_start|>{assistant}\n"

FAMILIES = {
    # ChatML: qwen2, qwen2_moe, arcee, helium, yi, internlm3, zamba2, olmo3, afmoe, minicpm ...
    "qwen2": Family(
        template=_default(_KIND) + _LOOP + _ask("<|im_start|>assistant\n"),
        special=_CHATML_SPECIAL,
        eos="<|im_end|>",
        head=(("default", _KIND.replace("system", "{system}", 1)),),
        **_TURN,
        opening=_CHATML_OPENING,
        expected=_CHATML_IDS,
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    # bos is the token that opens turns, and "assistant" is two tokens
    "smollm2": Family(
        template="{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
        + repr(_KIND)
        + " }}{% endif %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        + _ask("<|im_start|>assistant\n"),
        special=_CHATML_SPECIAL,
        bos="<|im_start|>",
        eos="<|im_end|>",
        lone_bos=False,
        split_names=True,
        head=(("default", _KIND.replace("system", "{system}", 1)),),
        **_TURN,
        opening=_CHATML_OPENING,
        expected="<|im_start|> <|im_end|> user ass istant",
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    "smollm": Family(
        template=_LOOP + _ask("<|im_start|>assistant\n"),
        special=_CHATML_SPECIAL,
        bos="<|im_start|>",
        eos="<|endoftext|>",  # not what ends a turn
        lone_bos=False,
        **_TURN,
        opening=_CHATML_OPENING,
        expected=_CHATML_IDS,
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    "lfm2": Family(
        template="{{ bos_token }}" + _LOOP + _ask("<|im_start|>assistant\n"),
        special="<|startoftext|> " + _CHATML_SPECIAL,
        bos="<|startoftext|>",
        eos="<|im_end|>",
        head=(("none", "<|startoftext|>"),),
        **_TURN,
        opening=_CHATML_OPENING,
        expected=_CHATML_IDS,
        closing="<|im_end|>",
        stop="<|im_end|>",
    ),
    "seed_oss": Family(
        template="{% for m in messages %}{{ bos_token + m['role'] + '\\n' + m['content'] + eos_token }}{% endfor %}"
        + _ask("<seed:bos>assistant\n"),
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
        template=_each(**{r: f"<|im_start|>{r}<|im_sep|>@<|im_end|>" for r in ("system", "user", "assistant")})
        + _ask("<|im_start|>assistant<|im_sep|>"),
        special=_CHATML_SPECIAL + " <|im_sep|>",
        bos="<|endoftext|>",
        eos="<|im_end|>",
        **{r: f"<|im_start|>{{{r}}}<|im_sep|>@<|im_end|>" for r in ("system", "user", "assistant")},
        opening="<|im_start|>{assistant}<|im_sep|>",
        expected=_CHATML_IDS + " <|im_sep|>",
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
        + _ask("<|im_start|>assistant\n"),
        special=_CHATML_SPECIAL,
        eos="<|im_end|>",
        **_TURN,
        last_assistant="<|im_start|>{assistant}\n<think>\n\n</think>\n\n@<|im_end|>\n",
        opening=_CHATML_OPENING,
        expected=_CHATML_IDS,
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
    # [INST] is text here, and every question begins with bos
    "llama2": Family(
        template=_each(user="<s>[INST] @ [/INST]", assistant=" @ </s>"),
        special="<s> </s>",
        bos="<s>",
        eos="</s>",
        user="<s>[INST] @",
        assistant=" [/INST] @ </s>",
        opening=" [/INST]",
        expected="</s>",
        closing="</s>",
        stop="</s>",
        headers=False,
    ),
    "mistral": Family(
        template="{{ bos_token }}" + _each(user="[INST] @[/INST]", assistant=" @</s>"),
        special="<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
        bos="<s>",
        eos="</s>",
        head=(("none", "<s>"),),
        user="[INST] @",
        assistant="[/INST] @</s>",
        opening="[/INST]",
        expected="[INST] [/INST] </s>",
        closing="</s>",
        stop="</s>",
    ),
    # a system prompt of the template's own, which nothing closes like a turn
    "mistral3": Family(
        template="{{ bos_token }}"
        + _default("[SYSTEM_PROMPT]You are kind.[/SYSTEM_PROMPT]")
        + _each(user="[INST]@[/INST]", assistant="@</s>", system="[SYSTEM_PROMPT]@[/SYSTEM_PROMPT]"),
        special="<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
        bos="<s>",
        eos="</s>",
        head=(("none", "<s>"), ("default", "[SYSTEM_PROMPT]You are kind.[/SYSTEM_PROMPT]")),
        user="[INST]@",
        assistant="[/INST]@</s>",
        opening="[/INST]",
        expected="[INST] [/INST] </s> [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
        closing="</s>",
        stop="</s>",
    ),
    "gemma2": Family(
        template="{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim"
        " + '<end_of_turn>\\n' }}{% endfor %}" + _ask("<start_of_turn>model\n"),
        special="<bos> <eos> <start_of_turn> <end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        head=(("none", "<bos>"),),
        user="<start_of_turn>{user}\n@<end_of_turn>\n",
        assistant="<start_of_turn>{model}\n@<end_of_turn>\n",
        opening="<start_of_turn>{model}\n",
        expected="<start_of_turn> <end_of_turn> user model",
        closing="<end_of_turn>",
        stop="<end_of_turn>",
        no_system="template: System role not supported",
    ),
    "phi3": Family(
        template="{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        special="<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
        bos="<s>",
        eos="<|endoftext|>",
        **{r: f"<|{r}|>\n@<|end|>\n" for r in ("system", "user", "assistant")},
        last_assistant="<|assistant|>\n@<|end|>\n<|endoftext|>",
        opening="<|assistant|>\n",
        expected="<|user|> <|assistant|> <|end|> <|endoftext|>",
        closing="<|end|>",
        stop="<|end|>",
    ),
    # thoughts are cut out of every answer; the prompt of an answer begins some
    "deepseek_r1": Family(
        template="{{ bos_token }}{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'system' %}{{ c }}"
        "{% elif m['role'] == 'user' %}{{ '<|User|>' + c }}{% else %}{% if '</think>' in c %}"
        "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + c + '<|eos|>' }}{% endif %}{% endfor %}"
        + _ask("<|Assistant|><think>\n"),
        special="<|bos|> <|eos|> <|User|> <|Assistant|>",
        bos="<|bos|>",
        eos="<|eos|>",
        head=(("none", "<|bos|>"),),
        user="<|User|>@",
        assistant="<|Assistant|>@<|eos|>",
        system="@",
        opening="<|Assistant|><think>\n",
        expected="<|User|> <|Assistant|> <|eos|>",
        closing="<|eos|>",
        stop="<|eos|>",
    ),
    # nothing closes a turn
    "glm4": Family(
        template="{{ '[gMASK]<sop>' }}"
        + _each(**{r: f"<|{r}|>\n@" for r in ("system", "user", "assistant")})
        + _ask("<|assistant|>"),
        special="[gMASK] <sop> <|system|> <|user|> <|assistant|> <|endoftext|>",
        eos="<|endoftext|>",
        head=(("user", "[gMASK]<sop>"),),
        user="<|user|>\n@",
        assistant="<|assistant|>\n@",
        opening="<|assistant|>",
        expected="[gMASK] <sop> <|user|> <|assistant|>",
    ),
    "cohere": Family(
        template="{{ bos_token }}"
        + _each(
            **{
                r: f"<|START_OF_TURN_TOKEN|><|{n}_TOKEN|>@<|END_OF_TURN_TOKEN|>"
                for r, n in (("system", "SYSTEM"), ("user", "USER"), ("assistant", "CHATBOT"))
            }
        )
        + _ask("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
        special="<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> "
        "<|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        head=(("none", "<BOS_TOKEN>"),),
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>@<|END_OF_TURN_TOKEN|>",
        user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>@<|END_OF_TURN_TOKEN|>",
        assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>@<|END_OF_TURN_TOKEN|>",
        opening="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        expected="<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>",
        closing="<|END_OF_TURN_TOKEN|>",
        stop="<|END_OF_TURN_TOKEN|>",
    ),
    "granite": Family(
        template=_default("<|start_of_role|>system<|end_of_role|>You are kind.<|end_of_text|>\n")
        + _each(
            **{r: f"<|start_of_role|>{r}<|end_of_role|>@<|end_of_text|>\n" for r in ("system", "user", "assistant")}
        )
        + _ask("<|start_of_role|>assistant<|end_of_role|>"),
        special="<|end_of_text|> <|start_of_role|> <|end_of_role|>",
        bos="<|end_of_text|>",  # the same token ends a turn
        eos="<|end_of_text|>",
        lone_bos=False,
        head=(("default", "<|start_of_role|>{system}<|end_of_role|>You are kind.<|end_of_text|>\n"),),
        **{r: f"<|start_of_role|>{{{r}}}<|end_of_role|>@<|end_of_text|>\n" for r in ("system", "user", "assistant")},
        opening="<|start_of_role|>{assistant}<|end_of_role|>",
        expected="<|start_of_role|> <|end_of_role|> <|end_of_text|> user assistant",
        closing="<|end_of_text|>",
        stop="<|end_of_text|>",
    ),
    # bos begins the dialogue and ends an answer; the roles are text
    "olmo2": Family(
        template="{{ bos_token }}"
        + _each(user="<|user|>\n@\n", assistant="<|assistant|>\n@<|endoftext|>\n", system="<|system|>\n@\n")
        + _ask("<|assistant|>\n"),
        special="<|endoftext|> <|pad|>",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        lone_bos=False,
        head=(("none", "<|endoftext|>"),),
        user="<|user|>\n@",
        assistant="\n<|assistant|>\n@<|endoftext|>\n",
        opening="\n<|assistant|>\n",
        expected="<|endoftext|>",
        closing="<|endoftext|>",
        stop="<|endoftext|>",
        headers=False,
    ),
    "falcon3": Family(
        template=_each(user="<|user|>\n@\n", assistant="<|assistant|>\n@<|endoftext|>\n", system="<|system|>\n@\n")
        + _ask("<|assistant|>\n"),
        special="<|endoftext|> <|system|> <|user|> <|assistant|>",
        eos="<|endoftext|>",
        **{r: f"<|{r}|>\n@\n" for r in ("system", "user")},
        assistant="<|assistant|>\n@<|endoftext|>\n",
        opening="<|assistant|>\n",
        expected="<|user|> <|assistant|> <|endoftext|>",
        closing="<|endoftext|>",
        stop="<|endoftext|>",
    ),
    "exaone4": Family(
        template=_each(
            user="[|user|]@\n", assistant="[|assistant|]@[|endofturn|]\n", system="[|system|]@[|endofturn|]\n"
        )
        + _ask("[|assistant|]"),
        special="[BOS] [|endofturn|] [|system|] [|user|] [|assistant|]",
        bos="[BOS]",
        eos="[|endofturn|]",
        user="[|user|]@\n",
        assistant="[|assistant|]@[|endofturn|]\n",
        system="[|system|]@[|endofturn|]\n",
        opening="[|assistant|]",
        expected="[|user|] [|assistant|] [|endofturn|]",
        closing="[|endofturn|]",
        stop="[|endofturn|]",
    ),
    # the last answer ends with another token than turns before it, which also ends thoughts
    "gpt_oss": Family(
        template="{{ '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ '<|start|>developer<|message|>' + m['content'] + '<|end|>' }}{% elif m['role'] == 'user' %}"
        "{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}{% else %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% endif %}{% endfor %}" + _ask("<|start|>assistant"),
        special="<|startoftext|> <|start|> <|message|> <|channel|> <|end|> <|return|>",
        bos="<|startoftext|>",
        eos="<|return|>",
        head=(("default", "<|start|>{system}<|message|>Today: 2024-07-26<|end|>"),),
        user="<|start|>{user}<|message|>@<|end|>",
        assistant="<|start|>{assistant}<|channel|>final<|message|>@<|end|>",
        last_assistant="<|start|>{assistant}<|channel|>final<|message|>@<|return|>",
        opening="<|start|>{assistant}",
        expected="<|start|> <|message|> <|channel|> <|end|> <|return|> user assistant",
        closing="<|end|> <|return|>",
        stop="<|return|>",
    ),
    # what ends a question is not what ends an answer
    "apertus": Family(
        template="{{ bos_token }}"
        + _each(**{r: f"<|{r}_start|>@<|{r}_end|>" for r in ("system", "user", "assistant")})
        + _ask("<|assistant_start|>"),
        special="<s> <|system_start|> <|system_end|> <|user_start|> <|user_end|> <|assistant_start|> <|assistant_end|>",
        bos="<s>",
        eos="<|assistant_end|>",
        head=(("none", "<s>"),),
        user="<|user_start|>@<|user_end|>",
        assistant="<|assistant_start|>@<|assistant_end|>",
        opening="<|assistant_start|>",
        expected="<|user_start|> <|user_end|> <|assistant_start|> <|assistant_end|>",
        closing="<|user_end|> <|assistant_end|>",
        stop="<|assistant_end|>",
    ),
    "dots1": Family(
        template=_each(
            user="<|userprompt|>@<|endofuserprompt|>",
            assistant="<|response|>@<|endofresponse|>",
            system="<|system|>@<|endofsystem|>",
        )
        + _ask("<|response|>"),
        special="<|system|> <|endofsystem|> <|userprompt|> <|endofuserprompt|> <|response|> <|endofresponse|>",
        eos="<|endofresponse|>",
        user="<|userprompt|>@<|endofuserprompt|>",
        assistant="<|response|>@<|endofresponse|>",
        opening="<|response|>",
        expected="<|userprompt|> <|endofuserprompt|> <|response|> <|endofresponse|>",
        closing="<|endofuserprompt|> <|endofresponse|>",
        stop="<|endofresponse|>",
    ),
    "nemotron_h": Family(
        template="{{ '<SPECIAL_10>System\\n' }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
        "{% set messages = messages[1:] %}{% endif %}{{ '\\n' }}"
        + _each(user="<SPECIAL_11>User\n@\n", assistant="<SPECIAL_11>Assistant\n@\n<SPECIAL_12>\n")
        + _ask("<SPECIAL_11>Assistant\n"),
        special="<s> </s> <SPECIAL_10> <SPECIAL_11> <SPECIAL_12>",
        bos="<s>",
        eos="<SPECIAL_12>",
        head=(("default", "<SPECIAL_10>{System}\n\n"),),
        user="<SPECIAL_11>{User}\n@\n",
        assistant="<SPECIAL_11>{Assistant}\n@\n<SPECIAL_12>\n",
        opening="<SPECIAL_11>{Assistant}\n",
        expected="<SPECIAL_10> <SPECIAL_11> <SPECIAL_12> User Assistant",
        closing="<SPECIAL_12>",
        stop="<SPECIAL_12>",
    ),
    "jamba": Family(
        template="{{ bos_token }}"
        + _each(**{r: f"<|bom|><|{r}|> @<|eom|>" for r in ("system", "user", "assistant")})
        + _ask("<|bom|><|assistant|>"),
        special="<|startoftext|> <|bom|> <|eom|> <|system|> <|user|> <|assistant|>",
        bos="<|startoftext|>",
        eos="<|eom|>",
        head=(("none", "<|startoftext|>"),),
        **{r: f"<|bom|><|{r}|> @<|eom|>" for r in ("system", "user", "assistant")},
        opening="<|bom|><|assistant|>",
        expected="<|bom|> <|eom|> <|user|> <|assistant|>",
        closing="<|eom|>",
        stop="<|eom|>",
    ),
    # plain text, and bos once
    "ernie4_5": Family(
        template="{{ bos_token }}"
        + _each(user="User: @\n", assistant="Assistant: @</s>", system="@\n")
        + _ask("Assistant: "),
        special="<s> </s>",
        bos="<s>",
        eos="</s>",
        head=(("none", "<s>"),),
        user="User: @",
        assistant="\nAssistant: @</s>",
        opening="\nAssistant: ",
        expected="</s>",
        closing="</s>",
        stop="</s>",
        headers=False,
    ),
    "bitnet": Family(
        template=_each(user="User: @<|eot_id|>", assistant="Assistant: @<|eot_id|>", system="System: @<|eot_id|>")
        + _ask("Assistant: "),
        special="<|begin_of_text|> <|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        user="User: @<|eot_id|>",
        assistant="Assistant: @<|eot_id|>",
        opening="Assistant: ",
        expected="<|eot_id|>",
        closing="<|eot_id|>",
        stop="<|eot_id|>",
        headers=False,
    ),
    # a content is a list of parts: a string has no text, and is left out or refused
    "idefics3": Family(
        template="{{ '<|im_start|>' }}{% for m in messages %}{{ m['role'] | capitalize + ': ' }}"
        "{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}{% endif %}{% endfor %}"
        "{{ '<end_of_utterance>\\n' }}{% endfor %}" + _ask("Assistant:"),
        special="<|im_start|> <end_of_utterance> <image>",
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        head=(("none", "<|im_start|>"),),
        user="User: @<end_of_utterance>\n",
        assistant="Assistant: @<end_of_utterance>\n",
        system="System: @<end_of_utterance>\n",
        opening="Assistant:",
        expected="<end_of_utterance>",
        closing="<end_of_utterance>",
        stop="<end_of_utterance>",
        headers=False,
        parts=True,
    ),
    "qwen2_vl": Family(
        template="{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% for part in m['content'] %}{{ part.text + '' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        + _ask("<|im_start|>assistant\n"),
        special=_CHATML_SPECIAL,
        eos="<|im_end|>",
        **_TURN,
        opening=_CHATML_OPENING,
        expected=_CHATML_IDS,
        closing="<|im_end|>",
        stop="<|im_end|>",
        parts=True,
    ),
    "llava": Family(
        template="{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for part in m['content'] | "
        "selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
        + _ask("ASSISTANT:"),
        special="<s> </s>",
        bos="<s>",
        eos="</s>",
        user="USER: @",
        assistant=" ASSISTANT: @</s>",
        opening=" ASSISTANT:",
        expected="</s>",
        closing="</s>",
        stop="</s>",
        headers=False,
        parts=True,
    ),
}
