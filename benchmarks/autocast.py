"""A product in bfloat16 against the same in float32, as `train.autocast: auto` decides between the two.

Prints the machine's vector instructions, what `auto` takes, and the median of time in bfloat16 over time in float32 for the
products of a training step (linear layer, input gradient, weight gradient) at two widths; both in turns in one run.

    OMP_NUM_THREADS=1 python benchmarks/autocast.py
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch

from fraqat.distill import autocast_dtype

TOKENS = 256
WIDTHS = (192, 1152)
ROUNDS = 7


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(make: Callable[[torch.dtype], Callable[[], object]]) -> list[float]:
    """bfloat16 over float32, one for each round."""
    runs = [make(dtype) for dtype in (torch.bfloat16, torch.float32)]
    for run in runs:
        run()
    return [seconds(runs[0]) / seconds(runs[1]) for _ in range(ROUNDS)]


def main() -> None:
    """Prints the table."""
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"train.autocast: auto takes {autocast_dtype('auto', 'cpu') or 'none'}")
    print("| product | width | bfloat16 / float32 | low | high |\n| --- | --- | --- | --- | --- |")
    for width in WIDTHS:
        x, weight, grad = (torch.randn(*shape) for shape in ((TOKENS, width), (width, width), (TOKENS, width)))
        products: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
            "linear": (x, weight.T),
            "input gradient": (grad, weight),
            "weight gradient": (grad.T, x),
        }
        for name, (left, right) in products.items():

            def make(
                dtype: torch.dtype, left: torch.Tensor = left, right: torch.Tensor = right
            ) -> Callable[[], object]:
                a, b = left.to(dtype), right.to(dtype)
                return lambda: a @ b

            found = ratios(make)
            print(f"| {name} | {width} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} |")


if __name__ == "__main__":
    main()
