"""The section on steering of docs/results.md: tables and sentences that follow from the numbers."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatsae.files import write_text
from chatsae.steering.sweep import ARMS
from chatsae.steering.tokens import TokenFeature, TokenRow

ROOT = Path(__file__).parents[1]
PAGE, FIGURE = ROOT / "docs" / "results.md", ROOT / "docs" / "img" / "steering.svg"
BEGIN, END = "<!-- steering: make steering -->", "<!-- end of steering -->"
CONTROLS = {"random": "a random direction", "other": "another feature"}

Rows = Mapping[tuple[str, str], Sequence[TokenRow]]


@dataclass(frozen=True)
class Sweep:
    """A sweep of a feature of a special token."""

    token: str
    method: str
    facts: Mapping[str, Any]


def kept_section(page: Path = PAGE) -> str:
    """The section as it stands on a page, for who writes the rest of it anew; without one, how to make it."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    _, begin, rest = text.partition(BEGIN)
    own, end, _ = rest.partition(END)
    return f"{BEGIN}{own}{END}" if begin and end else f"{BEGIN}\n\n`make steering` writes this section.\n\n{END}"


def write_section(rows: Rows, n_dialogues: int, sweeps: Sequence[Sweep], tokens: int, page: Path = PAGE) -> None:
    """Put the section between its marks, or at the end of a page without marks."""
    text = page.read_text(encoding="utf-8")
    made = f"{BEGIN}\n\n{section(rows, n_dialogues, sweeps, tokens)}\n{END}"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    whole = f"{before}{made}{after}" if begin and end else f"{text.rstrip()}\n\n{made}\n"
    write_text(page, whole)


def section(rows: Rows, n_dialogues: int, sweeps: Sequence[Sweep], tokens: int) -> str:
    """The whole section."""
    reading = (
        window_sentence,
        difference_sentence,
        length_sentence,
        reread_sentence,
        better_sentence,
        auto_sentence,
    )
    alt = "KL, perplexity, repetition, re-read activation and the share of answers that hold, over alpha / median norm"
    return f"""## Steering with the features of special tokens

{_filled(_tokens_intro(rows, n_dialogues, tokens))}

{token_table(rows)}

{_filled(tower_sentence(rows), exclusive_sentence(rows))}

![{alt}](img/{FIGURE.name})

{_filled(_sweep_intro(sweeps[0].facts))}

{window_table(sweeps)}

{_listed(*(sentence(sweeps) for sentence in reading))}

`chatsae tokens RUN` prints the rows of the first table, `chatsae steer RUN --feature K --sweep` one sweep with its
answers side by side ([steering.md](steering.md)).
"""


def _tokens_intro(rows: Rows, n_dialogues: int, tokens: int) -> str:
    first = rows[next(iter(rows))]
    counts = ", ".join(f"{row.occurrences:,} `{row.token}`" for row in first if row.place == "id")
    return (
        f"Written by `make steering` from the runs of one seed ({tokens:,} training tokens each). For each special "
        "token, by its id as the paper's Tables 12-18, the five features of largest mean activation over "
        f"{n_dialogues} held-out dialogues ({counts}): `feature: mean (exclusive)`, where *exclusive* is mean / "
        "(mean + mean on all other tokens): 1 only here, 0.5 everywhere alike."
    )


def _sweep_intro(facts: Mapping[str, Any]) -> str:
    quality = facts["quality"]
    relative = sum("relative" in step["grids"] for step in facts["strengths"])
    return (
        f"{len(facts['questions'])} questions (set `{facts['question_set']}` of `chatsae.steering.sweep`; the paper "
        f"does not print its ten) at the paper's strengths, at {relative} in median norms (here "
        f"{facts['median_norm']:.3g}), and at the automatic one (dotted); greedy, at most {facts['max_new_tokens']} "
        "tokens; features of FAST's JumpReLU SAE. Coloured fields: 95 % over questions. Grey: the window. Both "
        "controls are drawn anew for each question and move the stream by the same length. *Holds*: "
        f"{quality['words']}. *Window*: at least {quality['acts']:.0%} of the answers differ from the unsteered ones, "
        f"and up to there at least {quality['share']:.0%} hold; in median norms, with 95 % bootstrap intervals over "
        "questions, whose edges are tested strengths."
    )


def _filled(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 120)


def _listed(*sentences: str) -> str:
    return "\n".join(textwrap.fill(f"- {sentence}", 120, subsequent_indent="  ") for sentence in sentences)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _token(token: str) -> str:
    """A token as a cell: a bar would end the cell, even in code."""
    return f"`{token}`".replace("|", "\\|")


def token_table(rows: Rows) -> str:
    """The features of every token, the SAEs below each other."""
    head = ["token", "SAE", "method", "1.", "2.", "3.", "4.", "5."]
    lines = [_row(head), _row(["---"] * len(head))]
    tokens = [row.token for row in rows[next(iter(rows))] if row.place == "id"]
    for token in tokens:
        for (method, sae), found in sorted(rows.items(), key=lambda pair: pair[0][1]):
            for row in found:
                if (row.token, row.place) == (token, "id"):
                    cells = [_cell(feature) for feature in row.features]
                    lines.append(_row([_token(token), sae, method, *cells, *["–"] * (5 - len(cells))]))
    return "\n".join(lines)


def _cell(feature: TokenFeature) -> str:
    share = feature.exclusivity
    return f"{feature.feature}: {feature.mean:.3g} ({'–' if share is None else format(share, '.2f')})"


def tower_sentence(rows: Rows) -> str:
    """Whether one feature towers over the rest, as the paper finds: the first mean over the second, by method."""
    told = []
    for key, found in rows.items():
        ratios = [r.features[0].mean / r.features[1].mean for r in found if r.place == "id" and len(r.features) > 1]
        if ratios:
            told.append((key, sum(ratio >= 2 for ratio in ratios), len(ratios), max(ratios)))
    high = sum(n for _, n, _, _ in told)
    of = sum(n for _, _, n, _ in told)
    most = max((ratio for *_, ratio in told), default=0.0)
    return (
        f"The paper finds that one feature usually towers over the rest: here the first mean is at least twice the "
        f"second in {high} of {of} rows (most: {most:.2g} times)."
    )


def exclusive_sentence(rows: Rows) -> str:
    """How exclusive the first feature of a token is, by SAE."""
    parts = []
    for (method, sae), found in rows.items():
        shares = [s for row in found if row.place == "id" if (s := row.features[0].exclusivity) is not None]
        if shares:
            parts.append(f"{min(shares):.2f} to {max(shares):.2f} ({method} {sae.rpartition('-')[2]})")
    several = [
        f"{method} {sae.rpartition('-')[2]}: {feature} is first of {n} tokens"
        for (method, sae), found in rows.items()
        for feature, n in _shared(found).items()
        if n > 1
    ]
    shared = f" One feature can lead several tokens ({'; '.join(several)})." if several else ""
    return f"How exclusive the first features are: {', '.join(parts)}.{shared}"


def _shared(found: Sequence[TokenRow]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for row in found:
        if row.place == "id":
            counts[row.features[0].feature] = counts.get(row.features[0].feature, 0) + 1
    return counts


def window_table(sweeps: Sequence[Sweep]) -> str:
    """The window of each feature and how far those of the controls reach."""
    head = ["token", "method", "feature", "auto", "window: from", "to"]
    head += [f"to of {what}" for what in CONTROLS.values()]
    head += [f"further than {what}" for what in CONTROLS.values()]
    lines = [_row(head), _row(["---"] * len(head))]
    for sweep in sweeps:
        facts = sweep.facts
        norm, own = facts["median_norm"], facts["windows"][ARMS[0]]
        auto = facts["auto"]["rel_norm"] if facts["auto"]["alpha"] is not None else None
        cells = [_token(sweep.token), sweep.method, str(facts["feature"]), "–" if auto is None else f"{auto:.2f}"]
        cells += [_edge(own["from"], own["from_interval"], norm), _edge(own["to"], own["to_interval"], norm)]
        for arm in CONTROLS:
            found = facts["windows"][arm]
            cells.append(_edge(found["to"], found["to_interval"], norm))
        for arm in CONTROLS:
            apart = facts["windows_against"][arm]
            cells.append(_edge(apart["difference"], apart["interval"], norm, sign="+"))
        lines.append(_row(cells))
    return "\n".join(lines)


def _edge(value: float | None, interval: Sequence[float | None] | None, norm: float, sign: str = "") -> str:
    def number(edge: float | None) -> str:
        return "none" if edge is None else format(edge / norm, f"{sign}.2f")

    return number(value) + ("" if interval is None else f" [{', '.join(map(number, interval))}]")


def window_sentence(sweeps: Sequence[Sweep]) -> str:
    """How many windows reach surely further, or less far, than those of the controls."""
    parts = []
    for arm, what in CONTROLS.items():
        further = _count(sweeps, lambda s, arm=arm: _sure(s.facts["windows_against"][arm]["interval"]) > 0)
        less = _count(sweeps, lambda s, arm=arm: _sure(s.facts["windows_against"][arm]["interval"]) < 0)
        parts.append(f"further than that of {what} in {further} and less far in {less}")
    n_open = _count(sweeps, lambda s: s.facts["windows"][ARMS[0]]["open"])
    beyond = _count(sweeps, lambda s: _sure(s.facts["windows_against"]["random"]["interval"]) > 0)
    verdict = (
        f"in {beyond} of {len(sweeps)} sweeps a feature of special tokens keeps answers whole up to larger strengths "
        "than random directions of the same length do"
        if beyond
        else "features of special tokens keep answers whole no further than random directions of the same length do"
    )
    return (
        f"**Reading:** {verdict}. There is a window in {n_open} of {len(sweeps)} sweeps. It reaches surely (the "
        f"interval leaves out 0) {', and '.join(parts)}."
    )


def _count(sweeps: Sequence[Sweep], test: Callable[[Sweep], bool]) -> int:
    return sum(test(sweep) for sweep in sweeps)


def _sure(interval: Sequence[float] | None) -> int:
    """1 or -1 where an interval leaves out 0, by its side."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return 0
    return 1 if interval[0] > 0 else -1


def compared(sweeps: Sequence[Sweep], control: str, measure: str) -> tuple[int, int, int]:
    """Over sweeps and strengths: where a measure of the feature is surely larger, surely smaller, and of how many."""
    signs = [
        _sure(row["measures"][measure]["interval"])
        for sweep in sweeps
        for row in sweep.facts["against"]
        if row["control"] == control and row["measures"][measure] is not None
    ]
    return sum(s > 0 for s in signs), sum(s < 0 for s in signs), len(signs)


def difference_sentence(sweeps: Sequence[Sweep]) -> str:
    """KL, perplexity and repetition against a random direction of the same length."""
    names = {"kl_mean": "KL", "log_perplexity_ratio": "perplexity", "repetition": "repetition"}
    parts = []
    for measure, name in names.items():
        larger, smaller, n = compared(sweeps, "random", measure)
        parts.append(f"{name} is surely larger in {larger} and smaller in {smaller} of {n}")
    return (
        "At equal strength, feature against random direction over all sweeps and strengths (paired over questions; of "
        "100 such intervals 5 leave out 0 by chance, and neighbouring strengths go together): "
        f"{'; '.join(parts)}."
    )


def length_sentence(sweeps: Sequence[Sweep]) -> str:
    """What a feature does that has to do with where turns begin and end: the length of the answers, by sweep."""
    parts = []
    for sweep in sweeps:
        longer, shorter, n = compared([sweep], "random", "length")
        parts.append(f"`{sweep.token}` {sweep.facts['feature']} ({sweep.method}) {shorter} and {longer} of {n}")
    empty = [
        f"with {sweep.facts['feature']} ({sweep.method}, `{sweep.token}`) every answer is empty from {least:.2g} "
        "norms on"
        for sweep in sweeps
        if (least := _empty_from(sweep.facts, ARMS[0])) is not None and _empty_from(sweep.facts, "random") is None
    ]
    ends = f"; {', '.join(empty)}, which no random direction does" if empty else ""
    return f"Answers surely shorter, and longer, than with a random direction: {', '.join(parts)}{ends}."


def _empty_from(facts: Mapping[str, Any], arm: str) -> float | None:
    """The smallest strength, in median norms, from which on every answer is empty."""
    found = None
    for row in sorted((r for r in facts["summary"] if r["arm"] == arm), key=lambda r: -r["strength"]):
        if row["measures"]["length"]["mean"] != 0:
            break
        found = facts["strengths"][row["strength"]]["rel_norm"]
    return found


def reread_sentence(sweeps: Sequence[Sweep]) -> str:
    """Whether steered texts carry the feature."""
    larger, smaller, n = compared(sweeps, "random", "reread_mean")
    inside = [
        _sure(row["measures"]["reread_mean"]["interval"]) > 0
        for sweep in sweeps
        for row in sweep.facts["against"]
        if row["control"] == "random"
        and row["measures"]["reread_mean"] is not None
        and sweep.facts["strengths"][row["strength"]]["alpha"] <= sweep.facts["windows"][ARMS[0]]["to"]
    ]
    return (
        f"Read again by the unsteered model, the texts hold more of the feature than those of a random direction in "
        f"{larger} of {n} (less in {smaller}); within the window in {sum(inside)} of {len(inside)}."
    )


def better_sentence(sweeps: Sequence[Sweep]) -> str:
    """Whether steering makes held-out answers more likely, the one measure here that could show an improvement."""
    best = min(
        (step["log_ratio"], step["rel_norm"], sweep)
        for sweep in sweeps
        for step in sweep.facts["strengths"]
        if step["alpha"] > 0
    )
    if best[0] >= 0:
        found = f"it never falls below 1 (least {math.exp(best[0]):.4f})"
    else:
        found = (
            f"the least is {math.exp(best[0]):.4f}, of feature {best[2].facts['feature']} "
            f"({best[2].method}) at {best[1]:.2g} norms"
        )
    return (
        "None of these measures could show that an answer became better, as the paper reports of larger models; the "
        "one that could is the perplexity of held-out answers, steered over unsteered: "
        f"{found}. What a judge would say of the texts was not asked here."
    )


def auto_sentence(sweeps: Sequence[Sweep]) -> str:
    """Where the automatic strength lies."""
    where = {"below": 0, "within": 0, "above": 0}
    borne = [
        step["kl"]
        for sweep in sweeps
        for step in sweep.facts["strengths"]
        if step["alpha"] == sweep.facts["windows"][ARMS[0]]["to"]
    ]
    for sweep in sweeps:
        alpha, own = sweep.facts["auto"]["alpha"], sweep.facts["windows"][ARMS[0]]
        if alpha is None or not own["open"]:
            continue
        where["below" if alpha < own["from"] else "within" if alpha <= own["to"] else "above"] += 1
    parts = ", ".join(f"{name} it in {n}" for name, n in where.items() if n)
    bound = sweeps[0].facts["auto"]["bound"]
    return (
        f"The automatic strength (mean KL {bound:g} nats on held-out answers) and the window: "
        f"{parts or 'no sweep has both'}; at the end of the windows that KL is {min(borne):.2g} to {max(borne):.2g}. A "
        "bound on given texts does not bound what happens when the model goes on from its own: a sweep shows what it "
        "bears."
    )
