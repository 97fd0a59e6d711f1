"""A language model on this machine as a judge: the expected score, from one forward per feature."""

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from chatsae.batch import Message
from chatsae.config import ModelConfig
from chatsae.errors import UserError
from chatsae.features.judge import prompts
from chatsae.features.judge.client import Answer, Request
from chatsae.features.judge.rubric import file_name, rubric_request, shuffled
from chatsae.features.records import Feature
from chatsae.features.verdict import Verdict
from chatsae.lm.load import LanguageModel, load_model

DIGITS = "12345"


class LocalHF:
    """A chat model from a directory or the hub; answers greedily, or gives the probabilities of the digits 1 to 5.

    Raises:
        UserError: the model cannot be loaded, has no chat template, or no tokens for the digits.
    """

    def __init__(self, model: str | Path | LanguageModel, *, device: str = "cpu") -> None:
        if not isinstance(model, LanguageModel):
            model = load_model(ModelConfig(name=str(model), layers=(), device=device), head=True)
        self._lm = model
        self._one_at_a_time = threading.Lock()
        self.model = Path(model.name).name
        if not model.tokenizer.chat_template:
            raise UserError(f"{model.name}: the tokenizer has no chat template; a judge has to be an instruct model")
        self._digits = digit_tokens(model)

    def complete(self, request: Request) -> Answer:
        """The greedy answer; sampling parameters but the length are left aside.

        Raises:
            UserError: the chat template refuses the messages.
        """
        turns = [Message(m["role"], m["content"]) for m in request.messages]
        if self._lm.max_positions is not None:
            n = self._lm.prompt_ids(turns).shape[1]
            if n >= self._lm.max_positions:
                return Answer("", refusal=f"the prompt is longer than the context of {self.model}")
        with self._one_at_a_time:
            text, reason = self._lm.answer(turns, max_new_tokens=request.answer_tokens)
            return Answer(text, finish_reason=reason)

    def stop(self) -> None:
        """An answer under way comes to its end."""

    def close(self) -> None:
        """Nothing to let go of."""

    def scores(self, messages: Iterable[Mapping[str, str]]) -> tuple[tuple[float, ...], float] | None:
        """Probabilities of 1 to 5 at the first token of the answer, given that it is one of them; and of all five.

        None where the prompt is longer than what the model takes.

        Raises:
            UserError: the chat template refuses the messages.
        """
        ids = self._lm.prompt_ids(list(messages))
        if self._lm.max_positions is not None and ids.shape[1] > self._lm.max_positions:
            return None
        with torch.inference_mode(), self._one_at_a_time:
            logits = self._lm.model(input_ids=ids.to(self._lm.device), use_cache=False, logits_to_keep=1).logits
        log_p = logits[0, -1].double().log_softmax(-1).cpu()
        each = torch.stack([log_p[tokens].logsumexp(0) for tokens in self._digits])
        return tuple(each.softmax(0).tolist()), math.exp(float(each.logsumexp(0)))


def digit_tokens(lm: LanguageModel) -> list[list[int]]:
    """For each digit 1 to 5 the tokens that begin an answer with it, with a space before it or without.

    Raises:
        UserError: two digits share a token, or one has none.
    """
    found = []
    for digit in DIGITS:
        ways = [lm.tokenizer.encode(text, add_special_tokens=False) for text in (digit, f" {digit}")]
        ends = {way[-1] for way in ways if way}
        own = [i for i in sorted(ends) if str(lm.tokenizer.decode([i])).strip() == digit]
        if not own:
            raise UserError(f"{lm.name}: the tokenizer has no token for the digit {digit}, which a score is read from")
        found.append(own)
    return found


@dataclass(frozen=True)
class LocalJudge:
    """Scores a feature by the mean of a model's distribution over 1 to 5; it does not explain its scores."""

    client: LocalHF
    name: str
    activations: bool = False
    seed: int = 0

    @staticmethod
    def of(client: LocalHF, *, activations: bool = False, seed: int = 0) -> "LocalJudge":
        """A judge that has the name of its model."""
        return LocalJudge(client, f"local-{file_name(client.model)}", activations, seed)

    def verdicts(self, features: Iterable[Feature], *, n_contexts: int, repeat: int = 0) -> Iterator[Verdict]:
        """A verdict on each feature; a repeat shows the contexts in another order."""
        for feature in features:
            yield self._verdict(feature, n_contexts, repeat)

    def _verdict(self, feature: Feature, n_contexts: int, repeat: int) -> Verdict:
        order = shuffled(feature, n_contexts, self.seed, repeat)
        if not order:
            return Verdict(feature.index, self.name, 0, repeat, None, "no contexts")
        shown = [feature.contexts[i] for i in order]
        request = rubric_request(shown, prompts.SCORE_FORM, {}, repeat, activations=self.activations)
        found = self.client.scores(request.messages)
        if found is None:
            reason = f"the prompt is longer than the context of {self.client.model}"
            return Verdict(feature.index, self.name, len(order), repeat, None, reason)
        distribution, mass = found
        score = sum(p * k for k, p in enumerate(distribution, 1))
        entropy = -sum(p * math.log(p) for p in distribution if p > 0)
        details = {"digit_mass": mass, "entropy": entropy}
        return Verdict(feature.index, self.name, len(order), repeat, score, distribution=distribution, details=details)
