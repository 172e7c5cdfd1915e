"""FraQAT in a training loop of your own: three functions, no trainer; and two for a file of 4-bit codes.

python examples/own_training_loop.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from fraqat import LayerRule, LearningRateSpec, QuantSpec, ScheduleSpec, WeightSpec, quantize_, set_bits_
from fraqat.export import restore_packed_, save_packed


def make_network() -> nn.Module:
    """The architecture, in float32."""
    return nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 64))


def main() -> None:
    """Distils a small network into 4-bit weights and 8-bit activations, and prints the loss at each width."""
    torch.manual_seed(0)
    teacher = make_network().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    spec = QuantSpec(weight=WeightSpec(bits=4, range_method="mse"))
    print(quantize_(student, spec, rules=[LayerRule(pattern="4", activation_bits=16)]))

    schedule = ScheduleSpec("fractional").resolve(target_bits=4, total_steps=500)
    rate = LearningRateSpec(peak=1e-3, kind="decay_last")
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate.peak, fused=True)
    held_out = torch.randn(512, 64)
    for stage in schedule:
        set_bits_(student, stage.bits)
        for step in range(stage.first_step, stage.end_step):
            optimizer.param_groups[0]["lr"] = rate.at(step, schedule)
            x = torch.randn(64, 64)
            loss = nn.functional.mse_loss(student(x), teacher(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            print(f"{stage.bits:>5g} bits: {nn.functional.mse_loss(student(held_out), teacher(held_out)):.6f}")

    with tempfile.TemporaryDirectory() as folder:
        size = save_packed(student, Path(folder) / "student")
        restored = restore_packed_(make_network(), Path(folder) / "student")
        with torch.no_grad():
            is_same = torch.equal(restored(held_out), student.eval()(held_out))
    print(
        f"{size.num_file_bytes} bytes, {size.bits_per_weight:.2f} bits a weight with scales; read back bit for bit: {is_same}"
    )


if __name__ == "__main__":
    main()
