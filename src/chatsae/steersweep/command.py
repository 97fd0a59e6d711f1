"""`chatsae steer --sweep`: the sweep, graded where a judge is named, drawn where a figure is wanted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.errors import UserError
from chatsae.evals.pareto import figure_paths, need_matplotlib
from chatsae.features.judge.command import Options, open_asker, usage_line
from chatsae.features.judge.rubric import file_name
from chatsae.features.judging import read_judgements
from chatsae.files import write_json
from chatsae.steering.sweep_command import SweepAsk, sweep_run
from chatsae.steersweep.figure import sweep_figure
from chatsae.steersweep.grading import grade_table, graded, grades, planned

Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """What is done with the answers of a sweep."""

    judge: Options | None = None
    """The language model that grades them."""
    concept: str | None = None
    """What the feature is about; by default the explanation that `chatsae judge` found for it."""
    figure: Path | None = None


def steer_sweep(path: Path, ask: SweepAsk, extra: Extra) -> tuple[Facts, str]:
    """A sweep as JSON holds it and as text; in RUN/steer/ it has its grades as well.

    Raises:
        UserError: see `sweep_run`; or the judge cannot be asked, nothing says what the concept is, or matplotlib is
            missing.
        KeyboardInterrupt: Ctrl-C; the same call goes on where it stopped.
    """
    if extra.judge is not None and extra.judge.kind == "pattern":
        raise UserError("--judge of a sweep must be a language model: openai, local or replay:FILE")
    if extra.figure is not None:
        need_matplotlib()
        figure_paths(extra.figure)
    facts, text, file = sweep_run(path, ask)
    if extra.judge is not None:
        facts = _graded(path, facts, extra.judge, extra.concept)
        if facts["grades"] is None:
            return facts, text
        write_json(file, facts)
        text += "\n\n" + grade_table(facts)
    if extra.figure is not None:
        for drawn in sweep_figure([facts], extra.figure):
            console.say(f"drawn: {drawn}")
    return facts, text


def _graded(path: Path, facts: Facts, options: Options, given: str | None) -> Facts:
    concept = given or concept_of(path, facts["sae"], facts["feature"])
    with open_asker(options, path) as asker:
        assert asker is not None
        if options.dry_run:
            cost = planned(asker, facts, concept, options.sampling()).facts()
            console.say("grading would take " + ", ".join(f"{v:,} {k}" for k, v in cost.items() if v is not None))
            return facts
        try:
            found = grades(asker, facts, concept, options.sampling())
        finally:
            if asker.usage.calls or asker.usage.cached:
                console.say(usage_line(asker))
        name = f"{options.kind}-{file_name(asker.client.model)}"
        done = graded(facts, found, judge=name, concept=concept, seed=facts["seed"])
        done["grades"]["usage"] = asker.usage.facts()
    return done


def concept_of(path: Path, sae: str, feature: int) -> str:
    """The explanation of a feature that was judged best, among those of RUN/judge.

    Raises:
        UserError: there is none.
    """
    found = [
        (verdict["score"], verdict["explanation"])
        for judgement in read_judgements(path, sae)
        for verdict in judgement["verdicts"]
        if verdict["feature"] == feature and verdict["score"] is not None and verdict["explanation"]
    ]
    if not found:
        raise UserError(
            f"nothing in {path / 'judge' / sae} explains feature {feature}, so the judge cannot tell its concept; "
            "say what it is with --concept, or run `chatsae judge`"
        )
    return str(max(found)[1])
