"""A low-rank branch in 16 bits beside a quantized product: y = Q(x) Q(W - U D)^T + x (U D)^T (SVDQuant, arXiv 2411.05007).

The branch takes what is hard to quantize, and the layer's weight is what is left. Unlike an adapter (`fraqat.nn.adapters`) it
stays in the finished model.

Shape suffixes: O output channels, K input channels, R rank.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fraqat.errors import config_error
from fraqat.nn.shards import whole
from fraqat.nn.spec import STRICT_KEYS

RankKind = Literal["constant", "linear", "cosine"]
BranchStart = Literal["weight", "error"]
BranchDtype = Literal["bfloat16", "float32"]
_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_OVERSAMPLED = 16


@dataclass(frozen=True)
class RankSchedule:
    """How many components of a branch are left while it is trained.

    Args:
        kind: `constant`: all, for good. `linear`, `cosine`: fewer and fewer, and none at the end; weights take in what leaves.
        until: Share of the steps after which none is left; the last step trains without a branch in any case.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    kind: RankKind = "constant"
    until: float = 0.6

    def __post_init__(self) -> None:
        name = "branch.rank_schedule"
        if self.kind not in get_args(RankKind):
            names = ", ".join(get_args(RankKind))
            raise config_error(f"{name}.kind", self.kind, allowed=names, fix="choose one of these")
        if not 0 < self.until <= 1:
            raise config_error(
                f"{name}.until", self.until, allowed="more than 0, at most 1, a share of the steps", fix="use 0.6"
            )

    @property
    def decays(self) -> bool:
        """Whether the branch is gone at the end."""
        return self.kind != "constant"

    def rank_at(self, rank: int, step: int, total_steps: int) -> int:
        """Components that are left of `rank` in a step, which counts from 0; rounded up."""
        if not self.decays:
            return rank
        progress = step / (self.until * total_steps)
        if progress >= 1 or step >= total_steps - 1:
            return 0
        share = 1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return min(rank, math.ceil(rank * share))


@dataclass(frozen=True)
class BranchSpec:
    """The low-rank branch of every quantized layer, how it starts, and whether it stays.

    Args:
        rank: Columns of the thin matrices; a layer that is thinner gets its own width, 0 leaves the branch out.
        start: `weight`: the largest singular values of the weight (SVDQuant). `error`: those of what quantizing the weight
            alone loses, W - Q(W) (DiTAS, arXiv 2409.07756).
        iterations: How often the branch is fitted to what its quantized residual leaves, W - Q(W - U D), counting the first
            time; it ends when the error of the layer's output rises, and the best is kept.
        dtype: What the branch is computed in. Training keeps the thin matrices in the student's dtype and rounds at use.
        rank_schedule: How many components are left while it is trained; see docs/method.md.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    rank: int = 32
    start: BranchStart = "weight"
    iterations: int = 1
    dtype: BranchDtype = "bfloat16"
    rank_schedule: RankSchedule = field(default_factory=RankSchedule)

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise config_error("branch.rank", self.rank, allowed="0 or more", fix="choose a rank such as 32")
        if self.rank == 0 and self.rank_schedule.decays:
            raise config_error(
                "branch.rank_schedule.kind",
                self.rank_schedule.kind,
                allowed="constant with branch.rank: 0, which leaves the branch out",
                fix="choose a rank such as 16, or remove rank_schedule",
            )
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

    Buffer, only where the rank decays: `active` [R], saved, false for a component that has left; nothing reads it any more.

    Attributes:
        is_spent: Whether all components have left; kept beside `active`, which a graph should not read.

    Args:
        spec: Rank, and what it is computed in.
        weight: Of the layer, [O, K] or [O, K, 1, 1].
    """

    active: Tensor | None

    def __init__(self, spec: BranchSpec, weight: Tensor):
        super().__init__()
        self.spec = spec
        self.axis = 1 - weight.ndim
        num_outputs, num_inputs = weight.shape[:2]
        rank = min(spec.rank, num_outputs, num_inputs)
        self.up = nn.Parameter(weight.new_zeros(num_outputs, rank))
        self.down = nn.Parameter(weight.new_zeros(rank, num_inputs))
        is_there = torch.ones(rank, dtype=torch.bool, device=weight.device)
        self.register_buffer("active", is_there if spec.rank_schedule.decays else None)
        self.is_spent = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] for x [..., K], or [..., O, H, W] for [..., K, H, W], in the branch's own dtype.

        Gradient: to x and both matrices, as if none were rounded.
        """
        dtype, device = self.spec.torch_dtype, x.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            thin = nn.functional.linear(x.movedim(self.axis, -1).to(dtype), self.down.to(dtype))
            return nn.functional.linear(thin, self._used(self.up.to(dtype))).movedim(-1, self.axis)

    def product(self) -> Tensor:
        """U D [O, K] of the matrices as they are rounded at use, in float32."""
        dtype, device = self.spec.torch_dtype, self.up.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            return self._used(self.up.to(dtype)).float() @ self.down.to(dtype).float()

    @property
    def num_active(self) -> int:
        """Components that have not left."""
        return self.up.shape[1] if self.active is None else int(self.active.sum())

    @torch.no_grad()
    def take_out_(self, num_left: int) -> Tensor:
        """Lets the components of least singular value leave, and gives their sum [O, K], float32, as they were rounded at use.

        The one singular value of a component is the product of the norms of its column of U and its row of D. Those of the
        first step are the matrix' own; training may turn components towards each other, and they are not made orthogonal anew,
        so that the optimizer's state stays theirs. Where processes hold rows each, all must call together.

        Args:
            num_left: Components that stay, fewer than there are.
        """
        assert self.active is not None
        dtype = self.spec.torch_dtype
        up_OR, down_RK = (whole(matrix).detach().to(dtype).float() for matrix in (self.up, self.down))
        values_R = up_OR.double().norm(dim=0) * down_RK.double().norm(dim=1)
        rising = values_R.masked_fill(~self.active, math.inf).argsort(stable=True)
        leaving = rising[: self.num_active - num_left]
        self.active[leaving] = False
        self.renew_()
        with torch.autocast(self.up.device.type, enabled=False):
            return up_OR[:, leaving] @ down_RK[leaving]

    def renew_(self) -> None:
        """Call it when `active` was loaded."""
        self.is_spent = self.num_active == 0

    def _used(self, up_OR: Tensor) -> Tensor:
        return up_OR if self.active is None else up_OR * self.active.to(up_OR.dtype)


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
