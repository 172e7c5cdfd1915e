"""What every engine computes: the scaled integer product of activation codes and weight codes.

Shape suffixes: M tokens, K input channels, O output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fraqat.kernels.blocks import row_blocks


@dataclass(frozen=True)
class Operands:
    """The arguments of one product: y = ((sum_K x * w) - zero_point * row_sums) * weight_scale * token_scale + bias.

    The sum and the zero point's share are exact integers; then, in float32 and in this order, one conversion, two products
    and one sum, each rounded once; the result is rounded once more to `out_dtype`. Engines therefore agree bit for bit,
    but for those that contract a product and a sum into one rounding (CUDA).

    Args:
        codes_MK: int8, or uint8 where there is a zero point. Contiguous.
        weight_scale_O: float32.
        token_scale: float32, [M], or [1] where all tokens share it.
        zero_point: int32, 0-dim: the code of the value zero; None is 0.
        row_sums_O: int32, the sum of each row of the weight's codes; given with a zero point.
        bias_O: float32, or None.
        out_dtype: float32 or bfloat16.
    """

    codes_MK: Tensor
    weight_scale_O: Tensor
    token_scale: Tensor
    zero_point: Tensor | None
    row_sums_O: Tensor | None
    bias_O: Tensor | None
    out_dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.codes_MK.shape[0]

    def part(self, tokens: slice, outputs: slice | None = None) -> Operands:
        """Views of the operands of some tokens and output channels."""

        def cut(value: Tensor | None) -> Tensor | None:
            return value if value is None or outputs is None else value[outputs]

        return dataclasses.replace(
            self,
            codes_MK=self.codes_MK[tokens],
            weight_scale_O=self.weight_scale_O if outputs is None else self.weight_scale_O[outputs],
            token_scale=self.token_scale if self.token_scale.numel() == 1 else self.token_scale[tokens],
            row_sums_O=cut(self.row_sums_O),
            bias_O=cut(self.bias_O),
        )


class Engine(Protocol):
    """A way to compute the product."""

    @property
    def name(self) -> str:
        """What logs, records and recipes call it."""
        ...

    @property
    def is_layout_cheap(self) -> bool:
        """Whether training had better bring the codes into the layout for every product than keep a larger copy of them."""
        ...

    def why_unavailable(self, device: torch.device) -> str:
        """Why this engine cannot run on `device`; empty if it can."""
        ...

    def prepare(self, codes_OK: Tensor) -> Any:
        """The weight's codes as this engine wants them.

        Args:
            codes_OK: int8, contiguous.
        """
        ...

    def product(self, operands: Operands, prepared: Any) -> Tensor:
        """Computes y [M, O] in `operands.out_dtype` with what `prepare` made of the weight."""
        ...


def scale_product(product_MO: Tensor, operands: Operands) -> Tensor:
    """Everything after the sum, for engines whose product is not scaled yet.

    Args:
        product_MO: The exact sums: integers, or floats that hold them.
        operands: Scales, zero point and bias.

    Returns:
        y, [M, O].
    """
    if operands.zero_point is not None:
        assert operands.row_sums_O is not None
        product_MO = product_MO - operands.zero_point * operands.row_sums_O
    y = product_MO.float() * operands.weight_scale_O
    return finish_product(y, operands)


def product_in_blocks(
    operands: Operands,
    num_outputs: int,
    blocks: list[tuple[slice, slice]],
    sums_of: Callable[[Operands, slice], Tensor],
) -> Tensor:
    """The scaled product, made block by block; the same bits as `scale_product` of all sums at once.

    Args:
        operands: Of all tokens and output channels.
        num_outputs: O.
        blocks: Tokens and output channels of each block; together all of [M, O].
        sums_of: The exact sums of a block, from its own operands and its output channels; they may be changed in place.

    Returns:
        y, [M, O].
    """
    device = operands.codes_MK.device
    if len(blocks) == 1 and len(row_blocks(operands.num_tokens, 4 * num_outputs, device)) == 1:
        return scale_product(sums_of(operands, slice(0, num_outputs)), operands)
    y_MO = torch.empty(operands.num_tokens, num_outputs, dtype=operands.out_dtype, device=device)
    for tokens, outputs in blocks:
        part, y = operands.part(tokens, outputs), y_MO[tokens, outputs]
        sums = sums_of(part, outputs)
        for rows in row_blocks(part.num_tokens, 4 * y.shape[1], device):
            y[rows] = scale_product(sums[rows], part.part(rows))
    return y_MO


def finish_product(product_MO: Tensor, operands: Operands) -> Tensor:
    """Token scale, bias and rounding, for engines that have applied the weight's scale.

    Args:
        product_MO: float32, sums times the weight's scale; changed in place.
        operands: Token scales and bias.

    Returns:
        y, [M, O].
    """
    y = product_MO.mul_(operands.token_scale.unsqueeze(-1))
    if operands.bias_O is not None:
        y = y.add_(operands.bias_O)
    return y.to(operands.out_dtype)
