"""Distillation of a quantized student from its full-precision teacher, for any model family."""

from fraqat.distill.checkpoint import CheckpointStore, describe_difference
from fraqat.distill.log import LOG_FILE, StepRecord, read_log
from fraqat.distill.losses import LANGUAGE_LOSSES, OUTPUT_LOSSES, LossSpec, distillation_loss
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, BatchStream, DistillTask, Prediction
from fraqat.distill.trainer import Distiller, DistillResult
from fraqat.distill.validation import validation_loss

__all__ = [
    "LANGUAGE_LOSSES",
    "LOG_FILE",
    "OUTPUT_LOSSES",
    "Batch",
    "BatchStream",
    "CheckpointStore",
    "DistillResult",
    "DistillTask",
    "Distiller",
    "LossSpec",
    "Prediction",
    "StepRecord",
    "TrainSpec",
    "describe_difference",
    "distillation_loss",
    "read_log",
    "validation_loss",
]
