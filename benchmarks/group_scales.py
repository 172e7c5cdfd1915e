"""What do integer group scales cost against float ones? Signal to quantization noise of weights, in dB.

Each case is a kind of weights, a width, a group size and a range method. Beside the package's own choice of the multipliers
stand others: rounded to the nearest, rounded up, and searched: every multiplier with each of six scales of the channel. Prints
a table and appends one JSON line per case.

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

BITS = (3.0, 4.0, 5.0, 6.0, 7.0)
GROUP_SIZES = (32, 128)
METHODS = (RangeMethod.MAX_ABS, RangeMethod.MSE)
NUM_ROWS, WIDTH = 256, 1024
CHANNEL_SHARES = (1.0, 0.92, 0.85, 0.78, 0.7, 0.6)
"""Scales of the channel that `searched` tries, as shares of the package's."""


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


def chosen(weight: Tensor, wanted: Tensor, grid: Grid, layout: BlockLayout) -> Tensor:
    """The package's choice."""
    return integer_group_scales(weight, wanted, grid, layout).product


def nearest(weight: Tensor, wanted: Tensor, grid: Grid, layout: BlockLayout) -> Tensor:
    """Multipliers rounded to the nearest."""
    channel, largest = _channel(wanted, grid)
    return channel * torch.minimum(torch.round(wanted / channel).clamp(min=1), largest)


def rounded_up(weight: Tensor, wanted: Tensor, grid: Grid, layout: BlockLayout) -> Tensor:
    """Multipliers rounded up: no group is clipped that was not before."""
    channel, largest = _channel(wanted, grid)
    return channel * torch.minimum(torch.ceil(wanted / channel - 1e-5).clamp(min=1), largest)


def searched(weight: Tensor, wanted: Tensor, grid: Grid, layout: BlockLayout) -> Tensor:
    """The least squared error of every multiplier with a few scales of the channel."""
    top, largest = _channel(wanted, grid)
    best = torch.full_like(top, math.inf)
    scale = wanted
    for share in CHANNEL_SHARES:
        group_best = torch.full_like(wanted, math.inf)
        group_scale = wanted
        for multiplier in range(1, int(largest) + 1):
            tried = (top * share * multiplier).expand_as(wanted)
            error = _errors(weight, fake_quantize(weight, QParams(tried), grid, layout), layout)
            group_scale = torch.where(error < group_best, tried, group_scale)
            group_best = torch.minimum(group_best, error)
        error = group_best.sum(dim=1, keepdim=True)
        scale = torch.where(error < best, group_scale, scale)
        best = torch.minimum(best, error)
    return scale


def _channel(wanted: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    largest = largest_multiplier(grid)
    return wanted.amax(dim=1, keepdim=True) / largest, largest


def _errors(weight: Tensor, quantized: Tensor, layout: BlockLayout) -> Tensor:
    return layout.split((weight - quantized).square()).sum(dim=-1, keepdim=True)


Choice = Callable[[Tensor, Tensor, Grid, BlockLayout], Tensor]
CHOICES: Mapping[str, Choice] = {
    "chosen": chosen,
    "nearest": nearest,
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
    grid, layout = Grid(bits), BlockLayout(Granularity.GROUP, group_size=group_size)
    rows = BlockLayout(Granularity.CHANNEL)
    wanted = [choose_qparams(w, grid, layout, method).scale for w in weights]
    per_channel = [fake_quantize(w, choose_qparams(w, grid, rows, method), grid, rows) for w in weights]

    def groups_db(scales: list[Tensor]) -> float:
        quantized = [fake_quantize(w, QParams(s), grid, layout) for w, s in zip(weights, scales, strict=True)]
        return sqnr_db(weights, quantized)

    record: dict[str, Any] = {
        "benchmark": "group_scales",
        "weights": kind,
        "bits": bits,
        "group_size": group_size,
        "method": method.value,
        "num_weights": sum(w.numel() for w in weights),
        "largest_multiplier": int(largest_multiplier(grid)),
        "float_db": groups_db(wanted),
        "channel_db": sqnr_db(weights, per_channel),
    }
    for name, choose in CHOICES.items():
        scales = [choose(w, s, grid, layout) for w, s in zip(weights, wanted, strict=True)]
        record[f"{name.replace(' ', '_')}_loss_db"] = record["float_db"] - groups_db(scales)
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
            *(round(record[f"{name.replace(' ', '_')}_loss_db"], 2) for name in CHOICES),
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
    )
    return Table("Integer group scales", columns, rows)


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
