"""The verbs about steering. Each imports what it needs inside, so that `chatsae --help` answers at once."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from chatsae import console
from chatsae.errors import UserError
from chatsae.typed import Count, Dollars, Flags, Natural, Number, OutFile, Positive, Share, SmallSeed

_JUDGE = ("judge", "model", "base_url", "api_key_env", "params", "concurrency", "timeout", "dry_run")
_MONEY = ("budget", "price_in", "price_out")
_QUALITY = ("max_perplexity_ratio", "max_repetition", "share", "acts")
_SWEEP = ("relative", "questions", "seed", *_QUALITY, "figure", "concept", *_JUDGE, *_MONEY)
"""Flags that mean something with --sweep only."""


@dataclass
class Steer(Flags):
    """Answer prompts with a feature of a run's SAE added to the residual stream, side by side over its strengths.

    Each strength is shown in units of the layer's median norm and of the feature's maximum, with what it does to the
    predictions of held-out answers (docs/steering.md); writes RUN/steer/SAE-FEATURE.json.

    With --sweep ten questions are answered at every strength and at some in median norms, by the feature and by two
    controls (a random direction, another feature); every answer is measured, and the window of strengths in which
    quality holds is computed and drawn. Writes RUN/steer/SAE-FEATURE-sweep.json; the same command goes on where it
    stopped.
    """

    run: tyro.conf.Positional[Path]
    """Run directory."""
    feature: Natural
    """Feature whose decoder row is added; `chatsae tokens` finds those of the template's tokens."""
    alpha: tuple[str, ...] = ("0", "15", "25", "50", "100", "150", "200")
    """Strengths, multiples of the unit decoder row, by default the paper's. auto: the largest within --bound; a sweep
    always has it."""
    prompt: tuple[str, ...] = ()
    """What the user asks; by default what three held-out dialogues ask, in a sweep --questions."""
    sae: str | None = None
    """SAE of the run by name, where it has several."""
    max_new_tokens: Count = 64
    """Tokens of an answer at most; greedy."""
    bound: Positive = 0.5
    """Of auto: mean KL(steered || unsteered) in nats over the tokens of 32 held-out answers."""
    guard: bool = False
    """Lower the strength of an answer that repeats itself, collapses or strays (docs/steering.md)."""
    dialogues: Count = 400
    """Dialogues of the steering split that are read for the answers."""
    sweep: bool = False
    """Run the whole experiment; all that follows but --json is about it."""
    relative: tuple[Annotated[float, Number(least=0)], ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
    """Further strengths, in median norms of the layer's stream."""
    questions: Literal["general", "python"] | None = None
    """Ten questions that come with the package; by default python of the bundled model, general of any other."""
    seed: SmallSeed = 0
    """Draws the random directions, the other features and the bootstrap."""
    max_perplexity_ratio: Annotated[float, Number(least=1)] = 2.0
    """Quality holds: perplexity of the answer under the unsteered model, over that of the unsteered answer."""
    max_repetition: Share = 0.2
    """Quality holds: by how much the share of 3-grams that repeat may be larger than in the unsteered answer."""
    share: Annotated[float, Number(above=0, most=1)] = 0.8
    """Of the questions for which quality must hold, for a strength to be in the window."""
    acts: Annotated[float, Number(above=0, most=1)] = 0.5
    """Of the questions whose answer must differ from the unsteered one, for the window to begin."""
    figure: OutFile | None = None
    """Draw the sweep: PATH.png and PATH.svg, or the one that PATH names (chatsae[figures])."""
    concept: str | None = None
    """What the feature is about, for --judge; by default its best explanation in RUN/judge."""
    judge: str | None = None
    """Language model that grades every answer (concept, instruction, fluency, 0 to 2): openai, local, replay:FILE; this
    flag and those below as in `chatsae judge`."""
    model: str | None = None
    """openai: name of the judge. local: its directory or name. replay: whose answers."""
    base_url: str = "https://api.openai.com/v1"
    """openai: the endpoint."""
    api_key_env: str | None = None
    """openai: environment variable that holds the key."""
    params: str = "{}"
    """openai: JSON object of sampling parameters."""
    concurrency: Annotated[int, Number(least=1, most=1024)] = 8
    """openai: most calls at once."""
    timeout: Positive = 120.0
    """openai: seconds to wait for an answer."""
    dry_run: bool = False
    """Only say what the judge would cost; the sweep itself is made."""
    budget: Dollars | None = None
    """Dollars at which grading ends. Needs the prices."""
    price_in: Dollars | None = None
    """Dollars per million tokens of prompts."""
    price_out: Dollars | None = None
    """Dollars per million tokens of answers."""
    json: bool = False
    """Print what was found on stdout in place of the text."""

    def __call__(self) -> None:
        if self.sweep:
            facts, text = self._sweep()
        else:
            from chatsae.steering.command import Ask, steer_run

            self._refuse_sweep_flags()
            same = ("feature", "sae", "max_new_tokens", "bound", "guard", "dialogues")
            facts, text = steer_run(self.run, Ask(alphas=self.alpha, prompts=self.prompt, **self._values(same)))
        console.result(facts if self.json else text)

    def _sweep(self) -> tuple[dict[str, Any], str]:
        from chatsae.features.judge.command import Options
        from chatsae.steering.sweep_command import SweepAsk
        from chatsae.steering.sweep_window import Quality
        from chatsae.steersweep.command import Extra, steer_sweep

        if self.guard:
            raise UserError("--guard changes strengths while it writes, so a sweep does not go with it")
        judge = None
        if self.judge is not None:
            judge = Options(runs=(self.run,), **self._values((*_JUDGE, *_MONEY)))
        elif named := self._changed(("concept", *_JUDGE, *_MONEY)):
            raise UserError(f"--{named[0].replace('_', '-')} is about the judge; name one with --judge")
        same = ("feature", "sae", "relative", "questions", "max_new_tokens", "bound", "dialogues", "seed")
        quality = Quality(**self._values(_QUALITY))
        ask = SweepAsk(alphas=self.alpha, prompts=self.prompt, quality=quality, **self._values(same))
        return steer_sweep(self.run, ask, Extra(judge=judge, concept=self.concept, figure=self.figure))

    def _values(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        """Those of the flags that were given another value than their default."""
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def _refuse_sweep_flags(self) -> None:
        if changed := self._changed(_SWEEP):
            raise UserError(f"--{changed[0].replace('_', '-')} is about the sweep; give --sweep as well")


@dataclass
class Tokens(Flags):
    """Find the features of the tokens that the chat template writes, as the paper's Tables 12-18 do.

    Read on the dialogues held out for steering; writes RUN/special_tokens.json.
    """

    run: tyro.conf.Positional[Path]
    """Run directory."""
    sae: tuple[str, ...] = ()
    """SAEs of the run by name; by default all."""
    dialogues: Count = 1000
    """Dialogues of the steering split."""
    top: Count = 5
    """Features of each token."""
    json: bool = False
    """Print JSON on stdout in place of the tables."""

    def __call__(self) -> None:
        from chatsae.steering.command import tokens_run

        facts, text = tokens_run(self.run, saes=self.sae, dialogues=self.dialogues, top=self.top)
        console.result(facts if self.json else text)
