"""Blocks of a large matrix on a CPU, so that nothing between input and result is as large as the matrix itself.

glibc maps a buffer above 32 MiB anew at every allocation, page by page, which can take longer than the work done in it; and
what fits in a cache is not fetched from memory at the next step.

Shape suffixes: M tokens, O output channels.
"""

from __future__ import annotations

import torch
from torch._guards import detect_fake_mode

_CACHED_BYTES = 2**20
"""Of a float32 temporary per thread: with the tensors beside it, about what a core's own cache holds."""
_MAX_CACHED_BYTES = 2**23
_WHOLE_SUMS_BYTES = 24 * 2**20
"""Up to here one call makes all sums: see `sum_blocks`."""
_SUMS_BYTES = 12 * 2**20
_FEWEST_OUTPUTS = 512


def row_blocks(num_rows: int, row_bytes: int, device: torch.device) -> list[slice]:
    """Cuts rows for work that is done element by element or row by row.

    Args:
        num_rows: How many there are.
        row_bytes: What one row takes in the largest temporary.
        device: All rows are one block where it is not a CPU, in a graph, since a compiler fuses these steps itself, and while
            a plan is made of tensors without values, which stand for those of any device.

    Returns:
        Slices that cover all rows in order, at least one; of equal length but for the last.
    """
    whole = [slice(0, num_rows)]
    if device.type != "cpu" or torch.compiler.is_compiling():
        return whole
    blocks = even_blocks(num_rows, row_bytes, min(_CACHED_BYTES * torch.get_num_threads(), _MAX_CACHED_BYTES))
    return blocks if len(blocks) == 1 or detect_fake_mode() is None else whole


def sum_blocks(num_tokens: int, num_outputs: int, device: torch.device) -> list[tuple[slice, slice]]:
    """Cuts the int32 sums [M, O] of a product along the output channels, and along the tokens only where these are very many.

    A call of `torch._int_mm` costs something apart from its tokens, as if it packed its right operand each time. Blocks of
    output channels share that out between them; 1366 tokens at a time took 1.43 of the CPU time of 4096 at once.

    Returns:
        Tokens and output channels of each block, at least one block.
    """
    if device.type != "cpu" or 4 * num_tokens * num_outputs <= _WHOLE_SUMS_BYTES:
        return [(slice(0, num_tokens), slice(0, num_outputs))]
    return [
        (tokens, outputs)
        for tokens in even_blocks(num_tokens, 4 * min(num_outputs, _FEWEST_OUTPUTS), _SUMS_BYTES)
        for outputs in even_blocks(num_outputs, 4 * (tokens.stop - tokens.start), _SUMS_BYTES, multiple=64)
    ]


def token_blocks(num_tokens: int, row_bytes: int, device: torch.device) -> list[slice]:
    """Cuts the tokens of a product whose operands or sums take `row_bytes` a token, whichever is more; at least one slice."""
    if device.type != "cpu" or num_tokens * row_bytes <= _WHOLE_SUMS_BYTES:
        return [slice(0, num_tokens)]
    return even_blocks(num_tokens, row_bytes, _SUMS_BYTES)


def even_blocks(num_rows: int, row_bytes: int, limit_bytes: int, *, multiple: int = 1) -> list[slice]:
    """Cuts rows into as few blocks of at most `limit_bytes` as can be, of equal length but for the last.

    Args:
        num_rows: How many there are.
        row_bytes: Of one.
        limit_bytes: Of a block; one of `multiple` rows may be larger.
        multiple: What the length of every block but the last is a multiple of.

    Returns:
        Slices that cover all rows in order, at least one.
    """
    longest = max(limit_bytes // max(row_bytes, 1) // multiple, 1) * multiple
    num_blocks = max(-(-num_rows // longest), 1)
    length = max(-(-num_rows // num_blocks // multiple) * multiple, 1)
    starts = range(0, num_rows, length) if num_rows else (0,)
    return [slice(start, min(start + length, num_rows)) for start in starts]
