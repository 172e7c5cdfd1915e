"""What a Frechet distance is made of: the shift of the mean, the spread, and how much of it a few pictures are.

Samples pictures from the students of a comparison that has ended and from the original, with equal prompts and seeds, and
splits the distance. Random changes of single pictures do not move a distribution, but with few pictures they count as if they
did; so distances are given over several numbers of pictures.

    OMP_NUM_THREADS=1 python benchmarks/frechet_parts.py --work runs/quality/pixart-sigma --num 192,576 --name frechet_parts
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fraqat.config import ImageRecipe, load_recipe
from fraqat.data.captioned import held_out_prompts
from fraqat.evaluation import ColorDigitsJudge
from fraqat.evaluation.frechet import frechet_distance
from fraqat.table import Table
from fraqat.workflows.comparison import run_name
from fraqat.workflows.sessions import open_session
from fraqat.workflows.sessions.image import ImageSession
from fraqat.zoo import zoo_path
from quality import RESULTS, markdown_table

KEPT = 0.9
"""Share of the pictures that are left when those that changed most are taken out."""


def parts_of(features: Tensor, reference: Tensor) -> dict[str, float]:
    """The distance of two sets of features of equal prompts and seeds, [N, D] each, and its parts."""
    x, y = features.double(), reference.double()
    change_N = (x - y).square().sum(1)
    kept = change_N <= change_N.quantile(KEPT)
    return {
        "distance": frechet_distance(x, y),
        "mean": float((x.mean(0) - y.mean(0)).square().sum()),
        "least changed": frechet_distance(x[kept], y[kept]),
    }


def measure(folder: Path, nums: list[int], num_seeds: int) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """By method, for each seed the parts by number of pictures; and the recipe's name."""
    recipe = load_recipe(str(folder / "compared.yaml"))
    assert isinstance(recipe, ImageRecipe)
    session, evaluation = open_session(recipe), recipe.evaluation
    assert isinstance(session, ImageSession)
    judge = ColorDigitsJudge(zoo_path("color-digits-classifier"))
    prompts = held_out_prompts(recipe.data, max(nums))

    def features_of(model: Any) -> Tensor:
        images = session.sample(model, prompts, seed=evaluation.seed, batch_size=evaluation.batch_size)
        return judge.features(images * 2 - 1)

    reference = features_of(session.teacher)
    found: dict[str, list[dict[str, Any]]] = {}
    for method in json.loads((folder / "comparison.json").read_text())["methods"]:
        for record in method["records"][:num_seeds]:
            run = folder / method["method"] / run_name(record["rate"], record["seed"])
            features = features_of(
                session.load_student(load_recipe(str(run / "recipe.yaml")), run / "student.safetensors")
            )
            found.setdefault(method["method"], []).append(
                {str(num): parts_of(features[:num], reference[:num]) for num in nums}
            )
    return found, recipe.name


def table_of(found: dict[str, list[dict[str, Any]]], nums: list[int]) -> Table:
    """One row for each method and number of pictures: means over seeds."""
    rows: list[tuple[Any, ...]] = []
    for method, seeds in found.items():
        for num in nums:
            means = {
                name: statistics.fmean(seed[str(num)][name] for seed in seeds)
                for name in ("distance", "mean", "least changed")
            }
            shares = (means["mean"] / means["distance"], means["least changed"] / means["distance"])
            spread = [seed[str(num)]["distance"] for seed in seeds]
            rows.append(
                (
                    method,
                    num,
                    f"{means['distance']:.3f}",
                    f"{min(spread):.3f} to {max(spread):.3f}",
                    *(f"{s:.2f}" for s in shares),
                )
            )
    columns = (
        "method",
        "pictures",
        "distance",
        "over seeds",
        "share of the mean's shift",
        "without the most changed tenth, over all",
    )
    return Table("Frechet", columns, tuple(rows), ())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of a comparison that has ended")
    parser.add_argument("--num", default="192", help="numbers of pictures, the first of the most")
    parser.add_argument("--seeds", type=int, default=3, help="students of each method")
    parser.add_argument("--name", required=True, help="of the results' file")
    arguments = parser.parse_args()
    nums = [int(num) for num in arguments.num.split(",")]
    with torch.no_grad():
        found, recipe = measure(arguments.work, nums, arguments.seeds)
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/frechet_parts.py --work FOLDER --num {arguments.num} --seeds {arguments.seeds} "
        f"--name {arguments.name}"
    )
    parts = [
        f"# What a Frechet distance is made of: {recipe}",
        f"```\n{command}\n```",
        "Distance to the original's pictures of equal prompts and seeds, features of the classifier that knows digits and "
        f"colours; means over {arguments.seeds} students of each method.",
        markdown_table(table_of(found, nums)),
    ]
    target = RESULTS / f"{arguments.name}.md"
    target.write_text("\n\n".join(parts).rstrip() + "\n")
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(target.read_text())


if __name__ == "__main__":
    main()
