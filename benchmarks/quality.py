"""Methods on the tiny teachers, over seeds, each at its own best learning rate: the tables of docs/results/quality_DATE.md.

Runs `fraqat compare` on every family, or goes on with what is in the folder, and joins the results: for each method the ratio
of its test loss to vanilla QAT's in each family, and over all families the geometric mean with the 95 % interval over seeds.

    OMP_NUM_THREADS=1 python benchmarks/quality.py --work runs/quality --date 2026-11-23 \
        --family pixart-sigma --family flux-schnell --methods vanilla-qat,fraqat --seeds 5 --rates 1e-4,2e-4,4e-4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fraqat.analysis.intervals import SeedMean, mean_over_seeds
from fraqat.config import load_recipe
from fraqat.table import Table, format_value
from fraqat.workflows import CompareOptions, Comparison, SilentProgress, compare
from fraqat.workflows.comparison import REFERENCE, RunRecord

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PICTURES = ("sana-600m", "sd3.5-medium", "pixart-sigma", "flux-schnell")
FAMILIES = (*PICTURES, "gemma-2-2b-it", "speecht5")
PRESET = "fraqat"
FRECHET = "frechet"
SETTINGS = ("train.batch_size=16", "quantization.weight.range_method=learned")
"""The same scales for all methods that do not choose them, and a batch that lets many runs fit into an hour."""


def test_loss(record: RunRecord) -> float | None:
    """Loss on the half of the held-out data that chose nothing."""
    return record.test_loss


def frechet(record: RunRecord) -> float | None:
    """Frechet distance of the student's pictures to the original's."""
    return record.quality.get(FRECHET)


def overall(
    comparisons: Mapping[str, Comparison], method: str, value: Callable[[RunRecord], float | None] = test_loss
) -> SeedMean | None:
    """Ratio to the reference over all families that have the method: mean of logarithms by seed, then over seeds."""
    logs: dict[int, list[float]] = {}
    for comparison in comparisons.values():
        result = next((r for r in comparison.results if r.method == method), None)
        if result is None or result.rate is None:
            return None
        base = {record.seed: value(record) for record in comparison.reference.records}
        for record in result.records:
            found, reference = value(record), base.get(record.seed)
            if found and reference:
                logs.setdefault(record.seed, []).append(math.log(found / reference))
    whole = [statistics.fmean(values) for values in logs.values() if len(values) == len(comparisons)]
    if not whole:
        return None
    return exponential(mean_over_seeds(whole))


def frechet_table(sampled: Mapping[str, Comparison]) -> Table:
    """Frechet distance to the original's pictures over that of vanilla QAT: by family, and over all families."""
    names = list(dict.fromkeys(result.method for c in sampled.values() for result in c.results))
    rows: list[Sequence[Any]] = []
    for name in names:
        cells: list[str] = []
        for comparison in sampled.values():
            result = next(r for r in comparison.results if r.method == name)
            mean = statistics.fmean(frechet(record) or math.nan for record in result.records)
            cells.append(f"{mean:.4g}; {text_of(frechet_ratio(comparison, name))}")
        rows.append((name, *cells, text_of(overall(sampled, name, frechet))))
    num_images = {c.recipe.to_values()["evaluation"]["num_images"] for c in sampled.values()}
    num_seeds = {len(result.records) for c in sampled.values() for result in c.results}
    note = (
        f"Frechet distance between the pictures of student and original, {', '.join(map(str, sorted(num_images)))} held-out "
        "prompts with equal seeds, features of the classifier that knows digits and colours; mean over the students of "
        f"{', '.join(map(str, sorted(num_seeds)))} seeds; its ratio to vanilla QAT's as there."
    )
    return Table("Frechet distance", ("method", *sampled, "all families"), tuple(rows), (note,))


def frechet_ratio(comparison: Comparison, method: str) -> SeedMean | None:
    """A method's ratio of Frechet distances to vanilla QAT in one comparison."""
    result = next(r for r in comparison.results if r.method == method)
    return SeedMean(1.0, None, None) if result is comparison.reference else comparison.quality_ratio(result, FRECHET)


def half_ratios(comparisons: Mapping[str, Comparison], halves: Mapping[str, Comparison]) -> list[SeedMean]:
    """Loss of the preset after half of the steps over that of the reference after all: by family, and over all families."""
    logs: dict[str, dict[int, float]] = {}
    for family, comparison in comparisons.items():
        base = {record.seed: record.test_loss for record in comparison.reference.records}
        found = {record.seed: record.test_loss for record in halves[family].results[0].records}
        logs[family] = {
            seed: math.log(loss / reference)
            for seed, loss in found.items()
            if loss is not None and (reference := base.get(seed)) is not None
        }
    seeds = set.intersection(*(set(values) for values in logs.values()))
    whole = [statistics.fmean(values[seed] for values in logs.values()) for seed in sorted(seeds)]
    intervals = [mean_over_seeds(list(values.values())) for values in logs.values()]
    return [exponential(interval) for interval in (*intervals, mean_over_seeds(whole))]


def exponential(interval: SeedMean) -> SeedMean:
    """Of a mean of logarithms and its ends."""
    low, high = (None if end is None else math.exp(end) for end in (interval.low, interval.high))
    return SeedMean(math.exp(interval.mean), low, high)


def markdown(
    comparisons: Mapping[str, Comparison],
    halves: Mapping[str, Comparison],
    sampled: Mapping[str, Comparison],
    command: str,
    date: str,
) -> str:
    """The page: the joint table, then the tables of every family."""
    names = list(dict.fromkeys(result.method for c in comparisons.values() for result in c.results))
    rows: list[Sequence[Any]] = []
    for name in names:
        ratios = [ratio_to_reference(comparison, name) for comparison in comparisons.values()]
        rows.append((name, *map(text_of, ratios), text_of(overall(comparisons, name))))
    if halves:
        rows.append((f"{PRESET}, half of the steps", *map(text_of, half_ratios(comparisons, halves))))
    note = (
        "Ratio of the distillation loss on held-out data that chose nothing to that of vanilla QAT: geometric mean over "
        "seeds, in brackets its 95 % interval. All families: geometric mean over families, interval over seeds."
    )
    joint = Table("Ratio to vanilla QAT", ("method", *comparisons, "all families"), tuple(rows), (note,))
    parts = [f"# Quality, {date}", f"```\n{command}\n```", markdown_table(joint)]
    if sampled:
        parts.append(markdown_table(frechet_table(sampled)))
    for family, comparison in comparisons.items():
        parts += [f"## {family}", markdown_table(comparison.to_table()), markdown_table(comparison.rates_table())]
        if family in halves:
            half = halves[family]
            parts += [f"### {family}, half of the steps", *map(markdown_table, (half.to_table(), half.rates_table()))]
    return "\n\n".join(parts) + "\n"


def ratio_to_reference(comparison: Comparison, method: str) -> SeedMean | None:
    """A method's ratio to vanilla QAT in one comparison; None where it was not run."""
    result = next((r for r in comparison.results if r.method == method), None)
    if result is None:
        return None
    return SeedMean(1.0, None, None) if result is comparison.reference else comparison.ratio(result)


def text_of(interval: SeedMean | None) -> str | None:
    """`mean (low to high)`."""
    if interval is None:
        return None
    ends = "" if interval.low is None or interval.high is None else f" ({interval.low:.3f} to {interval.high:.3f})"
    return f"{interval.mean:.3f}{ends}"


def markdown_table(table: Table) -> str:
    """The table and its notes."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(format_value(value) for value in row) + " |" for row in table.rows]
    return "\n".join([*lines, "", *table.notes])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the runs; what is finished is not done again"
    )
    parser.add_argument("--date", required=True, help="of the results' file")
    parser.add_argument("--family", dest="families", action="append", choices=FAMILIES, help="default: all")
    parser.add_argument("--methods", default="vanilla-qat,fraqat")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", default="1e-4,2e-4,4e-4", help="learning rates that every method is tried at")
    parser.add_argument(
        "--rates-of",
        action="append",
        default=[],
        metavar="FAMILY=RATES",
        help="other rates for a family, for all methods",
    )
    parser.add_argument(
        "--half", action="store_true", help="also the preset in half of the steps, against all methods' in all"
    )
    parser.add_argument(
        "--sampled",
        metavar="METHODS",
        help="methods whose pictures are compared with the original's too, vanilla-qat among them",
    )
    parser.add_argument("--sampled-seeds", type=int, help="students of each that are sampled; default: all")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="further change of the recipes")
    parser.add_argument(
        "--set-of",
        dest="own_settings",
        action="append",
        default=[],
        metavar="FAMILY:SETTING",
        help="further change of one family's recipe",
    )
    arguments = parser.parse_args()
    families = arguments.families or list(FAMILIES)
    own_rates = dict(given.split("=", 1) for given in arguments.rates_of)
    own_settings = {family: [*SETTINGS, *arguments.settings] for family in families}
    for option, names in (
        ("--rates-of", set(own_rates)),
        ("--set-of", {given.partition(":")[0] for given in arguments.own_settings}),
    ):
        if unknown := names - set(families):
            allowed = ", ".join(families)
            parser.error(f"{option} {', '.join(sorted(unknown))}: allowed are the families compared: {allowed}")
    for given in arguments.own_settings:
        family, _, setting = given.partition(":")
        own_settings[family].append(setting)
    sampled_methods = tuple(arguments.sampled.split(",")) if arguments.sampled else ()
    if sampled_methods and REFERENCE not in sampled_methods:
        parser.error(f"--sampled {arguments.sampled}: {REFERENCE} has to be among them, ratios are taken to it")
    comparisons: dict[str, Comparison] = {}
    halves: dict[str, Comparison] = {}
    sampled: dict[str, Comparison] = {}
    for family, settings in own_settings.items():
        options = CompareOptions(
            methods=tuple(arguments.methods.split(",")),
            num_seeds=arguments.seeds,
            rates=tuple(float(rate) for rate in own_rates.get(family, arguments.rates).split(",")),
        )
        recipe = load_recipe(f"{family}-tiny", tuple(settings))
        comparisons[family] = compare(recipe, arguments.work / family, options, SilentProgress())
        if sampled_methods and family in PICTURES:
            num_seeds = arguments.sampled_seeds or arguments.seeds
            pictured = dataclasses.replace(options, methods=sampled_methods, measures_quality=True, num_seeds=num_seeds)
            sampled[family] = compare(recipe, arguments.work / family, pictured, SilentProgress())
        if arguments.half:
            assert recipe.train.steps is not None
            recipe = load_recipe(f"{family}-tiny", (*settings, f"train.steps={recipe.train.steps // 2}"))
            only = dataclasses.replace(options, methods=(PRESET,))
            halves[family] = compare(recipe, arguments.work / f"{family}-half", only, SilentProgress())
    chosen = " ".join(f"--family {family}" for family in families)
    changes = "".join(f" --rates-of {given}" for given in arguments.rates_of)
    changes += " --half" * arguments.half
    changes += f" --sampled {arguments.sampled}" if arguments.sampled else ""
    changes += f" --sampled-seeds {arguments.sampled_seeds}" if arguments.sampled_seeds else ""
    changes += "".join(f" --set {shlex.quote(setting)}" for setting in arguments.settings)
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/quality.py --work runs/quality --date {arguments.date} {chosen} "
        f"--methods {arguments.methods} --seeds {arguments.seeds} --rates {arguments.rates}{changes}"
    )
    command += "".join(f" --set-of {shlex.quote(given)}" for given in arguments.own_settings)
    target = RESULTS / f"quality_{arguments.date}.md"
    target.write_text(markdown(comparisons, halves, sampled, command, arguments.date))
    values = {family: comparison.to_json() for family, comparison in comparisons.items()}
    values |= {f"{family}, half of the steps": comparison.to_json() for family, comparison in halves.items()}
    values |= {f"{family}, pictures": comparison.to_json() for family, comparison in sampled.items()}
    target.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    print(target.read_text())


if __name__ == "__main__":
    main()
