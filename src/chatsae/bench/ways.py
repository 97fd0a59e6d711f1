"""The ways to read the activations of the same dialogues, each cut into parts so that they can take turns."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from chatsae.batch import TokenBatch
from chatsae.bench.peer import Peer
from chatsae.lm.budget import choose_budget
from chatsae.lm.forward import Way, bare_tokens, forward, plan
from chatsae.lm.load import LanguageModel

BLOCK = 2048  # tokens of a block, and of the longest dialogue; that of the paper's baselines
BATCH = 8  # dialogues of a batch in arrival order
PARTS = 8
BLOCKS, SINGLE, ARRIVAL = f"block {BLOCK:,}", "one by one", f"arrival order, batch {BATCH}"
_SPREAD = 0.7  # standard deviation of the logarithm of a dialogue's length
_MATMUL = {"cpu": (2048, 8), "cuda": (8192, 32)}  # rows of the square matrices, and products in each part


@dataclass(slots=True)
class Spent:
    """Tokens delivered, padding left out, and the time that they took."""

    tokens: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0

    def add(self, other: "Spent") -> None:
        """Counts both together."""
        self.tokens += other.tokens
        self.cpu_s += other.cpu_s
        self.wall_s += other.wall_s


@contextmanager
def clocked(spent: Spent) -> Iterator[None]:
    """Adds the CPU seconds of this process, all threads, and the seconds that pass."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    spent.cpu_s += time.process_time() - cpu
    spent.wall_s += time.perf_counter() - wall


class Reader(Protocol):
    """A way to read the dialogues: the tokens it forwards, padding counted, and the lengths that attention spans."""

    @property
    def name(self) -> str: ...
    @property
    def forwarded(self) -> int: ...
    @property
    def lengths(self) -> Sequence[int]: ...
    def read(self, part: int) -> Spent: ...


@dataclass(frozen=True, slots=True)
class Forwards:
    """Batches through `forward`, as `Harvest` sends them."""

    name: str
    lm: LanguageModel
    tokens: TokenBatch
    batches: Sequence[Sequence[int]]
    way: Way

    @property
    def lengths(self) -> Sequence[int]:
        return self.tokens.lengths.tolist()

    @property
    def forwarded(self) -> int:
        lengths = self.lengths
        if self.way == "packed":
            return sum(lengths)
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in self.batches)

    def warm_up(self) -> None:
        """Reads the first batch."""
        forward(self.lm, self.tokens.select(self.batches[0]), self.way)

    def read(self, part: int) -> Spent:
        """One batch in `PARTS`; a check of the activations waits for the device."""
        spent = Spent()
        with clocked(spent):
            for batch in self.batches[part::PARTS]:
                spent.tokens += forward(self.lm, self.tokens.select(batch), self.way).shape[1]
        return spent


@dataclass(frozen=True, slots=True)
class PeerRows:
    """Rows of `BLOCK` token ids through sae_lens' ActivationsStore."""

    name: str
    peer: Peer
    lengths: Sequence[int]
    rows: int
    row_batch: int

    @property
    def forwarded(self) -> int:
        return self.rows * BLOCK

    def read(self, part: int) -> Spent:
        """The next batches of rows, one in `PARTS`."""
        return Spent(**self.peer.read(self.name, len(range(part, self.rows // self.row_batch, PARTS))))


class Matmul:
    """Products of square matrices, with the model's dtype and device: what this machine can do at most.

    Attributes: rates (floating point operations per second of the best part, by each clock).
    """

    def __init__(self, lm: LanguageModel) -> None:
        size, self._products = _MATMUL[lm.device.type]
        self._a, self._b = (torch.randn(size, size, device=lm.device).to(lm.dtype) for _ in range(2))
        self._out = self._a @ self._b
        self.rates = {"cpu_s": 0.0, "wall_s": 0.0}

    def measure(self) -> None:
        """One more part."""
        self._out[0, 0].item()  # waits for the device
        spent = Spent()
        with clocked(spent):
            for _ in range(self._products):
                torch.mm(self._a, self._b, out=self._out)
            self._out[0, 0].item()
        for clock, rate in self.rates.items():
            self.rates[clock] = max(rate, 2 * len(self._a) ** 3 * self._products / getattr(spent, clock))


@dataclass(frozen=True, slots=True)
class Sample:
    """Dialogues of a pool, in the order they came, and the padded batches of the whole pool that hold them."""

    dialogues: TokenBatch
    padded: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        return len(self.dialogues.input_ids)

    @property
    def blocks(self) -> TokenBatch:
        """The same tokens in blocks; the last one may be shorter."""
        return bare_tokens(self.dialogues.input_ids.split(BLOCK))


def sample_dialogues(vocab: int, median: int, pool: int, token_budget: int, tokens: int, seed: int = 0) -> Sample:
    """About so many `tokens` (0: all) out of a pool of dialogues of random tokens, lengths lognormal up to `BLOCK`.

    Every k-th of the batches that a length-sorted pool is cut into: each dialogue is as likely as any other, and
    padding is that of the pool.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = (math.log(median) + _SPREAD * torch.randn(pool, generator=generator)).exp().long()
    lengths = drawn.clamp(1, BLOCK).tolist()
    whole = bare_tokens(torch.randint(vocab, (sum(lengths),), generator=generator).split(lengths))
    batches = plan(lengths, token_budget=token_budget)
    step = max(round(sum(lengths) / tokens), 1) if tokens else 1
    taken = batches[min(step // 2, len(batches) - 1) :: step]
    kept = sorted(i for batch in taken for i in batch)
    place = {old: new for new, old in enumerate(kept)}
    order = torch.randperm(len(taken), generator=generator).tolist()
    return Sample(whole.select(kept), [[place[i] for i in taken[j]] for j in order])


def own_readers(lm: LanguageModel, sample: Sample, token_budget: int) -> list[Forwards]:
    """Blocks first, then the ways to read dialogue by dialogue."""
    dialogues, blocks = sample.dialogues, sample.blocks
    lengths = dialogues.lengths.tolist()
    arrival = [list(range(i, min(i + BATCH, len(lengths)))) for i in range(0, len(lengths), BATCH)]
    packed = plan(lengths, token_budget=choose_budget(lm, "packed"), way="packed")
    return [
        Forwards(BLOCKS, lm, blocks, plan(blocks.lengths.tolist(), token_budget=token_budget), "padded"),
        Forwards(SINGLE, lm, dialogues, plan(lengths, token_budget=1, way="single"), "single"),
        Forwards(ARRIVAL, lm, dialogues, arrival, "padded"),
        Forwards("padded", lm, dialogues, sample.padded, "padded"),
        Forwards("packed", lm, dialogues, packed, "packed"),
    ]


def peer_rows(tokens: TokenBatch, pad_id: int, row_batch: int) -> Int[Tensor, "R T"]:
    """Each sequence padded to `BLOCK` tokens, and rows of padding until they are a multiple of `row_batch`."""
    count = math.ceil(len(tokens) / row_batch) * row_batch
    rows = torch.full((count, BLOCK), pad_id)
    padded = tokens.padded(pad_id)
    rows[: len(tokens), : padded.shape[1]] = padded
    return rows


def take_turns(readers: Sequence[Reader], matmul: Matmul, advance: Callable[..., None]) -> dict[str, Spent]:
    """Every reader's parts, one of each in turn, every second round backwards; what each spent in all."""
    spent = {reader.name: Spent() for reader in readers}
    for part in range(PARTS):
        matmul.measure()
        for reader in readers if part % 2 == 0 else reversed(readers):
            spent[reader.name].add(reader.read(part))
            advance(reader.forwarded / PARTS, reader.name)
    return spent
