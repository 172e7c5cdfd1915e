"""Where students err by noise level: with the prompt, without, in the difference, and as the sampler's guidance combines them.

Reads the students of a comparison that has ended, and gives for each method the mean square of every error over vanilla QAT's.
The mean of an error over pictures at one noise level is what all pictures share: Frechet distances see it most.

    OMP_NUM_THREADS=1 python benchmarks/guided_error.py --work runs/quality/pixart-sigma --num 128 --name guided_error_pixart
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.config import load_recipe
from fraqat.distill.parts import VALIDATION_SEED
from fraqat.table import Table
from fraqat.tasks.diffusion import OUTPUT, DiffusionTask
from fraqat.tasks.guided import GUIDED_BY, with_and_without_prompt
from fraqat.workflows.comparison import REFERENCE, run_name
from fraqat.workflows.sessions import open_session
from quality import RESULTS, markdown_table

PLACES = (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.98)
"""Shares of the distribution of noise levels, from the least noise to the most."""
KINDS = (
    "with the prompt, e_c",
    "without, e_u",
    "their difference, e_c - e_u",
    "as guided, s e_c - (s - 1) e_u",
    "the same, of its mean over pictures",
)


@torch.no_grad()
def outputs_at(task: DiffusionTask, model: nn.Module, place: float, num: int, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs [N, ...] with and without the prompt on the first `num` held-out pictures, noise fixed."""
    batch = task.validation_batches(num)[0]
    size = len(batch["latents"])
    marked = {**batch, GUIDED_BY: torch.full((size,), scale)}  # no caption is dropped
    places = torch.full((size,), place, dtype=torch.float64)
    inputs = dict(task.make_inputs_at(marked, places, torch.Generator().manual_seed(VALIDATION_SEED)))
    del inputs[GUIDED_BY]
    both = with_and_without_prompt(inputs, task.unprompted, task.shared_arguments)
    prompted, unprompted = task.predict(model, both)[OUTPUT].float().chunk(2)
    return prompted, unprompted


def errors_of(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], scale: float) -> tuple[float, ...]:
    """Mean squares in the order of `KINDS`."""
    with_prompt, without = (mine - theirs for mine, theirs in zip(student, teacher, strict=True))
    guided = scale * with_prompt - (scale - 1) * without
    found = (with_prompt, without, with_prompt - without, guided, guided.mean(0))
    return tuple(float(error.square().mean()) for error in found)


def measure(folder: Path, num: int) -> tuple[dict[str, list[list[list[float]]]], float, str]:
    """Mean squares by method, seed, place and kind; the sampler's scale; the recipe's name."""
    recipe = load_recipe(str(folder / "compared.yaml"))
    session = open_session(recipe)
    task, scale = session.task, recipe.to_values()["sampler"]["guidance_scale"]
    assert isinstance(task, DiffusionTask)
    reference = [outputs_at(task, session.teacher, place, num, scale) for place in PLACES]
    found: dict[str, list[list[list[float]]]] = {}
    for method in json.loads((folder / "comparison.json").read_text())["methods"]:
        for record in method["records"]:
            run = folder / method["method"] / run_name(record["rate"], record["seed"])
            student = session.load_student(load_recipe(str(run / "recipe.yaml")), run / "student.safetensors")
            values = [
                list(errors_of(wanted, outputs_at(task, student, place, num, scale), scale))
                for wanted, place in zip(reference, PLACES, strict=True)
            ]
            found.setdefault(method["method"], []).append(values)
    return found, scale, recipe.name


def ratio(values: Mapping[str, Sequence[Any]], method: str, place: int, kind: int) -> float:
    """Geometric mean over seeds of a method's mean square over the reference's."""
    pairs = zip(values[method], values[REFERENCE], strict=True)
    return math.exp(statistics.fmean(math.log(mine[place][kind] / base[place][kind]) for mine, base in pairs))


def table_of(values: Mapping[str, Sequence[Any]], method: str) -> Table:
    """One row for each kind of error, one column for each noise level, and the ratio of the means over levels."""
    rows: list[Sequence[Any]] = []
    for kind, name in enumerate(KINDS):
        cells = [f"{ratio(values, method, place, kind):.2f}" for place in range(len(PLACES))]
        means = [
            math.log(statistics.fmean(p[kind] for p in mine) / statistics.fmean(p[kind] for p in base))
            for mine, base in zip(values[method], values[REFERENCE], strict=True)
        ]
        rows.append((name, *cells, f"{math.exp(statistics.fmean(means)):.3f}"))
    return Table(method, ("error", *map(str, PLACES), "mean of all"), tuple(rows), ())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of a comparison that has ended")
    parser.add_argument("--num", type=int, default=128, help="held-out pictures")
    parser.add_argument("--name", required=True, help="of the results' file")
    arguments = parser.parse_args()
    values, scale, recipe = measure(arguments.work, arguments.num)
    if REFERENCE not in values:
        parser.error(f"--work {arguments.work}: has no students of {REFERENCE}, to which ratios are taken")
    num_seeds = len(values[REFERENCE])
    command = f"OMP_NUM_THREADS=1 python benchmarks/guided_error.py --work FOLDER --num {arguments.num} --name {arguments.name}"
    parts = [
        f"# Errors by noise level: {recipe}",
        f"```\n{command}\n```",
        f"Mean square over {REFERENCE}'s, geometric mean over {num_seeds} seeds, {arguments.num} held-out pictures, noise "
        f"levels by their place in the distribution of training, s = {scale:g}; last the ratio of the means over levels.",
    ]
    for method in values:
        if method != REFERENCE:
            parts += [f"## {method}", markdown_table(table_of(values, method)).rstrip()]
    target = RESULTS / f"{arguments.name}.md"
    target.write_text("\n\n".join(parts) + "\n")
    target.with_suffix(".json").write_text(json.dumps({"scale": scale, "places": PLACES, "errors": values}) + "\n")
    print(target.read_text())


if __name__ == "__main__":
    main()
