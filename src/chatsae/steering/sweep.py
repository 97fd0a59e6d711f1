"""The sweep: questions answered at every strength, by a feature and by two controls, read again and kept as it goes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chatsae import console
from chatsae.data.store.manifest import changes
from chatsae.errors import UserError
from chatsae.files import read_object, write_text
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.steering.generate import Completion, generate
from chatsae.steering.measures import Written, read_answers
from chatsae.steering.rows import Row
from chatsae.steering.spec import SteerSpec

RELATIVE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Strengths in median norms of the layer's stream."""

ARMS = ("feature", "random", "other")
"""The feature; a random unit direction; another feature that fires. The last two are drawn anew for each question."""

UNSTEERED = "unsteered"
_ROWS = 32  # that are answered in one batch


@cache
def question_sets() -> dict[str, tuple[str, ...]]:
    """The questions that come with the package, ten each: for any instruct model, and for the bundled one."""
    text = resources.files("chatsae.steering").joinpath("questions.json").read_text(encoding="utf-8")
    return {name: tuple(questions) for name, questions in json.loads(text).items()}


@dataclass(frozen=True, slots=True)
class Strength:
    """An absolute strength and the grids that it is of: paper, relative, auto."""

    label: str
    grids: tuple[str, ...]
    alpha: float


def strengths(
    alphas: Sequence[float], relative: Sequence[float], auto: float | None, median_norm: float
) -> tuple[Strength, ...]:
    """The strengths of a sweep, ascending, 0 first; equal ones are one.

    Raises:
        UserError: one is below 0 or not finite.
    """
    for flag, values in (("--alpha", alphas), ("--relative", relative)):
        for value in values:
            if not 0 <= value < float("inf"):
                raise UserError(f"{flag}: a sweep takes strengths of at least 0, not {value:g}")
    asked = [("paper", f"{a:g}", a) for a in (0.0, *alphas)]
    asked += [("relative", f"{r:g} norm", r * median_norm) for r in relative]
    asked += [] if auto is None else [("auto", "auto", auto)]
    found: dict[float, list[tuple[str, str]]] = {}
    for grid, label, alpha in asked:
        own = found.setdefault(alpha, [])
        own += [(grid, label)] if (grid, label) not in own else []
    return tuple(
        Strength(" = ".join(label for _, label in own), tuple(dict.fromkeys(grid for grid, _ in own)), alpha)
        for alpha, own in sorted(found.items())
    )


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to be written."""

    arm: str
    alpha: float
    question: int


def jobs(steps: Sequence[Strength], n_questions: int) -> list[Job]:
    """Every answer of a sweep: without steering once, then at every strength by every arm."""
    found = [Job(UNSTEERED, 0.0, q) for q in range(n_questions)]
    return found + [Job(arm, step.alpha, q) for step in steps if step.alpha for arm in ARMS for q in range(n_questions)]


def random_direction(d_in: int, seed: int, question: int) -> Float[Tensor, " D"]:
    """A unit vector of random direction, the same for the same seed and question."""
    drawn = torch.randn(d_in, generator=torch.Generator().manual_seed(2**20 * seed + question), dtype=torch.float64)
    return drawn / torch.linalg.vector_norm(drawn)


def other_features(max_acts: Float[Tensor, " F"], feature: int, n: int, seed: int) -> tuple[int, ...]:
    """`n` features that fire, other than `feature`, drawn by the seed; none twice while there are enough.

    Raises:
        UserError: no other feature fires.
    """
    live = [k for k in (max_acts > 0).nonzero().squeeze(1).tolist() if k != feature]
    if not live:
        raise UserError(f"no feature but {feature} fires on the dialogues, so there is none to compare it with")
    order = torch.randperm(len(live), generator=torch.Generator().manual_seed(2**20 * seed + feature)).tolist()
    return tuple(live[order[i % len(live)]] for i in range(n))


@dataclass(frozen=True)
class Experiment:
    """What is steered, by what, and asked what."""

    lm: LanguageModel
    sae: SAE
    feature: int
    prompts: tuple[Row, ...]
    others: tuple[int, ...]
    """The other feature of each question."""
    max_new_tokens: int = 64
    seed: int = 0

    @cached_property
    def _cache(self) -> dict[tuple[str, float, int], SteerSpec]:
        return {}

    def specs(self, job: Job) -> tuple[SteerSpec, ...]:
        """What acts on the row of an answer; equal specs are one object, which a batch needs to be told once."""
        if job.arm == UNSTEERED:
            return ()
        which = {"feature": self.feature, "other": self.others[job.question], "random": job.question}[job.arm]
        key = (job.arm, job.alpha, which)
        if key not in self._cache:
            self._cache[key] = self._spec(job)
        return (self._cache[key],)

    def _spec(self, job: Job) -> SteerSpec:
        if job.arm == "random":
            direction = random_direction(self.lm.d_in, self.seed, job.question)
            return SteerSpec(vector=direction, layer=self.sae.spec.layer, strength=job.alpha)
        feature = self.feature if job.arm == "feature" else self.others[job.question]
        return SteerSpec(sae=self.sae, feature=feature, strength=job.alpha)

    def answer(
        self, todo: Sequence[Job], *, test: bool = False, advance: Callable[[float], object] = lambda _: None
    ) -> list[dict[str, Any]]:
        """The answers of one batch, measured, as JSON holds them; `test`, `advance`: see `generate`."""
        specs = [self.specs(job) for job in todo]
        prompts = [self.prompts[job.question] for job in todo]
        found = generate(self.lm, prompts, specs, max_new_tokens=self.max_new_tokens, test=test, advance=advance)
        written = [
            Written(prompt, c.token_ids, c.finish_reason == "stop", own, self.feature, self.others[job.question])
            for job, prompt, own, c in zip(todo, prompts, specs, found.completions, strict=True)
        ]
        measured = read_answers(self.lm, self.sae, written)
        rows = zip(todo, found.completions, measured, strict=True)
        return [_facts(job, completion, values) for job, completion, values in rows]


_ANSWER = ("arm", "alpha", "question", "text", "token_ids", "finish_reason", "n_prompt", "measures")
"""What is kept of an answer; what follows from it is worked out anew."""


def _facts(job: Job, completion: Completion, values: dict[str, float | None]) -> dict[str, Any]:
    facts = {"arm": job.arm, "alpha": job.alpha, "question": job.question, "measures": values} | completion.facts()
    return {name: facts[name] for name in _ANSWER}


class Kept:
    """Answers on the disk: those of the finished sweep in `path`, and those of one under way beside it.

    Answers made with something else (`made_with`) are not used. `effects`: kl and log_ratio by strength, of a finished
    sweep (`chatsae.steering.strength.Effect`).
    """

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        self.path, self.made_with = path, made_with
        self.partial = path.with_name(path.name + ".partial")
        self.answers: dict[Job, dict[str, Any]] = {}
        self.effects: dict[float, dict[str, float]] = {}
        for file in (path, self.partial):
            self._take(file)

    def _take(self, file: Path) -> None:
        if not file.exists():
            return
        try:
            facts = read_object(file)
            changed = [k for k, v in self.made_with.items() if changes(facts["made_with"].get(k), v)]
            if changed:
                console.say(f"{file} has answers of another sweep ({', '.join(changed)}); they are not used")
                return
            for row in facts["answers"]:
                job = Job(row["arm"], row["alpha"], row["question"])
                self.answers[job] = {name: row[name] for name in _ANSWER}
            for step in facts.get("strengths", ()):
                self.effects[step["alpha"]] = {name: step[name] for name in ("kl", "log_ratio")}
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            console.warn(f"{file} is damaged ({error}); its answers are written anew")

    def add(self, todo: Sequence[Job], answers: Sequence[dict[str, Any]]) -> None:
        """Keep answers, on the disk when this returns."""
        self.answers |= dict(zip(todo, answers, strict=True))
        write_text(
            self.partial, json.dumps({"made_with": self.made_with, "answers": list(self.answers.values())}) + "\n"
        )

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the finished sweep; its answers need not be kept apart any more."""
        write_text(self.path, json.dumps(facts, indent=1) + "\n")
        self.partial.unlink(missing_ok=True)


def write_answers(experiment: Experiment, todo: Sequence[Job], kept: Kept) -> list[dict[str, Any]]:
    """The answers of all jobs, in their order; those that are kept are not written again, and each batch is kept.

    Raises:
        KeyboardInterrupt: Ctrl-C; the batch under way is kept first.
    """
    missing = [job for job in todo if job not in kept.answers]
    if len(missing) < len(todo):
        console.say(f"{len(todo) - len(missing)} of {len(todo)} answers are there already")
    with console.stop_requested("this batch of answers") as stop, console.progress("answers", len(missing)) as advance:
        for start in range(0, len(missing), _ROWS):
            part = missing[start : start + _ROWS]
            kept.add(part, experiment.answer(part, test=start == 0, advance=advance))
            if stop.is_set():
                raise KeyboardInterrupt
    return [kept.answers[job] for job in todo]
