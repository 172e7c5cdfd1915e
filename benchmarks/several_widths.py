"""One model for several widths against models trained for one: the tables of docs/results/several_widths_DATE.md.

On every tiny family and seed, with the same data, noise and learning rate: one model for each width alone with N steps; one
model for all of them with N steps, as much compute as one of those, and with 2 N. All are measured at every width, on the same
held-out data, the single ones at widths they were not trained for too. What is finished in the folder is not done again.

    OMP_NUM_THREADS=1 python benchmarks/several_widths.py --work runs/several --date 2026-11-29 --steps 100 --seeds 2
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fraqat.config import Recipe, load_recipe
from fraqat.distill import validation_loss
from fraqat.nn import kept_widths, set_bits_
from fraqat.table import Table, format_value
from fraqat.workflows import RunFolder, Session, SilentProgress, open_session
from fraqat.workflows.training import train_student

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
FAMILIES = ("sd3.5-medium", "pixart-sigma", "flux-schnell")
WIDTHS = (8, 6, 5, 4)
SETTINGS = (
    "quantization.weight.range_method=learned",
    "train.autocast=none",
    "train.tensorboard=false",
    "train.validate_every=100000",
    "train.checkpoint_every=100000",
    "baselines={}",
)


def recipe_of(family: str, arm: str, steps: int, seed: int, settings: Sequence[str]) -> Recipe:
    """The recipe of one arm: `8`, `6`, `5` or `4` alone, `in_turn` or `sampled`."""
    if arm.isdigit():
        own = (f"quantization.weight.bits={arm}", "schedule={kind: constant}")
    else:
        own = (f"schedule={{kind: several, widths: {list(WIDTHS)}, order: {arm}}}",)
    train = (f"train.steps={steps}", f"train.seed={seed}", "train.learning_rate.kind=cosine")
    return load_recipe(f"{family}-tiny", (*SETTINGS, *settings, *own, *train))


def losses_of(session: Session[Any], recipe: Recipe, folder: Path) -> dict[str, float]:
    """Trains one arm, and its held-out loss at every width; read from the folder where it is finished."""
    path = folder / "losses.json"
    if not path.is_file():
        start = time.process_time()
        student, _ = train_student(session, recipe, RunFolder.create(folder, recipe), SilentProgress())
        losses: dict[str, float] = {}
        with kept_widths(student):
            for bits in WIDTHS:
                set_bits_(student, bits, where="*")
                losses[str(bits)] = validation_loss(session.task, session.teacher, student, recipe.train)
        path.write_text(json.dumps({"losses": losses, "cpu_s": time.process_time() - start}))
    return json.loads(path.read_text())["losses"]


def arms(steps: int) -> list[tuple[str, str, int]]:
    """Name, arm and steps of every row."""
    single = [(f"{bits} bits alone", str(bits), steps) for bits in WIDTHS]
    return [*single, ("all in turn", "in_turn", steps), ("all in turn, 2x", "in_turn", 2 * steps)]


def table_of(family: str, losses: dict[str, list[dict[str, float]]]) -> Table:
    """Mean loss of every arm at every width, and of the arms for all the ratio to the model of that width alone."""
    rows: list[tuple[Any, ...]] = []
    for name, found in losses.items():
        means = [statistics.fmean(one[str(bits)] for one in found) for bits in WIDTHS]
        ratios = [_ratio(found, losses[f"{bits} bits alone"], str(bits)) for bits in WIDTHS]
        rows.append((name, *means, *(ratios if name.startswith("all") else [None] * len(WIDTHS))))
    columns = ("trained for", *(f"loss at {bits}" for bits in WIDTHS), *(f"ratio at {bits}" for bits in WIDTHS))
    return Table(family, columns, tuple(rows))


def _ratio(found: list[dict[str, float]], alone: list[dict[str, float]], bits: str) -> float:
    return math.exp(statistics.fmean(math.log(a[bits] / b[bits]) for a, b in zip(found, alone, strict=True)))


def overall(tables: Sequence[Table]) -> Table:
    """Geometric mean of the ratios over families."""
    names = [row[0] for row in tables[0].rows if row[0].startswith("all")]
    first = 1 + len(WIDTHS)
    rows = [
        (
            name,
            *(
                math.exp(statistics.fmean(math.log(row[i]) for table in tables for row in table.rows if row[0] == name))
                for i in range(first, first + len(WIDTHS))
            ),
        )
        for name in names
    ]
    return Table("All families", ("trained for", *(f"ratio at {bits}" for bits in WIDTHS)), tuple(rows))


def markdown(table: Table) -> str:
    """A table for the page."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(format_value, row)) + " |" for row in table.rows)])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--date", required=True, help="of the results' file")
    parser.add_argument("--family", dest="families", action="append", help="default: three of them")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="further change of the recipes")
    arguments = parser.parse_args()
    families = arguments.families or list(FAMILIES)
    tables: list[Table] = []
    records: dict[str, Any] = {}
    for family in families:
        losses: dict[str, list[dict[str, float]]] = {}
        session = open_session(recipe_of(family, "4", arguments.steps, 1, arguments.settings))
        for name, arm, steps in arms(arguments.steps):
            for seed in range(1, arguments.seeds + 1):
                recipe = recipe_of(family, arm, steps, seed, arguments.settings)
                folder = arguments.work / family / f"{arm}-{steps}" / f"seed-{seed}"
                losses.setdefault(name, []).append(losses_of(session, recipe, folder))
        tables.append(table_of(family, losses))
        records[family] = losses
        write(arguments, tables, records)
    print((RESULTS / f"several_widths_{arguments.date}.md").read_text())


def write(arguments: argparse.Namespace, tables: Sequence[Table], records: dict[str, Any]) -> None:
    """The page and the numbers of the families that are finished."""
    chosen = " ".join(f"--family {family}" for family in records)
    changes = "".join(f" --set {setting}" for setting in arguments.settings)
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/several_widths.py --work runs/several --date {arguments.date} {chosen} "
        f"--steps {arguments.steps} --seeds {arguments.seeds}{changes}"
    )
    note = (
        f"Held-out distillation loss, mean over {arguments.seeds} seeds, of models trained for one width with "
        f"{arguments.steps} steps and for all of them with as many and with twice as many. Ratio: to the model trained for "
        "that width alone, geometric mean over seeds. A model trained for one width is measured at the others with its learned "
        "scales carried over as at a change of stage."
    )
    parts = [f"# One model for several widths, {arguments.date}", f"```\n{command}\n```", note]
    parts += ["## All families", markdown(overall(tables))]
    for table in tables:
        parts += [f"## {table.title}", markdown(table)]
    target = RESULTS / f"several_widths_{arguments.date}.md"
    target.write_text("\n\n".join(parts) + "\n")
    target.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
