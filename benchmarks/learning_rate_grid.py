"""Which learning rate is best for which method, and how the methods compare at their own best one.

Every method trains on the embedded pipeline with the same data, batch size and number of steps. The rate is chosen from the
same grid on one seed; the comparison then uses other seeds. Prints a table and appends one JSON line per run.

    python benchmarks/learning_rate_grid.py --out docs/results/learning_rate_grid.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from fraqat import __version__
from fraqat.config import Recipe, load_recipe, load_values
from fraqat.distill import Distiller
from fraqat.table import Table
from fraqat.workflows import Session, open_session, resolve_schedule

DEMO = "color-digits"
GRID = (1e-4, 3e-4, 1e-3, 3e-3)
SELECTION_SEED = 1234
SEEDS = (1, 2, 3)
METHODS: dict[str, dict[str, Any]] = {
    "vanilla-qat, cosine": {"schedule": {"kind": "constant"}, "kind": "cosine"},
    "vanilla-qat, constant rate": {"schedule": {"kind": "constant"}, "kind": "constant"},
    "fraqat, decay in the last stage": {"schedule": {"kind": "fractional"}, "kind": "decay_last"},
    "fraqat, constant rate": {"schedule": {"kind": "fractional"}, "kind": "constant"},
}


def train_once(session: Session[Any], recipe: Recipe, method: str, peak: float, seed: int) -> dict[str, Any]:
    """Trains one method and returns its record."""
    values = recipe.to_values()
    values["schedule"] = METHODS[method]["schedule"]
    values["train"] |= {"seed": seed, "tensorboard": False, "checkpoint_every": 10**6, "validate_every": 10**6}
    values["train"]["learning_rate"] |= {"peak": peak, "kind": METHODS[method]["kind"]}
    values["baselines"] = {}
    own = load_values(values)
    schedule = resolve_schedule(own, session.task.steps_per_epoch(own.train.batch_size))
    assert schedule is not None
    student, _ = session.new_student(own)
    with tempfile.TemporaryDirectory() as folder:
        result = Distiller(session.task, session.teacher, student, schedule, own.train, Path(folder)).run()
    return {
        "benchmark": "learning_rate_grid",
        "recipe": recipe.name,
        "method": method,
        "peak": peak,
        "seed": seed,
        "steps": result.num_steps,
        "validation_loss": result.validation_loss,
        "weight": dataclasses.asdict(own.quantization.weight),
        "fraqat": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def run(recipe: Recipe, out: Path, methods: list[str]) -> Table:
    """All runs of the grid and of the comparison, for some of `METHODS`; the first one is the reference of the ratio."""
    session = open_session(recipe)
    best: dict[str, float] = {}
    selection: dict[str, dict[float, float]] = {}
    for method in methods:
        losses = {peak: _record(session, recipe, method, peak, SELECTION_SEED, out) for peak in GRID}
        selection[method] = losses
        best[method] = min(losses, key=lambda peak: losses[peak])
    final = {m: [_record(session, recipe, m, best[m], seed, out) for seed in SEEDS] for m in methods}
    reference = statistics.median(final[methods[0]])
    rows = tuple(
        (
            method,
            *(selection[method][peak] for peak in GRID),
            best[method],
            statistics.median(final[method]),
            min(final[method]),
            max(final[method]),
            statistics.median(final[method]) / reference,
        )
        for method in methods
    )
    columns = ("method", *(f"{peak:g}" for peak in GRID), "best rate", "median", "least", "most", "ratio")
    note = (
        f"Held-out distillation loss, {recipe.train.steps} steps of batch {recipe.train.batch_size}. Rates compared with "
        f"seed {SELECTION_SEED}; median, least and most over seeds {', '.join(map(str, SEEDS))} at the method's own best rate; "
        f"ratio of medians to {methods[0]}."
    )
    return Table("Learning rates", columns, rows, (note,))


def _record(session: Session[Any], recipe: Recipe, method: str, peak: float, seed: int, out: Path) -> float:
    done = _find(out, method, peak, seed, recipe)
    if done is not None:
        return done
    record = train_once(session, recipe, method, peak, seed)
    with out.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
    print(method, peak, seed, record["validation_loss"], flush=True)
    return record["validation_loss"]


def _find(out: Path, method: str, peak: float, seed: int, recipe: Recipe) -> float | None:
    """The loss of a run that an earlier, interrupted call made."""
    wanted = (recipe.name, method, peak, seed, recipe.train.steps, dataclasses.asdict(recipe.quantization.weight))
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else []:
        record = json.loads(line)
        found = (record.get("recipe", DEMO), *(record[key] for key in ("method", "peak", "seed", "steps", "weight")))
        if found == wanted:
            return record["validation_loss"]
    return None


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; runs found there are not made again")
    parser.add_argument("--recipe", default=DEMO, help="whose model and data")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="change of the recipe")
    parser.add_argument("--method", dest="methods", action="append", choices=list(METHODS), help="default: all")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, tuple(arguments.settings))
    print(run(recipe, arguments.out, arguments.methods or list(METHODS)))


if __name__ == "__main__":
    main()
