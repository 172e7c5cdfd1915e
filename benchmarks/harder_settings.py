"""Where a curriculum should pay: fewer bits, coarser scales, static or 4-bit inputs (docs/results/harder_settings.md).

`fraqat compare` once for each setting, or on with what is in the folder: vanilla QAT, Table 4's widths with the decay of the
learning rate at the final one, the same widths as shares of the final grid's error, and the preset. Learned scales in all.

    OMP_NUM_THREADS=1 python benchmarks/harder_settings.py --work runs/harder --family flux-schnell
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fraqat.config import load_recipe
from fraqat.table import Table
from fraqat.workflows import CompareOptions, Comparison, SilentProgress, compare
from quality import SETTINGS, markdown_table, ratio_to_reference, text_of

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
_STATIC = ("static=true", "granularity=tensor", "range_method=percentile", "symmetric=false")
HARDER = {
    "W4A8": (),
    "W3A8": ("quantization.weight.bits=3",),
    "W2A8": ("quantization.weight.bits=2",),
    "W4A4": ("quantization.activation.bits=4",),
    "W4A8, one scale a layer": ("quantization.weight.granularity=tensor",),
    "W4A8, static inputs": tuple(f"quantization.activation.{setting}" for setting in _STATIC),
}
"""What is written before the table's rows -> changes of the recipe."""


def markdown(comparisons: dict[str, Comparison], command: str) -> str:
    """The page: ratios of all settings, then the losses of each."""
    names = list(dict.fromkeys(result.method for c in comparisons.values() for result in c.results))
    rows: list[Sequence[Any]] = []
    for setting, comparison in comparisons.items():
        loss = sum(r.test_loss or 0.0 for r in comparison.reference.records) / len(comparison.reference.records)
        rows.append((setting, loss, *(text_of(ratio_to_reference(comparison, name)) for name in names[1:])))
    note = (
        f"Held-out distillation loss of {names[0]}, mean over seeds; of the others the ratio to it, geometric mean over seeds "
        "with its 95 % interval. Learned scales in all; each method at its own best rate of the grid."
    )
    joint = Table("Harder settings", ("setting", names[0], *names[1:]), tuple(rows), (note,))
    parts = ["# Harder settings", f"```\n{command}\n```", markdown_table(joint)]
    for setting, comparison in comparisons.items():
        parts += [f"## {setting}", markdown_table(comparison.to_table()), markdown_table(comparison.rates_table())]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; what is there is not done again")
    parser.add_argument("--family", default="flux-schnell", help="of the tiny recipes")
    parser.add_argument("--setting", dest="settings", action="append", choices=list(HARDER), help="default: all")
    parser.add_argument("--methods", default="vanilla-qat,fractional,final-grid,fraqat")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default="1e-4,2e-4,4e-4,8e-4")
    parser.add_argument("--name", default="harder_settings", help="of the results' file")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="further change of all recipes")
    arguments = parser.parse_args()
    options = CompareOptions(
        methods=tuple(arguments.methods.split(",")),
        num_seeds=arguments.seeds,
        rates=tuple(float(rate) for rate in arguments.rates.split(",")),
    )
    comparisons: dict[str, Comparison] = {}
    for setting in arguments.settings or HARDER:
        recipe = load_recipe(f"{arguments.family}-tiny", (*SETTINGS, *HARDER[setting], *arguments.changes))
        folder = arguments.work / arguments.family / setting.replace(", ", "-").replace(" ", "-")
        comparisons[setting] = compare(recipe, folder, options, SilentProgress())
        _write(comparisons, arguments)


def _write(comparisons: dict[str, Comparison], arguments: argparse.Namespace) -> None:
    chosen = "".join(f' --setting "{setting}"' for setting in arguments.settings or ())
    changes = "".join(f" --set {shlex.quote(change)}" for change in arguments.changes)
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/harder_settings.py --work runs/harder --family {arguments.family}{chosen} "
        f"--methods {arguments.methods} --seeds {arguments.seeds} --rates {arguments.rates} --name {arguments.name}{changes}"
    )
    target = RESULTS / f"{arguments.name}.md"
    target.write_text(markdown(comparisons, command))
    values = {setting: comparison.to_json() for setting, comparison in comparisons.items()}
    target.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    print(target.read_text().split("\n## ")[0], flush=True)


if __name__ == "__main__":
    main()
