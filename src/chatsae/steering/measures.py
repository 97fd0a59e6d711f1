"""What can be said of a steered answer without a judge: it is counted, and read again by unsteered model and SAE."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import splice
from chatsae.sae.base import SAE
from chatsae.steering.generate import distinct_specs
from chatsae.steering.guard import repetition
from chatsae.steering.hooks import Steering, model_inputs
from chatsae.steering.rows import Row, left_padded
from chatsae.steering.spec import SteerSpec

NGRAM = 3
"""Tokens of the n-grams whose repetition is measured, as the guard's."""

_CELLS = 2**27  # of logits that a batch may have, for memory
_ROWS = 32


@dataclass(frozen=True, slots=True)
class Measure:
    """What a number is called, and its unit."""

    label: str
    unit: Literal["nats", "tokens", "share", "activation"]


MEASURES: Mapping[str, Measure] = {
    "kl_first": Measure("KL(steered || unsteered) of the first token", "nats"),
    "kl_mean": Measure("KL(steered || unsteered), mean over the answer's tokens", "nats"),
    "log_perplexity": Measure("log perplexity of the answer under the unsteered model", "nats"),
    "log_perplexity_ratio": Measure("the same minus that of the unsteered answer", "nats"),
    "distinct_1": Measure("distinct tokens among the answer's tokens", "share"),
    "distinct_2": Measure("distinct pairs among the answer's pairs of tokens", "share"),
    "repetition": Measure(f"{NGRAM}-grams that stood before in the answer", "share"),
    "length": Measure("length of the answer", "tokens"),
    "stopped": Measure("answers that the model ended", "share"),
    "changed": Measure("answers that differ from the unsteered one", "share"),
    "reread_mean": Measure("the feature re-read in the answer by the unsteered model, mean over tokens", "activation"),
    "reread_max": Measure("the same, largest over tokens", "activation"),
    "reread_share": Measure("the answer's tokens on which the feature fires when re-read", "share"),
    "other_reread_mean": Measure("the other feature re-read in the answer, mean over tokens", "activation"),
}
"""Of each answer; all but the last of `against_base` are those of `read_answers`."""

Values = dict[str, float | None]
"""Measures of one answer; None: not defined for it."""


@dataclass(frozen=True, slots=True)
class Written:
    """An answer as it was written: the prompt, its tokens, whether the last one ended it, under which specs."""

    prompt: Row
    token_ids: tuple[int, ...]
    stopped: bool
    specs: tuple[SteerSpec, ...]
    feature: int
    """To be looked for in the answer."""
    other: int
    """The same, as a comparison."""

    @property
    def content(self) -> tuple[int, ...]:
        """The tokens without the one that ended the answer."""
        return self.token_ids[:-1] if self.stopped else self.token_ids


def distinct(ids: Sequence[int], n: int) -> float | None:
    """Distinct n-grams among all n-grams of a sequence (distinct-n); None where it is shorter than n."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def read_answers(lm: LanguageModel, sae: SAE, answers: Sequence[Written]) -> list[Values]:
    """The measures of answers, all but those that need the unsteered answer beside it (`against_base`).

    Each answer is read twice after its prompt, as it was steered and unsteered, without a cache; KL and perplexity are
    means over its tokens, the one that ended it included. What is counted and re-read leaves that one out.
    """
    full = lm.with_head()
    found: list[Values] = []
    for part in _batches(answers, full.vocab_size):
        read = _read(full, sae, part)
        found += [_counted(answer) | values for answer, values in zip(part, read, strict=True)]
    return found


def against_base(values: Values, answer: Sequence[int], base_values: Values, base: Sequence[int]) -> Values:
    """The measures of an answer with those that set it beside the unsteered answer to the same question."""
    mine, other = values["log_perplexity"], base_values["log_perplexity"]
    assert mine is not None
    assert other is not None
    found = values | {"log_perplexity_ratio": mine - other, "changed": float(list(answer) != list(base))}
    return {name: found[name] for name in MEASURES}


def _counted(answer: Written) -> Values:
    content = answer.content
    return {
        "distinct_1": distinct(content, 1),
        "distinct_2": distinct(content, 2),
        "repetition": repetition(content, NGRAM) if content else None,
        "length": float(len(content)),
        "stopped": float(answer.stopped),
    }


def _batches(answers: Sequence[Written], vocab_size: int) -> Iterator[list[Written]]:
    """Neighbours, as many as fit into memory."""
    part: list[Written] = []
    for answer in answers:
        longest = max(len(a.token_ids) for a in [*part, answer]) + 1
        if part and (len(part) == _ROWS or (len(part) + 1) * longest * vocab_size > _CELLS):
            yield part
            part = []
        part.append(answer)
    if part:
        yield part


def _read(full: LanguageModel, sae: SAE, answers: Sequence[Written]) -> list[Values]:
    """KL, perplexity and activations of one batch: one unsteered forward, and a steered one where there is a spec."""
    ids, mask = left_padded([_joined(answer) for answer in answers], 0)
    offsets = (mask == 0).sum(1).tolist()
    keep = max(len(answer.token_ids) for answer in answers) + 1
    specs, index = distinct_specs([answer.specs for answer in answers])
    seen: list[Float[Tensor, "B T D"]] = []

    def look(x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        seen.append(x)
        return x

    with torch.inference_mode():
        with splice(full, sae.spec.layer, look):
            clean = _last_logits(full, ids, mask, keep)
        steered = clean
        if specs:
            steering = Steering(full, specs, rows=index, quiet=True)
            with steering, steering.prompts([answer.prompt for answer in answers], offsets):
                steered = _last_logits(full, ids, mask, keep)
        (x,) = seen
        found = []
        for i, answer in enumerate(answers):
            n = len(answer.token_ids)
            new = torch.tensor(answer.token_ids, device=clean.device)
            values = _divergence(steered[i, -n - 1 : -1], clean[i, -n - 1 : -1], new)
            first = x.shape[1] - n
            found.append(values | _reread(sae, x[i, first : first + len(answer.content)], answer))
    return found


def _last_logits(full: LanguageModel, ids: Tensor, mask: Tensor, keep: int) -> Float[Tensor, "B K V"]:
    """Logits of the last `keep` columns."""
    given: dict[str, Any] = model_inputs(full, ids, mask)
    if "logits_to_keep" in inspect.signature(full.model.forward).parameters:
        given["logits_to_keep"] = keep
    return full.model(**given, use_cache=False).logits[:, -keep:]


def _divergence(steered: Float[Tensor, "N V"], clean: Float[Tensor, "N V"], new: Tensor) -> Values:
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (steered, clean))
    kl = (log_p.exp() * (log_p - log_q)).nan_to_num().sum(-1, dtype=torch.float64)
    loss = -log_q.gather(1, new[:, None]).double()
    return {"kl_first": float(kl[0]), "kl_mean": float(kl.mean()), "log_perplexity": float(loss.mean())}


def _reread(sae: SAE, x: Float[Tensor, "N D"], answer: Written) -> Values:
    if not len(x):
        return dict.fromkeys(("reread_mean", "reread_max", "reread_share", "other_reread_mean"))
    acts = sae.encode(x.to(sae.W_enc.device, sae.W_enc.dtype))
    own, other = acts[:, answer.feature].double(), acts[:, answer.other].double()
    return {
        "reread_mean": float(own.mean()),
        "reread_max": float(own.max()),
        "reread_share": float((own > 0).double().mean()),
        "other_reread_mean": float(other.mean()),
    }


def _joined(answer: Written) -> Row:
    """Prompt and answer as one row; what its tokens are is not looked at."""
    new, prompt = torch.tensor(answer.token_ids, dtype=torch.int64), answer.prompt
    unknown = torch.zeros(len(prompt) + len(new), dtype=torch.uint8)
    return Row(torch.cat([prompt.input_ids, new]), unknown, unknown, prompt.n_prompt)
