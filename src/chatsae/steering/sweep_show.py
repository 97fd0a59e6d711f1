"""A sweep for people: a table, a drawing of what holds, the windows, and the answers side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from chatsae import console
from chatsae.steering.sweep import ARMS

Facts = Mapping[str, Any]
_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 54  # characters of an answer in the terminal; JSON has the whole
_SHOWN = (
    ("kl_first", "KL, first"),
    ("kl_mean", "KL, mean"),
    ("log_perplexity_ratio", "log ppl ratio"),
    ("distinct_1", "distinct-1"),
    ("distinct_2", "distinct-2"),
    ("repetition", "repetition"),
    ("length", "length"),
    ("stopped", "ended"),
    ("reread_mean", "re-read"),
)


def sweep_text(facts: Facts) -> str:
    """The whole text."""
    return "\n".join(
        [_table(facts), "", drawing(facts), "", *_windows(facts), "", *_auto(facts), "", *side_by_side(facts)]
    )


def _table(facts: Facts) -> str:
    columns = [console.Column("strength"), console.Column("alpha"), console.Column("rel", header="alpha / norm")]
    columns += [console.Column("maxact", header="alpha / max"), console.Column("arm")]
    columns += [console.Column(name, header=header) for name, header in _SHOWN] + [console.Column("holds")]
    rows = []
    for s, step in enumerate(facts["strengths"]):
        for row in (r for r in facts["summary"] if r["strength"] == s and (s or r["arm"] == ARMS[0])):
            shown = {name: row["measures"][name]["mean"] for name, _ in _SHOWN} | {"holds": row["holds"]["mean"]}
            shown |= {"strength": step["label"], "alpha": step["alpha"], "rel": step["rel_norm"]}
            rows.append(shown | {"maxact": step["rel_maxact"], "arm": row["arm"] if s else "unsteered"})
    title = f"{facts['sae']}, feature {facts['feature']}: means over {len(facts['questions'])} questions"
    caption = (
        f"median norm {facts['median_norm']:.4g}; random: a random unit direction, other: another feature that fires, "
        "drawn anew for each question; intervals and differences are in the JSON"
    )
    return console.table(title, columns, rows, group="strength", caption=caption)


def drawing(facts: Facts) -> str:
    """The share of the answers that hold, a bar per strength, and the window of each arm below its bars."""
    steps, n = facts["strengths"], len(facts["questions"])
    name = max(map(len, ARMS)) + 2
    lines = [
        f"Answers whose quality holds, of {n}, over alpha / median norm:",
        "".rjust(name) + "".join(f"{step['rel_norm']:.2g}".rjust(7) for step in steps),
    ]
    for arm in ARMS:
        shares = [r["holds"]["mean"] for r in facts["summary"] if r["arm"] == arm]
        bars = "".join(f"{_BARS[round(share * 8)] * 3}{round(share * n):>3}".rjust(7) for share in shares)
        lines.append(arm.ljust(name) + bars)
        found = facts["windows"][arm]
        inside = [found["open"] and found["from"] <= step["alpha"] <= found["to"] for step in steps]
        lines.append(("".rjust(name) + "".join("   ━━━━" if yes else " " * 7 for yes in inside)).rstrip())
    return "\n".join(line for line in lines if line)


def _windows(facts: Facts) -> list[str]:
    quality = facts["quality"]
    lines = [
        f"Window: at least {quality['acts']:.0%} of the answers differ from the unsteered ones, and up to there at "
        f"least {quality['share']:.0%} hold. What holds: {quality['words']}."
    ]
    for arm in ARMS:
        found = facts["windows"][arm]
        start = "none" if found["from"] is None else f"{found['from']:.4g}"
        what = f"from {start}{_edges(found['from_interval'])} to {found['to']:.4g}{_edges(found['to_interval'])}"
        closed = "" if found["open"] else ": no strength lies in it"
        lines.append(f"  {arm:>8}: alpha {what}{closed}")
    for arm, apart in facts["windows_against"].items():
        end = f"{apart['difference']:+.4g}{_edges(apart['interval'])}"
        lines.append(f"  the feature's reaches {end} further than that of {arm}")
    return lines


def _edges(interval: Sequence[float | None] | None) -> str:
    if interval is None:
        return ""
    return f" [{', '.join('none' if edge is None else format(edge, '.4g') for edge in interval)}]"


def _auto(facts: Facts) -> list[str]:
    auto = facts["auto"]
    if auto["alpha"] is None:
        return [f"auto: none ({auto['reason']})"]
    inside = facts["windows"][ARMS[0]]
    where = "within" if inside["open"] and inside["from"] <= auto["alpha"] <= inside["to"] else "outside"
    return [
        f"auto: alpha {auto['alpha']:.4g} ({auto['rel_norm']:.3g} norms), KL {auto['kl']:.3f} nats on held-out answers "
        f"(bound {auto['bound']:g}), {where} the feature's window"
    ]


def side_by_side(facts: Facts) -> list[str]:
    """Per question a line per strength, the answers of the arms beside each other."""
    texts = {(a["arm"], a["strength"], a["question"]): _line(a) for a in facts["answers"]}
    width = max(len(step["label"]) for step in facts["strengths"])
    lines = []
    for q, question in enumerate(facts["questions"]):
        lines += [f"> {question}", f"  {'unsteered'.rjust(width)} │ {texts['unsteered', 0, q].rstrip()}"]
        lines.append("  " + " │ ".join(["".rjust(width), *(arm.ljust(_WIDTH) for arm in ARMS)]).rstrip())
        for s, step in list(enumerate(facts["strengths"]))[1:]:
            cells = [texts[arm, s, q] for arm in ARMS]
            lines.append("  " + " │ ".join([step["label"].rjust(width), *cells]).rstrip())
        lines.append("")
    return lines[:-1]


def _line(answer: Facts) -> str:
    """An answer on one line of fixed width; an ellipsis where it is cut, ∎ where the model ended it."""
    words = "".join(c if c.isprintable() else "·" for c in " ".join(answer["text"].split()))
    text = words + (" ∎" if answer["finish_reason"] == "stop" else "")
    return (text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…").ljust(_WIDTH)
