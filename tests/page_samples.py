"""A run whose dialogues hold what a careless page would run, break on, or show wrong."""

import json
from pathlib import Path

from chatsae.evals.session import evaluate_run
from chatsae.runs import Run
from chatsae.steering.command import Ask, steer_run
from chatsae.steering.sweep_command import SweepAsk, sweep_run
from feature_samples import TOKEN, planted_run

HOSTILE = (
    "<script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 1'>",
    "</script><script>window.owned = 1</script>",
    "שלום עולם",
    "\u202edrowkcab",
    "👩‍🔬 e\u0301",
    "\x00\x07",
    "{{data}} ${window.owned = 1} & &amp; \u2028",
)


def hostile_run(folder: Path, model: Path) -> Path:
    """The planted run, on dialogues that hold these texts; evaluated, with two lines of metrics."""
    path = planted_run(folder, model)
    rows = []
    for i in range(400):
        said = [
            {"role": "user", "content": f"{i} {HOSTILE[i % len(HOSTILE)]}"},
            {"role": "assistant", "content": "here we Zare"},
        ]
        rows.append(json.dumps({"messages": said}) + "\n")
    (folder / "chat.jsonl").write_text("".join(rows), encoding="utf-8")
    run = Run.read(path)
    for step in (1, 2):
        saes = {"L1-1x-standard": {"mse": 1.0 / step, "l0": 5.0, "dead_fraction": 0.5}}
        run.log({"step": step, "tokens": 100 * step, "saes": saes})
    evaluate_run(path, dialogues=8)
    return path


QUESTIONS = (f"Hi {HOSTILE[0]}", "Number 3")


def steer(run: Path) -> tuple[dict, dict]:
    """Examples and a sweep of steering with the feature of `<|im_end|>`, as the commands write them into a run."""
    asked = {"feature": TOKEN, "prompts": QUESTIONS, "max_new_tokens": 6}
    examples, _ = steer_run(run, Ask(alphas=("0", "1", "auto"), **asked))
    sweep, _, _ = sweep_run(run, SweepAsk(alphas=("0", "0.5", "2", "8"), relative=(), **asked))
    return examples, sweep
