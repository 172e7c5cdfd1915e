"""What benchmarks/guided_error.py reads off students."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from guided_error import KINDS, PLACES, errors_of, table_of

SCALE = 4.0


def test_errors_are_of_what_the_sampler_combines() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = (torch.randn(8, 3, generator=generator), torch.randn(8, 3, generator=generator))
    shift = torch.tensor([1.0, 2.0, -1.0])
    both = errors_of(teacher, (teacher[0] + shift, teacher[1] + shift), SCALE)
    assert both == pytest.approx((2.0, 2.0, 0.0, 2.0, 2.0), abs=1e-5)
    prompted = errors_of(teacher, (teacher[0] + shift, teacher[1]), SCALE)
    assert prompted == pytest.approx((2.0, 0.0, 2.0, 32.0, 32.0), abs=1e-4)
    sign = torch.tensor([1.0, -1.0] * 4)[:, None]
    alternating = errors_of(teacher, (teacher[0] + sign * shift, teacher[1] + sign * shift), SCALE)
    assert alternating == pytest.approx((2.0, 2.0, 0.0, 2.0, 0.0), abs=1e-5)


def test_ratios_are_geometric_means_over_seeds() -> None:
    def seed(value: float) -> list[list[float]]:
        return [[value] * len(KINDS) for _ in PLACES]

    table = table_of({"vanilla-qat": [seed(1.0), seed(2.0)], "other": [seed(2.0), seed(1.0)]}, "other")
    assert [row[0] for row in table.rows] == list(KINDS)
    assert all(cell == "1.00" for row in table.rows for cell in row[1:-1])
    assert all(row[-1] == "1.000" for row in table.rows)
