"""The verb about what SAEs know of behaviour and roles. It imports what it needs inside, as all verbs do."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from chatsae import console
from chatsae.typed import Count, Flags, Number, SmallSeed


@dataclass
class Audit(Flags):
    """Find what a run's SAEs know about two kinds of prompts, whether it causes the answers, and who they think speaks.

    Features at the template's tokens after the user's text, with AUROC on pairs they were not chosen on; ablating and
    clamping them against random features; sparse probes beside dense ones; and whether features of user turns fire on
    documents that imitate one (docs/audit.md). Writes RUN/audit.json.
    """

    run: tyro.conf.Positional[Path]
    """Run directory."""
    sae: tuple[str, ...] = ()
    """SAEs of the run by name; by default all."""
    sets: tuple[str, ...] = ()
    """Paired prompts: import, cannot, polite (the ones that come with chatsae, by default all), a .jsonl file of pairs,
    POSITIVE.json:NEGATIVE.json, or a directory of harmful_SPLIT.json and harmless_SPLIT.json."""
    prefixes: tuple[str, ...] = ()
    """Beginnings of an answer that show the behaviour, or one text file (.txt) with one per line; by default those that
    the set names, else beginnings of English refusals."""
    pairs: Annotated[int, Number(least=16)] = 200
    """Pairs of each set, at most."""
    dialogues: Annotated[int, Number(least=32)] = 200
    """Dialogues of the steering split: for densities, the perplexity guard and role confusion."""
    top: Count = 10
    """Features to choose and report."""
    ablate: Count = 4
    """Of them, how many are ablated and clamped together: the best that are more active on positive prompts."""
    controls: Annotated[int, Number(least=0, most=10_000)] = 19
    """Draws of random other features of like density; with 19 the smallest rank p is 0.05."""
    max_new_tokens: Count = 12
    """Tokens of an answer; only its beginning is looked at. Greedy."""
    max_perplexity_ratio: Annotated[float, Number(least=1)] = 1.5
    """The guard: an intervention that makes held-out answers less likely than this does not count."""
    draws: Annotated[int, Number(least=19, most=10_000_000)] = 1000
    """Random swaps behind the p value of the choice."""
    seed: SmallSeed = 0
    """Halves of sets without splits, swaps, controls and folds."""
    json: bool = False
    """Print what was found on stdout in place of the tables."""

    def __call__(self) -> None:
        from chatsae.audit.command import Ask, audit_run

        same = {each.name: getattr(self, each.name) for each in fields(Ask) if each.name != "saes"}
        facts, text = audit_run(self.run, Ask(saes=self.sae, **same))
        console.result(facts if self.json else text)
