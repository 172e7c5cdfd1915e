"""Is `import fraqat` as quick as `import torch`? Medians over fresh processes, taken in turn.

python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from fraqat.table import Table

NUM_RUNS = 7


def main() -> None:
    """Times both imports and prints the ratio."""
    times: dict[str, list[float]] = {"torch": [], "fraqat": []}
    for _ in range(NUM_RUNS):
        for name, values in times.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            values.append(time.perf_counter() - start)
    reference = statistics.median(times["torch"])
    rows = tuple(
        (f"import {n}", statistics.median(v) / reference, min(v) / reference, max(v) / reference)
        for n, v in times.items()
    )
    print(
        Table("Import time, ratio to torch", ("statement", "median", "least", "most"), rows, (f"{NUM_RUNS} runs each",))
    )


if __name__ == "__main__":
    main()
