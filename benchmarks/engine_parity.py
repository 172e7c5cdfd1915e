"""Whether fast engines train as the reference does: the tiny Sana with each, over the same seeds.

    OMP_NUM_THREADS=1 python benchmarks/engine_parity.py

Trains the demo's recipe with fake quantization in floating point (`reference`), with integer products, and with integer
products for the gradients of the inputs too; every arm has the same data, seeds, rate and steps. A fast arm passes where its
mean lies within the reference's spread over seeds. Runs found in the JSON lines are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from fraqat import __version__
from fraqat.config import Recipe, load_recipe, load_values
from fraqat.distill import Distiller, read_log
from fraqat.workflows import Session, open_session, resolve_schedule

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RECIPE = "color-digits"
SEEDS = (1, 2, 3, 4, 5)
ARMS: dict[str, dict[str, Any]] = {
    "reference": {"name": "reference"},
    "integer": {"name": "auto"},
    "integer, input gradient too": {"name": "auto", "input_gradient": "integer"},
}


def train_once(session: Session[Any], recipe: Recipe, arm: str, seed: int) -> dict[str, Any]:
    """One run: held-out losses while it trains and at its end."""
    values = recipe.to_values()
    values["train"] |= {"seed": seed, "tensorboard": False, "checkpoint_every": 10**6, "validate_every": 25}
    values["train"]["engine"] = ARMS[arm]
    values["baselines"] = {}
    own = load_values(values)
    schedule = resolve_schedule(own, session.task.steps_per_epoch(own.train.batch_size))
    assert schedule is not None
    student, _ = session.new_student(own)
    with tempfile.TemporaryDirectory() as folder:
        result = Distiller(session.task, session.teacher, student, schedule, own.train, Path(folder)).run()
        events = read_log(Path(folder))
    return {
        "benchmark": "engine_parity",
        "recipe": recipe.name,
        "arm": arm,
        "seed": seed,
        "steps": result.num_steps,
        "validation_loss": result.validation_loss,
        "curve": [(event["step"], event["loss"]) for event in events if event["event"] == "validation"],
        "step_ms": statistics.median(event["step_ms"] for event in events if event["event"] == "step"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fraqat": __version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def write_table(records: list[dict[str, Any]], path: Path) -> None:
    """Final losses and curves per arm."""
    losses = {arm: [r["validation_loss"] for r in records if r["arm"] == arm] for arm in ARMS}
    reference = losses["reference"]
    times = {arm: statistics.median(r["step_ms"] for r in records if r["arm"] == arm) for arm in ARMS if losses[arm]}
    parts = [
        "# Engines train alike\n",
        f"Made by `benchmarks/engine_parity.py`: recipe `{RECIPE}`, {records[0]['steps']} steps, one seed per run, "
        f"{records[0]['threads']} thread. Held-out distillation loss at 4 bits.\nTime is the median step over the reference's, "
        "eager; the runs were made one after the other, so it is a rough figure.\n",
        "| arm | runs | mean | standard deviation | least | most | mean within the reference's spread | time, ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, own in losses.items():
        if not own:
            continue
        mean = statistics.mean(own)
        is_within = "-" if arm == "reference" else str(min(reference) <= mean <= max(reference)).lower()
        deviation = statistics.stdev(own) if len(own) > 1 else 0.0
        parts.append(
            f"| {arm} | {len(own)} | {mean:.6f} | {deviation:.6f} | {min(own):.6f} | {max(own):.6f} | {is_within} | "
            f"{times[arm] / times['reference']:.2f} |"
        )
    parts.append("\n## Curves: mean over seeds\n")
    steps = [step for step, _ in records[0]["curve"]]
    parts.append("| arm | " + " | ".join(f"step {step}" for step in steps) + " |")
    parts.append("| --- |" + " --- |" * len(steps))
    for arm in ARMS:
        curves = [dict(map(tuple, r["curve"])) for r in records if r["arm"] == arm]
        if curves:
            means = [statistics.mean(curve[step] for curve in curves) for step in steps]
            parts.append(f"| {arm} | " + " | ".join(f"{mean:.5f}" for mean in means) + " |")
    path.write_text("\n".join(parts) + "\n")


def main() -> None:
    """Trains what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "engine_parity.jsonl")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    done = {(record["arm"], record["seed"]) for record in records}
    recipe = load_recipe(RECIPE)
    session = open_session(recipe)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            if (arm, seed) in done:
                continue
            records.append(train_once(session, recipe, arm, seed))
            with arguments.out.open("a") as stream:
                stream.write(json.dumps(records[-1]) + "\n")
            print(arm, seed, records[-1]["validation_loss"], flush=True)
    write_table(records, arguments.out.with_suffix(".md"))
    print(arguments.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
