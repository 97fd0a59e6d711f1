"""What an audit found, as JSON holds it and as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from chatsae import console
from chatsae.audit.causal import Intervention
from chatsae.audit.roles import FIRST, LATER, RoleFeature, median_reach
from chatsae.audit.separation import Choice, Separation

_Interval = Sequence[float] | None


def feature_facts(choice: Choice, found: Separation, feature: int, place: str) -> dict[str, Any]:
    """One feature at its best place."""
    return {
        "feature": feature,
        "place": place,
        "chosen_auroc": choice.auroc,
        "chosen_p": choice.p_value,
        **asdict(found),
        "significant": found.significant,
    }


def intervention_facts(found: Intervention) -> dict[str, Any]:
    """One intervention; rates with hits, n, share and interval."""

    def rate(one: Any) -> dict[str, Any]:
        return {"hits": one.hits, "n": one.n, "share": one.share, "interval": one.interval}

    own = asdict(found)
    own |= {"before": rate(found.before), "after": rate(found.after), "controls": [rate(c) for c in found.controls]}
    return own | {"acts": found.acts}


def role_facts(found: Sequence[RoleFeature]) -> dict[str, Any]:
    """The user features, and their median reach by condition."""
    features = [asdict(one) | {"significant": one.separation.significant} for one in found]
    return {"features": features, "median_reach": median_reach(found)}


def text(facts: Mapping[str, Any]) -> str:
    """All tables of an audit."""
    parts = []
    for name, sae in facts["saes"].items():
        for set_name, found in sae["sets"].items():
            parts += _set_tables(f"{name}, {set_name}", facts["sets"][set_name], found)
        parts += _role_table(name, sae["roles"])
    lines = [f"{n:,} × {reason}" for reason, n in facts["skipped"].items()]
    return "\n\n".join([*parts, *(["left out:\n" + "\n".join(lines)] if lines else [])])


def _set_tables(title: str, about: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    counted = f"chosen on {about['n_choose']} pairs, reported on {about['n_report']} others"
    parts = [_feature_table(f"{title}: features that tell the prompts apart", found["features"], counted)]
    parts.append(_probe_table(f"{title}: probes on the same pairs", found["probes"]))
    causal = found["causal"]
    if causal["interventions"]:
        parts.append(_causal_table(f"{title}: do features cause it?", causal["interventions"]))
    parts += [f"{title}: {reason}" for reason in causal["skipped"]]
    return parts


def _feature_table(title: str, features: Sequence[Mapping[str, Any]], counted: str) -> str:
    names = {"feature": "feature", "place": "place", "chosen": "AUROC, chosen on (p)", "auroc": "AUROC (95 %)"}
    names |= {"difference": "mean difference (95 %)", "p": "p, Holm", "holds": "holds"}
    rows = [
        {
            "feature": str(one["feature"]),
            "place": one["place"],
            "chosen": f"{one['chosen_auroc']:.2f} ({one['chosen_p']:.3f})",
            "auroc": _with(one["auroc"], one["auroc_interval"]),
            "difference": _with(one["difference"], one["difference_interval"]),
            "p": f"{one['p_holm']:.3f}",
            "holds": _yes(one["significant"]),
        }
        for one in features
    ]
    caption = f"{counted}; AUROC below 0.5: more active on negative prompts"
    return console.table(title, [console.Column(k, header=v) for k, v in names.items()], rows, caption=caption)


def _probe_table(title: str, places: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    names = {"place": "place", "name": "probe on", "auroc": "AUROC (95 %)", "accuracy": "accuracy (95 %)"}
    names |= {"fpr": "FPR at 95 % TPR", "minus": "AUROC minus dense (95 %)"}
    rows = [
        {
            "place": place,
            "name": one["name"],
            "auroc": _with(one["auroc"], one["auroc_interval"]),
            "accuracy": _with(one["accuracy"], one["accuracy_interval"]),
            "fpr": f"{one['fpr_at_95_tpr']:.2f}",
            "minus": "" if one["minus_dense"] is None else _with(one["minus_dense"], one["minus_dense_interval"]),
        }
        for place, probes in places.items()
        for one in probes
    ]
    return console.table(title, [console.Column(k, header=v) for k, v in names.items()], rows, group="place")


def _causal_table(title: str, interventions: Sequence[Mapping[str, Any]]) -> str:
    names = {"op": "operation", "on": "prompts", "before": "before (95 %)", "after": "after (95 %)", "p": "p"}
    names |= {"controls": "controls: mean (least-most)", "rank": "rank p"}
    names |= {"ppl": "perplexity ratio (controls)", "acts": "acts"}
    rows = []
    for one in interventions:
        shares = [c["share"] for c in one["controls"]]
        mean = f"{sum(shares) / len(shares):.2f} ({min(shares):.2f}-{max(shares):.2f})" if shares else "-"
        other = one["control_perplexity_ratio"]
        rows.append(
            {
                "op": f"{one['name']} {' '.join(map(str, one['features']))}",
                "on": "positive" if one["name"] == "ablate" else "negative",
                "before": _with(one["before"]["share"], one["before"]["interval"]),
                "after": _with(one["after"]["share"], one["after"]["interval"]),
                "p": f"{one['p_value']:.4f}",
                "controls": mean,
                "rank": f"{one['rank_p']:.2f}",
                "ppl": f"{one['perplexity_ratio']:.2f} ({'-' if other is None else format(other, '.2f')})",
                "acts": _yes(one["acts"]),
            }
        )
    caption = "shares of answers that begin as the set says; controls: random other features of like density"
    return console.table(title, [console.Column(k, header=v) for k, v in names.items()], rows, caption=caption)


def _role_table(name: str, roles: Mapping[str, Any]) -> list[str]:
    title = f"{name}: do user features fire on text that imitates a user's turn?"
    if not roles["features"]:
        return [f"{title}\n{roles['skipped'] or 'no feature is more active in user turns'}"]
    others = list(roles["median_reach"])
    columns = [console.Column("feature"), console.Column("real", header="real (document)", beside="plain")]
    columns += [console.Column("auroc", header="AUROC (95 %)"), console.Column("holds")]
    columns += [console.Column(c) for c in others]
    rows: list[dict[str, Any]] = [
        {
            "feature": str(one["feature"]),
            "real": one["separation"]["positive_mean"],
            "plain": one["separation"]["negative_mean"],
            "auroc": _with(one["separation"]["auroc"], one["separation"]["auroc_interval"]),
            "holds": _yes(one["significant"]),
        }
        | {c: _with(one["reach"][c][0], None if c in (FIRST, LATER) else one["reach"][c][1]) for c in others}
        for one in roles["features"]
    ]
    medians = {c: _with(roles["median_reach"][c], None) for c in others}
    caption = f"{roles['n_report']} texts; right: share of real level minus plain document that is reached (95 %)"
    told = ", ".join(f"{c} {value}" for c, value in medians.items())
    return [f"{console.table(title, columns, rows, caption=caption)}\nmedian of the features that hold: {told}"]


def _with(value: float | None, between: _Interval) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if between is None else f"{value:.2f} ({between[0]:.2f} {between[1]:.2f})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
