"""What do integer group scales cost against float ones? Signal to quantization noise of weights, in dB.

Each case is a kind of weights, a width, a group size and a range method. Beside the package's own choice of integer scales
stand two others: multipliers rounded up, and a base per channel that is searched among eight for the closest fit of the scales
(`jump`: how far the quantized weights move when the weights move a little, relative to float scales). Prints a table and
appends one JSON line per case.

    python benchmarks/group_scales.py --out docs/results/group_scales.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fraqat import __version__
from fraqat.numerics import (
    BlockLayout,
    Granularity,
    Grid,
    QParams,
    RangeMethod,
    choose_qparams,
    fake_quantize,
    integer_group_scales,
    largest_multiplier,
)
from fraqat.table import Table
from fraqat.zoo import zoo_path

BITS = (3.0, 4.0, 5.0, 6.0)
GROUP_SIZES = (32, 64, 128)
METHODS = (RangeMethod.MAX_ABS, RangeMethod.MSE)
NUM_ROWS, WIDTH = 512, 1024
NUM_BASES = 8
MOVE = 1e-3
"""Size of the small step that `jump` is measured with, relative to the weights' mean magnitude."""


def gaussian() -> list[Tensor]:
    """One matrix of normal weights."""
    return [torch.randn(NUM_ROWS, WIDTH)]


def student_t() -> list[Tensor]:
    """One matrix with the heavy tails of Student's t with 3 degrees of freedom."""
    return [torch.distributions.StudentT(3.0).sample((NUM_ROWS, WIDTH))]


def trained() -> list[Tensor]:
    """The matrices of the embedded Sana, each scaled to unit mean square."""
    path = zoo_path("color-digits-sana") / "transformer" / "diffusion_pytorch_model.safetensors"
    matrices = [w.float().flatten(1) for w in load_file(path).values() if w.ndim > 1 and w[0].numel() == w[0].shape[0]]
    return [matrix / matrix.square().mean().sqrt() for matrix in matrices]


WEIGHTS: Mapping[str, Callable[[], list[Tensor]]] = {"Gaussian": gaussian, "Student t": student_t, "trained": trained}


def rounded(wanted: Tensor, grid: Grid) -> Tensor:
    """The package's choice."""
    return integer_group_scales(wanted, grid).product


def rounded_up(wanted: Tensor, grid: Grid) -> Tensor:
    """Multipliers rounded up: no group is clipped that was not before."""
    largest = largest_multiplier(grid)
    base = wanted.amax(dim=1, keepdim=True) / largest
    return base * torch.minimum(torch.ceil(wanted / base - 1e-5).clamp(min=1), largest)


def searched(wanted: Tensor, grid: Grid) -> Tensor:
    """The base whose multiples are closest to the wanted scales, among a few."""
    largest = largest_multiplier(grid)
    top = wanted.amax(dim=1, keepdim=True) / largest
    best = torch.full_like(top, math.inf)
    chosen = wanted
    for share in torch.linspace(1.0, 0.75, NUM_BASES):
        base = top * share
        scale = base * torch.minimum(torch.round(wanted / base).clamp(min=1), largest)
        error = (scale - wanted).square().sum(dim=1, keepdim=True)
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(best, error)
    return chosen


CHOICES: Mapping[str, Callable[[Tensor, Grid], Tensor]] = {
    "rounded": rounded,
    "rounded up": rounded_up,
    "searched": searched,
}


def sqnr_db(weights: Sequence[Tensor], quantized: Sequence[Tensor]) -> float:
    """Signal to quantization noise over all matrices."""
    signal = sum(w.double().square().sum().item() for w in weights)
    noise = sum((w.double() - q).square().sum().item() for w, q in zip(weights, quantized, strict=True))
    return 10 * math.log10(signal / noise)


def run_case(kind: str, bits: float, group_size: int, method: RangeMethod) -> dict[str, Any]:
    """One case: SQNR with a scale per channel and with float groups, and the loss of every choice of integer groups."""
    torch.manual_seed(0)
    weights = [w for w in WEIGHTS[kind]() if w.shape[1] % group_size == 0]
    moved = [w + MOVE * w.abs().mean() * torch.randn_like(w) for w in weights]
    grid, layout = Grid(bits), BlockLayout(Granularity.GROUP, group_size=group_size)

    def quantize(matrices: list[Tensor], choose: Callable[[Tensor, Grid], Tensor] | None) -> list[Tensor]:
        wanted = [choose_qparams(w, grid, layout, method).scale for w in matrices]
        scales = wanted if choose is None else [choose(scale, grid) for scale in wanted]
        return [fake_quantize(w, QParams(s), grid, layout) for w, s in zip(matrices, scales, strict=True)]

    rows = BlockLayout(Granularity.CHANNEL)
    per_channel = [fake_quantize(w, choose_qparams(w, grid, rows, method), grid, rows) for w in weights]
    floats = quantize(weights, None)
    float_db, float_move = sqnr_db(weights, floats), _distance(floats, quantize(moved, None))
    record: dict[str, Any] = {
        "benchmark": "group_scales",
        "weights": kind,
        "bits": bits,
        "group_size": group_size,
        "method": method.value,
        "num_weights": sum(w.numel() for w in weights),
        "largest_multiplier": int(largest_multiplier(grid)),
        "channel_db": sqnr_db(weights, per_channel),
        "float_db": float_db,
    }
    for name, choose in CHOICES.items():
        integers = quantize(weights, choose)
        key = name.replace(" ", "_")
        record[f"{key}_loss_db"] = float_db - sqnr_db(weights, integers)
        record[f"{key}_jump"] = _distance(integers, quantize(moved, choose)) / float_move
    return record | {
        "fraqat": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "commit": _commit(),
    }


def to_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Losses against float scales per group, and what one scale per channel would cost."""
    rows = tuple(
        (
            record["weights"],
            f"{record['bits']:g}",
            record["group_size"],
            record["method"],
            record["largest_multiplier"],
            round(record["float_db"], 2),
            round(record["float_db"] - record["channel_db"], 2),
            *(round(record[f"{name.replace(' ', '_')}_loss_db"], 3) for name in CHOICES),
            round(record["rounded_jump"], 3),
            round(record["searched_jump"], 3),
        )
        for record in records
    )
    columns = (
        "weights",
        "bits",
        "group",
        "range",
        "M",
        "float groups, dB",
        "channel, loss",
        *(f"{name}, loss" for name in CHOICES),
        "rounded, jump",
        "searched, jump",
    )
    return Table("Integer group scales", columns, rows)


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return math.sqrt(sum((a - b).double().square().sum().item() for a, b in zip(first, second, strict=True)))


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines, one per case")
    parser.add_argument("--bits", type=float, action="append", help=f"default: {', '.join(f'{b:g}' for b in BITS)}")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    for kind, bits, size, method in itertools.product(WEIGHTS, arguments.bits or BITS, GROUP_SIZES, METHODS):
        records.append(run_case(kind, bits, size, method))
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(records[-1]) + "\n")
    print(to_table(records))


if __name__ == "__main__":
    main()
