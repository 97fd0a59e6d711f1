"""Evaluate the SAEs of run directories."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from chatsae import console
from chatsae.batch import ActivationBatch
from chatsae.config import ModelConfig, RunConfig
from chatsae.errors import UserError
from chatsae.evals.controls import FIT_TOKENS, Control, Controls, fit_moments
from chatsae.evals.evaluate import evaluate_tokens
from chatsae.evals.held_out import HeldOut, fit_tokens, held_out
from chatsae.evals.report import Report
from chatsae.lm.load import LanguageModel, load_model
from chatsae.lm.norms import read_norms
from chatsae.run_model import trained_model
from chatsae.runs import Run
from chatsae.sae.base import SAE


def evaluate_runs(
    path: Path,
    *,
    dialogues: int | None = None,
    sources: Sequence[str] = (),
    allow_overlap: bool = False,
    controls: Sequence[Control] = (),
    sinks_pass: bool | None = None,
) -> dict[Path, Report]:
    """`evaluate_run` for the run in a directory, or for every run below it (a demo, say).

    With `sinks_pass`, by default of runs that were not trained on sinks as they are, norm sinks keep the model's
    activation where an SAE is spliced in (`evaluate_tokens`).

    Raises:
        UserError: see `evaluate_run`; or there is no run.
    """
    below = sorted(p.parent for p in path.glob("*/config.yaml")) if not (path / "config.yaml").is_file() else []
    model: tuple[ModelConfig, LanguageModel] | None = None
    known: tuple[RunConfig, HeldOut] | None = None
    reports = {}
    for run in map(Run.read, below or [path]):
        config = run.config
        limit = config.eval.dialogues if dialogues is None else dialogues
        if limit < 1:
            raise UserError(f"--dialogues must be at least 1, not {limit}")
        saes = {p.name: SAE.load(p) for p in run.sae_directories()}
        trained = trained_model(run)
        if model is None or model[0] != trained:
            model = trained, load_model(trained, head=True)
        alike = RunConfig(model=config.model, data=replace(config.data, method="fast"), eval=config.eval)
        if known is not None and known[0] == alike and not known[1].facts:
            data = known[1]  # the held-out part of the same corpora
        else:
            tally: Counter[str] = Counter()
            data = held_out(run, model[1], limit, sources=sources, allow_overlap=allow_overlap, tally=tally)
            for reason, n in tally.most_common():
                console.say(f"{n:,} × {reason}")
        known = alike, data
        passing = run.config.train.sinks != "keep" if sinks_pass is None else sinks_pass
        reports[run.path] = _evaluate(run, saes, model[1], data, limit, controls, passing)
    return reports


def evaluate_run(path: Path, *, dialogues: int | None = None) -> Report:
    """Evaluate every SAE of a run on held-out dialogues (see `held_out`); writes report.json.

    Raises:
        UserError: the run has no SAE yet, or the dialogues cannot be read or were trained on.
    """
    run = Run.read(path)
    return evaluate_runs(run.path, dialogues=dialogues)[run.path]


def _evaluate(
    run: Run,
    saes: dict[str, SAE],
    lm: LanguageModel,
    data: HeldOut,
    limit: int,
    controls: Sequence[Control],
    sinks_pass: bool,
) -> Report:
    """`controls` add rows for random directions or principal components with the L0 of each SAE."""
    norms = run.path / "norms.json"
    for sae in saes.values():
        sae.to(lm.device)
    report = evaluate_tokens(
        saes,
        lm,
        data.tokens,
        limit=limit,
        max_length=run.config.data.max_length,
        token_budget=run.config.harvest.token_budget,
        controls=_controls(run, lm, controls) if controls else None,
        sinks_pass=sinks_pass,
        norms=read_norms(norms) if sinks_pass and norms.is_file() else (),
    )
    report.facts.update(data.facts)
    report.save(run.path / "report.json")
    return report


def _controls(run: Run, lm: LanguageModel, kinds: Sequence[Control]) -> Controls:
    """Controls of some kinds, fitted on the training split of the run's dialogues."""
    with console.progress("fit the controls", FIT_TOKENS) as advance:

        def batches() -> Iterator[ActivationBatch]:
            for batch in lm.harvest(fit_tokens(run, lm, FIT_TOKENS), token_budget=run.config.harvest.token_budget):
                advance(len(batch.tokens.input_ids))
                yield batch

        return Controls(tuple(dict.fromkeys(kinds)), fit_moments(batches(), lm.layers))
