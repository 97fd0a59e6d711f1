"""`chatsae steer` and `chatsae tokens`: a run's features at work, side by side, and those of its special tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.batch import Kind, Role, TokenBatch
from chatsae.config import RunConfig
from chatsae.data.store.splits import split_tokens
from chatsae.errors import UserError
from chatsae.files import write_json
from chatsae.lm.load import LanguageModel, load_model
from chatsae.run_model import trained_model
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.steering.generate import Completion, generate
from chatsae.steering.guard import Guard
from chatsae.steering.rows import Prompt, Row, prompt_of, rows_of_dialogues, spread_rows
from chatsae.steering.spec import SteerSpec
from chatsae.steering.strength import FORWARDS, Calibration, Effect, Scale, auto_alpha, measure_scale
from chatsae.steering.tokens import token_features, token_table

PAPER = ("0", "15", "25", "50", "100", "150", "200")
"""The paper's strengths."""

_SCALE_DIALOGUES = 64
_ROWS = 32  # that are answered in one batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What `steer_run` is asked; the fields of the verb."""

    feature: int
    alphas: tuple[str, ...] = PAPER
    prompts: tuple[str, ...] = ()
    sae: str | None = None
    max_new_tokens: int = 64
    bound: float = 0.5
    guard: bool = False
    dialogues: int = 400


def steer_split(config: RunConfig, lm: LanguageModel, limit: int, tally: Counter[str] | None = None) -> TokenBatch:
    """The first dialogues that a run holds out for steering, rendered.

    Raises:
        UserError: they cannot be read.
    """
    stream = split_tokens(config.data, lm.tokenizer, "steer", sources=config.eval.sources, limit=limit, tally=tally)
    return TokenBatch.concat(list(stream))


def steer_run(path: Path, ask: Ask) -> tuple[dict[str, Any], str]:
    """Answers to prompts at each strength of an add, as JSON holds them and as text; written to RUN/steer/ as well.

    Raises:
        UserError: there is no such run, SAE or feature, or a number cannot be.
    """
    wanted = [alpha_of(text) for text in ask.alphas]
    ready = prepare(path, ask.sae, ask.feature, ask.dialogues)
    strengths = strengths_facts(wanted, ready, ask.bound)
    prompts: list[Prompt] = list(ask.prompts) or [prompt_of(row) for row in ready.rows[:3]]
    answers = _answers(ready.lm, prompts, [ready.spec.at(s["alpha"]) for s in strengths], ask)
    facts = {"sae": ready.name, "feature": ask.feature, **ready.facts(), "strengths": strengths, **answers}
    write_json(ready.folder() / f"{ready.name}-{ask.feature}.json", facts)
    return facts, _text(facts)


@dataclass(frozen=True)
class Prepared:
    """A feature of a run, the model that it steers, and what its strengths are measured against."""

    run: Run
    name: str
    sae: SAE
    spec: SteerSpec
    lm: LanguageModel
    rows: tuple[Row, ...]
    """Answered dialogues of the steering split."""
    scale: Scale
    calibration: Calibration

    @property
    def max_act(self) -> float | None:
        """The feature's largest activation."""
        acts, feature = self.scale.max_acts, self.spec.feature
        return None if acts is None or feature is None else float(acts[feature])

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "median_norm": self.scale.median_norm,
            "max_act": self.max_act,
            "n_calibration_predictions": self.calibration.n_predictions,
        }

    def folder(self) -> Path:
        """RUN/steer, made where it is missing."""
        found = self.run.path / "steer"
        found.mkdir(exist_ok=True)
        return found


def prepare(path: Path, sae_name: str | None, feature: int, dialogues: int) -> Prepared:
    """Load a run's SAE and model, and measure the layer's scale on its steering split.

    Raises:
        UserError: there is no such run, SAE or feature, or no dialogue.
    """
    if dialogues < 1:
        raise UserError(f"--dialogues must be at least 1, not {dialogues}")
    run = Run.read(path)
    name, sae = _only(_saes(run, () if sae_name is None else (sae_name,)), path)
    spec = SteerSpec(sae=sae, feature=feature)
    spec.direction()  # refuses a feature that does not exist before the model is loaded
    lm = load_model(trained_model(run), head=True)
    sae.to(lm.device)
    tokens = steer_split(run.config, lm, dialogues)
    rows = rows_of_dialogues(tokens, lm.max_positions)
    few = tokens.select(range(min(_SCALE_DIALOGUES, len(tokens))))
    scale = measure_scale(lm, few, sae.spec.layer, sae)
    return Prepared(run, name, sae, spec, lm, tuple(rows), scale, Calibration(lm, spread_rows(rows)[0]))


def tokens_run(
    path: Path, *, saes: Sequence[str] = (), dialogues: int = 1000, top: int = 5
) -> tuple[dict[str, Any], str]:
    """The features of each special token over a run's steering split, as JSON and text; RUN/special_tokens.json.

    Raises:
        UserError: there is no such run or SAE, or no dialogue.
    """
    if dialogues < 1:
        raise UserError(f"--dialogues must be at least 1, not {dialogues}")
    run = Run.read(path)
    chosen = _saes(run, saes)
    lm = load_model(trained_model(run))
    for sae in chosen.values():
        sae.to(lm.device)
    tally: Counter[str] = Counter()
    batch = steer_split(run.config, lm, dialogues, tally)
    found = token_features(lm, chosen, [batch], top=top)
    for reason, n in tally.most_common():
        console.say(f"{n:,} × {reason}")
    facts = {
        "split": "steer",
        "n_dialogues": len(batch),
        "n_tokens": len(batch.input_ids),
        "saes": {name: [row.facts() for row in rows] for name, rows in found.items()},
    }
    write_json(run.path / "special_tokens.json", facts)
    return facts, "\n\n".join(token_table(name, rows) for name, rows in found.items())


def _saes(run: Run, names: Sequence[str]) -> dict[str, SAE]:
    there = {p.name: p for p in run.sae_directories()}
    for name in names:
        if name not in there:
            raise UserError(f"run {run.path} has no SAE {name!r}; it has {', '.join(there)}")
    return {name: SAE.load(there[name]) for name in there if not names or name in names}


def _only(saes: dict[str, SAE], path: Path) -> tuple[str, SAE]:
    if len(saes) > 1:
        raise UserError(f"run {path} has several SAEs; choose one with --sae: {', '.join(saes)}")
    return next(iter(saes.items()))


def alpha_of(text: str) -> float | None:
    """A number, or None for auto.

    Raises:
        UserError: it is neither.
    """
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise UserError(f"--alpha takes numbers or auto, not {text!r}")
    return value


def strengths_facts(wanted: Sequence[float | None], ready: Prepared, bound: float) -> list[dict[str, Any]]:
    """`strength_facts` of several strengths, under one progress bar."""
    calibration = ready.calibration
    forwards = sum(FORWARDS - 1 if alpha is None else bool(alpha) for alpha in wanted)
    with console.progress("effect on held-out answers", forwards * calibration.n_rows) as calibration.on_rows:
        return [strength_facts(alpha, ready, bound) for alpha in wanted]


def strength_facts(alpha: float | None, ready: Prepared, bound: float) -> dict[str, Any]:
    """One strength, None: auto, in all units, and what it does to the predictions of the calibration answers.

    Raises:
        UserError: no strength stays within the bound.
    """
    scale, calibration, spec = ready.scale, ready.calibration, ready.spec
    if alpha is None:
        found = auto_alpha(calibration, spec, bound=bound, start=0.3 * scale.median_norm)
        label, effect = "auto", found.effect
        chosen, auto = found.alpha, {"forwards": found.forwards, "bound": bound, "tried": found.tried}
        console.say(
            f"auto: alpha {chosen:.4g} after {found.forwards} batch forwards, KL {effect.kl:.3f} (bound {bound:g})"
        )
    else:
        label, chosen, auto = f"{alpha:g}", alpha, None
        effect = calibration.effect([spec.at(alpha)]) if alpha else Effect(0.0, 0.0)
    return {"label": label, **scale.relative(spec.at(chosen)), **asdict(effect), "auto": auto}


def _answers(lm: LanguageModel, prompts: Sequence[Prompt], specs: Sequence[SteerSpec], ask: Ask) -> dict[str, Any]:
    """Every prompt without steering and at every strength."""
    todo = [(p, s) for p in range(len(prompts)) for s in [None, *range(len(specs))]]
    done: list[Completion] = []
    counts: Counter[str] = Counter()
    with console.progress("answers", len(todo)) as advance:
        for start in range(0, len(todo), _ROWS):
            part = todo[start : start + _ROWS]
            found = generate(
                lm,
                [prompts[p] for p, _ in part],
                [[] if s is None else [specs[s]] for _, s in part],
                max_new_tokens=ask.max_new_tokens,
                guard=Guard() if ask.guard else None,
                test=start == 0,
                advance=advance,
            )
            done += found.completions
            counts["forwards"] += found.forwards
            counts["hook_calls"] += sum(found.hook_calls.values())
    base = {p: c for (p, s), c in zip(todo, done, strict=True) if s is None}
    examples = [
        {
            "label": f"alpha {specs[s].strength:.4g}",
            "prompt": _shown(prompts[p], lm),
            "base": base[p].text,
            "steered": completion.text,
            **completion.facts(),
        }
        for (p, s), completion in zip(todo, done, strict=True)
        if s is not None
    ]
    return {"examples": examples, **counts}


def _shown(prompt: Prompt, lm: LanguageModel) -> str:
    """A prompt for people: what the user says in it."""
    if not isinstance(prompt, Row):
        return str(prompt)
    said = (prompt.role == int(Role.USER)) & (prompt.kind == int(Kind.CONTENT))
    return str(lm.tokenizer.decode(prompt.input_ids[said]))


def _text(facts: dict[str, Any]) -> str:
    title = f"{facts['sae']}, feature {facts['feature']}: median norm {facts['median_norm']:.4g}"
    columns = [
        console.Column("label", header="strength"),
        console.Column("alpha"),
        console.Column("rel_norm", header="alpha / norm"),
        console.Column("rel_maxact", header="alpha / max"),
        console.Column("kl", header="KL, nats"),
        console.Column("log_ratio", header="log perplexity ratio"),
    ]
    lines = [console.table(title, columns, facts["strengths"])]
    before = None
    for example in facts["examples"]:
        if example["prompt"] != before:
            before = example["prompt"]
            lines += ["", f"> {before}", f"  {'unsteered':>12} | {_line(example['base'])}"]
        lowered = f" (guard lowered it {len(example['events'])} times)" if example["events"] else ""
        lines.append(f"  {example['label']:>12} | {_line(example['steered'])} [{example['finish_reason']}]{lowered}")
    return "\n".join(lines)


def _line(text: str) -> str:
    return " ".join(text.split())
