"""Steer a language model while a context lasts: hooks that know which token of which row they see."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from chatsae import console
from chatsae.data.template import control_ids
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.lm.tap import cache_given, splice, tokens_in
from chatsae.steering import ops
from chatsae.steering.masks import Known, Seen, Special, acting, needs_labels, needs_prompt
from chatsae.steering.rows import Row, row_of_ids
from chatsae.steering.spec import SteerSpec


@dataclass(frozen=True, slots=True)
class _Act:
    """One spec in one forward: flat indices of the tokens it acts on, and their factors; None: all 1."""

    spec: int
    index: Tensor
    factor: Tensor | None


class Steering:
    """A context in which specs act on every forward and every `generate` of a model.

    A spec acts on a token once per forward in which that token is computed. Specs of one layer act in their order.
    `rows`: for each row of the batch, the indices of the specs that act on it; None: all on every row. Beams and
    several samples of a prompt are the rows of that prompt.

    Attributes: specs, factors (per row of `rows`, multiplies every change; a guard lowers it), forwards, hook_calls
    (by layer), acted (per spec: tokens acted on), tested (what the test at attach time found; None
    without).
    """

    def __init__(
        self,
        lm: LanguageModel,
        specs: Sequence[SteerSpec],
        *,
        rows: Sequence[Sequence[int]] | None = None,
        quiet: bool = False,
    ) -> None:
        """Check the specs against the model; see `chatsae.steering.attach.attach` for the test that it can be steered.

        `quiet`: no warning where a spec met no token.

        Raises:
            UserError: a spec does not fit the model, or has no absolute strength.
        """
        self.full = lm.with_head()
        self.specs = tuple(spec.loaded() for spec in specs)
        self.rows = None if rows is None else [frozenset(row) for row in rows]
        self._directions = [_checked(spec, self.full).to(self.full.device) for spec in self.specs]
        for row in self.rows or ():
            if any(not 0 <= i < len(self.specs) for i in row):
                raise UserError(f"steering: rows name specs 0..{len(self.specs) - 1}, not {sorted(row)}")
        self.factors: Float[Tensor, " B"] = torch.ones(1 if self.rows is None else len(self.rows))
        self.forwards = 0
        self.hook_calls = dict.fromkeys(sorted({spec.place for spec in self.specs}), 0)
        self.acted = [0] * len(self.specs)
        self._labelled = any(map(needs_labels, self.specs))
        self._prompted = any(map(needs_prompt, self.specs))
        self._reads_ids = any(spec.where.kinds for spec in self.specs)
        self._special = self._specials() if self._labelled else Special(frozenset(), frozenset())
        self._known: Known | None = None
        self._reached = 0
        self._ids: Tensor | None = None
        self._acts: list[_Act] = []
        self._stack: ExitStack | None = None
        self._quiet = quiet
        self.tested: dict[str, Any] | None = None

    def __enter__(self) -> "Steering":
        if self._stack is not None:
            raise UserError("steering: this context is in use already")
        with ExitStack() as stack:
            model, decoder = self.full.model, self.full.decoder
            if model is not decoder:
                stack.callback(model.register_forward_pre_hook(self._keep_ids, with_kwargs=True).remove)
            stack.callback(decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            for layer in self.hook_calls:
                stack.enter_context(splice(self.full, layer, partial(self._steer, layer)))
            stack.enter_context(_instead(model, "generate", self._generate))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        assert self._stack is not None
        self._stack.close()
        self._stack = None
        if kind is None and self.forwards and not self._quiet:
            for spec, n in zip(self.specs, self.acted, strict=True):
                if n == 0:
                    console.warn(f"steering: {spec.label()} met no token in {self.forwards} forwards")

    @contextmanager
    def prompts(self, rows: Sequence[Row], offsets: Sequence[int] | None = None) -> Iterator[None]:
        """Say what the rows of the next forwards are, and how many columns of padding stand on the left of each.

        Raises:
            UserError: there are other rows than specs are given for; on leaving: a layer was not hooked once per
                forward.
        """
        if self.rows is not None and len(rows) != len(self.rows):
            raise UserError(f"steering: specs are given for {len(self.rows)} rows, the batch has {len(rows)}")
        self._known, self._reached = Known.of(rows, offsets or [0] * len(rows)), 0
        before = self.forwards, dict(self.hook_calls)
        try:
            yield
        finally:
            self._known = None
        for layer, calls in self.hook_calls.items():
            if calls - before[1][layer] != self.forwards - before[0]:
                raise UserError(
                    f"steering: layer {layer} was hooked {calls - before[1][layer]} times in "
                    f"{self.forwards - before[0]} forwards of {self.full.name}; the texts are not what was asked for"
                )

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`model.generate` that is told where the prompts end."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if not isinstance(ids, Tensor):
            raise UserError("steering: generate needs the token ids of the prompts")
        mask = kwargs.get("attention_mask")
        if mask is None:
            if len(ids) > 1:
                raise UserError("steering: generate needs the attention_mask of a batch, to know its padding")
            mask = kwargs["attention_mask"] = torch.ones_like(ids)
        padding = (mask == 0).sum(1).tolist()
        if any(bool((row[n:] == 0).any()) for row, n in zip(mask.cpu(), padding, strict=True)):
            raise UserError("steering: prompts must be padded on the left, and have nothing masked in them")
        tokenizer = self.full.tokenizer if self._labelled else None
        rows = [row_of_ids(row[n:], tokenizer) for row, n in zip(ids, padding, strict=True)]
        with self.prompts(rows, padding):
            return original(*args, **kwargs)

    def _keep_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = _bound(module, args, kwargs).get("input_ids")

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out, before a forward, which of its tokens each spec acts on."""
        given = _bound(module, args, kwargs)
        ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
        ids = self._ids if ids is None else ids
        self._ids = None
        told = embedded if ids is None else ids
        if not isinstance(told, Tensor):
            raise UserError(f"steering: a forward of {self.full.name} is given neither token ids nor embeddings")
        shape = told.shape[:2]
        seen, known = self._seen(ids, shape, given)
        n_rows = 1 if self.rows is None else len(self.rows)
        if shape[0] % n_rows:
            raise UserError(f"steering: specs are given for {n_rows} rows, a forward has {shape[0]}")
        row = torch.arange(shape[0]) // (shape[0] // n_rows)
        self._acts = []
        for i, spec in enumerate(self.specs):
            mask, factor = acting(spec, seen, known, self._special)
            if self.rows is not None:
                mask &= torch.tensor([i in specs for specs in self.rows])[row][:, None]
            factor = factor * self.factors[row][:, None]
            index = mask.flatten().nonzero().squeeze(1)
            chosen = factor.flatten()[index]
            device = self.full.device
            self._acts.append(_Act(i, index.to(device), None if bool((chosen == 1).all()) else chosen.to(device)))
        self.forwards += 1

    def _seen(self, ids: Tensor | None, shape: torch.Size, given: dict[str, Any]) -> tuple[Seen, Known]:
        """The tokens of a forward by absolute position, and what is known about their rows."""
        past = _past(cache_given(given))
        columns = past + torch.arange(shape[1])[None].expand(shape)
        if self._known is not None:
            self._advance(past, shape)
            known = self._known.spread(shape[0] // len(self._known.length))
            position = columns - known.offset[:, None]
            real = position >= 0
        else:
            mask = given.get("attention_mask")
            position, real = _masked(mask, columns, past) if isinstance(mask, Tensor) else (columns, columns >= 0)
            known = self._bare(ids, position, real, past)
        read = ids.cpu() if self._reads_ids and ids is not None else None
        if self._reads_ids and read is None:
            raise UserError("steering: kinds are told by token ids, and this forward is given embeddings")
        return Seen(position, real, read), known

    def _advance(self, past: int, shape: torch.Size) -> None:
        """Refuse forwards whose tokens cannot be placed: a state that is carried on but not counted."""
        assert self._known is not None
        columns = int((self._known.n_prompt + self._known.offset).max())
        if past == 0 and self._reached and shape[1] < min(self._reached, columns):
            raise UserError(
                f"steering: {self.full.name} keeps no count of the tokens it has read; generate with use_cache=False"
            )
        self._reached = past + shape[1]
        if shape[0] % len(self._known.length):
            raise UserError(f"steering: {len(self._known.length)} prompts, but a forward of {shape[0]} rows")

    def _bare(self, ids: Tensor | None, position: Tensor, real: Tensor, past: int) -> Known:
        """A forward of which nothing is known beforehand: it is all prompt."""
        if past and self._prompted:
            raise UserError(
                "steering: this forward goes on from a cache, and where its prompts end is not known; use "
                "chatsae.steering.generate, model.generate, or Steering.prompts"
            )
        if self._labelled and ids is None:
            raise UserError("steering: roles and kinds are told by token ids, and this forward is given embeddings")
        n = [int(p.max()) + 1 for p in position]
        if not self._labelled or ids is None:
            empty = torch.zeros(len(n), 1, dtype=torch.int64)
            return Known(
                empty, empty, torch.zeros(len(n), dtype=torch.int64), torch.tensor(n), torch.zeros(len(n)).long()
            )
        rows = [row_of_ids(row[ok], self.full.tokenizer) for row, ok in zip(ids.cpu(), real, strict=True)]
        return Known.of(rows, [0] * len(rows))

    def _steer(self, layer: int, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        self.hook_calls[layer] += 1
        out: Tensor | None = None
        for act in self._acts:
            spec = self.specs[act.spec]
            if spec.place != layer or not len(act.index):
                continue
            out = x.flatten(0, 1).clone() if out is None else out  # rows that are not steered keep their bits
            chosen = out[act.index]
            out[act.index] = ops.steered(chosen, spec.op, self._directions[act.spec], spec.strength, act.factor)
            self.acted[act.spec] += len(act.index)
        return x if out is None else out.view_as(x)

    def _specials(self) -> Special:
        control = control_ids(self.full.tokenizer)
        return Special(control, self.full.stop_ids & control)


def model_inputs(
    full: LanguageModel, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"], start: int = 0
) -> dict[str, Any]:
    """Arguments of a forward over the columns from `start` on of a batch that is padded on the left."""
    given = {"input_ids": ids[:, start:], "attention_mask": mask}
    if "position_ids" in inspect.signature(full.model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    return {name: value.to(full.device) for name, value in given.items()}


def _checked(spec: SteerSpec, lm: LanguageModel) -> Float[Tensor, " D"]:
    """The spec's direction.

    Raises:
        UserError: it does not fit the model, or the strength is not absolute.
    """
    direction = spec.direction()
    if len(direction) != lm.d_in:
        raise UserError(f"steering: the direction has {len(direction)} numbers, the stream of {lm.name} {lm.d_in}")
    if not 0 <= spec.place < lm.n_layers:
        raise UserError(f"steering: layer {spec.place} does not exist: {lm.name} has layers 0..{lm.n_layers - 1}")
    if spec.unit != "absolute":
        raise UserError(
            f"steering: a strength in {spec.unit} must be made absolute first (chatsae.steering.strength.absolute)"
        )
    return direction


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name."""
    if not args:
        return kwargs
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def _past(cache: Any) -> int:
    """Tokens in a cache."""
    if cache is None:
        return 0
    tokens = tokens_in(cache)
    if tokens is None:
        raise UserError(f"steering: a cache of type {type(cache).__name__} does not say how many tokens it holds")
    return tokens


def _masked(mask: Tensor, columns: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """Positions and real tokens from an attention mask over cache and tokens."""
    if mask.ndim != 2 or mask.shape[1] < past + columns.shape[1]:
        raise UserError(
            f"steering: an attention mask of shape {list(mask.shape)} does not say which tokens are padding"
        )
    real = mask.cpu().bool()
    position = real.long().cumsum(1) - 1
    now = slice(past, past + columns.shape[1])
    return position[:, now], real[:, now]


@contextmanager
def _instead(model: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Another method of one object while the context lasts; it gets the one before as its first argument."""
    own = model.__dict__.get(name)
    setattr(model, name, partial(wrapper, getattr(model, name)))
    try:
        yield
    finally:
        delattr(model, name)
        if own is not None:
            setattr(model, name, own)
