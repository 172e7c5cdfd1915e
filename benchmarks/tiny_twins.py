"""The tiny twin of every full-size recipe: original, dynamic, vanilla QAT and FraQAT side by side, on the zoo's models.

    python benchmarks/tiny_twins.py --work runs/twins [RECIPE ...]

trains and evaluates each recipe with its baselines (what is finished is not done again) and rewrites
`docs/results/tiny_twins.json` and `.md` from all runs that are finished in `--work`. One thread, one seed: the loss moves by
5 % with the number of threads (docs/log.md), so set OMP_NUM_THREADS=1 or pass --threads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fraqat.config import load_recipe, recipe_names
from fraqat.workflows import RunFolder, evaluate, open_session, quality_table, train
from fraqat.workflows.progress import SilentProgress

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def main() -> None:
    """Runs recipes and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in recipe_names() if name.endswith("-tiny")]
    parser.add_argument("recipes", nargs="*", default=names, help="recipes to run; all tiny ones without any")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "twins", help="folder of the runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.recipes:
        _run(name, arguments.work / name, tuple(arguments.settings))
    write_results([arguments.work / name for name in names])


def write_results(folders: list[Path]) -> None:
    """Rewrites the tables from all evaluated runs."""
    runs = [RunFolder(folder) for folder in folders if (folder / "evaluation.json").is_file()]
    values: dict[str, Any] = {}
    parts = [
        "# The tiny twins\n\nMade by `benchmarks/tiny_twins.py` on one thread, one seed; every student of a table has the same "
        "data, seed, batch and\nnumber of steps. Time is a ratio to vanilla QAT's."
    ]
    for run in runs:
        recipe, evaluation = run.recipe(), run.read_json(run.evaluation_path)
        values[recipe.name] = {"evaluation": evaluation, "environment": run.read_json(run.path / "environment.json")}
        parts.append(_markdown(recipe.name, evaluation))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "tiny_twins.json").write_text(json.dumps(values, indent=1) + "\n")
    (RESULTS / "tiny_twins.md").write_text("\n\n".join(parts) + "\n")


def _run(name: str, folder: Path, settings: tuple[str, ...]) -> None:
    recipe = load_recipe(name, settings)
    session = open_session(recipe)
    progress = SilentProgress()
    run = train(recipe, folder, progress, with_baselines=True, session=session)
    if not run.evaluation_path.exists():
        evaluate(run, progress, session=session)
    print(quality_table(run.read_json(run.evaluation_path), name), flush=True)


def _markdown(name: str, evaluation: dict[str, Any]) -> str:
    table = quality_table(evaluation, name)
    seconds = {row["model"]: row["train_s"] for row in evaluation["models"]}
    reference = seconds.get("vanilla-qat")
    columns = [*table.columns[:-1], "time, ratio"]
    cells = table.to_cells()
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row, values in zip(table.rows, cells, strict=True):
        ratio = f"{seconds[row[0]] / reference:.2f}" if seconds[row[0]] and reference else "-"
        lines.append("| " + " | ".join([*values[:-1], ratio]) + " |")
    return f"## {name}\n\n" + "\n".join(lines) + "\n\n" + "\n".join(table.notes)


if __name__ == "__main__":
    main()
