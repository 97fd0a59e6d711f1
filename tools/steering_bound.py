"""Measure whether automatic strengths keep their bound on prompts that they were not chosen on.

    python tools/steering_bound.py RUN [--sae NAME] [--features 24] [--bound 0.5] [--out FILE]

Features are drawn at random among those that fire. Exits 1 if the held-out KL of one is over 20 % off the bound.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from chatsae import console
from chatsae.lm.load import load_model
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.steering.command import steer_split
from chatsae.steering.rows import rows_of_dialogues, spread_rows
from chatsae.steering.spec import SteerSpec
from chatsae.steering.strength import Calibration, auto_alpha, measure_scale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sae")
    parser.add_argument("--features", type=int, default=24)
    parser.add_argument("--bound", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    run = Run.read(asked.run)
    there = {path.name: path for path in run.sae_directories()}
    sae = SAE.load(there[asked.sae or next(iter(there))])
    lm = load_model(run.config.model, head=True)
    tokens = steer_split(run.config, lm, 1010)
    chosen, rest = spread_rows(rows_of_dialogues(tokens, lm.max_positions))
    scale = measure_scale(lm, tokens.select(range(min(64, len(tokens)))), sae.spec.layer, sae)
    assert scale.max_acts is not None
    live = (scale.max_acts > 0).nonzero().squeeze(1)
    drawn = live[torch.randperm(len(live), generator=torch.Generator().manual_seed(0))[: asked.features]].tolist()
    calibration, held_out = Calibration(lm, chosen), Calibration(lm, rest)
    rows = []
    with console.progress("features", len(drawn)) as advance:
        for feature in drawn:
            spec = SteerSpec(sae=sae, feature=feature)
            found = auto_alpha(calibration, spec, bound=asked.bound, start=0.3 * scale.median_norm)
            held = held_out.effect([spec.at(found.alpha)]).kl
            row = {"feature": feature, "alpha": found.alpha, "kl": found.effect.kl, "held_out_kl": held}
            rows.append(row | {"off": held / asked.bound - 1, "forwards": found.forwards})
            advance(1)
    worst = max(abs(row["off"]) for row in rows)
    facts = {
        "sae": sae.spec.name,
        "bound": asked.bound,
        "calibration": {"prompts": len(chosen), "predictions": calibration.n_predictions},
        "held_out": {"prompts": len(rest), "predictions": held_out.n_predictions},
        "most_forwards": max(row["forwards"] for row in rows),
        "worst_off": worst,
        "within_20_percent": sum(abs(row["off"]) <= 0.2 for row in rows),
        "features": rows,
    }
    if asked.out:
        asked.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    columns = ["feature", "alpha", "kl", "held_out_kl", "off", "forwards"]
    console.result(console.table(sae.spec.name, [console.Column(name) for name in columns], rows))
    console.say(f"{facts['within_20_percent']} of {len(rows)} within 20 % of {asked.bound:g}; worst {worst:.1%}")
    return int(worst > 0.2)


if __name__ == "__main__":
    sys.exit(main())
