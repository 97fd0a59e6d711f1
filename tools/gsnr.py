"""GSNR of FAST, BT(F), BT(P) and isolated blocks from the same weights on the same dialogues, and attention leakage.

Weights are those of a fresh grid and of the SAEs of each run directory; all of one model. Prints Markdown tables;
--json writes every number, parameter by parameter.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from chatsae.config import Method, RunConfig, sae_specs
from chatsae.data.reading import read, read_text
from chatsae.errors import UserError
from chatsae.evals.gsnr import Readings, method_gsnr, methods_table, read_methods
from chatsae.evals.leakage import Leakage, leakage
from chatsae.files import write_json
from chatsae.lm.load import LanguageModel, load_model
from chatsae.runs import Run
from chatsae.sae.base import SAE
from chatsae.sae.grid import build_grid
from chatsae.sae.init import set_b_dec_

ROOT = Path(__file__).parents[1]
_SAMPLE = 2048  # tokens per method that place the b_dec of fresh weights


def fresh(config: RunConfig, lm: LanguageModel, readings: Readings) -> dict[str, SAE]:
    """The grid as it is before step 0; b_dec from the tokens of all methods alike, so that it favours none."""
    saes = build_grid(sae_specs(config.sae, layers=lm.layers, d_in=lm.d_in), seed=config.train.seed)
    for sae in saes.values():
        layer = readings.layers.index(sae.spec.layer)
        set_b_dec_(
            sae, torch.cat([acts[layer, :: max(1, acts.shape[1] // _SAMPLE)] for acts in readings.acts.values()])
        )
        sae.to(lm.device)
    return saes


def leakage_table(found: Leakage) -> str:
    """Markdown, a row per layer."""
    if found.layers is None:
        return f"No leakage: {found.reason}."
    lines = ["| layer | foreign | of exposed tokens | on the block's first token |", "|---|---|---|---|"]
    for layer, own in found.layers.items():
        exposed = "–" if own.foreign_exposed is None else f"{own.foreign_exposed:.1%}"
        lines.append(f"| {layer} | {own.foreign:.1%} | {exposed} | {own.foreign_first:.1%} |")
    facts = f"{found.n_blocks} blocks of {found.block_size} tokens, {found.exposed:.1%} of the tokens exposed"
    return "\n".join([*lines, "", f"{facts}; attention that does not look would spend {found.uniform:.1%}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories (default: runs/results/seed-42/*)")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--folds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    paths = args.runs or sorted(p.parent for p in (ROOT / "runs/results/seed-42").glob("*/config.yaml"))
    if not paths:
        raise UserError("there is no run; name run directories, or `make results` first")
    runs = [Run.read(path) for path in paths]
    config = runs[0].config
    data = config.data
    if any(run.config.model != config.model for run in runs):
        raise UserError("the runs are of several models or layers; compare those of one")
    lm = load_model(config.model)
    readings = read_methods(
        lm,
        read(*data.sources, split="eval", order=data.order),
        read_text(*data.text_sources, split="eval", order=data.order),
        n_blocks=args.blocks,
        block_size=data.block_size,
        max_length=data.max_length,
    )
    rows: dict[tuple[str, str], dict[Method, dict[str, Any]]] = {}
    for name, sae in fresh(config, lm, readings).items():
        rows[name, "initial"] = method_gsnr(sae, readings, sparsity_scale=0.0, folds=args.folds)
    for run in runs:
        for path in run.sae_directories():
            sae = SAE.load(path, device=lm.device)
            rows[path.name, f"trained {run.config.data.method}"] = method_gsnr(sae, readings, folds=args.folds)
    leaks = leakage(lm, [readings.dialogues], block_size=data.block_size, limit=args.blocks)
    print(f"{args.blocks * data.block_size:,} tokens per method, {lm.name}, seed {config.train.seed}\n")
    print(methods_table(dict(sorted(rows.items(), key=lambda item: item[0][0]))))
    print(f"\n{leakage_table(leaks)}")
    if args.json:
        gsnr = [
            {"sae": s, "weights": w, "method": m, **row} for (s, w), found in rows.items() for m, row in found.items()
        ]
        write_json(args.json, {"runs": [str(p) for p in paths], "gsnr": gsnr, "leakage": asdict(leaks)})


if __name__ == "__main__":
    main()
