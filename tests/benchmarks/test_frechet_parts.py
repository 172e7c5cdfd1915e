"""How benchmarks/frechet_parts.py splits a distance."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from frechet_parts import parts_of, table_of


def test_a_shift_of_all_pictures_is_the_means() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    parts = parts_of(features + torch.tensor([3.0, 0.0, 4.0, 0.0]), features)
    assert parts["distance"] == pytest.approx(25, rel=1e-4)
    assert parts["mean"] == pytest.approx(25, rel=1e-4)
    assert parts["least changed"] == pytest.approx(25, rel=1e-4)


def test_what_a_tenth_of_the_pictures_adds_leaves_with_them() -> None:
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    changed = features.clone()
    changed[:5] += torch.tensor([[10.0], [-10.0], [10.0], [-10.0], [10.0]])
    parts = parts_of(changed, features)
    assert parts["distance"] > 1
    assert parts["least changed"] == pytest.approx(0, abs=1e-6)


def test_shares_are_of_the_mean_distance_over_seeds() -> None:
    seeds = [{"8": {"distance": d, "mean": 1.0, "least changed": 0.5}} for d in (1.0, 3.0)]
    row = table_of({"fraqat": seeds}, [8]).rows[0]
    assert row == ("fraqat", 8, "2.000", "1.000 to 3.000", "0.50", "0.25")
