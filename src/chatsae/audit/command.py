"""`chatsae audit`: what the SAEs of a run know about two kinds of prompts, what that causes, and about who speaks."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from chatsae import console
from chatsae.audit.behaviour import REFUSAL_PREFIXES, read_prefixes
from chatsae.audit.causal import Bench, ablate, clamp, like_density
from chatsae.audit.places import POOLED, Prompts, feature_places, read_ends, render_pairs, stream_places
from chatsae.audit.probe import probe_table
from chatsae.audit.report import feature_facts, intervention_facts, role_facts, text
from chatsae.audit.roles import imitations, mean_acts, role_features
from chatsae.audit.separation import Choice, choose, confirm
from chatsae.audit.sets import PromptSet, halves, load_sets
from chatsae.batch import TokenBatch
from chatsae.errors import UserError
from chatsae.files import shared_name, write_json
from chatsae.lm.load import LanguageModel, load_model
from chatsae.run_model import trained_model
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.steering.command import steer_split
from chatsae.steering.rows import rows_of_dialogues, spread_rows
from chatsae.steering.strength import Calibration

SCHEMA_VERSION = 1
_GUARD_ROWS, _GUARD_LENGTH = 16, 160
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What `audit_run` is asked; the fields of the verb."""

    saes: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    """Beginnings of an answer that show the behaviour, or one text file of them; by default what each set says."""
    pairs: int = 200
    dialogues: int = 200
    top: int = 10
    ablate: int = 4
    controls: int = 19
    max_new_tokens: int = 12
    max_perplexity_ratio: float = 1.5
    draws: int = 1000
    seed: int = 0

    def check(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            UserError: one is too small.
        """
        least = {"pairs": 16, "dialogues": 32, "top": 1, "ablate": 1, "controls": 0, "max_new_tokens": 1, "draws": 19}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise UserError(f"--{name.replace('_', '-')} must be at least {number}, not {getattr(self, name)}")
        if not self.max_perplexity_ratio >= 1:
            raise UserError(f"--max-perplexity-ratio must be at least 1, not {self.max_perplexity_ratio}")


@dataclass(frozen=True, slots=True)
class _Set:
    """A prompt set, read by the model: the stream [L, S, P, D] of both sides, and the two halves."""

    found: PromptSet
    prompts: Prompts
    positive: Tensor
    negative: Tensor
    chosen: list[int]
    report: list[int]
    bench: Bench

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        sides = {"positive": self.bench.plain["ablate"], "negative": self.bench.plain["clamp"]}
        return {
            "source": _shared(self.found.source),
            "n_choose": len(self.chosen),
            "n_report": len(self.report),
            "template_tokens": list(self.prompts.tokens),
            "prefixes": list(self.bench.prefixes),
            "behaviour": {side: {"hits": sum(hits), "n": len(hits)} for side, (hits, _) in sides.items()},
        }


def audit_run(path: Path, ask: Ask) -> tuple[dict[str, Any], str]:
    """An audit of the SAEs of a run, as JSON and as text; RUN/audit.json (docs/audit.md).

    Raises:
        UserError: there is no such run or SAE, a set cannot be read or used, or a number cannot be.
    """
    ask.check()
    tally: Counter[str] = Counter()
    found = load_sets(ask.sets, pairs=ask.pairs, tally=tally)
    prefixes = _prefixes(ask.prefixes)
    run = Run.read(path)
    saes = _saes(run, ask.saes)
    lm = load_model(trained_model(run), head=True)
    for sae in saes.values():
        sae.to(lm.device)
    tokens = steer_split(run.config, lm, ask.dialogues, tally)
    guard = Calibration(lm, spread_rows(rows_of_dialogues(tokens, _GUARD_LENGTH), _GUARD_ROWS)[0])
    steps = 2 + 3 * len(found) + len(saes) * (1 + len(found) * (2 + 2 * (1 + ask.controls)))
    with console.progress("audit", steps) as advance:
        density = densities(lm, saes, tokens)
        advance()
        ready = [_read(lm, one, prefixes, guard, ask, tally, advance) for one in found]
        results = {
            name: {
                "layer": sae.spec.layer,
                "sets": {one.found.name: _one_set(lm, sae, one, density[name], ask, advance) for one in ready},
            }
            for name, sae in saes.items()
        }
        roles = _roles(lm, saes, tokens, ask, tally, advance)
    files = {key: tuple(map(_shared, getattr(ask, key))) for key in ("sets", "prefixes")}
    facts = {
        "schema_version": SCHEMA_VERSION,
        "model": lm.label,
        "split": "steer",
        "n_dialogues": len(tokens),
        "n_tokens": len(tokens.input_ids),
        "settings": {key: value for key, value in (asdict(ask) | files).items() if key != "saes"},
        "sets": {one.found.name: one.facts() for one in ready},
        "saes": {name: result | {"roles": roles[name]} for name, result in results.items()},
        "skipped": dict(tally.most_common()),
    }
    write_json(run.path / "audit.json", facts)
    return facts, text(facts)


def densities(lm: LanguageModel, saes: Mapping[str, SAE], tokens: TokenBatch) -> dict[str, Float[Tensor, " F"]]:
    """The share of tokens on which each feature fires, by SAE; 0 also where its decoder row is all zero."""
    counts = {name: torch.zeros(sae.spec.d_sae, dtype=torch.float64) for name, sae in saes.items()}
    for batch in lm.harvest([tokens]):
        for name, sae in saes.items():
            for x in batch.acts[lm.layers.index(sae.spec.layer)].split(_CHUNK):
                with torch.no_grad():
                    counts[name] += (sae.encode(x.to(sae.W_enc.device)) > 0).sum(0).double().cpu()
    directed = {name: (sae.W_dec.detach().abs().sum(1) > 0).cpu() for name, sae in saes.items()}
    return {name: count * directed[name] / len(tokens.input_ids) for name, count in counts.items()}


def _shared(value: str) -> str:
    """The `shared_name` of a file or of each file of a POSITIVE.json:NEGATIVE.json."""
    return ":".join(map(shared_name, value.split(":")))


def _prefixes(values: Sequence[str]) -> tuple[str, ...]:
    if len(values) == 1 and (Path(values[0]).is_file() or values[0].endswith(".txt")):
        return read_prefixes(Path(values[0]))
    for value in values:
        if not value.strip():
            raise UserError("--prefixes: an empty prefix begins every answer")
    return tuple(values)


def _saes(run: Run, names: Sequence[str]) -> dict[str, SAE]:
    there = {p.name: p for p in run.sae_directories()}
    for name in names:
        if name not in there:
            raise UserError(f"run {run.path} has no SAE {name!r}; it has {', '.join(there)}")
    return {name: SAE.load(there[name]) for name in there if not names or name in names}


def _read(
    lm: LanguageModel,
    found: PromptSet,
    prefixes: tuple[str, ...],
    guard: Calibration,
    ask: Ask,
    tally: Counter[str],
    advance: Callable[..., None],
) -> _Set:
    """A set's prompts, rendered and read."""
    room = None if lm.max_positions is None else lm.max_positions - ask.max_new_tokens
    prompts = render_pairs(found, lm.tokenizer, room=room, tally=tally)
    try:
        chosen, report = halves(prompts.pairs, ask.seed)
    except UserError as error:
        raise UserError(f"{found.source}: {error}") from None
    n = len(prompts.tokens)
    ends = read_ends(lm, [*prompts.positive, *prompts.negative], n)
    positive, negative = ends.split(len(prompts.pairs), dim=1)
    advance(note=found.name)
    bench = Bench(
        lm,
        [prompts.positive[i] for i in report],
        [prompts.negative[i] for i in report],
        guard,
        prefixes=prefixes or found.prefixes or REFUSAL_PREFIXES,
        max_new_tokens=ask.max_new_tokens,
        max_perplexity_ratio=ask.max_perplexity_ratio,
        advance=advance,
    )
    return _Set(found, prompts, positive, negative, chosen, report, bench)


def _one_set(
    lm: LanguageModel,
    sae: SAE,
    one: _Set,
    density: Float[Tensor, " F"],
    ask: Ask,
    advance: Callable[..., None],
) -> dict[str, Any]:
    """Features, probes and interventions of one SAE on one set."""
    layer = lm.layers.index(sae.spec.layer)
    ends = one.positive[layer], one.negative[layer]
    acts = [feature_places(sae, side).numpy() for side in ends]
    stream = [stream_places(side).double().numpy() for side in ends]
    choices, features = _features(sae, one, acts, ask)
    advance()
    probes = {}
    for g, place in enumerate(one.prompts.places):
        if place == POOLED or g == len(one.prompts.tokens) - 1:
            sides = (acts[0][:, g].astype(np.float64), acts[1][:, g].astype(np.float64))
            found = probe_table(sides, (stream[0][:, g], stream[1][:, g]), one.chosen, one.report, seed=ask.seed)
            probes[place] = [asdict(probe) for probe in found]
    advance()
    causes = [choice.column % sae.spec.d_sae for choice in choices if choice.auroc > 0.5]
    train = (ends[0][one.chosen], ends[1][one.chosen])
    return {"features": features, "probes": probes, "causal": _causal(sae, one, causes, density, train, ask, advance)}


def _features(
    sae: SAE, one: _Set, acts: Sequence[Float[np.ndarray, "S G F"]], ask: Ask
) -> tuple[list[Choice], list[dict[str, Any]]]:
    """The features that separate best on one half, and what they do on the other."""
    n, groups, d_sae = acts[0].shape
    columns = [side.reshape(n, groups * d_sae) for side in acts]
    norms = torch.linalg.vector_norm(sae.W_dec.detach().double(), dim=1).cpu().numpy()
    choices = choose(
        columns[0][one.chosen],
        columns[1][one.chosen],
        top=ask.top,
        per_candidate=np.tile(norms, groups),
        draws=ask.draws,
        seed=ask.seed,
        groups=groups,
    )
    at = [choice.column for choice in choices]
    above = [choice.auroc > 0.5 for choice in choices]
    found = confirm(columns[0][one.report][:, at], columns[1][one.report][:, at], above, seed=ask.seed)
    places = one.prompts.places
    facts = [
        feature_facts(choice, separation, choice.column % d_sae, places[choice.column // d_sae])
        for choice, separation in zip(choices, found, strict=True)
    ]
    return choices, facts


def _causal(
    sae: SAE,
    one: _Set,
    causes: Sequence[int],
    density: Float[Tensor, " F"],
    ends: tuple[Float[Tensor, "S P D"], Float[Tensor, "S P D"]],
    ask: Ask,
    advance: Callable[..., None],
) -> dict[str, Any]:
    """Ablate the features on positive prompts and clamp them on negative ones; `skipped` says what was not done."""
    directed = [k for k in causes if bool(sae.W_dec[k].detach().any())]
    features = directed[: ask.ablate]
    shown = {name: sum(hits) for name, (hits, _) in one.bench.plain.items()}
    n = len(one.report)
    skipped = [f"feature {k} is left alone: its decoder row is all zero" for k in causes if k not in directed]
    found = []
    whole = 2 * (1 + ask.controls)
    if not shown["ablate"]:
        skipped.append(f"no intervention: none of the {n} answers to positive prompts begins as the set says")
    elif not features:
        skipped.append("no intervention: no chosen feature is more active on positive prompts")
    else:
        controls = like_density(features, density, ask.controls, ask.seed)
        found.append(ablate(one.bench, sae, features, controls))
        if shown["clamp"] == n:
            skipped.append(f"no clamping: all {n} answers to negative prompts begin as the set says already")
        else:
            found.append(clamp(one.bench, sae, features, controls, ends))
        whole -= len(found) * (1 + len(controls))
    advance(whole)
    return {"features": features, "interventions": [intervention_facts(i) for i in found], "skipped": skipped}


def _roles(
    lm: LanguageModel,
    saes: Mapping[str, SAE],
    tokens: TokenBatch,
    ask: Ask,
    tally: Counter[str],
    advance: Callable[..., None],
) -> dict[str, dict[str, Any]]:
    """Role confusion of each SAE; why not, where there is nothing to compare."""
    try:
        found = imitations(lm, tokens, ask.dialogues, tally)
    except UserError as error:
        advance(1 + len(saes))
        return {name: {"skipped": str(error), "n_report": 0, "features": [], "median_reach": {}} for name in saes}
    acts = mean_acts(lm, saes, found)
    advance(note="roles")
    results = {}
    for name in saes:
        features = role_features(found.conditions, acts[name].numpy(), top=ask.top, draws=ask.draws, seed=ask.seed)
        n = len(found.lengths)
        about = {"conditions": list(found.conditions), "start": found.start, "n_report": n - n // 2, "skipped": ""}
        results[name] = about | role_facts(features)
        advance()
    return results
