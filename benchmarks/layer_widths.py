"""Widths by layer against one width for all at the same average size: the tables of docs/results/layer_widths_DATE.md.

On every tiny family: the rises of the loss with each layer alone (`fraqat analyze --what layer-widths`), on training data;
then students of one width and students of mixed widths with the same average, untrained and trained with the same data, noise,
number of steps and learning rate. What is finished in the folder is not done again.

    OMP_NUM_THREADS=1 python benchmarks/layer_widths.py --work runs/layer_widths --date 2026-11-29 --steps 100 --seeds 2
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fraqat.config import Recipe, load_recipe
from fraqat.distill import validation_loss
from fraqat.table import Table, format_value
from fraqat.workflows import AnalysisKind, RunFolder, Session, SilentProgress, analyze, open_session
from fraqat.workflows.calibration import calibrated_student
from fraqat.workflows.training import train_student

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
FAMILIES = ("sd3.5-medium", "pixart-sigma", "flux-schnell")
MIXES = ("3,4,5,6", "2,3,4")
"""Widths that layers may have; one goes with every average between its ends."""
SETTINGS = (
    "quantization.weight.range_method=learned",
    "schedule={kind: constant}",
    "train.learning_rate.kind=cosine",
    "train.autocast=none",
    "train.tensorboard=false",
    "train.validate_every=100000",
    "train.checkpoint_every=100000",
    "baselines={}",
)
_ALIKE = "all alike"


def recipe_of(family: str, average: float, mix: str, table: Path, settings: Sequence[str]) -> Recipe:
    """The recipe of one arm."""
    own = (f"quantization.weight.bits={average:g}",)
    if mix != _ALIKE:
        section = {"average_bits": average, "widths": [float(b) for b in mix.split(",")], "table": str(table)}
        own = (f"quantization.layer_widths={json.dumps(section)}",)
    return load_recipe(f"{family}-tiny", (*SETTINGS, *settings, *own))


def measure(session: Session[Any], recipe: Recipe, folder: Path, steps: int, seeds: int) -> dict[str, Any]:
    """Held-out loss untrained and after training, seed by seed; read from the folder where it is finished."""
    path = folder / "losses.json"
    if path.is_file():
        return json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    student = calibrated_student(session, recipe, SilentProgress())
    untrained = validation_loss(session.task, session.teacher, student, recipe.train)
    trained: list[float] = []
    for seed in range(1, seeds + 1):
        changed = recipe.with_method(f"seed-{seed}", {"train": {"steps": steps, "seed": seed}})
        run = RunFolder.create(folder / f"seed-{seed}", changed)
        trained.append(train_student(session, changed, run, SilentProgress())[1].validation_loss)
    spec = recipe.quantization.layer_widths
    counts = Counter() if spec is None else Counter(f"{bits:g}" for bits in spec.bits.values())
    found = {"untrained": untrained, "trained": trained, "layers": dict(sorted(counts.items()))}
    path.write_text(json.dumps(found))
    return found


def table_of(family: str, found: dict[str, dict[str, Any]]) -> Table:
    """One row for each arm; ratios to the same average with all layers alike."""
    rows: list[tuple[Any, ...]] = []
    for name, one in found.items():
        average, mix = name.split(": ")
        base = found[f"{average}: {_ALIKE}"]
        layers = ", ".join(f"{count} at {bits}" for bits, count in one["layers"].items()) or None
        trained = statistics.fmean(one["trained"])
        rows.append(
            (average, mix, one["untrained"], one["untrained"] / base["untrained"], trained, _ratio(one, base), layers)
        )
    columns = ("average", "widths", "untrained", "ratio", "trained", "trained, ratio", "layers")
    return Table(family, columns, tuple(rows))


def _ratio(one: dict[str, Any], base: dict[str, Any]) -> float:
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(one["trained"], base["trained"], strict=True)))


def overall(found: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Geometric means of the ratios over families."""
    rows: list[tuple[Any, ...]] = []
    for name in next(iter(found.values())):
        average, mix = name.split(": ")
        pairs = [(one[name], one[f"{average}: {_ALIKE}"]) for one in found.values()]
        untrained = math.exp(statistics.fmean(math.log(a["untrained"] / b["untrained"]) for a, b in pairs))
        rows.append((average, mix, untrained, math.exp(statistics.fmean(math.log(_ratio(a, b)) for a, b in pairs))))
    return Table("All families", ("average", "widths", "untrained, ratio", "trained, ratio"), tuple(rows))


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
    parser.add_argument("--average", dest="averages", action="append", type=float, help="bits; default: 4 and 3")
    parser.add_argument("--mix", dest="mixes", action="append", help=f"comma-separated widths; default: {MIXES}")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="further change of the recipes")
    arguments = parser.parse_args()
    families, averages = arguments.families or list(FAMILIES), arguments.averages or [4.0, 3.0]
    mixes = arguments.mixes or list(MIXES)
    widths = sorted({float(bits) for mix in mixes for bits in mix.split(",")} | set(averages))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for family in families:
        folder = arguments.work / family
        plain = load_recipe(f"{family}-tiny", (*SETTINGS, *arguments.settings))
        session = open_session(plain)
        table = folder / "layer-widths.json"
        if not table.is_file():
            analyze(plain, AnalysisKind.LAYER_WIDTHS, SilentProgress(), bits=widths, folder=folder, session=session)
        found[family] = {}
        for average in averages:
            spans = {mix: [float(bits) for bits in mix.split(",")] for mix in mixes}
            fitting = [mix for mix, span in spans.items() if min(span) < average < max(span)]
            for mix in (_ALIKE, *fitting):
                recipe = recipe_of(family, average, mix, table, arguments.settings)
                place = folder / f"{average:g}-{mix.replace(',', '_').replace(' ', '-')}"
                found[family][f"{average:g}: {mix}"] = measure(session, recipe, place, arguments.steps, arguments.seeds)
        write(arguments, averages, mixes, found)
    print((RESULTS / f"layer_widths_{arguments.date}.md").read_text())


def write(
    arguments: argparse.Namespace,
    averages: Sequence[float],
    mixes: Sequence[str],
    found: dict[str, dict[str, dict[str, Any]]],
) -> None:
    """The page and the numbers of the families that are finished."""
    chosen = " ".join(f"--family {family}" for family in found)
    changes = "".join(f" --average {average:g}" for average in averages) + "".join(f" --mix {mix}" for mix in mixes)
    changes += "".join(f" --set {setting}" for setting in arguments.settings)
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/layer_widths.py --work runs/layer_widths --date {arguments.date} {chosen} "
        f"--steps {arguments.steps} --seeds {arguments.seeds}{changes}"
    )
    note = (
        "Held-out distillation loss of students whose codes need the same bits a weight on average: all layers alike, or "
        f"widths chosen by layer from those named. Trained with {arguments.steps} steps, mean over {arguments.seeds} seeds; "
        "ratios are geometric means."
    )
    parts = [f"# Widths by layer, {arguments.date}", f"```\n{command}\n```", note]
    parts += ["## All families", markdown(overall(found))]
    for family, one in found.items():
        parts += [f"## {family}", markdown(table_of(family, one))]
    target = RESULTS / f"layer_widths_{arguments.date}.md"
    target.write_text("\n\n".join(parts) + "\n")
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
