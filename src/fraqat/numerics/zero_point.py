"""Integer zero points of inputs that are measured at run time, in the float32 arithmetic of the runtimes that compute them."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from fraqat.numerics.qparams import Levels, QParams, clamp_codes, finish_scale


class ZeroPoint(StrEnum):
    """What the smallest value of an asymmetric dynamic input becomes.

    `float`: a real offset, the paper's Eq. 2. `integer`: an integer zero point as PyTorch (torchao) computes it.
    `xnnpack`: an integer zero point as XNNPACK computes it. The two integer forms differ in the last bit of the scale, and in a
    code where a value lies halfway between two.
    """

    FLOAT = "float"
    INTEGER = "integer"
    XNNPACK = "xnnpack"


def zero_point_qparams(low: Tensor, high: Tensor, levels: Levels, form: ZeroPoint) -> QParams:
    """Scale and integer zero point of a range.

    With l = min(low, 0), h = max(high, 0), n = qmax - qmin:

    | | `integer` | `xnnpack` |
    | --- | --- | --- |
    | scale s | (h - l) / n | 1 / m |
    | values are multiplied by m | 1 / s | n / (h - l), or 1 where h = l |
    | zero point | qmin - round(l / s) | round of qmin - l m or qmax - h m, whichever the smaller error gives |

    Args:
        low, high: Range per block, float32, of the scale's shape.
        levels: An asymmetric grid, codes [0, n].
        form: `integer` or `xnnpack`.

    Returns:
        Scale, zero point among the codes, and multiplier. Zero is exact.

    Numerics: bit for bit torchao's `choose_qparams_affine` and XNNPACK's `xnn_f32_qd8_asymmetric_quantization_params`, whose
        codes are these less 2^(b-1). Ties round to even.
    """
    assert form is not ZeroPoint.FLOAT and not levels.symmetric
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if form is ZeroPoint.INTEGER:
        scale = finish_scale((high - low) / (levels.qmax - levels.qmin), None)
        zero_point = clamp_codes(levels.qmin - torch.round(low / scale), levels)
        return QParams(scale, zero_point, multiplier=1.0 / scale)
    # XNNPACK's codes are signed: the sums below round as they do there.
    shift = (levels.qmax + 1) / 2
    qmin, qmax = levels.qmin - shift, levels.qmax - shift
    steps = torch.ones_like(low) * (qmax - qmin)  # number / tensor would be rounded twice, as number * (1 / tensor)
    multiplier = torch.where(high == low, torch.ones_like(low), steps / (high - low))
    scaled_low, scaled_high = low * multiplier, high * multiplier
    takes_low = (qmin + scaled_low) + (qmax + scaled_high) > 0
    zero_point = torch.where(takes_low, qmin - scaled_low, qmax - scaled_high)
    zero_point = torch.round(torch.clamp(zero_point, qmin, qmax)) + shift  # pyright: ignore[reportCallIssue, reportArgumentType]
    return QParams(1.0 / multiplier, zero_point, multiplier=multiplier)
