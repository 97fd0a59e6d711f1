"""The two phases of training: next tokens of pages, then the answers of dialogues."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from tinychat.batches import IGNORED, Batch
from tinychat.tokenizer import MAX_LENGTH, VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase does; the learning rate rises linearly and falls as a cosine to a tenth."""

    name: str
    steps: int
    lr: float
    warmup: int

    def lr_at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True, slots=True)
class Trained:
    """What a phase took; tokens are all real tokens of its batches, padding left out."""

    name: str
    steps: int
    lr: float
    tokens: int
    label_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A fresh model of the Qwen2 architecture."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # as Qwen2.5's: a padding_idx would keep <|endoftext|> from being learned
    )
    return Qwen2ForCausalLM(config)


def loss_sum(model: Qwen2ForCausalLM, batch: Batch) -> Float[Tensor, ""]:
    """Sum of the negative log-likelihoods of a batch's labels, in nats."""
    ids, labels = batch
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    chosen = labels != IGNORED
    logits = model.lm_head(hidden[chosen])
    return torch.nn.functional.cross_entropy(logits.float(), labels[chosen], reduction="sum")


def join(rank: int, world: int, meeting_place: Path) -> None:
    """Connect the processes that train together on this machine; each computes a share of every batch.

    Threads that meet after every operation wait for one another as soon as anything else runs on the machine;
    processes that meet once a step do not.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=world)


def _share(batch: Batch, rank: int, world: int) -> Batch:
    """The rows of one process; where there are too few, a row without labels."""
    ids, labels = batch
    if rank < len(ids):
        return ids[rank::world], labels[rank::world]
    return ids[:1], torch.full_like(labels[:1], IGNORED)


def _sum_gradients(model: Qwen2ForCausalLM) -> None:
    """Add up the gradients of all processes, in place."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    torch._foreach_copy_(
        grads, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
    )


def train(
    model: Qwen2ForCausalLM, batches: Iterator[Batch], phase: Phase, *, pad_id: int, snapshots: Path, every: int = 500
) -> Trained:
    """One phase; AdamW, bf16 autocast, gradients clipped to norm 1; snapshots of the weights on the way.

    Every process sees the same batches and takes its share of the rows; the gradient is that of the whole batch.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=(0.9, 0.95), fused=True)
    model.train()
    start, tokens, label_tokens, shown = time.perf_counter(), 0, 0, 0.0
    for step, batch in enumerate(islice(batches, phase.steps)):
        for group in optimizer.param_groups:
            group["lr"] = phase.lr_at(step)
        labels = int((batch[1] != IGNORED).sum())
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_sum(model, _share(batch, rank, world)) / labels
        loss.backward()
        _sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((batch[0] != pad_id).sum())
        label_tokens += labels
        mean = world * loss.item()  # of this process's rows
        shown = mean if step == 0 else 0.95 * shown + 0.05 * mean
        if rank == 0 and ((step + 1) % 50 == 0 or step + 1 == phase.steps):
            _progress(phase, step + 1, shown, tokens, time.perf_counter() - start)
        if rank == 0 and (step + 1) % every == 0:
            model.save_pretrained(snapshots / phase.name)
    return Trained(phase.name, phase.steps, phase.lr, tokens, label_tokens, time.perf_counter() - start)


def _progress(phase: Phase, done: int, loss: float, tokens: int, seconds: float) -> None:
    eta = seconds / done * (phase.steps - done)
    print(
        f"{phase.name} {done}/{phase.steps}  loss {loss:.3f}  lr {phase.lr_at(done - 1):.2e}  "
        f"{tokens / seconds:,.0f} tokens/s  ETA {eta / 60:.1f} min",
        flush=True,
    )
