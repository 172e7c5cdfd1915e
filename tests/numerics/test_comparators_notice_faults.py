"""The comparisons of this suite are themselves tested: each must notice a small fault that was put in on purpose."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fraqat.numerics import BlockLayout, Granularity, Grid, RangeMethod, choose_qparams, fake_quantize, qparams

ROWS = BlockLayout(Granularity.CHANNEL)
GRID = Grid(4)
SAME_DB = 100.0
"""Two results that should be equal differ by float rounding only: 100 dB and more."""


def correct(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=1, keepdim=True) / 7
    return scale * torch.clamp(torch.round(x / scale), -8, 7)


def scale_one_percent_off(x: Tensor) -> Tensor:
    return 1.01 * correct(x)


def step_one_percent_off(x: Tensor) -> Tensor:
    scale = 1.01 * x.abs().amax(dim=1, keepdim=True) / 7
    return scale * torch.clamp(torch.round(x / scale), -8, 7)


def rounding_one_code_off(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=1, keepdim=True) / 7
    codes = torch.round(x / scale)
    codes[0, 0] += 1
    return scale * torch.clamp(codes, -8, 7)


def rounding_down(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=1, keepdim=True) / 7
    return scale * torch.clamp(torch.floor(x / scale), -8, 7)


def clip_one_code_off(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=1, keepdim=True) / 7
    return scale * torch.clamp(torch.round(x / scale), -8, 6)


FAULTS = [scale_one_percent_off, step_one_percent_off, rounding_one_code_off, rounding_down, clip_one_code_off]


@pytest.fixture
def x() -> Tensor:
    values = torch.randn(16, 64)
    values[:, 0] = 0.4 * values.abs().amax(dim=1)
    values[:, 1] = 1.1 * values.abs().amax(dim=1)
    return values


def library(x: Tensor) -> Tensor:
    return fake_quantize(x, choose_qparams(x, GRID, ROWS, RangeMethod.MAX_ABS), GRID, ROWS)


def test_library_agrees_with_the_correct_reference(x: Tensor, sqnr_db: Callable) -> None:
    assert sqnr_db(correct(x), library(x)) > SAME_DB
    torch.testing.assert_close(library(x), correct(x))


@pytest.mark.parametrize("fault", FAULTS)
def test_sqnr_notices_the_fault(x: Tensor, fault: Callable, sqnr_db: Callable) -> None:
    assert sqnr_db(fault(x), library(x)) < SAME_DB / 2


@pytest.mark.parametrize("fault", FAULTS)
def test_largest_difference_notices_the_fault(x: Tensor, fault: Callable) -> None:
    with pytest.raises(AssertionError):
        torch.testing.assert_close(library(x), fault(x))


def test_cosine_alone_would_not_notice_a_wrong_scale(x: Tensor) -> None:
    cosine = torch.cosine_similarity(scale_one_percent_off(x).flatten(), library(x).flatten(), dim=0)
    assert cosine > 0.999999


def test_sqnr_measures_decibels(sqnr_db: Callable) -> None:
    one = torch.ones(10)
    assert sqnr_db(one, 1.1 * one) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(one, 1.01 * one) == pytest.approx(40, abs=1e-3)
    assert sqnr_db(one, one) == math.inf


def off_by_one_round(blocks: Tensor, params: qparams.QParams) -> Tensor:
    return torch.round(blocks / params.scale) + 1


def off_by_one_clamp(codes: Tensor, levels: qparams.Levels) -> Tensor:
    return torch.clamp(codes, levels.qmin, levels.qmax - 1)


def wrong_decode(codes: Tensor, params: qparams.QParams) -> Tensor:
    return 1.01 * codes * params.scale


@pytest.mark.parametrize(
    ("name", "fault"),
    [("round_to_codes", off_by_one_round), ("clamp_codes", off_by_one_clamp), ("decode", wrong_decode)],
)
def test_fault_inside_the_package_is_noticed(
    x: Tensor, sqnr_db: Callable, monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable
) -> None:
    monkeypatch.setattr(f"fraqat.numerics.fake_quant.{name}", fault)
    assert sqnr_db(correct(x), library(x)) < SAME_DB / 2
