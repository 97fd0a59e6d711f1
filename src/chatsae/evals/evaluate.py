"""Evaluate SAEs on held-out dialogues, each fed whole and alone: one forward for all, one part of one per SAE."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatsae import console
from chatsae.batch import ActivationBatch, Dialogue, Role, TokenBatch, first, head
from chatsae.data.render import render
from chatsae.data.template import template_facts
from chatsae.errors import UserError
from chatsae.evals import sample
from chatsae.evals.controls import Controls
from chatsae.evals.figures import ABLATIONS, Table, add_intervals, dialogue_table, sae_row
from chatsae.evals.groups import NAMES, SPECIAL, VARIANTS, WHOLE
from chatsae.evals.loss import LOSS_SUMS, constant_losses, token_losses
from chatsae.evals.reconstruction import TOKEN_SUMS, Labelled, Reconstruction, Stream, per_dialogue
from chatsae.evals.report import DialogueSums, Report
from chatsae.evals.resume import Trunk, tolerance
from chatsae.evals.sample import TokenSample, gsnr_figures
from chatsae.files import shared_name
from chatsae.lm.forward import broken_sequences, check_tokens
from chatsae.lm.harvest import isolation_error, plan
from chatsae.lm.load import LanguageModel
from chatsae.lm.norms import LayerNorms, measure_norms, sinks
from chatsae.sae.base import SAE

_BUDGET = 4096  # padded tokens of one forward, where nobody says
_NORM_TOKENS = 16_384  # that norms are measured on, where no run has them
_LOGITS = 2**27  # logits of one forward, where the head cannot be run apart: half a gigabyte in float32


def evaluate(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    dialogues: Iterable[Dialogue],
    *,
    limit: int | None = None,
    max_length: int = 8192,
    token_budget: int = 0,
    tally: Counter[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    shortcuts: bool = True,
    gsnr: bool = True,
    sinks_pass: bool = False,
) -> Report:
    """The metrics of `evaluate_tokens` on the first `limit` dialogues, each cut at `max_length` tokens.

    Raises:
        UserError: there is no dialogue to evaluate on, the model cannot take one, or an SAE is not of this model.
    """
    tokens = render(head(dialogues, limit), lm.tokenizer, method="fast", max_length=max_length, tally=tally)
    return evaluate_tokens(
        saes,
        lm,
        tokens,
        limit=limit,
        max_length=max_length,
        token_budget=token_budget,
        resamples=resamples,
        seed=seed,
        shortcuts=shortcuts,
        gsnr=gsnr,
        sinks_pass=sinks_pass,
    )


@torch.inference_mode()
def evaluate_tokens(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    tokens: Iterable[TokenBatch],
    *,
    limit: int | None = None,
    max_length: int = 8192,
    token_budget: int = 0,
    resamples: int = 1000,
    seed: int = 0,
    shortcuts: bool = True,
    gsnr: bool = True,
    controls: Controls | None = None,
    sinks_pass: bool = False,
    norms: Sequence[LayerNorms] = (),
) -> Report:
    """Every figure of `chatsae.evals.schema` for every SAE, by group, with 95 % intervals over dialogues.

    The model runs once as it is, for all layers, and once more per SAE from its layer on, with the reconstruction in
    place of the residual stream. Ablations, the same for all SAEs of a layer, take one sequence. `shortcuts` False
    runs the model whole each time. `resamples` and `seed` are those of the bootstrap. `gsnr` is measured on a random
    sample of the tokens. `controls`, made for the L0 of each SAE, take a second pass. With `sinks_pass` norm sinks keep
    the model's own activation where a reconstruction is put in place of the residual stream; their bounds are those of
    `norms`, or for layers without any are measured on the dialogues (`_norms`). No figure depends on the order of the
    dialogues or, but for rounding in the model, on `token_budget`.

    Raises:
        UserError: there is no dialogue to evaluate on, the model cannot take one, an SAE is of another width or layer,
            or an activation is not finite.
    """
    _check(saes, lm)
    full = lm.with_head()
    dialogues, digest = _gather(first(tokens, limit))
    check_tokens(full, dialogues)
    dialogues, keys = _sorted(dialogues)
    trunk = Trunk(full, sorted({sae.spec.layer for sae in saes.values()}), shortcuts=shortcuts)
    budget = _budget(lm, trunk, token_budget or _BUDGET)
    batches = plan(dialogues.lengths.tolist(), token_budget=budget, split=full.rope_split)
    special_ids = template_facts(lm.tokenizer).special_ids
    drawn = TokenSample(dialogues, sample.TOKENS) if gsnr or controls else None
    passing = _norms(trunk, dialogues, budget, norms) if sinks_pass else {}
    done = _Pass(saes, trunk, dialogues, special_ids, drawn, passing)
    rows, tables = done.run(batches)
    report = Report(rows=rows, facts=_facts(lm, len(dialogues), max_length, digest, passing))
    if gsnr and drawn is not None:
        report = report.with_figures(_gsnr(saes, drawn))
    if controls is not None and drawn is not None:
        acts = {layer: drawn.acts(layer) for layer in trunk.layers}
        made = controls.make(saes, {name: row["l0"] for name, row in report.rows.items()}, acts)
        others = {name: sae for name, (sae, _) in made.items()}
        more, more_tables = _Pass(others, trunk, dialogues, special_ids, None, passing).run(
            batches, "evaluate controls"
        )
        for name, row in more.items():
            reasons = row["reasons"] | {"gsnr": "a control is not trained"}
            report.rows[name] = row | {"control": made[name][1], "reasons": reasons}
        tables |= more_tables
    add_intervals(report.rows, tables, resamples=resamples, seed=seed)
    return replace(report, dialogues=DialogueSums(keys, tables))


@dataclass
class _Pass:
    """What one pass over the dialogues adds up."""

    saes: Mapping[str, SAE]
    trunk: Trunk
    dialogues: TokenBatch
    special_ids: tuple[int, ...]
    sample: TokenSample | None
    norms: Mapping[int, LayerNorms]  # of the layers whose sinks keep the model's activation
    streams: dict[int, Stream] = field(init=False)
    sums: dict[str, Reconstruction] = field(init=False)
    _order: list[int] = field(default_factory=list)  # of the dialogues, as they were added
    _columns: dict[str, dict[str, list[Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self.streams = {layer: Stream(self.trunk.full.d_in) for layer in self.trunk.layers}
        self.sums = {name: Reconstruction(sae.spec.d_in, sae.spec.d_sae) for name, sae in self.saes.items()}
        self._columns = {name: {} for name in self.saes}

    def run(self, batches: Iterable[list[int]], task: str = "evaluate") -> tuple[dict[str, Any], dict[str, Table]]:
        """The rows of a report without the figures that `evaluate_tokens` adds, and the sums by dialogue."""
        with console.progress(task, len(self.dialogues)) as advance:
            for chosen in batches:
                self.add(chosen)
                advance(len(chosen))
        tables, rows = self.tables(), {}
        for name, sae in self.saes.items():
            layer = sae.spec.layer
            constant = layer in self.trunk.constant
            rows[name] = sae_row(self.sums[name], self.streams[layer], tables[name], sae.W_dec, constant=constant)
        return rows, tables

    def add(self, chosen: list[int]) -> None:
        """Run the model on some dialogues, and add what each SAE makes of them."""
        trunk, tokens = self.trunk, self.dialogues.select(chosen)
        ids, real = tokens.padded().to(trunk.full.device), _real(tokens).to(trunk.full.device)
        clean, residuals = trunk.clean(ids)
        batch = Labelled.of(tokens, self.special_ids)
        scored = torch.zeros_like(real)
        scored[:, :-1] = real[:, 1:]
        states: dict[str, Tensor] = {}
        for layer in trunk.layers:
            if self.sample is not None:
                self.sample.add(layer, chosen, residuals[layer][real])
            self._add_layer(layer, residuals[layer], real, batch, ids, scored, states)
        own, found = token_losses(trunk, clean[scored], states, ids[:, 1:][real[:, 1:]])
        self._order += chosen
        later = tokens.position > 0
        for name in self.saes:
            values = torch.cat([torch.ones(len(own), 1, dtype=torch.float64), own[:, None], found[name]], dim=1)
            self._put_scored(name, values, tokens.sequence[later], tokens.role[later], len(tokens))

    def tables(self) -> dict[str, Table]:
        """The sums by dialogue of each SAE, with the losses of its layer's ablations; dialogues in their order."""
        order = torch.tensor(self._order)
        place = order.argsort().numpy()
        ablated = {layer: self._ablated(layer) for layer in self.trunk.layers}
        tables = {}
        for name, sae in self.saes.items():
            columns = {column: torch.cat(parts) for column, parts in self._columns[name].items()}
            columns |= {column: values[order] for column, values in ablated[sae.spec.layer].items()}
            table = dialogue_table(columns, self.streams[sae.spec.layer], sae.spec.d_in)
            tables[name] = {column: values[place] for column, values in table.items()}
        return tables

    def _add_layer(
        self,
        layer: int,
        residual: Float[Tensor, "B T D"],
        real: Bool[Tensor, "B T"],
        batch: Labelled,
        ids: Int[Tensor, "B T"],
        scored: Bool[Tensor, "B T"],
        states: dict[str, Tensor],
    ) -> None:
        x = residual[real]
        _check_finite(x, layer, batch.tokens)
        exact = x.double()
        where = self.streams[layer].add(exact, batch)
        passing = sinks(x[None].float(), [self.norms[layer]])[0] if self.norms else None
        for name, sae in self.saes.items():
            if sae.spec.layer != layer:
                continue
            feature_acts = sae.encode(x.to(sae.W_enc.device))
            sae_out = sae.decode(feature_acts).to(x.device)
            if not torch.isfinite(sae_out).all():
                raise UserError(f"{name}: its reconstruction of layer {layer} holds NaN or infinite numbers")
            sums, errors = self.sums[name].add(exact, sae_out, feature_acts.to(x.device), batch, where)
            self._put(name, "n_tokens", batch.tokens.lengths.double())
            self._put(name, "squared_error", sums[:, 0] / sae.spec.d_in)
            for i, column in enumerate(TOKEN_SUMS[3:], start=3):
                self._put(name, column, sums[:, i])
            self._put(name, "mse", errors[:, NAMES.index((WHOLE, ""))])
            for variant in VARIANTS:
                self._put(name, variant, errors[:, NAMES.index((SPECIAL, variant))])
            spliced, put = residual.clone(), sae_out.to(residual.dtype)
            spliced[real] = put if passing is None else torch.where(passing[:, None], x, put)
            states[name] = self.trunk.spliced(layer, spliced, ids)[scored]

    def _put(self, name: str, column: str, values: Float[Tensor, " B"]) -> None:
        self._columns[name].setdefault(column, []).append(values)

    def _put_scored(
        self, name: str, values: Float[Tensor, "M K"], sequence: Int[Tensor, " M"], role: Tensor, n: int
    ) -> None:
        assistant = (role == int(Role.ASSISTANT)).double()[:, None]
        for suffix, chosen in (("", values), ("_assistant", values * assistant)):
            sums = per_dialogue(chosen, sequence, n)
            for i, column in enumerate(("n_scored", "loss", *LOSS_SUMS)):
                self._put(name, f"{column}{suffix}", sums[:, i])

    def _ablated(self, layer: int) -> dict[str, Float[Tensor, " S"]]:
        """Summed losses per dialogue with zero, and with the mean activation, as the whole residual stream."""
        tokens, stream = self.dialogues, self.streams[layer]
        mean = stream.x[NAMES.index((WHOLE, ""))] / len(tokens.input_ids)
        assistant = (tokens.role == int(Role.ASSISTANT)).double()
        found = {}
        for name, vector in zip(ABLATIONS, (torch.zeros_like(mean), mean), strict=True):
            if layer in self.trunk.constant:
                losses = constant_losses(self.trunk, layer, vector, tokens)
            else:
                losses = torch.full_like(assistant, torch.nan)
            both = per_dialogue(torch.stack([losses, losses * assistant], dim=1), tokens.sequence, len(tokens))
            found |= {f"loss_{name}": both[:, 0], f"loss_{name}_assistant": both[:, 1]}
        return found


def _facts(
    lm: LanguageModel, n_dialogues: int, max_length: int, digest: str, passing: Mapping[int, LayerNorms]
) -> dict[str, Any]:
    facts = {"model": lm.label, "n_dialogues": n_dialogues, "max_length": max_length, "tokens_sha256": digest}
    random = {} if lm.random_weights is None else {"random_weights": lm.random_weights}
    bounds = {"sinks_pass": {str(layer): one.bound for layer, one in passing.items()}} if passing else {}
    return facts | random | bounds


def _budget(lm: LanguageModel, trunk: Trunk, budget: int) -> int:
    """Padded tokens of one forward: less where it makes logits, one dialogue where several are not kept apart."""
    if not lm.layers or isolation_error(lm) > tolerance(lm.dtype):
        return 1
    return budget if trunk.headless else min(budget, _LOGITS // trunk.full.vocab_size)


def _norms(trunk: Trunk, dialogues: TokenBatch, budget: int, known: Sequence[LayerNorms]) -> dict[int, LayerNorms]:
    """Norms by layer: those known, or else of the first dialogues in their order, up to `_NORM_TOKENS` tokens."""
    found = {one.layer: one for one in known}
    if set(trunk.layers) <= set(found):
        return {layer: found[layer] for layer in trunk.layers}
    few = dialogues.select(range(int((dialogues.cu_seqlens[:-1] < _NORM_TOKENS).sum())))

    def batches() -> Iterator[ActivationBatch]:
        for chosen in plan(few.lengths.tolist(), token_budget=budget, split=trunk.full.rope_split):
            tokens = few.select(chosen)
            _, residuals = trunk.clean(tokens.padded().to(trunk.full.device))
            acts = [residuals[layer].cpu()[_real(tokens)].float() for layer in trunk.layers]
            for layer, x in zip(trunk.layers, acts, strict=True):
                _check_finite(x, layer, tokens)
            yield ActivationBatch(torch.stack(acts), tokens)

    measured = {one.layer: one for one in measure_norms(batches(), trunk.layers)}
    return {layer: found.get(layer, measured[layer]) for layer in trunk.layers}


def _gsnr(saes: Mapping[str, SAE], drawn: TokenSample) -> dict[str, dict[str, Any]]:
    found = {}
    with console.progress(f"gsnr on {sample.TOKENS:,} tokens", len(saes)) as advance:
        for name, sae in saes.items():
            found[name] = gsnr_figures(drawn.gsnr(sae))
            advance(1)
    return found


def _check(saes: Mapping[str, SAE], lm: LanguageModel) -> None:
    """Refuse SAEs that are not of this model.

    Raises:
        UserError: there is none, or one has another width, or a layer that the model does not have.
    """
    if not saes:
        raise UserError("there is no SAE to evaluate")
    for name, sae in saes.items():
        lm.check_width(name, sae.spec.d_in)
        if not 0 <= sae.spec.layer < lm.n_layers:
            raise UserError(f"{name}: layer is {sae.spec.layer}, {lm.name} has layers 0..{lm.n_layers - 1}")
        trained_on = sae.metadata.get("model_name")
        if trained_on is not None and shared_name(trained_on) != lm.label:
            console.warn(f"{name} was trained on {trained_on} and is evaluated on {lm.name}")
        elif trained_on is not None and sae.metadata.get("random_weights") != lm.random_weights:
            own, here = (_weights(seed) for seed in (sae.metadata.get("random_weights"), lm.random_weights))
            console.warn(f"{name} was trained on {lm.name} with {own} and is evaluated with {here}")


def _weights(seed: int | None) -> str:
    return "its own weights" if seed is None else f"random weights (seed {seed})"


def _gather(stream: Iterator[TokenBatch]) -> tuple[TokenBatch, str]:
    """All dialogues in one batch, and the digest of their tokens in the order they came.

    Raises:
        UserError: there is none.
    """
    batches = list(stream)
    if not sum(map(len, batches)):
        raise UserError("there is no dialogue to evaluate on")
    tokens = TokenBatch.concat(batches)
    return tokens, hashlib.sha256(tokens.input_ids.numpy().tobytes()).hexdigest()


def _sorted(tokens: TokenBatch) -> tuple[TokenBatch, list[str]]:
    """Dialogues by the digest of their tokens, and the digests: an order that does not depend on the one given."""
    ids = tokens.input_ids.numpy()
    keys = [
        hashlib.blake2b(ids[start:stop].tobytes(), digest_size=8).hexdigest()
        for start, stop in pairwise(tokens.cu_seqlens.tolist())
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return tokens.select(order), [keys[i] for i in order]


def _check_finite(x: Float[Tensor, "N D"], layer: int, tokens: TokenBatch) -> None:
    for broken in broken_sequences((layer,), x[None], tokens):
        raise UserError(f"{broken}; try model.dtype float32")


def _real(tokens: TokenBatch) -> Bool[Tensor, "B T"]:
    return torch.arange(int(tokens.lengths.max())) < tokens.lengths[:, None]
