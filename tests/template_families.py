"""The table of `templates`, with the families whose turns have other headers, or take other contents."""

from templates import CHATML_IDS, CHATML_OPENING, CHATML_SPECIAL, TURN, TURNED, Family, ask, default, each

FAMILIES = TURNED | {
    # [INST] is text here, and every question begins with bos
    "llama2": Family(
        template=each(user="<s>[INST] @ [/INST]", assistant=" @ </s>"),
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
        template="{{ bos_token }}" + each(user="[INST] @[/INST]", assistant=" @</s>"),
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
        + default("[SYSTEM_PROMPT]You are kind.[/SYSTEM_PROMPT]")
        + each(user="[INST]@[/INST]", assistant="@</s>", system="[SYSTEM_PROMPT]@[/SYSTEM_PROMPT]"),
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
        " + '<end_of_turn>\\n' }}{% endfor %}" + ask("<start_of_turn>model\n"),
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
        + ask("<|Assistant|><think>\n"),
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
        + each(**{r: f"<|{r}|>\n@" for r in ("system", "user", "assistant")})
        + ask("<|assistant|>"),
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
        + each(
            **{
                r: f"<|START_OF_TURN_TOKEN|><|{n}_TOKEN|>@<|END_OF_TURN_TOKEN|>"
                for r, n in (("system", "SYSTEM"), ("user", "USER"), ("assistant", "CHATBOT"))
            }
        )
        + ask("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
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
        template=default("<|start_of_role|>system<|end_of_role|>You are kind.<|end_of_text|>\n")
        + each(**{r: f"<|start_of_role|>{r}<|end_of_role|>@<|end_of_text|>\n" for r in ("system", "user", "assistant")})
        + ask("<|start_of_role|>assistant<|end_of_role|>"),
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
        + each(user="<|user|>\n@\n", assistant="<|assistant|>\n@<|endoftext|>\n", system="<|system|>\n@\n")
        + ask("<|assistant|>\n"),
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
        template=each(user="<|user|>\n@\n", assistant="<|assistant|>\n@<|endoftext|>\n", system="<|system|>\n@\n")
        + ask("<|assistant|>\n"),
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
        template=each(
            user="[|user|]@\n", assistant="[|assistant|]@[|endofturn|]\n", system="[|system|]@[|endofturn|]\n"
        )
        + ask("[|assistant|]"),
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
        "{% endif %}{% endfor %}" + ask("<|start|>assistant"),
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
        + each(**{r: f"<|{r}_start|>@<|{r}_end|>" for r in ("system", "user", "assistant")})
        + ask("<|assistant_start|>"),
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
        template=each(
            user="<|userprompt|>@<|endofuserprompt|>",
            assistant="<|response|>@<|endofresponse|>",
            system="<|system|>@<|endofsystem|>",
        )
        + ask("<|response|>"),
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
        + each(user="<SPECIAL_11>User\n@\n", assistant="<SPECIAL_11>Assistant\n@\n<SPECIAL_12>\n")
        + ask("<SPECIAL_11>Assistant\n"),
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
        + each(**{r: f"<|bom|><|{r}|> @<|eom|>" for r in ("system", "user", "assistant")})
        + ask("<|bom|><|assistant|>"),
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
        + each(user="User: @\n", assistant="Assistant: @</s>", system="@\n")
        + ask("Assistant: "),
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
        template=each(user="User: @<|eot_id|>", assistant="Assistant: @<|eot_id|>", system="System: @<|eot_id|>")
        + ask("Assistant: "),
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
        "{{ '<end_of_utterance>\\n' }}{% endfor %}" + ask("Assistant:"),
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
        + ask("<|im_start|>assistant\n"),
        special=CHATML_SPECIAL,
        eos="<|im_end|>",
        **TURN,
        opening=CHATML_OPENING,
        expected=CHATML_IDS,
        closing="<|im_end|>",
        stop="<|im_end|>",
        parts=True,
    ),
    "llava": Family(
        template="{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for part in m['content'] | "
        "selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
        + ask("ASSISTANT:"),
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
