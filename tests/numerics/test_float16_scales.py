"""Scales that are rounded to float16 stay float16 numbers, whatever the weights."""

import torch

from fraqat.numerics.qparams import MIN_FLOAT16_SCALE, finish_scale


def test_float16_scales_are_float16_numbers_above_zero() -> None:
    scale = torch.tensor([0.0, 1e-30, 3e-8, 1e-5, 0.1, 1.0, 1e9])
    found = finish_scale(scale, torch.float16)
    assert torch.equal(found.to(torch.float16).float(), found)
    assert float(found.min()) == MIN_FLOAT16_SCALE
    assert float(found.max()) == torch.finfo(torch.float16).max


def test_other_scales_are_as_before() -> None:
    scale = torch.tensor([1e-30, 1e-5, 1.0, 1e9])
    assert torch.equal(finish_scale(scale, None), scale)
    assert torch.equal(finish_scale(scale, torch.bfloat16), scale.bfloat16().float())
