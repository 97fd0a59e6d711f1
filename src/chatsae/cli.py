"""The verbs. Each imports what it needs inside, so that `chatsae --help` answers at once."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from chatsae import console
from chatsae.config import Method, RunConfig
from chatsae.errors import UserError
from chatsae.recipe import load_recipe

_Flat = Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass
class Demo:
    """Train FAST, BT(F) and BT(P) SAEs on the bundled chat model and compare them (a few minutes on two cores)."""

    out: Path = Path("runs/demo")
    """Directory of the three runs and of compare.json."""
    recipe: Path | None = None
    """Another recipe than the demo's; its method is ignored, all three are trained."""

    def __call__(self) -> None:
        from chatsae.demo.walkthrough import demo

        demo(self.out, self.recipe)


@dataclass
class Train:
    """Train the grid of a recipe from one pass of the language model; an interrupted run goes on where it stopped."""

    recipe: tyro.conf.Positional[Path]
    """YAML file; every field below can be set in it and overridden by a flag."""
    out: Path | None = None
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
class Prepare:
    """Read, normalise, deduplicate, split and tokenise the data of a recipe once, for every method and run.

    Writes shards and manifest.json; `chatsae train RECIPE --data.prepared DIR` reads them. An interrupted preparation
    goes on where it stopped; one that is done is checked and left as it is.
    """

    recipe: tyro.conf.Positional[Path]
    """YAML file; every field below can be set in it and overridden by a flag."""
    out: Path | None = None
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
class Eval:
    """Evaluate the SAEs of a run on held-out dialogues, each fed whole; writes report.json."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    dialogues: int | None = None
    """Held-out dialogues; by default eval.dialogues of the run."""
    json: bool = False
    """Print JSON on stdout in place of the table."""

    def __call__(self) -> None:
        from chatsae.evals.session import evaluate_run

        report = evaluate_run(self.run, dialogues=self.dialogues)
        console.result({"facts": report.facts, "saes": report.rows} if self.json else report.table())


@dataclass
class Compare:
    """Set evaluated runs side by side, the best value of each group marked."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path | None = None
    """Also write the rows to this JSON file."""
    json: bool = False
    """Print JSON on stdout in place of the table."""

    def __call__(self) -> None:
        from chatsae.evals.report import compare
        from chatsae.runs import Run

        if not self.runs:
            raise UserError("compare needs at least one run directory")
        comparison = compare([Run.read(path) for path in self.runs])
        if self.out is not None:
            comparison.save(self.out)
        console.result({"facts": comparison.facts, "rows": comparison.rows} if self.json else comparison.table())


@dataclass
class Plan:
    """What recipes would train: passes, SAE names, memory, FLOPs, and the time that takes here. Loads no weights."""

    recipes: tyro.conf.Positional[tuple[Path, ...]]
    """YAML files, or run directories."""
    methods: tuple[Method, ...] = ("fast", "bt-f", "bt-p")
    """One pass is planned per recipe and method."""
    seconds: float = 10
    """Seconds of measuring on this machine per recipe, which predict the times; 0: no times."""
    json: bool = False
    """Print JSON on stdout in place of the table."""

    def __call__(self) -> None:
        from chatsae.training.plan import plan_recipes, plan_table

        if not self.recipes:
            raise UserError("plan needs at least one recipe")
        passes = plan_recipes(self.recipes, self.methods, self.seconds)
        console.result([p.facts() for p in passes] if self.json else plan_table(passes))


@dataclass
class Show:
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
class Bench:
    """Measure a part of chatsae on this machine, other libraries beside it; exits 1 when a claim does not hold."""

    name: tyro.conf.Positional[Literal["dedup", "harvest"]]
    """dedup: the n-gram deduplication, beside the naive algorithm, DuckDB and datatrove (bench/requirements.txt).
    harvest: the ways to read activations of random models, beside blocks, naive batches and sae_lens."""
    source: tuple[str, ...] = ("pydocs",)
    """dedup: dialogues to measure on, sources as data.sources of a recipe has them."""
    size: int = 0
    """dedup: samples, made of the dialogues and of rewritten copies of them; 0: 20,000, about a minute.
    harvest: d_in of the models; 0: 256 (12 M parameters, minutes), on a GPU 896."""
    median: int = 300
    """harvest: median length of a dialogue in tokens."""
    peer: Path | None = None
    """harvest: Python interpreter that has sae_lens; by default that of `make parity`, if it is there."""
    json: bool = False
    """Print JSON on stdout in place of the tables."""

    def __call__(self) -> None:
        if self.name == "harvest":
            from chatsae.bench.harvest import bench_harvest

            result = bench_harvest(self.size, median=self.median, peer=self.peer)
        else:
            from chatsae.bench.dedup import bench_dedup

            result = bench_dedup(self.source, self.size)
        console.result(result.facts() if self.json else result.table())
        if not result.holds:
            raise SystemExit(1)


_VERBS = {
    "demo": Demo,
    "prepare": Prepare,
    "train": Train,
    "eval": Eval,
    "compare": Compare,
    "plan": Plan,
    "show": Show,
    "bench": Bench,
}
_WITH_RECIPE = {"prepare": Prepare, "train": Train}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv in (["--version"], ["-V"]):
        from importlib.metadata import version

        console.result(version("chatsae"))
        return 0
    try:
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
    verbs = {name: tyro.conf.subcommand(name, prefix_name=False) for name in _VERBS}
    verb = _WITH_RECIPE.get(argv[0])
    if verb is not None and len(argv) > 1 and not argv[1].startswith("-"):
        recipe = Path(argv[1])  # the recipe's values become the defaults of the flags
        default = verb(recipe=recipe, config=load_recipe(recipe))
        verbs[argv[0]] = tyro.conf.subcommand(argv[0], prefix_name=False, default=default)
        argv = [argv[0], *argv[2:]]
    annotated: Any = Annotated  # types made at run time, which a type checker would take for wrong annotations
    union: Any = Union
    kinds = tuple(annotated[verb, verbs[name]] for name, verb in _VERBS.items())
    return tyro.cli(
        union[kinds],
        prog="chatsae",
        description="Train, judge and steer sparse autoencoders on instruct language models, dialogue by dialogue.",
        args=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
