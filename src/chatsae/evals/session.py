"""Evaluate the SAEs of a run directory."""

from collections import Counter
from pathlib import Path

from chatsae import console
from chatsae.data.sources import read
from chatsae.errors import UserError
from chatsae.evals.evaluate import evaluate
from chatsae.evals.report import Report
from chatsae.lm.load import load_model
from chatsae.runs import Run
from chatsae.sae.base import SAE


def evaluate_run(path: Path, *, dialogues: int | None = None) -> Report:
    """Evaluate every SAE of a run on the held-out part of its chat sources; writes report.json.

    Raises:
        UserError: the run has no SAE yet, or the dialogues cannot be read.
    """
    run = Run.read(path)
    config = run.config
    limit = config.eval.dialogues if dialogues is None else dialogues
    if limit < 1:
        raise UserError(f"--dialogues must be at least 1, not {limit}")
    saes = {p.name: SAE.load(p) for p in run.sae_directories()}
    lm = load_model(config.model, head=True)
    for sae in saes.values():
        sae.to(lm.device)
    sources = config.eval.sources or config.data.sources
    tally: Counter[str] = Counter()
    report = evaluate(
        saes,
        lm,
        read(*sources, split="eval", tally=tally),
        limit=limit,
        max_length=config.data.max_length,
        token_budget=config.harvest.token_budget,
        tally=tally,
    )
    report.save(run.path / "report.json")
    for reason, n in tally.most_common():
        console.say(f"{n:,} × {reason}")
    return report
