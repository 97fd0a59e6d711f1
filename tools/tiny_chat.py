"""Make the bundled tiny chat model from nothing: tokenizer, two phases of training, measurements, model card.

It takes under two hours on two cores. With --card-only it measures an existing checkpoint again.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, Qwen2ForCausalLM
from transformers.utils import logging

from chatsae.batch import Dialogue
from chatsae.data import pydocs
from tinychat import card, measure
from tinychat import tokenizer as tiny_tokenizer
from tinychat.batches import dialogue_batches, page_batches
from tinychat.training import Phase, Trained, join, new_model, train

DEMO = Path(__file__).resolve().parents[1] / "src/chatsae/demo/tiny-chat"
SCORED, HELDOUT, PROMPTS, SAMPLES = 500, 64, 200, 4  # dialogues of the eval split


def main() -> None:
    args = _arguments()
    if args.card_only:
        _measure_again(args)
        return
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tiny-chat-") as scratch:
        work = Path(args.work or scratch)
        tokenizer = tiny_tokenizer.build(work / "final")
        print(f"tokenizer: {len(tokenizer):,} tokens, {time.perf_counter() - begun:.0f} s", flush=True)
        meeting_place = Path(scratch) / "processes"
        torch.multiprocessing.spawn(_work, (args, work, meeting_place), nprocs=args.processes)
        _publish(work / "final", args.out)
    print(f"{args.out}: done in {(time.perf_counter() - begun) / 60:.1f} min", flush=True)


def _work(rank: int, args: argparse.Namespace, work: Path, meeting_place: Path) -> None:
    """One process: it trains with the others; the first one also measures and writes."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    join(rank, args.processes, meeting_place)
    tokenizer = tiny_tokenizer.load(work / "final")
    model, phases, losses = _trained(args, tokenizer, work)
    if rank == 0:
        torch.set_num_threads(args.processes)
        _save(model, tokenizer, work / "final")
        training: dict[str, Any] = {
            "seed": args.seed,
            "processes": args.processes,
            "phases": [card.phase_facts(p) for p in phases],
            "heldout_loss": {
                "pages": card.losses(*(pair[0] for pair in losses)),
                "dialogues": card.losses(*(pair[1] for pair in losses)),
            },
        }
        _write_card(work / "final", training)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO, help="where the checkpoint goes")
    parser.add_argument("--work", type=Path, help="where snapshots are kept (default: a directory that is removed)")
    parser.add_argument("--pretrain-steps", type=int, default=800, help="steps of phase 1, of 4,096 tokens")
    parser.add_argument("--finetune-steps", type=int, default=2200, help="steps of phase 2, of about 6,000 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="that share each batch")
    parser.add_argument("--card-only", action="store_true", help="measure the checkpoint in --out again; no training")
    return parser.parse_args()


Losses = list[tuple[measure.Loss, measure.Loss]]


def _trained(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, work: Path
) -> tuple[Qwen2ForCausalLM, list[Trained], Losses]:
    """The model after both phases, what each took, and the held-out losses before, between and after."""
    model = new_model(tokenizer)
    held_out = list(islice(pydocs.dialogues("eval"), SCORED))
    plan = [
        (Phase("pages", args.pretrain_steps, 2.5e-3, 100), page_batches(tokenizer, args.seed, measure.BLOCK, 8)),
        (Phase("dialogues", args.finetune_steps, 2e-3, 100), dialogue_batches(tokenizer, args.seed, 6144)),
    ]
    losses, phases = [_losses(model, tokenizer, held_out)], []
    for phase, batches in plan:
        phases.append(train(model, batches, phase, pad_id=tokenizer.pad_token_id, snapshots=work))
        losses.append(_losses(model, tokenizer, held_out))
    return model, phases, losses


def _losses(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, dialogues: list[Dialogue]
) -> tuple[measure.Loss, measure.Loss]:
    """Held-out losses on pages and on answers, measured by the first process while the others wait."""
    if dist.get_rank() > 0:
        return measure.Loss(0.0, 0), measure.Loss(0.0, 0)
    torch.set_num_threads(dist.get_world_size())
    found = measure.page_loss(model, tokenizer), measure.dialogue_loss(model, tokenizer, dialogues)
    torch.set_num_threads(1)
    print(f"held-out loss: pages {found[0].nats_per_token:.4f}, answers {found[1].nats_per_token:.4f}", flush=True)
    return found


def _save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """The weights in bfloat16, and how to generate."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False, max_new_tokens=256
    )
    model.bfloat16().save_pretrained(directory)


def _write_card(directory: Path, training: dict[str, Any]) -> None:
    """Measure the saved model as anyone would load it, in float32; write card.json and README.md."""
    tokenizer = tiny_tokenizer.load(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    dialogues = list(pydocs.dialogues("eval"))
    heldout = [d for d in dialogues if sum(len(m.content) for m in d.messages) <= 2500][:HELDOUT]
    on_heldout = measure.dialogue_loss(model, tokenizer, heldout)
    prompts = measure.first_questions(dialogues[:PROMPTS])
    ending = sum(measure.ends_properly(tokenizer, a) for a in measure.answers(model, tokenizer, prompts))
    with_three_turns = [d for d in dialogues if sum(m.role == "user" for m in d.messages) == 3][:SAMPLES]
    samples = measure.sample_dialogues(model, tokenizer, with_three_turns)
    facts: dict[str, Any] = {
        "model": card.model_facts(model, (directory / "model.safetensors").stat().st_size),
        "corpus": card.corpus_facts(tokenizer),
        **training,
        "heldout": {"dialogues": len(heldout), **asdict(on_heldout), "ids": [d.id for d in heldout]},
        "generation": {
            "prompts": len(prompts),
            "ending_properly": ending,
            "share": ending / len(prompts),
            "max_new_tokens": measure.MAX_NEW_TOKENS,
        },
        "position_0_norms": measure.position_0_norms(model, tokenizer, heldout),
        "samples": [[asdict(m) for m in d.messages] for d in samples],
    }
    card.write_json(directory / "card.json", facts)
    card.write_readme(directory / "README.md", facts)


def _measure_again(args: argparse.Namespace) -> None:
    """Write the card of an existing checkpoint anew; what its training took is read from its card.json."""
    with tempfile.TemporaryDirectory(prefix="tiny-chat-") as scratch:
        shutil.copytree(args.out, scratch, dirs_exist_ok=True)
        old = json.loads((args.out / "card.json").read_text())
        training = {k: old[k] for k in ("seed", "processes", "phases", "heldout_loss")}
        torch.set_num_threads(args.processes)
        _write_card(Path(scratch), training)
        _publish(Path(scratch), args.out)


def _publish(made: Path, out: Path) -> None:
    """Put the files in place, each at once: written beside its target, then renamed."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(made.iterdir()):
        beside = out / f".{path.name}.new"
        beside.write_bytes(path.read_bytes())
        beside.replace(out / path.name)


if __name__ == "__main__":
    main()
