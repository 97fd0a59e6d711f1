"""Measure what `chatsae serve` does with a model: answers at once and one by one, and tokens that are read again alone.

    python tools/serving.py [MODEL]

One run, process CPU time, 50 answers of 24 tokens with different steering, half of them sampled.
"""

import argparse
import time
from collections.abc import Sequence

import torch

from chatsae.lm.load import LanguageModel
from chatsae.serve.answer import Answer
from chatsae.serve.probe import measure_margin
from chatsae.serve.rows import Rows
from chatsae.serve.sampling import Sampling
from chatsae.steering.rows import row_of_prompt
from chatsae.steering.spec import SteerSpec

ANSWERS, TOKENS = 50, 24
WORDS = ("What is a list?", "Hi", "Explain the module that reads files, please.", "Who are you?")


def answers_of(lm: LanguageModel) -> list[Answer]:
    """The requests, with random directions as steering; every fifth has none."""
    found = []
    for i in range(ANSWERS):
        vector = torch.randn(lm.d_in, generator=torch.Generator().manual_seed(i))
        specs = [SteerSpec(vector=vector, layer=lm.layers[0], strength=10.0 + i)] if i % 5 else []
        row = row_of_prompt(f"{WORDS[i % len(WORDS)]} {i}", lm.tokenizer)
        sampling = Sampling(temperature=0.0 if i % 2 else 0.9, top_p=0.9, seed=i)
        options = {"specs": specs, "sampling": sampling, "max_new_tokens": TOKENS}
        found.append(Answer(row, lm.tokenizer, lambda event: None, **options))
    return found


def seconds(rows: Rows, answers: Sequence[Answer]) -> float:
    """CPU seconds to answer them together; nothing ends an answer but its length."""
    start = time.process_time()
    tokens = rows.join(answers)
    while tokens:
        for answer, token in tokens:
            answer.take(token, frozenset())
        rows.leave()
        tokens = rows.step()
    return time.process_time() - start


def measure(model: str, dtype: str) -> str:
    """A line of the table."""
    half = LanguageModel(model, [0]).n_layers // 2
    lm = LanguageModel(model, [half], head=True, dtype=dtype)
    margin, _ = measure_margin(lm)
    together, rows = answers_of(lm), Rows(lm, margin)
    batch = seconds(rows, together)
    single = answers_of(lm)
    one = sum(seconds(Rows(lm, margin), [answer]) for answer in single)
    unsafe = answers_of(lm)
    fast = seconds(Rows(lm, 0.0), unsafe)
    differ = sum(a.new != b.new for a, b in zip(together, single, strict=True))
    lost = sum(a.new != b.new for a, b in zip(unsafe, single, strict=True))
    n = ANSWERS * TOKENS
    cells = [dtype, f"{rows.worst:.2g}", "-" if margin is None else f"{margin:.2g}", f"{rows.alone / rows.tokens:.1%}"]
    cells += [f"{n / batch:,.0f}", f"{n / one:,.0f}", f"{one / batch:.1f}", str(differ), f"{n / fast:,.0f}", str(lost)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    head = ["dtype", "sharing moves a logit by", "margin", "tokens read again alone", "tokens/s together"]
    head += ["one by one", "ratio", "answers that differ", "tokens/s, margin 0", "answers that differ, margin 0"]
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for dtype in args.dtypes:
        print(measure(args.model, dtype), flush=True)


if __name__ == "__main__":
    main()
