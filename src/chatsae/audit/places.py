"""The tokens that the chat template writes after the user's text, and the residual stream there.

Letters in shapes, beside those of `chatsae.batch`: S pairs, P template tokens, G places (each token, and all pooled).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chatsae.audit.sets import Pair, PromptSet
from chatsae.data.template import chat_template
from chatsae.errors import UserError
from chatsae.lm.harvest import bare_tokens
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.steering.rows import Row, row_of_prompt

_PROBES = ("Hello", "2 + 2", "Why?", "Name one:")

POOLED = "pooled"
"""The place that is the mean over all template tokens after the user's text."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The pairs of a set, rendered up to the generation prompt; all end with the same template tokens."""

    pairs: tuple[Pair, ...]
    positive: tuple[Row, ...]
    negative: tuple[Row, ...]
    tokens: tuple[str, ...]
    """The text of each template token after the user's text, first to last."""

    @property
    def places(self) -> tuple[str, ...]:
        """What each of the G places is called: `-3 assistant` is the third token from the end."""
        n = len(self.tokens)
        return (*(f"{i - n} {text}" for i, text in enumerate(self.tokens)), POOLED)


def render_pairs(
    found: PromptSet, tokenizer: PreTrainedTokenizerBase, *, room: int | None = None, tally: Counter[str] | None = None
) -> Prompts:
    """The pairs rendered with the chat template; those that cannot be are left out and counted in `tally`.

    `room`: tokens that a prompt may have.

    Raises:
        UserError: see `template_end`; or no pair is left.
    """
    end = template_end(tokenizer)
    counts = Counter[str]() if tally is None else tally
    kept: list[tuple[Pair, Row, Row]] = []
    for pair in found.pairs:
        try:
            rows = (row_of_prompt(pair.positive, tokenizer), row_of_prompt(pair.negative, tokenizer))
        except UserError as error:
            counts[f"{found.name}: {error}"] += 1
            continue
        if room is not None and max(map(len, rows)) > room:
            counts[f"{found.name}: a prompt of more than {room} tokens"] += 1
        elif any(tuple(row.input_ids[-len(end) :].tolist()) != end for row in rows):
            counts[f"{found.name}: other template tokens after the user's text"] += 1
        else:
            kept.append((pair, *rows))
    if not kept:
        raise UserError(f"{found.source}: no pair of {found.name} can be used: {_counted(counts)}")
    pairs, positive, negative = zip(*kept, strict=True)
    return Prompts(pairs, positive, negative, tuple(_shown(str(tokenizer.decode([i]))) for i in end))


def template_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that the template writes after the user's text: what prompts with other texts end with.

    Raises:
        UserError: the tokenizer has no chat template, or one that writes nothing there.
    """
    chat_template(tokenizer)
    probes = [row_of_prompt(text, tokenizer).input_ids.tolist()[::-1] for text in _PROBES]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*probes, strict=False))
    end = tuple(column[0] for column in same)[::-1]
    if not end:
        raise UserError(f"the chat template of {tokenizer.name_or_path} writes nothing after the user's text")
    return end


def read_ends(lm: LanguageModel, rows: Sequence[Row], n: int) -> Float[Tensor, "L S P D"]:
    """The residual stream at the last `n` tokens of each prompt, on the CPU in float32."""
    found = torch.zeros(len(lm.layers), len(rows), n, lm.d_in)
    for batch in lm.harvest([bare_tokens([row.input_ids[: row.n_prompt] for row in rows])]):
        ends = batch.tokens.cu_seqlens[1:].tolist()
        for name, end in zip(batch.tokens.names, ends, strict=True):
            found[:, int(name)] = batch.acts[:, end - n : end].float().cpu()
    return found


@torch.no_grad()
def feature_places(sae: SAE, x: Float[Tensor, "S P D"], *, chunk: int = 64) -> Float[Tensor, "S G F"]:
    """Feature activations at each place, on the CPU: P template tokens, then their mean."""
    parts = []
    for part in x.split(chunk):
        acts = sae.encode(part.to(sae.W_enc.device)).float().cpu()
        parts.append(torch.cat([acts, acts.mean(1, keepdim=True)], dim=1))
    return torch.cat(parts)


def stream_places(x: Float[Tensor, "S P D"]) -> Float[Tensor, "S G D"]:
    """The residual stream at each place: P template tokens, then their mean."""
    return torch.cat([x, x.mean(1, keepdim=True)], dim=1)


def _shown(text: str) -> str:
    """A token as a table shows it."""
    return repr(text)[1:-1]


def _counted(tally: Counter[str]) -> str:
    return ", ".join(f"{n} × {reason}" for reason, n in tally.most_common()) or "there is none"
