"""The verbs about features. Each imports what it needs inside, so that `chatsae --help` answers at once."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from chatsae import console
from chatsae.errors import UserError
from chatsae.typed import Count, Dollars, Finite, Flags, Natural, Number, OutDir, OutFile, Positive, SmallSeed


@dataclass
class Features(Flags):
    """Find out what the features of a run's SAEs respond to, on the dialogues held out for interpretation.

    Builds RUN/features/SAE when it is missing (docs/features.md): strongest and sampled contexts, densities,
    histograms, promoted tokens, neighbours. An interrupted pass goes on where it stopped.
    """

    run: tyro.conf.Positional[Path]
    """Run directory."""
    sae: tuple[str, ...] = ()
    """SAEs of the run by name; by default all."""
    token: str | None = None
    """Rank features by their mean activation on this token, set against that on all tokens."""
    text: str | None = None
    """Show which features fire on each token of this text, as the user's turn of a dialogue."""
    raw: bool = False
    """Take --text as it is, without the chat template."""
    like: Natural | None = None
    """Show the features whose decoder directions are closest to this one's, and those that fire with it."""
    dialogues: Count | None = None
    """Dialogues of the interpretation split; by default as before, else 10,000."""
    features: Natural | None = None
    """Live features with contexts, chosen by --seed, 0: all; by default as before, else 512."""
    only: tuple[Natural, ...] = ()
    """Print these features; they get contexts where they have none."""
    contexts: Count | None = None
    """Strongest contexts of each feature; by default as before, else 20."""
    window: Count | None = None
    """Tokens of a context; by default as before, else 64."""
    one_per_dialogue: bool | None = None
    """Whether the strongest contexts of a feature are of different dialogues; by default as before, else True."""
    seed: SmallSeed | None = None
    """Chooses features and samples; by default as before, else 0."""
    rows: Count = 20
    """Features to print."""
    rebuild: bool = False
    """Build it anew, whatever is there."""
    json: bool = False
    """Print JSON on stdout in place of the tables."""

    def __call__(self) -> None:
        from chatsae.features.command import look
        from chatsae.features.session import Ask

        ask = Ask(
            dialogues=self.dialogues,
            features=self.features,
            only=self.only,
            contexts=self.contexts,
            window=self.window,
            one_per_dialogue=self.one_per_dialogue,
            seed=self.seed,
            rebuild=self.rebuild,
        )
        facts, text = look(
            self.run,
            ask,
            saes=self.sae,
            token=self.token,
            text=self.text,
            raw=self.raw,
            like=self.like,
            rows=self.rows,
        )
        console.result(facts if self.json else text)


@dataclass
class Judge(Flags):
    """Score the features of a run's SAEs from 1 to 5 by the paper's rubric, and how far the judge can be believed.

    Finds the features' contexts first where they are missing (`chatsae features`); writes RUN/judge/SAE/JUDGE-N.json,
    N being --contexts. Answers of a model are kept in RUN/judge/cache.sqlite; the same command goes on where it
    stopped. Several runs are judged one after another, and their scores set side by side.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or a directory of runs (a demo)."""
    sae: tuple[str, ...] = ()
    """SAEs of the run by name; by default all."""
    judge: str = "pattern"
    """pattern: patterns that are listed beforehand, no model. openai: a model behind any OpenAI-compatible endpoint.
    local: a chat model on this machine, its expected score from one forward. replay:FILE: answers in a cache.sqlite."""
    model: str | None = None
    """openai: name of the model. local: directory or name of the model. replay: whose answers."""
    base_url: str = "https://api.openai.com/v1"
    """openai: the endpoint, http://127.0.0.1:8000/v1 for example."""
    api_key_env: str | None = None
    """openai: environment variable that holds the key; no key by default."""
    params: str = "{}"
    """openai: JSON object of sampling parameters beside or in place of temperature 0.1, max_tokens 256 and seed; null
    takes one away."""
    concurrency: Annotated[int, Number(least=1, most=1024)] = 8
    """openai: most calls at once; fewer while the server says that it is too much."""
    timeout: Positive = 120.0
    """openai: seconds to wait for an answer."""
    contexts: Literal[5, 20] = 20
    """Strongest contexts of a feature that are judged; the paper has 5, with which chance alone scores higher."""
    features: Natural | None = None
    """Features to judge, drawn by --seed, 0: all that have contexts. By default all, or as the paper 128 of openai."""
    activations: bool = False
    """Show the model how active the feature is."""
    repeat: Count = 1
    """Times that every feature is judged, the contexts in another order each time."""
    also: tuple[Literal["detection", "intruder"], ...] = ()
    """detection: tell windows in which a feature is active from others, by its explanation (balanced accuracy).
    intruder: tell which of five contexts is not one of the feature's."""
    controls: Natural | None = None
    """Random directions that are judged beside an SAE's features, and features of a model with random weights; by
    default 64, of openai and replay 20. 0: none."""
    null_run: Path | None = None
    """Run of the same recipe with model.random-weights; by default one beside RUN, if there is one."""
    dialogues: Count | None = None
    """Dialogues of the interpretation split; by default as before, else 10,000."""
    seed: SmallSeed = 0
    """Chooses features, the order of contexts, and what the judge is calibrated on."""
    dry_run: bool = False
    """Only print the calls, tokens and dollars that it would take."""
    budget: Dollars | None = None
    """Dollars; it ends before the call that could cost more than is left. Needs the prices."""
    price_in: Dollars | None = None
    """Dollars per million tokens of prompts."""
    price_out: Dollars | None = None
    """Dollars per million tokens of answers."""
    json: bool = False
    """Print what was found on stdout in place of the table."""

    def __call__(self) -> None:
        from chatsae.features.judge.command import Options, judge

        facts, text = judge(Options(**{each.name: getattr(self, each.name) for each in fields(Options)}))
        console.result(facts if self.json else text)


@dataclass
class Export(Flags):
    """Write a run's features, its evaluation or its steering in the formats of other tools; nothing is sent.

    docs/exports.md has the formats. Features are those that have contexts; they are found first where they are missing
    (`chatsae features`). Steering is a constant at every token: --feature at --alpha, or --recipe.
    """

    run: tyro.conf.Positional[Path]
    """Run directory."""
    format: Literal[
        "neuronpedia",
        "neuronpedia-bulk",
        "saedashboard",
        "delphi",
        "saebench",
        "gguf",
        "repeng",
        "neuronpedia-vector",
        "bias",
    ]
    """neuronpedia: bodies of uploads, 128 features each. neuronpedia-bulk: JSONL files of a bulk import. saedashboard:
    its batch files. delphi: its cache of latents, for which the model reads the dialogues once. saebench: the result
    of its core evaluation, from report.json. Of steering: gguf: a control vector of llama.cpp. repeng: of repeng.
    neuronpedia-vector: the body of a new vector. bias: the model itself, with the constant in a bias."""
    feature: Natural | None = None
    """Of steering: feature whose unit decoder row is added."""
    alpha: Finite | None = None
    """Of steering: strength, multiples of the unit decoder row as in `chatsae steer`; below 0 against it."""
    recipe: Path | None = None
    """Of steering: file of specs in place of --feature and --alpha (docs/steering.md)."""
    sae: str | None = None
    """SAE of the run by name; by default all, of steering the only one."""
    out: OutDir | None = None
    """Directory to write to; by default RUN/exports/FORMAT."""
    features: Natural = 0
    """Features to export, drawn as `chatsae judge` draws them; 0: all that have contexts."""
    model_id: str = ""
    """Id of the model on the other side; by default made of its name."""
    set_name: str = ""
    """Name of the set of SAEs on the other side; by default chatsae-METHOD-SAE."""
    creator_id: str = ""
    """neuronpedia-bulk: id of the account that the records get."""
    json: bool = False
    """Print what was written on stdout in place of the table."""

    def __call__(self) -> None:
        from chatsae.features.export import command as features
        from chatsae.steering.export import command as steering

        steers = self.format in steering.FORMATS
        others = ("features", "set_name", "creator_id") if steers else ("feature", "alpha", "recipe")
        for each in fields(self):
            if each.name in others and getattr(self, each.name) != each.default:
                what = "steering has none" if steers else f"only {', '.join(steering.FORMATS)} take it"
                raise UserError(f"--{each.name.replace('_', '-')}: {what}; leave it out with --format {self.format}")
        wanted: Any = steering.Wanted if steers else features.Wanted
        asked = wanted(**{each.name: getattr(self, each.name) for each in fields(wanted)})
        written, text = steering.export_steering(self.run, asked) if steers else features.export(self.run, asked)
        console.result(written if self.json else text)


@dataclass
class Report(Flags):
    """Write one HTML file about runs that opens anywhere, offline: figures, training, features, contexts, scores.

    What is missing of features and scores is made first (`chatsae features`, the pattern judge); docs/report.md.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or a directory of runs (a demo)."""
    out: OutFile | None = None
    """File to write; by default report.html in the directory that is given, of several in the working directory."""
    sae: tuple[str, ...] = ()
    """SAEs whose features are shown; by default of one run all, of several runs the first of each."""
    features: Count = 512
    """Features of each, at most."""
    contexts: Count = 20
    """Strongest contexts of each feature."""
    dialogues: Count | None = None
    """Dialogues to find features on, where that has not been done; by default 10,000, of the bundled model 300."""
    no_build: bool = False
    """Make nothing that is missing; the page says how to."""
    open: bool = False
    """Open the page in a browser."""
    json: bool = False
    """Print where the page is and what is in it on stdout as JSON."""

    def __call__(self) -> None:
        from chatsae.page.data import Wanted
        from chatsae.page.write import default_out, report, summary

        names = ("features", "contexts", "dialogues")
        wanted = Wanted(saes=self.sae, build=not self.no_build, **{name: getattr(self, name) for name in names})
        out = self.out or default_out(self.runs)
        facts = report(self.runs, out, wanted)
        console.result(facts if self.json else summary(facts))
        if self.open:
            import webbrowser

            webbrowser.open(out.resolve().as_uri())
