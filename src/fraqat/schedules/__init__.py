"""Bit width and learning rate as functions of training progress."""

from fraqat.schedules.bit_widths import (
    AutomaticSpec,
    Schedule,
    ScheduleKind,
    ScheduleSpec,
    Stage,
    StageGrid,
    StageUnit,
    WidthOrder,
)
from fraqat.schedules.learning_rate import CooldownShape, LearningRateKind, LearningRateSpec

__all__ = [
    "AutomaticSpec",
    "CooldownShape",
    "LearningRateKind",
    "LearningRateSpec",
    "Schedule",
    "ScheduleKind",
    "ScheduleSpec",
    "Stage",
    "StageGrid",
    "StageUnit",
    "WidthOrder",
]
