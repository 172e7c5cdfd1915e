"""A learning rate that falls with the width, against a cosine over the run, on three tiny teachers.

    OMP_NUM_THREADS=1 python benchmarks/cooldown.py

Writes `docs/results/cooldown.jsonl`, from which it goes on, and prints the table of `docs/results/cooldown.md`.
"""

from __future__ import annotations

from pathlib import Path

from arms import Ablation

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
_FRACTIONAL = "schedule.kind=fractional"
ABLATION = Ablation(
    name="cooldown",
    families=("pixart-sigma", "sd3.5-medium", "flux-schnell"),
    arms={
        "final width, cosine": ("schedule.kind=constant", "train.learning_rate.kind=cosine"),
        "Table 4, cosine": (_FRACTIONAL, "train.learning_rate.kind=cosine"),
        "Table 4, cooldown": (_FRACTIONAL, "train.learning_rate.kind=cooldown"),
    },
    settings=(
        "quantization.weight.range_method=learned",
        "train.betas=[0.5,0.999]",
        "train.steps=40",
        "train.batch_size=8",
        "train.autocast=none",
        "train.engine.name=reference",
        "data.num_train=256",
        "data.num_validation=64",
    ),
    rates=(8e-4, 4e-4, 2e-4),
    seeds=(1, 2),
    path=RESULTS / "cooldown.jsonl",
)

if __name__ == "__main__":
    ABLATION.run()
    print(ABLATION.table())
