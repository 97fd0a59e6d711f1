"""The tables and sentences of docs/results.md, computed from reports."""

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chatsae.config import Method
from chatsae.evals.matched import Matched

Found = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""Rows of reports by (SAE, method), one per seed."""

METHODS: tuple[Method, ...] = ("bt-p", "bt-f", "bt-f-isolated", "fast")
_MAIN = {
    "mse": "mse",
    "mse_st": "mse_st",
    "mse_st_template": "mse_st by template",
    "l0": "l0",
    "explained_variance": "explained variance",
    "dead_fraction": "dead",
    "delta_loss": "Delta Loss",
    "delta_loss_percent": "Delta Loss, %",
}
_VARIANTS = {
    "mse_st": "by token id, as the paper",
    "mse_st_template": "by template position",
    "mse_st_no_first": "without position 0",
    "mse_st_no_prefix": "without the constant prefix",
}
_PARTITIONS = ("part", "role", "kind", "position")
_MATCHED = ("mse", "mse_st", "mse_st_no_prefix", "explained_variance", "delta_loss")
_HIGHER = ("explained_variance",)
_ARCHITECTURES = ("jumprelu", "standard")


def names(found: Found) -> list[str]:
    """The SAEs, in alphabetical order."""
    return sorted({name for name, _ in found})


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but words to the right."""
    words = [any(any(c.isalpha() for c in row[i]) for row in rows) for i in range(len(head))]
    rule = "|" + "|".join("---" if word else "--:" for word in words) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def folded(title: str, text: str) -> str:
    """A part of the page that opens on a click."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, to the second digit of the latter."""
    mean = statistics.mean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    if deviation <= 1e-9 * abs(mean):
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def main_table(found: Found) -> str:
    """The figures of every SAE and method; log2 beside errors."""

    def cell(rows: Sequence[Mapping[str, Any]], name: str) -> str:
        text = spread([row[name] for row in rows])
        logs = [row[f"log2_{name}"] for row in rows if f"log2_{name}" in row]
        return text + (f" ({statistics.mean(logs):.2f})" if logs else "")

    rows = [
        [sae, method, *(cell(found[sae, method], name) for name in _MAIN)] for sae in names(found) for method in METHODS
    ]
    return markdown(["SAE", "method", *_MAIN.values()], rows)


def ratio_table(found: Found) -> str:
    """Each baseline's error over FAST's, seed by seed."""
    figures = ("mse", *_VARIANTS)
    rows = []
    for sae in names(found):
        for method in METHODS[:-1]:
            pairs = list(zip(found[sae, method], found[sae, "fast"], strict=True))
            rows.append([sae, method, *(spread([b[name] / f[name] for b, f in pairs]) for name in figures)])
    return markdown(["SAE", "method over fast", *figures], rows)


def _gains(found: Found, sae: str, method: str, name: str) -> list[float]:
    """By how much FAST lowers log2 of an error, seed by seed."""
    pairs = zip(found[sae, method], found[sae, "fast"], strict=True)
    return [base[f"log2_{name}"] - fast[f"log2_{name}"] for base, fast in pairs]


def gain_table(found: Found) -> str:
    """FAST's gain in log2(MSE_st) over each baseline, for every choice of special tokens; share of the second."""
    rows = []
    for sae in names(found):
        for method in METHODS[:-1]:
            whole = statistics.mean(_gains(found, sae, method, "mse_st_template"))
            cells = []
            for name in _VARIANTS:
                gain = _gains(found, sae, method, name)
                share = f" ({statistics.mean(gain) / whole:.0%})" if "_no_" in name and abs(whole) > 0.05 else ""
                cells.append(spread(gain) + share)
            rows.append([sae, f"{method} → fast", *cells])
    return markdown(["SAE", "gain, bits", *_VARIANTS.values()], rows)


def gain_paragraph(found: Found) -> str:
    """How much of the gain remains outside position 0 and outside the constant prefix; SAEs in order of `names`."""
    parts = [f"Figures are given for {' and '.join(names(found))}, in this order."]
    for method, paper in (("bt-p", "BT(P)"), ("bt-f", "BT(F)")):
        bits = {
            name: [statistics.mean(_gains(found, sae, method, name)) for sae in names(found)]
            for name in ("mse_st_template", "mse_st_no_first", "mse_st_no_prefix")
        }
        whole, first, prefix = bits.values()
        rest = [1 - part / total for part, total in zip(prefix, whole, strict=True)]
        excess = [[_excess_share(found, sae, method, name) for sae in names(found)] for name in list(bits)[1:]]
        parts.append(
            f"From {paper} to FAST, MSE_st by template position falls by {_join(whole)} bits. Of these, {_join(first)} "
            f"({_shares(first, whole)}) remain without position 0, and {_join(prefix)} ({_shares(prefix, whole)}) "
            f"without position 0 and the constant prefix, which make up the other {_percent(rest)}. Counted in squared "
            f"error and not in bits, {_percent(excess[0])} of what {paper} has in excess of FAST on special tokens is "
            f"not at position 0, and {_percent(excess[1])} is neither there nor in the prefix."
        )
    return textwrap.fill(" ".join(parts), 120)


def _excess_share(found: Found, sae: str, method: str, name: str) -> float:
    """Share of a baseline's excess over FAST in the summed squared error on special tokens that `name` still counts."""

    def excess(part: str) -> float:
        sums = [
            [row["groups"]["special"][part]["n_tokens"] * row["groups"]["special"][part]["mse_token"] for row in rows]
            for rows in (found[sae, method], found[sae, "fast"])
        ]
        return sum(sums[0]) - sum(sums[1])

    return excess(name) / excess("mse_st_template")


def _join(values: Sequence[float]) -> str:
    return " and ".join(f"{value:.2f}" for value in values)


def _percent(values: Sequence[float]) -> str:
    return " and ".join(f"{value:.0%}" for value in values)


def _shares(parts: Sequence[float], wholes: Sequence[float]) -> str:
    return _percent([part / whole for part, whole in zip(parts, wholes, strict=True)])


def _times(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def group_table(found: Found) -> str:
    """Mean squared error by group: mean over seeds of every SAE and method; FAST's in full, baselines as multiples."""
    saes = names(found)
    example = found[saes[0], "fast"][0]
    total = example["n_tokens"]
    head = ["group", "share of tokens"]
    for sae in saes:
        head += [f"{sae.split('x-')[-1]} fast", *(f"{method} ÷ fast" for method in METHODS[:-1])]
    rows = []
    for partition in _PARTITIONS:
        for part, group in example["groups"][partition].items():
            cells = [f"{partition}: {part.replace('_', ' ')}", f"{group['n_tokens'] / total:.1%}"]
            for sae in saes:
                mean = {m: statistics.mean(r["groups"][partition][part]["mse"] for r in found[sae, m]) for m in METHODS}
                cells += [f"{mean['fast']:.3g}", *(_times(mean[m] / mean["fast"]) for m in METHODS[:-1])]
            rows.append(cells)
    return markdown(head, rows)


def gsnr_table(found: Found) -> str:
    """The GSNR of every SAE at its own weights, on held-out tokens."""
    rows = []
    for sae in names(found):
        for method in METHODS:
            values = [row["gsnr"] for row in found[sae, method] if row["gsnr"] is not None]
            kept = {name: [1000 * v[name] for v in values if v[name] is not None] for name in ("value", "total")}
            rows.append([sae, method, *(spread(numbers) if numbers else "–" for numbers in kept.values())])
    return markdown(["SAE", "method", "GSNR × 10³", "of the whole gradient × 10³"], rows)


def gsnr_unit(found: Found) -> str:
    """Unit and number of samples, as the reports have them."""
    first = next(row["gsnr"] for rows in found.values() for row in rows if row["gsnr"] is not None)
    return f"a sample is one {first['unit']}, n = {first['n']:,}"


def matched_table(at: Matched) -> str:
    """Every method at the common L0 values, the best of each SAE and L0 in bold."""
    rows = []
    for row in at.rows:
        peers = [r for r in at.rows if (r["SAE"], r["l0"]) == (row["SAE"], row["l0"])]
        rows.append([row["SAE"], f"{row['l0']:g}", row["method"], *(_matched_cell(row, peers, n) for n in _MATCHED)])
    return markdown(["SAE", "L0", "method", *_MATCHED], rows)


def _matched_cell(row: Mapping[str, Any], peers: Sequence[Mapping[str, Any]], name: str) -> str:
    if row[name] is None:
        return "–"
    found = row["intervals"][name]
    text = f"{row[name]:.3g}" + (f" ± {(found[1] - found[0]) / 2:.1g}" if found else "")
    best = (max if name in _HIGHER else min)(r[name] for r in peers if r[name] is not None)
    return f"**{text}**" if row[name] == best and len(peers) > 1 else text


def missing_sentence(at: Matched) -> str:
    """Which methods do not reach an L0, and why."""
    gone = {(r["SAE"], r["method"], r["reasons"]["mse"]): r["l0"] for r in at.rows if r["mse"] is None}
    return " ".join(f"No figure (–) for {method} of {sae} elsewhere: {reason}." for sae, method, reason in gone)


def architecture_sentence(at: Matched, method: str = "fast") -> str:
    """L0 against L1 at equal L0: how often which is better, by how much, and whether the interval leaves a doubt."""
    lines = []
    for figure in ("mse", "mse_st", "delta_loss"):
        ratios = [
            row[figure] / other[figure]
            for row in at.rows
            for other in at.rows
            if _same(row, other, "method", "l0") and (row["architecture"], other["architecture"]) == _ARCHITECTURES
            if row[figure] is not None and other[figure] is not None
        ]
        lines.append(f"{figure} {_verdict(ratios, _pairs(at, figure, lambda d: d['first'][1] == d['second'][1]))}")
    quoted = []
    for row in at.rows:
        for other in at.rows:
            chosen = row["method"] == method and (row["architecture"], other["architecture"]) == _ARCHITECTURES
            if chosen and _same(row, other, "method", "l0") and row["mse"] is not None and other["mse"] is not None:
                quoted.append(
                    f"at L0 {row['l0']:g} mse {row['mse']:.3g} against {other['mse']:.3g} and "
                    f"Delta Loss {row['delta_loss']:.3g} against {other['delta_loss']:.3g}"
                )
    everywhere = "JumpReLU + L0 over ReLU + L1, geometric mean of the ratio over methods and L0 values"
    question = "**Is L0 regularisation better than L1 at equal L0?**"
    answer = f"{everywhere}: {'; '.join(lines)}. {_exceptions(at)} {method}: {'; '.join(quoted)}."
    return textwrap.fill(f"{question} {answer}", 120)


def _exceptions(at: Matched) -> str:
    """The methods in which L1 is surely better in mse at some L0."""
    found = []
    for method in METHODS:
        pairs = _pairs(at, "mse", lambda d, method=method: d["first"][1] == d["second"][1] == method)
        losses = _count(pairs)[2]
        found += [f"{method} ({losses} of {len(pairs)})"] if losses else []
    return (
        f"Where mse is surely higher the method is {', '.join(found)}."
        if found
        else "No method is an exception in mse."
    )


def method_table(at: Matched) -> str:
    """FAST against each baseline at equal L0."""
    figures = ("mse", "mse_st", "mse_st_no_prefix", "delta_loss")
    rows = []
    for other in METHODS[:-1]:
        cells = []
        for figure in figures:
            ratios = [
                a[figure] / b[figure]
                for a in at.rows
                for b in at.rows
                if _same(a, b, "SAE", "l0") and (a["method"], b["method"]) == ("fast", other)
                if a[figure] is not None and b[figure] is not None
            ]
            whose = {"fast", other}
            pairs = _pairs(at, figure, lambda d, whose=whose: {d["first"][1], d["second"][1]} == whose, "fast")
            cells.append(_verdict(ratios, pairs))
        rows.append([f"fast over {other}", *cells])
    return markdown(["", *figures], rows)


def _same(a: Mapping[str, Any], b: Mapping[str, Any], *keys: str) -> bool:
    return all(a[key] == b[key] for key in keys)


def _verdict(ratios: Sequence[float], pairs: Sequence[tuple[float, Sequence[float] | None]]) -> str:
    """The geometric mean of the ratios, and in how many of the pairs the first is lower, surely lower or higher."""
    if not ratios:
        return "–"
    wins, sure, losses = _count(pairs)
    higher = f", surely higher in {losses}" if losses else ""
    return f"× {statistics.geometric_mean(ratios):.2f}, lower in {wins} of {len(pairs)} (surely {sure}){higher}"


def _pairs(
    at: Matched, figure: str, which: Callable[[Mapping[str, Any]], bool], first: str = "jumprelu"
) -> list[tuple[float, Sequence[float] | None]]:
    """Differences of a figure and their intervals, turned so that `first` (a method or architecture) comes first."""
    found = []
    for d in at.differences:
        if d["figure"] == figure and which(d):
            own = d["first"][1] == first or d["first"][0].endswith(first)
            sign, interval = (1 if own else -1), d["interval"]
            turned = interval if own or interval is None else [-interval[1], -interval[0]]
            found.append((sign * d["difference"], turned))
    return found


def _count(pairs: Sequence[tuple[float, Sequence[float] | None]]) -> tuple[int, int, int]:
    """How many are below 0; surely so; surely above."""
    return (
        sum(value < 0 for value, _ in pairs),
        sum(interval is not None and interval[1] < 0 for _, interval in pairs),
        sum(interval is not None and interval[0] > 0 for _, interval in pairs),
    )
