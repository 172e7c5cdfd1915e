"""Which recipes can have smoothing and low-rank branches."""

from __future__ import annotations

from fraqat.distill import TrainSpec
from fraqat.errors import config_error
from fraqat.nn import BranchSpec, SmoothingSpec
from fraqat.schedules import ScheduleKind


def check_branch(
    branch: BranchSpec | None, smoothing: SmoothingSpec | None, kind: ScheduleKind, target: str | None, train: TrainSpec
) -> None:
    """Branch and smoothing are more than a target computes, and a branch is one low-rank product, an adapter another.

    Args:
        branch, smoothing: Of a recipe's quantization.
        kind: Of its schedule.
        target: Its target, if it has one.
        train: Its training.

    Raises:
        ConfigError: The recipe has one of them where it cannot.
    """
    decays = branch is not None and branch.rank_schedule.decays
    for name, section in (("branch", branch), ("smoothing", smoothing)):
        if section is None:
            continue
        if kind is ScheduleKind.SEVERAL:
            raise config_error(
                f"quantization.{name}", "set", allowed="null with schedule.kind: several", fix="remove one of the two"
            )
        if target is not None and not (name == "branch" and decays):
            what = f"remove quantization.{name}"
            if name == "branch":
                what += ", let it leave (rank_schedule: {kind: linear})"
            raise config_error(
                f"quantization.{name}",
                "set",
                allowed=f"null for target {target}, which computes quantized products alone",
                fix=f"{what}, or remove target and run the student with fraqat itself",
            )
        if train.low_rank is not None:
            raise config_error(
                f"quantization.{name}", "set", allowed="null with train.low_rank", fix="remove one of the two"
            )
    if branch is not None and decays:
        _check_decay(branch.rank_schedule.kind, train)


def _check_decay(kind: str, train: TrainSpec) -> None:
    """A branch leaves while weights are trained, and an average of weights would hold what left only in part."""
    if train.steps == 0:
        raise config_error(
            "quantization.branch.rank_schedule.kind",
            kind,
            allowed="constant where nothing is trained (train.steps: 0), so that no step lets the branch leave",
            fix="remove rank_schedule, set train.steps, or set quantization.branch: null in a baseline of 0 steps",
        )
    if train.ema_decay is not None:
        raise config_error(
            "train.ema_decay",
            train.ema_decay,
            allowed=f"null with quantization.branch.rank_schedule.kind: {kind}, which changes weights from outside of training",
            fix="leave ema_decay out, or remove rank_schedule",
        )
