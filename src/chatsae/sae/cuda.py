"""What the GPU step needs of CUDA: graphs, precisions of a product, and a number that is read without waiting."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from chatsae import console

Outputs = tuple[Tensor, Tensor]
"""Total, mse, sparsity and l0 in one tensor [4], and the firings [F]."""
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], object], Outputs]]
"""Records what a function launches, without running it: what replays it, and where its results will lie."""

_WARM_UP = 3  # steps before a graph is made: they compile the kernels


@dataclass
class _Graph:
    x: Tensor
    replay: Callable[[], object]
    outputs: Outputs


class Graphs:
    """Runs steps, from the fourth of a kind on by replaying what the third one launched."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._pointers: tuple[int, ...] = ()
        self._made: dict[Hashable, _Graph] = {}
        self._seen: Counter[Hashable] = Counter()

    def __call__(
        self, pointers: tuple[int, ...], kind: str, x: Float[Tensor, "N D"], run: Callable[[Tensor], Outputs]
    ) -> Outputs:
        """The outputs of run(x).

        Args:
            pointers: where everything lies that `run` works on; elsewhere, old graphs are useless.
            kind: `run` launches the same for each step of a kind with one shape of `x`.
            x: copied to where the graph reads it.
            run: launches only; the numbers of a step reach it through tensors.
        """
        if self._capture is None:
            return run(x)
        if pointers != self._pointers:
            self._pointers = pointers
            self._made.clear()
            self._seen.clear()
        key = (kind, x.shape)
        self._seen[key] += 1
        if key not in self._made and (self._seen[key] <= _WARM_UP or not self._make(key, x, run, self._capture)):
            return run(x)
        graph = self._made[key]
        graph.x.copy_(x)
        graph.replay()
        losses, firings = graph.outputs  # the next replay writes there
        return losses.clone(), firings.clone()

    def _make(self, key: Hashable, x: Tensor, run: Callable[[Tensor], Outputs], capture: Capture) -> bool:
        place = x.clone()
        try:
            replay, outputs = capture(lambda: run(place))
        except RuntimeError as error:
            console.warn(f"the SAE steps run without CUDA graphs: {str(error).splitlines()[0]}")
            self._capture = None
            return False
        self._made[key] = _Graph(place, replay, outputs)
        return True


def capture_graph(run: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
    """A CUDA graph of a function."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may be using the GPU
        outputs = run()
    return graph.replay, outputs


class Reading:
    """A number on the device that the host hears of later."""

    def __init__(self, like: Tensor) -> None:
        self._host = torch.zeros((), dtype=like.dtype, pin_memory=like.is_cuda)
        self._event = torch.cuda.Event() if like.is_cuda else None
        self.pending = False

    def post(self, value: Float[Tensor, ""]) -> None:
        """Send a number to the host, in the order of the device's work."""
        self._host.copy_(value, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self.pending = True

    def take(self) -> float:
        """The number that was sent; waits for the device where it has not got that far."""
        if self._event is not None:
            self._event.synchronize()
        self.pending = False
        return float(self._host.numpy())


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Products of float32 matrices on tensor cores, with 10 bits of mantissa."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def half_product(x: Float[Tensor, "N D"], rows: BFloat16[Tensor, "F D"]) -> Float[Tensor, "N F"]:
    """x @ rows.T of bfloat16 numbers, summed and returned in the dtype of x."""
    half = x.to(torch.bfloat16)
    if half.is_cuda and x.dtype == torch.float32:
        return torch.mm(half, rows.T, out_dtype=torch.float32)
    return half.to(x.dtype) @ rows.to(x.dtype).T
