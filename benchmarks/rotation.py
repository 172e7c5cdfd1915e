"""Rotated values of attentions against plain ones, at W4A8, W4A4 and W3A8, on three tiny teachers, untrained and trained.

    OMP_NUM_THREADS=1 python benchmarks/rotation.py

Writes `docs/results/rotation.jsonl`, from which it goes on, and prints the tables of `docs/results/rotation.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from arms import Ablation

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
WIDTHS: Mapping[str, tuple[str, ...]] = {
    "W4A8": (),
    "W4A4": ("quantization.activation.bits=4",),
    "W3A8": ("quantization.weight.bits=3",),
}
ARMS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "hadamard": ("quantization.rotation={kind: hadamard}",),
    "random": ("quantization.rotation={kind: random}",),
}


def ablation(widths: str, num_steps: int) -> Ablation:
    """Untrained (0 steps), or trained as the default preset does."""
    return Ablation(
        name=f"rotation {widths}, {num_steps} steps",
        families=("pixart-sigma", "sd3.5-medium", "flux-schnell"),
        arms=ARMS,
        settings=(
            *WIDTHS[widths],
            "quantization.weight.range_method=learned",
            "schedule.kind=constant",
            "train.learning_rate.kind=cosine",
            "train.betas=[0.5,0.999]",
            f"train.steps={num_steps}",
            "train.batch_size=8",
            "train.autocast=none",
            "train.engine.name=reference",
            "data.num_train=256",
            "data.num_validation=64",
        ),
        rates=(8e-4, 4e-4) if num_steps else (4e-4,),
        seeds=(1, 2) if num_steps else (1,),
        path=RESULTS / "rotation.jsonl",
    )


if __name__ == "__main__":
    for steps in (0, 40):
        for name in WIDTHS:
            made = ablation(name, steps)
            made.run()
            print(f"\n## {made.name}\n\n{made.table()}\n", flush=True)
