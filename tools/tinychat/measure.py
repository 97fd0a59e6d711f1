"""What the model card states: held-out losses, how answers end, residual norms, sample dialogues."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, Qwen2ForCausalLM

from chatsae.batch import Dialogue, Message
from tinychat.batches import IGNORED, Batch, bucketed, encoded, page_batch, pages
from tinychat.tokenizer import SPECIALS
from tinychat.training import loss_sum

BLOCK = 512
MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean negative log-likelihood, in nats per token, and the number of tokens it is a mean of."""

    nats_per_token: float
    tokens: int


@torch.inference_mode()
def mean_loss(model: Qwen2ForCausalLM, batches: Iterable[Batch]) -> Loss:
    """The loss over all labels of some batches, each label counted once."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        total += loss_sum(model, batch).item()
        tokens += int((batch[1] != IGNORED).sum())
    return Loss(total / tokens, tokens)


def page_loss(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Loss:
    """On the pages of the eval split, seed 0, in blocks of 512 tokens."""
    blocks = pages(tokenizer, "eval", 0, BLOCK)
    return mean_loss(model, (page_batch(b) for b in blocks.split(8)))


def dialogue_loss(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue]) -> Loss:
    """On the assistant's answers, each dialogue alone, with the <|im_end|> that closes an answer."""
    return mean_loss(model, bucketed(tokenizer, encoded(tokenizer, dialogues), 6144))


def first_questions(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    """Each dialogue up to its first user turn."""
    cut = []
    for d in dialogues:
        last = next(i for i, m in enumerate(d.messages) if m.role == "user")
        cut.append(Dialogue(d.id, d.source, d.messages[: last + 1]))
    return cut


@torch.inference_mode()
def answers(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Dialogue], rows: int = 25
) -> list[list[int]]:
    """Greedy answers of at most 256 tokens, as token ids, up to and with the <|im_end|> if there is one."""
    model.eval()
    tokenizer.padding_side, end = "left", tokenizer.eos_token_id
    found: list[list[int]] = []
    for start in range(0, len(prompts), rows):
        chats = [[{"role": m.role, "content": m.content} for m in d.messages] for d in prompts[start : start + rows]]
        inputs = cast(
            BatchEncoding,
            tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ),
        )
        generate = cast(Callable[..., torch.Tensor], model.generate)
        out = generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :].tolist()
        found += [row[: row.index(end) + 1] if end in row else row for row in new]
    tokenizer.padding_side = "right"
    return found


def ends_properly(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> bool:
    """Whether an answer has text, ends with <|im_end|> and holds no other control token."""
    control = {tokenizer.convert_tokens_to_ids(s) for s in SPECIALS}
    return len(answer) > 1 and answer[-1] == tokenizer.eos_token_id and not control & set(answer[:-1])


@torch.inference_mode()
def position_0_norms(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue]
) -> list[float]:
    """Norm of the residual stream at position 0 over the median norm at all other positions, after each layer."""
    norms: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(_tensor(out)[0].norm(dim=-1)))
        for layer, kept in zip(model.model.layers, norms, strict=True)
    ]
    for ids in encoded(tokenizer, dialogues):
        model.model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [
        (torch.stack([n[0] for n in kept]).mean() / torch.cat([n[1:] for n in kept]).median()).item() for kept in norms
    ]


def _tensor(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def sample_dialogues(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Dialogue]
) -> list[Dialogue]:
    """The same dialogues with the model's own greedy answers, turn by turn."""
    finished = []
    for d in dialogues:
        said: tuple[Message, ...] = ()
        for m in d.messages:
            if m.role != "assistant":
                said += (m,)
                continue
            [answer] = answers(model, tokenizer, [Dialogue(d.id, d.source, said)])
            said += (Message("assistant", str(tokenizer.decode(answer, skip_special_tokens=True))),)
        finished.append(Dialogue(d.id, d.source, said))
    return finished
