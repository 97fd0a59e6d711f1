"""`chatsae judge`: the judge that was asked for, what it would cost, and what it finds."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chatsae import console
from chatsae.console import Column
from chatsae.errors import UserError
from chatsae.features.collect import Reading
from chatsae.features.comparison import compare_scores
from chatsae.features.judge.asking import Asker, Estimate, Prices, estimate
from chatsae.features.judge.cache import Cache, Replay
from chatsae.features.judge.client import Client
from chatsae.features.judge.local import LocalHF, LocalJudge
from chatsae.features.judge.openai import OpenAICompat
from chatsae.features.judge.rubric import PARAMS, RubricJudge, file_name
from chatsae.features.judge.tasks import Tasks, silent_windows
from chatsae.features.judging import Asked, Facts, Work, gather_work, judge_work
from chatsae.features.patterns.judge import PatternJudge
from chatsae.features.random_directions import DIRECTIONS
from chatsae.features.records import Context
from chatsae.features.score_tables import comparison_table, judgement_table
from chatsae.features.session import Ask, RunFeatures
from chatsae.features.verdict import Judge, Verdict
from chatsae.files import Lock, parse_json
from chatsae.runs import Run

PAPER_FEATURES = 128
"""Features that the paper judges per SAE: the default where answers cost something."""

PAID_CONTROLS = 20
"""Features of each control where answers cost something."""

_SECRET = re.compile(r"(?:x-)?(?:api[-_]?)?key|authorization|secret|password|(?:\w+[-_])?token", re.IGNORECASE)
_LEAST_MASS = 0.5  # probability of all five digits together, below which a local model does not answer the question

_ESTIMATE = (
    Column("SAE"),
    Column("calls"),
    Column("cached"),
    *(Column(f"{n}_tokens") for n in ("prompt", "completion")),
)
_TASKS = (
    Column("SAE"),
    Column("detection", "balanced accuracy\nof explanations"),
    Column("detected", "features"),
    Column("intruder", "intruder found\n(chance 0.2)"),
    Column("intruded", "features"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `chatsae judge` is told; see its help."""

    runs: tuple[Path, ...]
    sae: tuple[str, ...] = ()
    judge: str = "pattern"
    model: str | None = None
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str | None = None
    params: str = "{}"
    concurrency: int = 8
    timeout: float = 120.0
    contexts: Literal[5, 20] = 20
    features: int | None = None
    activations: bool = False
    repeat: int = 1
    also: tuple[Literal["detection", "intruder"], ...] = ()
    controls: int | None = None
    null_run: Path | None = None
    dialogues: int | None = None
    seed: int = 0
    dry_run: bool = False
    budget: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--repeat", self.repeat, 1),
            ("--concurrency", self.concurrency, 1),
            ("--features", self.features, 0),
            ("--controls", self.controls, 0),
            ("--seed", self.seed, 0),
            ("--budget", self.budget, 0),
            ("--price-in", self.price_in, 0),
            ("--price-out", self.price_out, 0),
        ):
            if value is not None and not value >= least:
                raise UserError(f"{flag} must be at least {least}, not {value}")
        if not self.timeout > 0:
            raise UserError(f"--timeout must be more than 0 seconds, not {self.timeout}")
        if (self.price_in is None) != (self.price_out is None):
            raise UserError("--price-in and --price-out go together, in dollars per million tokens")
        if not self.runs:
            raise UserError("judge needs at least one run directory")
        if self.null_run is not None and (len(self.runs) > 1 or self.controls == 0):
            raise UserError("--null-run stands beside one run, and needs --controls above 0")
        if self.kind not in ("pattern", "openai", "local", "replay"):
            raise UserError(f"--judge {self.judge} is none of pattern, openai, local, replay:FILE")
        self.sampling()
        if self.also and self.kind == "pattern":
            raise UserError("--also needs a language model as the judge; the pattern judge has its own held-out check")

    @property
    def kind(self) -> str:
        """pattern, openai, local or replay."""
        return self.judge.partition(":")[0]

    @property
    def free(self) -> bool:
        """Whether a verdict costs nothing but time."""
        return self.kind in ("pattern", "local")

    @property
    def n_controls(self) -> int:
        """Features of each control: fewer where answers cost something."""
        return self.controls if self.controls is not None else (DIRECTIONS if self.free else PAID_CONTROLS)

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters; null takes one away.

        Raises:
            UserError: --params is no JSON object.
        """
        try:
            given = parse_json(self.params)
        except ValueError:
            given = None
        if not isinstance(given, dict) or {"model", "messages"} & set(given):
            raise UserError(f"--params must be a JSON object with sampling parameters, not {self.params}")
        if wrong := [name for name in given if _SECRET.fullmatch(name)]:  # it would be kept with the request
            raise UserError(f"--params holds {wrong[0]}; a key comes from a variable, --api-key-env NAME")
        return {name: value for name, value in (PARAMS | given).items() if value is not None}


def judge(options: Options) -> tuple[dict[str, Any], str]:
    """What was found, by SAE, or what it would cost; as JSON holds it and as text tables.

    Of several runs it stands under "runs" by their path, and "comparison" sets their scores side by side.

    Raises:
        UserError: the judge does not exist or cannot be asked, or the budget is spent.
    """
    runs = [Run.read(path) for path in _run_paths(options.runs)]
    found: dict[str, dict[str, Any]] = {}
    texts, left = [], options.budget
    for run in runs:
        facts, text, spent = _judge_run(replace(options, budget=left), run.path)
        found[str(run.path)] = facts
        texts.append(text if len(runs) == 1 else f"{run.path}\n{text}")
        left = None if left is None else max(left - spent, 0.0)
    if len(runs) == 1:
        return found[str(runs[0].path)], texts[0]
    if options.dry_run:
        return {"runs": found}, "\n\n".join(texts)
    judged = {(f["sae"], f["judge"], f["n_contexts"]) for facts in found.values() for f in facts.values()}
    compared = [c for c in compare_scores(runs) if (c["sae"], c["judge"], c["n_contexts"]) in judged]
    texts += [comparison_table(compared)] if compared else []
    return {"runs": found, "comparison": compared}, "\n\n".join(texts)


def _run_paths(paths: Sequence[Path]) -> list[Path]:
    """Run directories, and those below a directory of runs; each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        below = [] if (path / "config.yaml").is_file() else sorted(p.parent for p in path.glob("*/config.yaml"))
        for one in below or [path]:
            found.setdefault(one.resolve(), one)
    return list(found.values())


def _judge_run(options: Options, path: Path) -> tuple[dict[str, Any], str, float]:
    """What was found of a run, as JSON holds it and as text, and the dollars it took."""
    run = RunFeatures(path, options.sae)
    with open_asker(options, path) as asker:
        limit = options.features if options.features is not None else (0 if options.free else PAPER_FEATURES)
        asked = gather_work(
            run,
            ask=Ask(dialogues=options.dialogues),
            n_contexts=options.contexts,
            limit=limit,
            controls=options.n_controls,
            null=options.null_run,
            seed=options.seed,
        )
        facts, text = _dry_run(options, asked, asker) if options.dry_run else _judge(options, asked, asker)
        return facts, text, 0.0 if asker is None else asker.usage.cost or 0.0


def _judge(options: Options, asked: Asked, asker: Asker | None) -> tuple[dict[str, Any], str]:
    chosen: Judge = PatternJudge(asked.background)
    more: Callable[[Work, Sequence[Verdict]], Facts] | None = None
    if asker is not None:
        tasks = Tasks(asker, options.sampling(), options.seed)
        chosen = _rubric(options, asker)
        if isinstance(asker.client, LocalHF):
            chosen = LocalJudge.of(asker.client, activations=options.activations, seed=options.seed)
        if options.also:
            more = partial(_more, options, asked, tasks, _rubric(options, asker))
    try:
        found = judge_work(asked, chosen, repeats=options.repeat, more=more)
    finally:
        if asker is not None and (asker.usage.calls or asker.usage.cached):
            console.say(usage_line(asker))
    for name, facts in found.items():
        mass = [v["details"]["digit_mass"] for v in facts["verdicts"] if "digit_mass" in v["details"]]
        if mass and np.mean(mass) < _LEAST_MASS:
            console.warn(
                f"{name}: {facts['judge']} answers with a digit in {np.mean(mass):.2%} of all cases only; "
                "its scores say little"
            )
    tables = [judgement_table(found)]
    if options.also:
        tables.append(
            console.table("Without a scale", _TASKS, [_task_row(name, facts) for name, facts in found.items()])
        )
    return found, "\n\n".join(tables)


def _more(
    options: Options, asked: Asked, tasks: Tasks, rubric: RubricJudge, work: Work, verdicts: Sequence[Verdict]
) -> Facts:
    silent = _silent(asked, work)
    found: Facts = {}
    if "detection" in options.also:
        told = verdicts
        if options.kind == "local":  # its scores come without a word
            with console.progress(f"explain {work.sae}", len(work.features)) as advance:
                told = []
                for verdict in rubric.verdicts(work.features, n_contexts=asked.n_contexts):
                    told.append(verdict)
                    advance(1)
        found["detection"] = tasks.detection(work.features, told, silent)
        found["detection"]["explanations"] = {str(v.feature): v.explanation for v in told if v.explanation}
    if "intruder" in options.also:
        found["intruder"] = tasks.intruder(work.features, asked.n_contexts, silent)
    return found


def _silent(asked: Asked, work: Work) -> dict[int, list[Context]]:
    run, facts = asked.run, work.store.facts
    tokens, reading = run.tokens(facts["dialogues_asked"]), Reading(**facts["reading"])
    windows = asked.background.contexts
    return silent_windows(run.saes[work.sae], run.lm, tokens, reading, work.features, windows, seed=asked.seed)


def _task_row(name: str, facts: Facts) -> dict[str, Any]:
    told, found = facts.get("detection", {}), facts.get("intruder", {})
    right = found.get("right")
    return {
        "SAE": name,
        "detection": told.get("mean"),
        "detected": told.get("n"),
        "intruder": None if right is None else right["share"],
        "intruded": None if right is None else right["of"],
    }


def _rubric(options: Options, asker: Asker) -> RubricJudge:
    name = ("replay-" if options.kind == "replay" else "") + file_name(asker.client.model)
    return RubricJudge(asker, name, options.sampling(), options.activations, options.seed)


@contextmanager
def open_asker(options: Options, path: Path) -> Iterator[Asker | None]:
    """The model behind a judge, closed when the judging ends; None of the pattern judge.

    Raises:
        UserError: it cannot be asked, or another process records into the same cache.
    """
    if options.kind == "pattern":
        yield None
        return
    prices = None
    if options.price_in is not None and options.price_out is not None:
        prices = Prices(options.price_in, options.price_out)
    with ExitStack() as stack:
        client, cache, concurrency = _client(options), None, 1
        stack.callback(client.close)
        if options.kind == "openai":
            folder = path / "judge"
            folder.mkdir(exist_ok=True)
            stack.callback(Lock(folder, "judge directory").close)
            cache, concurrency = Cache(folder / "cache.sqlite"), options.concurrency
            stack.callback(cache.close)
        asker = Asker(client, cache, prices=prices, budget=options.budget, concurrency=concurrency)
        stack.callback(asker.close)
        yield asker


def _client(options: Options) -> Client:
    if options.kind == "replay":
        return Replay(Path(options.judge.partition(":")[2]), options.model)
    if options.model is None:
        what = "a directory or name of an instruct model" if options.kind == "local" else "its name at --base-url"
        raise UserError(f"--judge {options.kind} needs --model, {what}")
    if options.kind == "local":
        return LocalHF(options.model)
    return OpenAICompat(
        options.base_url,
        options.model,
        api_key_env=options.api_key_env,
        timeout=options.timeout,
        concurrency=options.concurrency,
    )


def _dry_run(options: Options, asked: Asked, asker: Asker | None) -> tuple[dict[str, Any], str]:
    """What would be asked, without asking."""
    found: dict[str, Estimate] = {}
    for work in asked.work:
        rounds = list(work.rounds(options.repeat))
        if asker is None or options.kind in ("local", "replay"):
            found[work.sae] = Estimate()
            continue
        rubric = _rubric(options, asker)
        requests = (
            request
            for features, repeat in rounds
            for request in rubric.requests(features, n_contexts=options.contexts, repeat=repeat)
        )
        if options.also:
            tasks = Tasks(asker, options.sampling(), options.seed)
            more = tasks.requests(options.also, work.features, options.contexts, _silent(asked, work))
            requests = chain(requests, more)
        found[work.sae] = estimate(requests, asker.client.model, asker.cache, asker.prices)
    rows = [{"SAE": name, **each.facts()} for name, each in found.items()]
    columns = _ESTIMATE if asker is None or asker.prices is None else (*_ESTIMATE, Column("cost", "dollars"))
    text = console.table(
        "What would be asked: calls, those answered already, and tokens and dollars at most (an estimate)",
        columns,
        rows,
    )
    return {name: each.facts() for name, each in found.items()}, text


def usage_line(asker: Asker) -> str:
    """What was spent, for people."""
    usage = asker.usage
    cost = "" if usage.cost is None else f", ${usage.cost:,.4f}"
    return (
        f"{usage.calls:,} calls ({usage.cached:,} answers from the cache), {usage.prompt_tokens:,} tokens in, "
        f"{usage.completion_tokens:,} out{cost}; {usage.reasked:,} asked again, {usage.refused:,} refused, "
        f"{usage.unreadable:,} unreadable" + (f", {usage.cut:,} of them cut off by max_tokens" if usage.cut else "")
    )
