"""The run that is served: its model, its SAEs by name, and what requests become beside them."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from chatsae.batch import Dialogue, Message, TokenBatch
from chatsae.data.render import render
from chatsae.data.store.splits import split_tokens
from chatsae.data.template import SkippedError, chat_template, encode
from chatsae.errors import UserError
from chatsae.features.lookup import on_tokens
from chatsae.features.session import RunFeatures
from chatsae.lm.harvest import bare_tokens
from chatsae.sae.base import SAE
from chatsae.serve.errors import ApiError
from chatsae.serve.requests import ChatRequest, FeaturesRequest
from chatsae.steering.hooks import Steering
from chatsae.steering.proof import self_test
from chatsae.steering.rows import Row, row_of_prompt
from chatsae.steering.spec import SteerSpec, spec_of
from chatsae.steering.strength import Scale, absolute, measure_scale

_SPECS = 16  # of one request
_SCALE_DIALOGUES = 64
_STRONGEST = 1e38  # float32 holds it
_VALUES = 1 << 20  # features in one answer, some 50 bytes each


class Served:
    """A run's model and SAEs. What takes a tokenizer may run in any thread; so may `specs` and `read_scale`.

    The rest uses the model.

    Attributes: name (of the model, as clients say it), lm, saes, context (tokens of a prompt and its answer at most).

    Raises:
        UserError: there is no such run, it has no SAE, or its model cannot be steered.
    """

    def __init__(self, path: Path, max_context: int) -> None:
        self._features = RunFeatures(path)
        self.saes: Mapping[str, SAE] = self._features.saes
        self.lm = self._features.lm
        if not self.lm.tokenizer.chat_template:
            raise UserError(f"{self.lm.name}: the tokenizer has no chat template; an instruct model is needed")
        self.name = self.lm.label
        self.context = min(max_context, self.lm.max_positions or max_context)
        self._few: TokenBatch | None = None
        self._scales: dict[str | int, Scale] = {}
        self._proven: set[int] = set()
        for sae in self.saes.values():
            self.prove([SteerSpec(sae=sae, feature=_live(sae))])

    def listed(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        saes = [
            {"name": name, "layer": s.layer, "d_sae": s.d_sae, "architecture": s.architecture}
            for name, s in ((name, sae.spec) for name, sae in self.saes.items())
        ]
        facts = {"id": self.name, "object": "model", "created": 0, "owned_by": "chatsae"}
        return facts | {"context": self.context, "saes": saes}

    def text(self, request: ChatRequest | FeaturesRequest, tokenizer: PreTrainedTokenizerBase) -> str:
        """What is going to be tokenised; nothing where the template refuses it.

        Raises:
            ApiError: there are more messages than the context has tokens.
        """
        if len(request.messages) > self.context:
            raise self.too_long(request, "more")
        if isinstance(request, FeaturesRequest) and request.raw:
            return request.text or ""
        dialogue = Dialogue("the messages", "", _turns(request))
        try:
            return chat_template(tokenizer).render(dialogue, prompt=isinstance(request, ChatRequest)).text
        except SkippedError:
            return ""

    def count(self, text: str, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many tokens a text has.

        Raises:
            ApiError: it is not valid Unicode.
        """
        return len(_encoded(text, tokenizer))

    def too_long(self, request: ChatRequest | FeaturesRequest, n: int | str) -> ApiError:
        """What a client is told whose messages, or text, have `n` tokens."""
        chat = isinstance(request, ChatRequest)
        param = "messages" if chat or request.text is None else "text"
        more = f" and {request.max_tokens} for the answer" if chat and request.max_tokens is not None else ""
        message = f"this model's context is {self.context} tokens; {param} holds {n}{more}"
        return ApiError(400, message, param=param, code="context_length_exceeded")

    def prompt(self, request: ChatRequest, most: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Row, int]:
        """The rendered prompt, and how many tokens its answer may have.

        Raises:
            ApiError: the template refuses it, or there is no room.
        """
        if request.max_tokens is not None and request.max_tokens > most:
            message = f"max_tokens is {request.max_tokens}; this server allows answers of {most} tokens"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        try:
            row = row_of_prompt(_turns(request), tokenizer)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None
        room = self.context - len(row)
        if room < max(request.max_tokens or 1, 1):
            raise self.too_long(request, len(row))
        return row, min(room, request.max_tokens or most)

    def specs(self, entries: Sequence[Mapping[str, Any]]) -> tuple[SteerSpec, ...]:
        """The specs of a request, their SAEs by name; strengths may still be relative.

        Raises:
            ApiError: one of them cannot be.
        """
        if len(entries) > _SPECS:
            raise ApiError(400, f"steering: at most {_SPECS} specs, not {len(entries)}", param="steering")
        found = []
        for i, entry in enumerate(entries):
            at = f"steering[{i}]"
            if "feature" in entry and "sae" not in entry and len(self.saes) == 1:
                entry = {**entry, "sae": next(iter(self.saes))}
            try:
                spec = spec_of(entry, at, lambda name, at=at: self._sae(name, f"{at}.sae"))
                if spec.unit == "auto":
                    raise UserError("unit auto is chosen beforehand, with `chatsae steer RUN --feature K --alpha auto`")
                Steering(self.lm, [spec.at(spec.strength)], quiet=True)  # its direction and layer fit the model
            except (UserError, OverflowError) as error:
                text = str(error)
                raise ApiError(400, text if text.startswith(at) else f"{at}: {text}", param=at) from None
            found.append(spec)
        return tuple(found)

    def needs_scale(self, specs: Sequence[SteerSpec]) -> bool:
        """Whether a strength is relative, and `read_scale` has not been called yet."""
        return self._few is None and any(spec.unit != "absolute" for spec in specs)

    def read_scale(self) -> None:
        """Read the dialogues that relative strengths are measured on; may take seconds, uses no model.

        Raises:
            UserError: they cannot be read.
        """
        config, tokenizer = self._features.run.config, copy.deepcopy(self.lm.tokenizer)
        try:
            few = split_tokens(config.data, tokenizer, "steer", sources=config.eval.sources, limit=_SCALE_DIALOGUES)
            self._few = TokenBatch.concat(list(few))
        except UserError as error:
            raise UserError(f"relative strengths are measured on the run's dialogues: {error}") from None

    def absolute(self, specs: Sequence[SteerSpec]) -> tuple[SteerSpec, ...]:
        """The specs in absolute strengths; a scale is measured when it is first needed. Layers are tested likewise.

        Raises:
            UserError: a strength has no absolute value or is too large, or the model cannot be steered there.
        """
        found = tuple(s if s.unit == "absolute" else absolute(s, self._scale(s)) for s in specs)
        for spec in found:
            if abs(spec.strength) > _STRONGEST:
                raise UserError(f"steering: strength {spec.strength:g} is too large; the most is {_STRONGEST:g}")
        self.prove(found)
        return found

    def prove(self, specs: Sequence[SteerSpec]) -> None:
        """Test each layer once: steering it acts, on one row only (`chatsae.steering.proof`).

        Raises:
            UserError: it does not.
        """
        new = {spec.place: spec for spec in specs if spec.place not in self._proven}
        if new:
            self_test(self.lm, list(new.values()))
            self._proven |= set(new)

    def tokens(self, request: FeaturesRequest, tokenizer: PreTrainedTokenizerBase) -> TokenBatch:
        """What a features request is about, as tokens.

        Raises:
            ApiError: it cannot be rendered, is empty or too long, or too many features are asked for.
        """
        param = "messages" if request.text is None else "text"
        if request.raw:
            tokens = bare_tokens([torch.tensor(_encoded(request.text or "", tokenizer), dtype=torch.int64)])
        else:
            cut = Counter[str]()
            try:
                dialogue = Dialogue("the text", "", _turns(request))
                (tokens,) = render([dialogue], tokenizer, max_length=self.context, tally=cut)
            except UserError as error:
                raise ApiError(400, str(error), param=param) from None
            if any(reason.startswith("cut at") for reason in cut):
                raise self.too_long(request, "more")
        n = len(tokens.input_ids)
        if n > self.context:
            raise self.too_long(request, n)
        if not n:
            raise ApiError(400, "the text is empty", param=param)
        values = n * request.k * len(request.saes or self.saes)
        if values > _VALUES:
            message = f"{values} features are asked for (tokens x k x SAEs); an answer has at most {_VALUES}"
            raise ApiError(400, message, param="k", code="invalid_value")
        return tokens

    def features(self, request: FeaturesRequest, tokens: TokenBatch) -> dict[str, Any]:
        """The strongest features on each token, by SAE."""
        chosen = {name: self.saes[name] for name in request.saes or self.saes}
        found = on_tokens(chosen, self.lm, tokens, self._features.reading, k=request.k)
        data = [{"sae": name, "layer": chosen[name].spec.layer, "tokens": rows} for name, rows in found.items()]
        return {"object": "list", "model": self.name, "data": data}

    def check_saes(self, names: Sequence[str]) -> None:
        """Refuse names of SAEs that the run does not have.

        Raises:
            ApiError: names the first one.
        """
        for name in names:
            try:
                self._sae(name, "sae")
            except UserError as error:
                raise ApiError(404, str(error), param="sae", code="sae_not_found") from None

    def _sae(self, name: str, at: str) -> SAE:
        if name not in self.saes:
            raise UserError(f"{at}: the run has no SAE {name[:100]!r}; it has {', '.join(self.saes)}")
        return self.saes[name]

    def _scale(self, spec: SteerSpec) -> Scale:
        sae = spec.sae if isinstance(spec.sae, SAE) and spec.place == spec.sae.spec.layer else None
        key = spec.place if sae is None else sae.spec.name
        if key not in self._scales:
            assert self._few is not None
            self._scales[key] = measure_scale(self.lm, self._few, spec.place, sae)
        return self._scales[key]


def _turns(request: ChatRequest | FeaturesRequest) -> tuple[Message, ...]:
    if isinstance(request, FeaturesRequest) and request.text is not None:
        return (Message("user", request.text),)
    return tuple(Message(**message) for message in request.messages)


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the text is not valid Unicode", param="text") from None
    ids: list[int] = encode(tokenizer, [text], offsets=False)["input_ids"][0]
    return ids


def _live(sae: SAE) -> int:
    """The first feature that has a direction."""
    return int(sae.W_dec.detach().abs().sum(1).gt(0).float().argmax())
