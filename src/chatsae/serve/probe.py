"""How far the logits of a row move when it shares a forward, measured on the model at hand."""

import math
from collections.abc import Sequence

import torch

from chatsae.errors import UserError
from chatsae.lm.harvest import ISOLATION_TOLERANCE
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import FORWARD_ERRORS
from chatsae.serve.answer import Answer
from chatsae.serve.rows import Rows
from chatsae.steering.rows import row_of_ids

_LENGTHS = (41, 3, 17, 64, 9)
_STEPS = 6
_TIMES = 4  # the margin, in the largest differences that were measured
_LEAST = {torch.float64: 1e-9, torch.float32: 1e-3}


def measure_margin(lm: LanguageModel) -> tuple[float | None, str]:
    """The margin for `Rows`, and why it is that; None where rows of a batch change each other.

    Random rows of several lengths join one after the other, and every prediction is compared with that of the row
    alone, without a cache.
    """
    full = lm.with_head()
    if full.rope_split is not None:
        return None, "positions depend on the longest row of a forward (longrope)"
    rows = Rows(full, math.inf)
    generator = torch.Generator().manual_seed(0)
    longest = full.max_positions or 1 << 30
    ids = [torch.randint(full.vocab_size, (min(n, longest - _STEPS),), generator=generator) for n in _LENGTHS]
    answers = [Answer(row_of_ids(i, None), full.tokenizer, lambda event: None, max_new_tokens=_STEPS) for i in ids]
    scale = 0.0
    try:
        for answer in answers:
            scale = max(scale, float(rows.read_alone(answer).double().nan_to_num(0.0, 0.0, 0.0).std()))
            _take(rows.step())
            _take(rows.join([answer]))
            rows.leave()
    except (*FORWARD_ERRORS, UserError) as error:
        line = " ".join(str(error).split())[:200]
        return None, f"rows of several lengths do not go through the model together ({line})"
    bound = 8 * ISOLATION_TOLERANCE.get(full.dtype, ISOLATION_TOLERANCE[torch.float32]) * scale
    if rows.worst > bound:
        return None, f"rows of a batch change each other's logits by {rows.worst:.2g} (rounding explains {bound:.1g})"
    return max(_TIMES * rows.worst, _LEAST.get(full.dtype, 0.0)), f"sharing moves a logit by up to {rows.worst:.1e}"


def _take(tokens: Sequence[tuple[Answer, int]]) -> None:
    for answer, token in tokens:
        if token >= 0:
            answer.take(token, frozenset())
