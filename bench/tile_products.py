"""The matrix products of a dense step on the tiles of a CPU with AMX, beside float32 ones of torch, on an idle machine.

Prints a row per product: shape, GFLOP/s and the root mean square of the error against float64, of both, on one thread.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from chatsae.sae.products import fits_tiles, on_tiles, tiles
from chatsae.sae.workspace import both


def matrix(name: str, rows: int, columns: int) -> Tensor:
    """Random numbers, laid out as in a step."""
    _, tensor = both(name, (rows, columns), np.float32, padded=True)
    return tensor.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(len(name))))


def measured(multiply: Callable[[], object], out: Tensor, exact: Tensor, depth: int) -> tuple[float, float]:
    """GFLOP/s of the fastest of ten calls, and the error."""
    multiply()
    error = (out - exact).square().mean().sqrt().item()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return 2e-9 * out.numel() * depth / min(seconds), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    if not (tiles() and fits_tiles(torch.float32, args.d_in, args.d_sae, args.tokens)):
        parser.exit(1, "no tiles: this CPU has no AMX, Linux does not let us use it, or a side is no multiple of 32\n")
    torch.set_num_threads(1)
    d, F, n = args.d_in, args.d_sae, args.tokens
    W, x, z, grad = matrix("W", F, d), matrix("x_", d, n), matrix("z__", F, n), matrix("grad", F, d)
    products = {"hidden_pre": (W, x, z), "sae_out": (W.T, z, x), "W_dec.grad": (z, x.T, grad)}
    print(f"{'product':12}{'shape':>22}{'tiles':>8}{'torch':>8} GFLOP/s{'tiles':>10}{'torch':>10} error")
    for name, (a, b, like) in products.items():
        out, exact = torch.empty_like(like), a.double() @ b.double()
        ours = measured(lambda a=a, b=b, out=out: on_tiles(a, b, out), out, exact, a.shape[1])
        torchs = measured(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), out, exact, a.shape[1])
        shape = " x ".join(f"{side:,}" for side in (*a.shape, b.shape[1]))
        print(f"{name:12}{shape:>22}{ours[0]:8.0f}{torchs[0]:8.0f}{'':8}{ours[1]:10.1e}{torchs[1]:10.1e}")


if __name__ == "__main__":
    main()
