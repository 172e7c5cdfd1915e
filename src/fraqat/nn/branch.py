"""A low-rank branch in 16 bits beside a quantized product: y = Q(x) Q(W - U D)^T + x (U D)^T (SVDQuant, arXiv 2411.05007).

The branch takes what is hard to quantize, and the layer's weight is what is left. Unlike an adapter (`fraqat.nn.adapters`) it
stays in the finished model.

Shape suffixes: O output channels, K input channels, R rank.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fraqat.errors import config_error
from fraqat.nn.spec import STRICT_KEYS

BranchStart = Literal["weight", "error"]
BranchDtype = Literal["bfloat16", "float32"]
_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_OVERSAMPLED = 16


@dataclass(frozen=True)
class BranchSpec:
    """The low-rank branch of every quantized layer, and how it starts.

    Args:
        rank: Columns of the thin matrices; a layer that is thinner gets its own width, 0 leaves the branch out.
        start: `weight`: the largest singular values of the weight (SVDQuant). `error`: those of what quantizing the weight
            alone loses, W - Q(W) (DiTAS, arXiv 2409.07756).
        iterations: How often the branch is fitted to what its quantized residual leaves, W - Q(W - U D), counting the first
            time; it ends when the error of the layer's output rises, and the best is kept.
        dtype: What the branch is computed in. Training keeps the thin matrices in the student's dtype and rounds at use.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    rank: int = 32
    start: BranchStart = "weight"
    iterations: int = 1
    dtype: BranchDtype = "bfloat16"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise config_error("branch.rank", self.rank, allowed="0 or more", fix="choose a rank such as 32")
        if self.start not in ("weight", "error"):
            raise config_error("branch.start", self.start, allowed="weight, error", fix="choose one of these")
        if self.iterations < 1:
            raise config_error("branch.iterations", self.iterations, allowed="1 or more", fix="use 1")
        if self.dtype not in _DTYPES:
            raise config_error("branch.dtype", self.dtype, allowed=", ".join(_DTYPES), fix="choose one of these")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return _DTYPES[self.dtype]


class LowRankBranch(nn.Module):
    """x (U D)^T: `up` [O, R] and `down` [R, K], zero until `initialize_branches_` sets them.

    Args:
        spec: Rank, and what it is computed in.
        weight: Of the layer, [O, K] or [O, K, 1, 1].
    """

    def __init__(self, spec: BranchSpec, weight: Tensor):
        super().__init__()
        self.spec = spec
        self.axis = 1 - weight.ndim
        num_outputs, num_inputs = weight.shape[:2]
        rank = min(spec.rank, num_outputs, num_inputs)
        self.up = nn.Parameter(weight.new_zeros(num_outputs, rank))
        self.down = nn.Parameter(weight.new_zeros(rank, num_inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] for x [..., K], or [..., O, H, W] for [..., K, H, W], in the branch's own dtype.

        Gradient: to x and both matrices, as if none were rounded.
        """
        dtype, device = self.spec.torch_dtype, x.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            thin = nn.functional.linear(x.movedim(self.axis, -1).to(dtype), self.down.to(dtype))
            return nn.functional.linear(thin, self.up.to(dtype)).movedim(-1, self.axis)

    def product(self) -> Tensor:
        """U D [O, K] of the matrices as they are rounded at use, in float32."""
        dtype, device = self.spec.torch_dtype, self.up.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            return self.up.to(dtype).float() @ self.down.to(dtype).float()


@torch.no_grad()
def low_rank_factors(weight_OK: Tensor, rank: int, *, exact: bool = True) -> tuple[Tensor, Tensor]:
    """U D nearest to a matrix (Eckart-Young), with the singular values shared evenly, so that both train alike.

    Args:
        weight_OK: float32.
        rank: R, at most the smaller side.
        exact: False lets a matrix that is much larger have a randomized decomposition (Halko and others, arXiv 0909.4061),
            from a seed of its own; for a search, where the decomposition is thrown away.

    Returns:
        U [O, R] and D [R, K], float32.

    Numerics: float64 where exact.
    """
    if not exact and min(weight_OK.shape) >= 2 * (rank + _OVERSAMPLED):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            left_OR, values_R, right_KR = torch.svd_lowrank(weight_OK, rank + _OVERSAMPLED, niter=2)
        right_RK = right_KR.t()
    else:
        left_OR, values_R, right_RK = torch.linalg.svd(weight_OK.double(), full_matrices=False)
    root_R = values_R[:rank].sqrt()
    return (left_OR[:, :rank] * root_R).float(), (root_R.unsqueeze(1) * right_RK[:rank]).float()
