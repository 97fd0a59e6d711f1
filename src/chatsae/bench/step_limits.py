"""What the machine can do at most, beside which `chatsae bench sae-step` puts a training step."""

import time
from collections.abc import Callable

import torch

from chatsae.bench.step_cases import Case
from chatsae.bench.step_peers import matmul_precision

COUNTED = (
    "2 N d_in d_sae operations of the encoder and 8 N L0 d_in of decoder and gradients at the matrix peak, and the 24 "
    "bytes that Adam reads and writes per element of W_enc and W_dec at the rate of a multiplication in place"
)
_MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices


class Limits:
    """What this machine can do at most, measured between the turns: matrix products, and Adam's traffic."""

    def __init__(self, case: Case, device: str) -> None:
        self._case, self._device = case, device
        size = _MATRIX[device]
        self._a, self._b = (torch.randn(size, size, device=device) for _ in range(2))
        self._out = self._a @ self._b
        self._moments = [torch.ones(case.weights, device=device) for _ in range(3)]
        self._product, self._adam = float("inf"), float("inf")
        self.error = self._relative_error()

    def measure(self) -> None:
        """One more product by each route, and one more pass over the moments."""

        def product() -> None:
            torch.mm(self._a, self._b, out=self._out)

        def passes() -> None:
            for tensor in self._moments:
                tensor.mul_(0.999)

        self._product = min(self._product, timed(self._device, product)[0])
        with matmul_precision("high"):
            self._product = min(self._product, timed(self._device, product)[0])
        passes()  # from the caches, where they are large enough
        self._adam = min(self._adam, timed(self._device, passes)[0])

    def least(self, l0: float) -> float:
        """Seconds that a step with so many active features takes at least; see `COUNTED`."""
        case = self._case
        operations = 2 * case.batch_size * case.d_in * (case.d_sae + 4 * l0)
        return operations * self._product / (2 * len(self._a) ** 3) + self._adam

    def facts(self) -> dict[str, float]:
        """The best rates."""
        gflops = 2e-9 * len(self._a) ** 3 / self._product
        gigabytes = 24e-9 * self._case.weights / self._adam
        return {"matrix_gflops": round(gflops, 1), "memory_gb_per_s": round(gigabytes, 1)}

    def _relative_error(self) -> float:
        a, b = self._a[:256], self._b[:, :256]
        exact = a.double() @ b.double()
        with matmul_precision("high"):
            return ((a @ b - exact).abs().max() / exact.abs().max()).item()


def timed(device: str, run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock that judges, CPU time or device events, and seconds that pass."""
    if device == "cpu":
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return time.process_time() - cpu, time.perf_counter() - wall
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    wall = time.perf_counter()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, time.perf_counter() - wall
