"""How the range of static inputs is chosen, and what it costs: the tiny Sana on the phone's grid with each rule.

    OMP_NUM_THREADS=1 python benchmarks/static_ranges.py

Every rule sees the same 100 calibration samples; then the model is measured as it is (0 steps), and after the demo's training
by vanilla QAT and by FraQAT, all with the same data, seed and rate. Dynamic inputs per token stand beside them. Runs found in
the JSON lines are not made again. Writes `docs/results/static_ranges.jsonl` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fraqat import __version__
from fraqat.config import load_recipe
from fraqat.workflows import RunFolder, SilentProgress, open_session, train

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RECIPE, TARGET = "color-digits", "onnx-qdq"
_RULE = "quantization.activation.range_method="
RULES: Mapping[str, tuple[str, ...]] = {
    "dynamic per token": (),
    "three_sigma": (f"target={TARGET}", f"{_RULE}three_sigma"),
    "min_max": (f"target={TARGET}", f"{_RULE}min_max"),
    "percentile 99.9": (f"target={TARGET}", f"{_RULE}percentile", "quantization.activation.percentile=99.9"),
    "percentile 99.99": (f"target={TARGET}", f"{_RULE}percentile"),
    "mse": (f"target={TARGET}", f"{_RULE}mse"),
}
METHODS: Mapping[str, tuple[str, ...]] = {
    "0 steps": ("train.steps=0", "schedule.kind=constant"),
    "vanilla QAT": ("schedule.kind=constant", "train.learning_rate.kind=cosine"),
    "FraQAT": (),
}


def measure(rule: str, method: str) -> dict[str, Any]:
    """One run in a folder of its own."""
    recipe = load_recipe(RECIPE, (*RULES[rule], *METHODS[method], "baselines={}", "train.tensorboard=false"))
    with tempfile.TemporaryDirectory() as folder:
        run: RunFolder = train(recipe, Path(folder) / "run", SilentProgress(), session=open_session(recipe))
        result = run.read_json(run.result_path)
    return {
        "rule": rule,
        "method": method,
        "validation_loss": result["validation_loss"],
        "num_steps": result["num_steps"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fraqat": __version__,
    }


def write_table(records: list[dict[str, Any]], path: Path) -> None:
    """Held-out losses, a row for every rule."""
    found = {(record["rule"], record["method"]): record["validation_loss"] for record in records}
    lines = [
        "# Ranges of static inputs",
        "",
        f"Made by `benchmarks/static_ranges.py`: recipe `{RECIPE}`, `target: {TARGET}`, held-out distillation loss at 4 bits,",
        "one seed, one rate for all. Dynamic inputs are symmetric per token, static ones uint8 per tensor with a zero point.",
        "",
        "| rule | " + " | ".join(METHODS) + " |",
        "| --- |" + " --- |" * len(METHODS),
    ]
    for rule in RULES:
        values = [found.get((rule, method)) for method in METHODS]
        if any(value is not None for value in values):
            cells = ("-" if value is None else f"{value:.5f}" for value in values)
            lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Makes the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "static_ranges.jsonl")
    arguments = parser.parse_args()
    lines = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    done = {(record["rule"], record["method"]) for record in records}
    for method in arguments.methods:
        for rule in arguments.rules:
            if (rule, method) in done:
                continue
            records.append(measure(rule, method))
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(records[-1]) + "\n")
            print(f"{method:12} {rule:18} {records[-1]['validation_loss']:.5f}", flush=True)
            write_table(records, arguments.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
