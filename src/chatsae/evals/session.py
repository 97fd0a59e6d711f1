"""Evaluate the SAEs of a run directory."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from chatsae import console
from chatsae.batch import TokenBatch
from chatsae.config import RunConfig
from chatsae.data.reading import read
from chatsae.data.render import render
from chatsae.data.store.prepared import Prepared
from chatsae.errors import UserError
from chatsae.evals.evaluate import evaluate_tokens
from chatsae.evals.report import Report
from chatsae.lm.load import LanguageModel, load_model
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
    tally: Counter[str] = Counter()
    report = evaluate_tokens(
        saes,
        lm,
        _held_out(config, lm, limit, tally),
        limit=limit,
        max_length=config.data.max_length,
        token_budget=config.harvest.token_budget,
    )
    report.save(run.path / "report.json")
    for reason, n in tally.most_common():
        console.say(f"{n:,} × {reason}")
    return report


def _held_out(config: RunConfig, lm: LanguageModel, limit: int, tally: Counter[str]) -> Iterator[TokenBatch]:
    data = config.data
    if data.prepared and not config.eval.sources:
        return Prepared(data.prepared, lm.tokenizer).batches(split="eval", max_length=data.max_length, tally=tally)
    sources = config.eval.sources or data.sources
    dialogues = islice(read(*sources, split="eval", order=data.order, tally=tally), limit)
    return render(dialogues, lm.tokenizer, max_length=data.max_length, tally=tally)
