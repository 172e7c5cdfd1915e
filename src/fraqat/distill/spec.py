"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from fraqat.distill.importance import TimestepImportanceSpec
from fraqat.distill.losses import LossSpec
from fraqat.distill.precision import Autocast
from fraqat.distill.watch_spec import NonFiniteSpec, OutOfMemory, ProfileSpec, WandbSpec
from fraqat.errors import check_seed, config_error
from fraqat.nn import STRICT_KEYS, EngineSpec, LowRankSpec
from fraqat.schedules import LearningRateSpec

CompileMode = Literal["none", "default", "blocks", "cuda_graphs"]
OptimizerName = Literal["adamw", "adamw_adapted", "adamw_8bit"]
OptimizerDevice = Literal["same", "host"]
TeacherDtype = Literal["model", "bfloat16", "int8"]
TeacherOutputsMode = Literal["computed", "recorded"]
CheckpointedModules = Literal["none", "blocks"]
ParallelMode = Literal["none", "ddp", "fsdp2", "hybrid"]


@dataclass(frozen=True)
class TeacherSpec:
    """How the teacher is held during training; see docs/memory.md.

    Args:
        dtype: Of the weights of its linear layers and convolutions: `model` leaves them as they were loaded
            (`model.teacher_dtype`); `bfloat16` changes nothing in training under bfloat16 autocast, which rounds them at every
            call; `int8` keeps codes with a scale for each output channel.
        outputs: `computed` at every step, or `recorded`: those of the whole run are computed before training and kept in the
            run's folder until it ends, and the teacher leaves memory. The same bits.
        outputs_limit_gib: Disk that recorded outputs may take; a run that needs more is refused.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    dtype: TeacherDtype = "model"
    outputs: TeacherOutputsMode = "computed"
    outputs_limit_gib: float = 50.0

    def __post_init__(self) -> None:
        _check_choice("train.teacher.dtype", self.dtype, TeacherDtype)
        _check_choice("train.teacher.outputs", self.outputs, TeacherOutputsMode)
        limit = self.outputs_limit_gib
        _check("train.teacher.outputs_limit_gib", limit, 0 < limit < math.inf, "more than 0 GiB")


@dataclass(frozen=True)
class ParallelSpec:
    """How several processes, started by `torchrun`, train one student; see docs/parallel.md.

    None of it changes what a batch is: `train.accumulation` divides a batch into parts, and the processes share these.

    Args:
        mode: `none`: one process. `ddp`: each has everything, gradients are averaged. `fsdp2`: each holds a part of every
            weight of the student, with its gradient and optimizer state. `hybrid`: so do the processes of a group, and the
            groups average their gradients.
        shards: Processes of a group of `hybrid`; None: those of one machine.
        teacher: `replicate`: whole in every process; `shard`: in parts.
        gather: What travels when a sharded weight is made whole: `weights`, once or more for every part of a batch, or `codes`
            with their scales, once for a batch; these need stages of at most 8 bits on grids of their own.
        reduce: Sharded gradients are summed over the processes once for a `batch`, which keeps them whole until then, or for
            every `part` of it.
        timeout_s: Seconds that a process waits for the others before it gives up.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    mode: ParallelMode = "none"
    shards: int | None = None
    teacher: Literal["replicate", "shard"] = "replicate"
    gather: Literal["weights", "codes"] = "weights"
    reduce: Literal["batch", "part"] = "batch"
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        _check_choice("train.parallel.mode", self.mode, ParallelMode)
        for name, allowed in (
            ("teacher", ("replicate", "shard")),
            ("gather", ("weights", "codes")),
            ("reduce", ("batch", "part")),
        ):
            _check(f"train.parallel.{name}", getattr(self, name), getattr(self, name) in allowed, ", ".join(allowed))
        is_sharded = self.mode in ("fsdp2", "hybrid")
        _check(
            "train.parallel.gather",
            self.gather,
            is_sharded or self.gather == "weights",
            "weights without fsdp2 or hybrid",
        )
        _check(
            "train.parallel.reduce", self.reduce, is_sharded or self.reduce == "batch", "batch without fsdp2 or hybrid"
        )
        _check(
            "train.parallel.teacher",
            self.teacher,
            self.mode != "none" or self.teacher == "replicate",
            "replicate in one process",
        )
        _check(
            "train.parallel.shards", self.shards, self.shards is None or self.mode == "hybrid", "null without hybrid"
        )
        _check("train.parallel.shards", self.shards, self.shards is None or self.shards >= 1, "1 or more, or null")
        _check("train.parallel.timeout_s", self.timeout_s, 0 < self.timeout_s < math.inf, "more than 0 seconds")


@dataclass(frozen=True)
class TrainSpec:
    """How long, with what data order, optimizer and precision.

    Args:
        steps: Optimizer steps; 0 trains nothing (post-training quantization). None takes `epochs`, or the lengths of the
            schedule's own stages.
        epochs: Passes over the training data, instead of `steps`.
        batch_size: Samples per optimizer step.
        accumulation: Parts in which a batch is computed; `batch_size` must be a multiple. Several processes share the parts.
        learning_rate: Peak and course.
        losses: Weighted terms on the outputs.
        timestep_importance: Draw noise levels where the student errs most (diffusion); `auto`: with the defaults, where
            training draws levels and the teacher's outputs are not recorded; null: as `sampler.timesteps` says.
        guidance_scale: Learn what guidance by this scale makes of the outputs with and without a prompt (diffusion), from half
            as many samples in a batch, each computed twice. `auto`: the sampler's scale where it is guided by two outputs, else
            as null. null: outputs one by one.
        optimizer: `adamw`; `adamw_adapted`, which moves a weight less where its gradients cancel (`VarianceAdaptedAdamW`); or
            `adamw_8bit` with its state in 8 bits (needs torchao). Master weights are float32 with all.
        optimizer_device: Where its state is and its step runs: `same` as the model, or `host`, for a model on a GPU.
        scale_rate: Learning rate of learned scales (`range_method: learned`) over that of the weights; no weight decay is taken
            from them.
        betas, eps, weight_decay: Of AdamW.
        clip_norm: Largest norm of the whole gradient, None to leave it.
        ema_decay: Averages the trained parameters; the student that is kept is then the average. None for none.
        autocast: Precision of matrix products in training: `bfloat16`, `none` for the model's own, or `auto`: bfloat16 where
            the hardware multiplies in it, else `none`. The log names what was taken.
        low_rank: Train thin matrices that are added to the frozen weights before these are quantized, instead of the weights;
            merged at the end. None trains the weights.
        teacher: How the teacher is held.
        activation_checkpointing: `blocks` keeps the results of matrix products in the student's repeated blocks and computes
            everything else again in the backward pass; `none` keeps what autograd keeps.
        engine: How the products of quantized layers are computed in training.
        parallel: How several processes train together.
        compile: `none`; `default` compiles student and teacher once for all widths (needs a C++ compiler on a CPU, Triton on
            CUDA; minutes at the start); `blocks` compiles their repeated blocks alone, equal ones together, and is the way of
            sharded models; `cuda_graphs` compiles all and records CUDA graphs.
        seed: Decides data order, noise, timesteps and dropped captions.
        validate_every, checkpoint_every: Steps between two; both also happen at the end.
        num_checkpoints_kept: Older ones are removed.
        keep_best: Also keep the checkpoint with the lowest held-out loss at the final width.
        async_checkpoints: Write checkpoints from a copy on the host while training goes on.
        tensorboard: Write TensorBoard files beside `log.jsonl`.
        log_code_flips: Every `validate_every` steps, log which share of the weight codes has changed; needs a byte a weight.
        on_non_finite: What is done when the loss or a gradient is NaN or infinite.
        on_out_of_memory: `stop`; `split` computes every part of a batch in halves, quarters, ... until a step fits, with the
            same batches, noise and global batch size; in several processes all do, with sharded models at the next start.
        profile: Steps of which a torch.profiler trace is written to `profile/`; null: none.
        wandb: Log to Weights & Biases too; null: no.
        calibration_samples: Samples for static activation ranges (the paper: 100).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_KEYS

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64
    accumulation: int = 1
    learning_rate: LearningRateSpec = field(default_factory=LearningRateSpec)
    losses: tuple[LossSpec, ...] = (LossSpec(),)
    timestep_importance: TimestepImportanceSpec | Literal["auto"] | None = None
    guidance_scale: float | Literal["auto"] | None = None
    optimizer: OptimizerName = "adamw"
    optimizer_device: OptimizerDevice = "same"
    scale_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    autocast: Autocast = "auto"
    low_rank: LowRankSpec | None = None
    teacher: TeacherSpec = field(default_factory=TeacherSpec)
    activation_checkpointing: CheckpointedModules = "none"
    engine: EngineSpec = field(default_factory=EngineSpec)
    parallel: ParallelSpec = field(default_factory=ParallelSpec)
    compile: CompileMode = "none"
    seed: int = 1234
    validate_every: int = 100
    checkpoint_every: int = 100
    num_checkpoints_kept: int = 2
    keep_best: bool = True
    async_checkpoints: bool = True
    tensorboard: bool = True
    log_code_flips: bool = False
    on_non_finite: NonFiniteSpec = field(default_factory=NonFiniteSpec)
    on_out_of_memory: OutOfMemory = "stop"
    profile: ProfileSpec | None = None
    wandb: WandbSpec | None = None
    calibration_samples: int = 100

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "validate_every", "checkpoint_every", "num_checkpoints_kept"):
            _check(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        _check("train.calibration_samples", self.calibration_samples, self.calibration_samples >= 1, "1 or more")
        _check("train.steps", self.steps, self.steps is None or self.steps >= 0, "0 or more, or null")
        _check("train.epochs", self.epochs, self.epochs is None or 0 < self.epochs < math.inf, "more than 0, or null")
        _check("train.epochs", self.epochs, self.epochs is None or self.steps is None, "null when train.steps is given")
        _check(
            "train.accumulation", self.accumulation, self.batch_size % self.accumulation == 0, "a divisor of batch_size"
        )
        check_seed("train.seed", self.seed)
        _check_choice("train.autocast", self.autocast, Autocast)
        _check_choice("train.optimizer", self.optimizer, OptimizerName)
        _check_choice("train.optimizer_device", self.optimizer_device, OptimizerDevice)
        _check_choice("train.on_out_of_memory", self.on_out_of_memory, OutOfMemory)
        _check(
            "train.on_out_of_memory",
            self.on_out_of_memory,
            self.on_out_of_memory == "stop" or self.teacher.outputs == "computed",
            "stop with train.teacher.outputs: recorded, which are those of whole parts",
        )
        _check_choice("train.compile", self.compile, CompileMode)
        _check_choice("train.activation_checkpointing", self.activation_checkpointing, CheckpointedModules)
        importance = self.timestep_importance
        is_importance = not isinstance(importance, str) or importance == "auto"
        _check("train.timestep_importance", importance, is_importance, "settings, auto, or null")
        scale = self.guidance_scale
        is_scale = scale in (None, "auto") if isinstance(scale, str | None) else 1 < scale < math.inf
        _check("train.guidance_scale", scale, is_scale, "a finite number above 1, auto, or null")
        _check("train.losses", self.losses, len(self.losses) > 0, "at least one term")
        _check("train.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        _check("train.scale_rate", self.scale_rate, 0 <= self.scale_rate < math.inf, "0 or more")
        _check("train.eps", self.eps, self.eps > 0, "more than 0")
        _check("train.weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _check("train.clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "more than 0, or null")
        _check("train.ema_decay", self.ema_decay, self.ema_decay is None or 0 <= self.ema_decay < 1, "[0, 1), or null")

    @property
    def draws_by_error(self) -> bool:
        """Whether noise levels have to follow the student's error; with `auto` they do where they can."""
        return isinstance(self.timestep_importance, TimestepImportanceSpec)

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """Optimizer steps that `steps` or `epochs` ask for; None leaves it to the schedule's stages."""
        if self.epochs is not None:
            return max(1, round(self.epochs * steps_per_epoch))
        return self.steps


def _check(field_name: str, value: Any, is_possible: bool, allowed: str) -> None:
    if not is_possible:
        raise config_error(field_name, value, allowed=allowed, fix=f"correct {field_name}")


def _check_choice(field_name: str, value: Any, choices: Any) -> None:
    _check(field_name, value, value in get_args(choices), ", ".join(get_args(choices)))
