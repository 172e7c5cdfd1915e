"""Distillation of a quantized student from its full-precision teacher, for any model family."""

from fraqat.distill.checkpoint import CheckpointStore, describe_difference
from fraqat.distill.checkpointing import checkpoint_blocks_, keep_products, repeated_blocks
from fraqat.distill.code_flips import CODES_EVENT, CodeFlips, FlipCount
from fraqat.distill.guidance import guidance_phrase, training_task
from fraqat.distill.importance import TimestepImportance, TimestepImportanceSpec, importance_phrase
from fraqat.distill.log import LOG_FILE, StepRecord, read_log
from fraqat.distill.losses import LANGUAGE_LOSSES, OUTPUT_LOSSES, LossSpec, distillation_loss
from fraqat.distill.optimizers import DeviceOptimizer, HostOptimizer, TrainOptimizer, make_optimizer
from fraqat.distill.precision import Autocast, autocast, autocast_dtype
from fraqat.distill.spec import ParallelSpec, TeacherSpec, TrainSpec
from fraqat.distill.step_times import DistillResult
from fraqat.distill.task import Batch, BatchStream, DistillTask, Prediction
from fraqat.distill.teacher import StoredWeight, TeacherMemory, hold_teacher_, share_frozen_, store_weights_
from fraqat.distill.teacher_outputs import OUTPUTS_FOLDER, check_recordable
from fraqat.distill.trainer import Distiller
from fraqat.distill.validation import validation_loss
from fraqat.distill.variance_adapted import VarianceAdaptedAdamW
from fraqat.distill.watch_spec import NonFiniteSpec, ProfileSpec, WandbSpec
from fraqat.distill.workers import ALONE, Workers, current_workers, is_first_process, joined

__all__ = [
    "ALONE",
    "CODES_EVENT",
    "LANGUAGE_LOSSES",
    "LOG_FILE",
    "OUTPUTS_FOLDER",
    "OUTPUT_LOSSES",
    "Autocast",
    "Batch",
    "BatchStream",
    "CheckpointStore",
    "CodeFlips",
    "DeviceOptimizer",
    "DistillResult",
    "DistillTask",
    "Distiller",
    "FlipCount",
    "HostOptimizer",
    "LossSpec",
    "NonFiniteSpec",
    "ParallelSpec",
    "Prediction",
    "ProfileSpec",
    "StepRecord",
    "StoredWeight",
    "TeacherMemory",
    "TeacherSpec",
    "TimestepImportance",
    "TimestepImportanceSpec",
    "TrainOptimizer",
    "TrainSpec",
    "VarianceAdaptedAdamW",
    "WandbSpec",
    "Workers",
    "autocast",
    "autocast_dtype",
    "check_recordable",
    "checkpoint_blocks_",
    "current_workers",
    "describe_difference",
    "distillation_loss",
    "guidance_phrase",
    "hold_teacher_",
    "importance_phrase",
    "is_first_process",
    "joined",
    "keep_products",
    "make_optimizer",
    "read_log",
    "repeated_blocks",
    "share_frozen_",
    "store_weights_",
    "training_task",
    "validation_loss",
]
