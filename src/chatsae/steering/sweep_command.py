"""`chatsae steer --sweep`: ten questions at every strength, a feature beside its controls."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.errors import UserError
from chatsae.files import sha256
from chatsae.steering.command import PAPER, Prepared, alpha_of, prepare, strengths_facts
from chatsae.steering.rows import row_of_prompt
from chatsae.steering.strength import Effect
from chatsae.steering.sweep import (
    ARMS,
    RELATIVE,
    Experiment,
    Kept,
    Strength,
    jobs,
    other_features,
    question_sets,
    strengths,
    write_answers,
)
from chatsae.steering.sweep_show import sweep_text
from chatsae.steering.sweep_summary import numbers
from chatsae.steering.sweep_window import Quality

Facts = dict[str, Any]
VERSION = 1
"""Of the file; answers of another one are written anew."""

BUNDLED = "demo"
"""The name of the bundled model in a recipe; it knows one subject, and is asked about that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepAsk:
    """What `sweep_run` is asked; the fields of the verb."""

    feature: int
    alphas: tuple[str, ...] = PAPER
    relative: tuple[float, ...] = RELATIVE
    questions: str | None = None
    """A set of `question_sets`; by default python of the bundled model, general of any other."""
    prompts: tuple[str, ...] = ()
    """In place of a set."""
    sae: str | None = None
    max_new_tokens: int = 64
    bound: float = 0.5
    dialogues: int = 400
    seed: int = 0
    quality: Quality = field(default_factory=Quality)


def sweep_run(path: Path, ask: SweepAsk) -> tuple[Facts, str, Path]:
    """Answers at every strength with what was measured, as JSON holds them, as text, and the file in RUN/steer/.

    Answers that are there already are not written again.

    Raises:
        UserError: there is no such run, SAE or feature, or a number cannot be.
        KeyboardInterrupt: Ctrl-C; the same call goes on where it stopped.
    """
    alphas = [alpha for text in ask.alphas if (alpha := alpha_of(text)) is not None]
    strengths(alphas, ask.relative, None, 1.0)  # refuses numbers before the model is loaded
    set_name = _question_set(ask)
    ready = prepare(path, ask.sae, ask.feature, ask.dialogues)
    if not set_name:
        set_name = "python" if ready.run.config.model.name == BUNDLED else "general"
    questions = ask.prompts or question_sets()[set_name]
    if not ready.max_act:
        console.warn(f"feature {ask.feature} does not fire on the dialogues; it is steered all the same")
    auto = _auto(ready, ask.bound)
    steps = strengths(alphas, ask.relative, auto["alpha"], ready.scale.median_norm)
    experiment = _experiment(ready, ask, questions)
    kept = Kept(
        ready.folder() / f"{ready.name}-{ask.feature}-sweep.json", _made_with(ready, experiment, ask, questions)
    )
    answers = write_answers(experiment, jobs(steps, len(questions)), kept)
    told = _strengths(ready, steps, kept.effects)
    facts: Facts = {
        "kind": "sweep",
        "version": VERSION,
        "sae": ready.name,
        "feature": ask.feature,
        "layer": ready.sae.spec.layer,
        "model": ready.lm.label,
        "seed": ask.seed,
        "max_new_tokens": ask.max_new_tokens,
        **ready.facts(),
        "question_set": set_name,
        "questions": list(questions),
        "arms": list(ARMS),
        "others": list(experiment.others),
        "strengths": told,
        "auto": auto,
        **numbers(answers, told, questions, ask.quality, ready.scale.median_norm, seed=ask.seed),
        "grades": None,
        "made_with": kept.made_with,
    }
    kept.finish(facts)
    return facts, sweep_text(facts), kept.path


def _question_set(ask: SweepAsk) -> str:
    """The set that is asked for; empty: it depends on the model.

    Raises:
        UserError: there is no such set, or prompts are given as well.
    """
    if ask.prompts and ask.questions is not None:
        raise UserError("--questions names a set, --prompt gives questions; give one of them")
    if ask.questions is not None and ask.questions not in question_sets():
        raise UserError(f"--questions must be one of {', '.join(question_sets())}, not {ask.questions!r}")
    return "prompts" if ask.prompts else ask.questions or ""


def _auto(ready: Prepared, bound: float) -> Facts:
    """The automatic strength, or why there is none."""
    try:
        found = strengths_facts([None], ready, bound)[0]
    except UserError as error:
        console.warn(str(error))
        return {"alpha": None, "bound": bound, "kl": None, "forwards": None, "reason": str(error)}
    chosen = {"alpha": found["alpha"], "rel_norm": found["rel_norm"], "bound": bound, "kl": found["kl"]}
    return chosen | {"forwards": found["auto"]["forwards"], "reason": None}


def _strengths(ready: Prepared, steps: Sequence[Strength], effects: Mapping[float, Mapping[str, float]]) -> list[Facts]:
    """The strengths in all units, with the feature's effect on the predictions of held-out answers."""
    found = []
    calibration = ready.calibration
    missing = [step for step in steps if step.alpha and step.alpha not in effects]
    with console.progress("effect on held-out answers", len(missing) * calibration.n_rows) as calibration.on_rows:
        for step in steps:
            spec = ready.spec.at(step.alpha)
            effect = effects.get(step.alpha)
            if effect is None:
                effect = asdict(calibration.effect([spec])) if step.alpha else asdict(Effect(0.0, 0.0))
            found.append({"label": step.label, "grids": list(step.grids)} | ready.scale.relative(spec) | dict(effect))
    return found


def _experiment(ready: Prepared, ask: SweepAsk, questions: Sequence[str]) -> Experiment:
    assert ready.scale.max_acts is not None
    return Experiment(
        lm=ready.lm,
        sae=ready.sae,
        feature=ask.feature,
        prompts=tuple(row_of_prompt(question, ready.lm.tokenizer) for question in questions),
        others=other_features(ready.scale.max_acts, ask.feature, len(questions), ask.seed),
        max_new_tokens=ask.max_new_tokens,
        seed=ask.seed,
    )


def _made_with(ready: Prepared, experiment: Experiment, ask: SweepAsk, questions: Sequence[str]) -> Facts:
    """What answers, and the effects of strengths, follow from, apart from arm, strength and question."""
    weights = ready.run.path / "saes" / ready.name / "sae_weights.safetensors"
    return {
        "version": VERSION,
        "model": ready.lm.label,
        "revision": ready.run.config.model.revision,
        "dtype": str(ready.lm.dtype).removeprefix("torch."),
        "sae_sha256": sha256(weights),
        "feature": experiment.feature,
        "others": list(experiment.others),
        "questions": list(questions),
        "max_new_tokens": ask.max_new_tokens,
        "dialogues": ask.dialogues,
        "seed": ask.seed,
    }
