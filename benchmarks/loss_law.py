"""A loss law fitted to our own runs over widths, steps and model sizes, and its error on runs that it was not fitted to.

    OMP_NUM_THREADS=1 python benchmarks/loss_law.py --work runs/loss_law

Trains two narrower variants of the zoo's tiny PixArt, first distilled from it in floating point, to 2, 3, 4 and 6 bits
in 10 to 160 steps, every run with its own cosine and all with the same peak; and a few runs of the zoo's own model, which are
only predicted. Runs found in `docs/results/loss_law.jsonl` are not made again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fraqat import __version__
from fraqat.analysis import (
    LawRun,
    PilotRun,
    bootstrap_laws,
    fit_loss_law,
    fit_pilot,
    held_out_errors,
    log_errors,
)
from fraqat.analysis.loss_law import percentile_interval
from fraqat.config import Recipe, load_recipe
from fraqat.distill import Batch, Distiller
from fraqat.errors import ConfigError
from fraqat.nn import quantized_layers
from fraqat.workflows import Session, open_session, resolve_schedule

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
RUNS = RESULTS / "loss_law.jsonl"
RECIPE = "pixart-sigma-tiny"
SETTINGS = (
    "schedule.kind=constant",
    "quantization.weight.range_method=learned",
    "train.learning_rate.kind=cosine",
    "train.betas=[0.5,0.999]",
    "train.batch_size=8",
    "train.autocast=none",
    "train.engine.name=reference",
    "data.num_train=1024",
    "data.num_validation=64",
    "train.tensorboard=false",
    "train.validate_every=1000000",
    "train.checkpoint_every=1000000",
    "baselines={}",
)
"""The default preset's method: final width from the first step, learned scales, little momentum, a cosine."""

BITS = (4, 2, 3, 6)
STEPS = (10, 20, 40, 80, 160)
RATE = 4e-4
TOKENS_PER_SAMPLE = 16  # 8 x 8 latents in patches of 2 x 2
HEADS: Mapping[str, int] = {"half": 2, "quarter": 1}
"""Attention heads of 32 channels of the variants; the zoo's own model has four."""
ZOO_RUNS = ((4, 10), (4, 40), (3, 40), (4, 80))
"""(bits, steps) of the zoo's own model, which is in no fit: a size that is only predicted."""
NUM_DRAWS = 100
VARIANT_STEPS, VARIANT_BATCH, VARIANT_RATE = 400, 16, 2e-3


class Sizes:
    """The zoo's model and its narrower variants as teachers, with the data of one recipe.

    Args:
        work: Folder of the variants; what is there is not trained again.
    """

    def __init__(self, work: Path):
        self._work = work
        self._teachers: dict[str, nn.Module] = {}

    @cached_property
    def recipe(self) -> Recipe:
        """Model, data and training settings; width, steps and rate are the runs' own."""
        return load_recipe(RECIPE, (*SETTINGS, "train.steps=100"))

    @cached_property
    def session(self) -> Session[Any]:
        """Models and data of the recipe."""
        return open_session(self.recipe)

    def teacher(self, name: str) -> nn.Module:
        """A frozen teacher of one size."""
        if name not in self._teachers:
            is_original = name == "zoo"
            self._teachers[name] = self.session.teacher if is_original else self._variant(name, HEADS[name])
        return self._teachers[name]

    def _variant(self, name: str, num_heads: int) -> nn.Module:
        width = 32 * num_heads
        changes = {"num_attention_heads": num_heads, "cross_attention_dim": width}
        torch.manual_seed(0)
        model = self.session.build_float(self.session.known.class_name, dict(self.session.known.config) | changes)
        path = self._work / f"{name.replace(' ', '-')}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            loss = self._distil_float(model)
            print(f"{name}: distilled in floating point, last loss {loss:.4f}", flush=True)
            save_file(model.state_dict(), path)
        return model.eval().requires_grad_(False)

    def _distil_float(self, model: nn.Module) -> float:
        """A smaller model of the same kind that knows the same task, so that it can be a teacher of its own size."""
        task, teacher = self.session.task, self.session.teacher
        optimizer = torch.optim.AdamW(model.parameters(), VARIANT_RATE, betas=(0.9, 0.99), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VARIANT_RATE, VARIANT_STEPS, pct_start=0.05)
        batches: Iterator[Batch] = iter(task.train_stream(VARIANT_BATCH, 0))
        generator = torch.Generator().manual_seed(0)
        losses: list[float] = []
        for _ in range(VARIANT_STEPS):
            inputs = task.make_inputs(next(batches), generator)
            with torch.no_grad():
                wanted = task.predict(teacher, inputs)["output"]
            loss = nn.functional.mse_loss(task.predict(model.train(), inputs)["output"], wanted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return sum(losses[-50:]) / 50


def train_once(sizes: Sizes, size: str, bits: float, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """One run of one size, and its record."""
    values = sizes.recipe.to_values()
    values["quantization"]["weight"]["bits"] = bits
    values["train"] |= {"steps": steps, "seed": seed}
    values["train"]["learning_rate"]["peak"] = rate
    recipe = type(sizes.recipe).model_validate(values)
    session, teacher = sizes.session, sizes.teacher(size)
    student = copy.deepcopy(teacher).float().requires_grad_(True)
    session.quantize(student, recipe)
    schedule = resolve_schedule(recipe, session.task.steps_per_epoch(recipe.train.batch_size))
    assert schedule is not None
    with tempfile.TemporaryDirectory() as folder:
        result = Distiller(session.task, teacher, student, schedule, recipe.train, Path(folder)).run()
    num_weights = sum(layer.weight.numel() for _, layer in quantized_layers(student))
    return {
        "benchmark": "loss_law",
        "size": size,
        "num_weights": num_weights,
        "bits": bits,
        "steps": steps,
        "num_tokens": steps * recipe.train.batch_size * TOKENS_PER_SAMPLE,
        "rate": rate,
        "seed": seed,
        "loss": result.validation_loss,
        "train_s": result.train_s,
        "fraqat": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


class Sweep:
    """The runs, remembered in a file of JSON lines.

    Args:
        sizes: Teachers and data.
        path: Where records lie and are appended.
    """

    def __init__(self, sizes: Sizes, path: Path):
        self._sizes, self._path = sizes, path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def run(self, size: str, bits: float, steps: int, rate: float = RATE, seed: int = 1234) -> dict[str, Any]:
        """A run, from the file if it is there."""
        wanted = {"size": size, "bits": bits, "steps": steps, "rate": rate, "seed": seed}
        for record in self.records:
            if all(record[name] == value for name, value in wanted.items()):
                return record
        record = train_once(self._sizes, size, bits, steps, rate, seed)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.records.append(record)
        print(size, bits, steps, f"{rate:g}", f"{record['loss']:.6f}", f"{record['train_s']:.0f} s", flush=True)
        return record

    def all(self) -> None:
        """Every run, the short ones first, so that an interrupted sweep has every width."""
        for steps in STEPS:
            for bits in BITS:
                for size in HEADS:
                    self.run(size, bits, steps)
            if steps == ZOO_RUNS[-1][1]:
                for run in ZOO_RUNS:
                    self.run("zoo", *run)


def report(records: Sequence[dict[str, Any]]) -> str:
    """The page: losses, laws, their errors on held-out runs, and predictions from pilots."""
    fitted = [record for record in records if record["size"] in HEADS]
    only_predicted = [_law_run(record) for record in records if record["size"] not in HEADS]
    runs = [_law_run(record) for record in fitted]
    parts = ["# A loss law of our own runs", str(__doc__).strip().split("\n\n", 1)[1], _losses(records)]
    parts += ["## The law", *(_law_section(runs, only_predicted, size_in_floor) for size_in_floor in (True, False))]
    return "\n\n".join([*parts, "## Predicted from pilots", _pilot_section(fitted)]) + "\n"


def _law_run(record: dict[str, Any]) -> LawRun:
    return LawRun(record["num_weights"], record["bits"], record["num_tokens"], record["loss"])


def _losses(records: Sequence[dict[str, Any]]) -> str:
    steps = sorted({record["steps"] for record in records})
    found = {(r["size"], r["num_weights"], r["bits"], r["steps"]): r["loss"] for r in records}
    lines = ["| model | weights | bits | " + " | ".join(f"{n} steps" for n in steps) + " |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(steps))
    for size, num_weights, bits in sorted({key[:3] for key in found}):
        values = [found.get((size, num_weights, bits, n)) for n in steps]
        cells = " | ".join("-" if value is None else f"{value:.3g}" for value in values)
        lines.append(f"| {size} | {num_weights:,} | {bits:g} | {cells} |")
    return "Held-out distillation loss:\n\n" + "\n".join(lines)


def _law_section(runs: Sequence[LawRun], only_predicted: Sequence[LawRun], size_in_floor: bool) -> str:
    law = fit_loss_law(runs, size_in_floor=size_in_floor)
    lengths = sorted({run.num_tokens for run in runs})
    long = set(lengths[-2:])
    short_law = fit_loss_law([run for run in runs if run.num_tokens not in long], size_in_floor=size_in_floor)
    groups = held_out_errors(runs, lambda run: (run.num_weights, run.bits), size_in_floor=size_in_floor)
    rows = {
        "runs that it was fitted to": log_errors(law, runs),
        "the two longest lengths, fitted to the shorter ones": log_errors(
            short_law, [run for run in runs if run.num_tokens in long]
        ),
        "every width of a size, fitted to all others": [error for group in groups.values() for error in group],
        "the zoo's own size, fitted to the narrower ones": log_errors(law, only_predicted),
    }
    lines = ["| predicted | runs | median error | largest error |", "| --- | --- | --- | --- |"]
    for name, errors in rows.items():
        if errors:
            sizes = sorted(math.expm1(abs(error)) for error in errors)
            lines.append(f"| {name} | {len(sizes)} | {statistics.median(sizes):.1%} | {sizes[-1]:.1%} |")
    draws = bootstrap_laws(runs, law, NUM_DRAWS, size_in_floor=size_in_floor)
    lines += ["", "| parameter | value | 95 % bootstrap interval |", "| --- | --- | --- |"]
    for field in dataclasses.fields(law):
        low, high = percentile_interval([getattr(draw, field.name) for draw in draws])
        lines.append(f"| {field.name} | {getattr(law, field.name):.3g} | {low:.3g} to {high:.3g} |")
    title = "### With the size in both terms (tau free)" if size_in_floor else "### The published form (tau = 0)"
    return "\n".join([title, "", *lines])


def _pilot_section(records: Sequence[dict[str, Any]]) -> str:
    """Three pilots of every size and width, against the longer runs: the shortest three lengths, and those that follow."""
    steps = sorted({record["steps"] for record in records})
    lines = [
        "Three pilots for each size and width; the loss of longer runs is predicted, and the length that it takes. Error: the "
        "larger over the smaller loss, less 1. Pilots that did not fall are refused.",
        "",
        "| pilots, steps | refused | run, steps | runs | error of the loss, median | largest | predicted / true steps, median "
        "| least | most |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pilots in (steps[:3], steps[1:4]):
        lines += _pilot_rows(records, pilots, [n for n in steps if n > pilots[-1]])
    return "\n".join(lines)


def _pilot_rows(records: Sequence[dict[str, Any]], pilots: Sequence[int], longer: Sequence[int]) -> list[str]:
    loss_errors: dict[int, list[float]] = {}
    length_ratios: dict[int, list[float]] = {}
    num_refused = 0
    for key in sorted({(record["size"], record["bits"]) for record in records}):
        found = {r["steps"]: r["loss"] for r in records if (r["size"], r["bits"]) == key}
        try:
            law = fit_pilot([PilotRun(n, found[n]) for n in pilots])
        except ConfigError:
            num_refused += 1
            continue
        for n in longer:
            if n in found:
                loss_errors.setdefault(n, []).append(math.expm1(abs(math.log(law.loss(n) / found[n]))))
                length_ratios.setdefault(n, []).append(law.steps_for(found[n]) / n)
    rows = []
    for n, errors in sorted(loss_errors.items()):
        ratios = length_ratios[n]
        ends = (statistics.median(ratios), min(ratios), max(ratios))
        shown = " | ".join("never" if math.isinf(end) else f"{end:.2f}" for end in ends)
        rows.append(
            f"| {', '.join(map(str, pilots))} | {num_refused} | {n} | {len(errors)} | {statistics.median(errors):.1%} | "
            f"{max(errors):.1%} | {shown} |"
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the narrower variants; none writes the page alone")
    arguments = parser.parse_args()
    sweep = Sweep(Sizes(arguments.work or Path()), RUNS)
    if arguments.work is not None:
        sweep.all()
    RUNS.with_suffix(".md").write_text(report(sweep.records), encoding="utf-8")


if __name__ == "__main__":
    main()
