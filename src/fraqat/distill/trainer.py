"""Algorithm 1 of FraQAT (arXiv 2510.14823): distil a full-precision teacher into a student whose width falls."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fraqat.distill.checkpoint import CheckpointStore
from fraqat.distill.checkpointing import checkpoint_blocks_
from fraqat.distill.diagnose import first_non_finite_layer, first_non_finite_parameter
from fraqat.distill.ema import ParameterAverage
from fraqat.distill.interrupt import InterruptGuard
from fraqat.distill.log import RunLog, StepRecord
from fraqat.distill.memory_use import peak_memory_bytes
from fraqat.distill.micro_batch import MICRO_BATCH_EVENT, MicroBatch
from fraqat.distill.optimizers import make_optimizer
from fraqat.distill.recovery import REWIND_EVENT, Recovery
from fraqat.distill.spec import CompileMode, TrainSpec
from fraqat.distill.step_hooks import StepHooks
from fraqat.distill.task import Batch, DistillTask, SplittableTask
from fraqat.distill.teacher import hold_teacher_
from fraqat.distill.validation import to_device, validation_loss
from fraqat.errors import InterruptedRunError, NonFiniteLossError, config_error
from fraqat.kernels import EngineName
from fraqat.nn import IntegerLayers, scale_parameters, set_bits_
from fraqat.schedules import Schedule, Stage

_STEP_TIMES_AVERAGED = 20


@dataclass(frozen=True)
class DistillResult:
    """What a finished training leaves: steps, the seconds that they took (all processes), held-out loss at the end."""

    num_steps: int
    train_s: float
    validation_loss: float


class Distiller:
    """One training run of a quantized student; `run` goes on where the newest checkpoint ends.

    Args:
        task: Model family and data.
        teacher: Model in its own dtype; it is frozen, and `spec.teacher` changes how it holds its weights, for good.
        student: Model changed by `quantize_`, at its final width. Frozen parameters that equal the teacher's use its memory.
        schedule: Stages of the run.
        spec: Settings.
        folder: Run folder for checkpoints and log.
        fingerprint: Settings that a checkpoint must share to be resumed.
        on_step: Called after every optimizer step, for the progress line.
        on_phase: Called with `training`, `validating`, `saving` or `resuming` when it begins.
        say: Receives lines about what happens.
        warn: Receives lines that a person should not miss.
    """

    def __init__(
        self,
        task: DistillTask,
        teacher: nn.Module,
        student: nn.Module,
        schedule: Schedule,
        spec: TrainSpec,
        folder: Path,
        *,
        fingerprint: dict[str, Any] | None = None,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        on_phase: Callable[[str], None] = lambda phase: None,
        say: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = print,
    ):
        self.task, self.schedule, self.spec, self.folder = task, schedule, spec, folder
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.teacher_memory = hold_teacher_(self.teacher, student, spec.teacher.dtype)
        self.on_step, self.on_phase, self.say, self.warn = on_step, on_phase, say, warn
        self.device = next(student.parameters()).device
        self.store = CheckpointStore(folder / "checkpoints", fingerprint or {}, spec.num_checkpoints_kept, warn)
        trained = [p for p in student.parameters() if p.requires_grad]
        if not trained:
            raise config_error(
                "quantization", "all frozen", allowed="something to train", fix="free a family, or train for 0 steps"
            )
        self.trained = trained
        self.optimizer = make_optimizer(trained, spec, scale_parameters(student))
        if spec.ema_decay is not None and any(scale.requires_grad for scale in scale_parameters(student)):
            # A learned scale jumps with the width; its average would still be that of wider stages at the end.
            raise config_error(
                "train.ema_decay", spec.ema_decay, allowed="null with learned scales", fix="use range_method: mse"
            )
        self.average = ParameterAverage(student, spec.ema_decay) if spec.ema_decay is not None else None
        self.integers = IntegerLayers(student, spec.engine) if spec.engine.name != EngineName.REFERENCE else None
        self._called_teacher = compiled(self.teacher, spec.compile)
        self._called_student = compiled(student, spec.compile)
        if spec.on_out_of_memory == "split" and not isinstance(task, SplittableTask):
            raise config_error(
                "train.on_out_of_memory", "split", allowed="stop for a task without split_inputs", fix="add the method"
            )
        self.recovery = Recovery(spec.on_non_finite)
        self.micro_batch = MicroBatch(spec.on_out_of_memory, spec.batch_size // spec.accumulation, warn)
        self.stream = task.train_stream(spec.batch_size // spec.accumulation, spec.seed)
        self.step = 0
        self.train_s = 0.0
        self._recent_ms: deque[float] = deque(maxlen=_STEP_TIMES_AVERAGED)

    def run(self) -> DistillResult:
        """Trains to the end of the schedule and leaves the kept parameters in the student, at the final width.

        Raises:
            NonFiniteLossError: The loss, a gradient or a weight became NaN or infinite, and `spec.on_non_finite` says to stop;
                the newest checkpoint stays.
            DeviceMemoryError: A step does not fit.
            InterruptedRunError: SIGINT or SIGTERM; a checkpoint was written first.
            CheckpointError, OutputError: See `CheckpointStore`.
        """
        while True:
            try:
                return self._run_from_newest()
            except NonFiniteLossError as error:
                self.recovery.after_failure(error, self.step)
                self.warn(f"{error} Going back to the newest checkpoint (train.on_non_finite).")
                self.stream = self.task.train_stream(self.spec.batch_size // self.spec.accumulation, self.spec.seed)

    def _run_from_newest(self) -> DistillResult:
        torch.manual_seed(self.spec.seed)
        undo = checkpoint_blocks_(self.student) if self.spec.activation_checkpointing == "blocks" else lambda: None
        self._resume()
        spec = self.spec
        settings = self.store.fingerprint
        log = RunLog(self.folder, self.step, tensorboard=spec.tensorboard, wandb=spec.wandb, settings=settings)
        if self.recovery.pending is not None:
            log.write_event(REWIND_EVENT, self.step, **self.recovery.pending)
            self.recovery.pending = None
        if self.step:
            log.write_event("resume", self.step)
            self.say(f"going on from the checkpoint after step {self.step}")
        batches = iter(self.stream)
        self.student.train()
        num_named = -1
        try:
            with InterruptGuard() as guard, StepHooks(self.student, self.spec, log) as hooks:
                if self.recovery.wants_first_checkpoint and self.store.is_empty:
                    self._save(log)
                while self.step < self.schedule.total_steps:
                    stage = self._enter_stage(log)
                    hooks.before_step(self.step)
                    num_splits = self.micro_batch.num_splits
                    record = self._train_step(batches, stage)
                    if self.micro_batch.num_splits != num_splits:
                        log.write_event(MICRO_BATCH_EVENT, record.step, samples=self.micro_batch.size)
                    log.write_step(record)
                    hooks.after_step(record)
                    if self.integers is not None and self.integers.num_now != num_named:
                        log.write_event("engines", record.step, **self.integers.record())
                        self.say(self.integers.summary())
                        num_named = self.integers.num_now
                    self.on_step(record)
                    is_last = self.step == self.schedule.total_steps
                    if self.step % self.spec.validate_every == 0 and not is_last:
                        log.write_validation(self.step, stage.bits, self._finite(stage, self.validate()))
                    signal_number = guard.signal_number  # read once: one that comes now is obeyed after the next step
                    if self.step % self.spec.checkpoint_every == 0 or is_last or signal_number:
                        self._save(log, stage)
                    if signal_number:
                        self._leave(signal_number)
                if guard.signal_number:
                    self._leave(guard.signal_number)
            return self._finish(log)
        finally:
            log.close()
            undo()

    def validate(self) -> float:
        """Held-out distillation loss of the student, averaged if there is an average."""
        self.on_phase("validating")
        if self.average is None:
            return validation_loss(self.task, self.teacher, self.student, self.spec)
        with self.average.applied():
            self._refresh_codes()
            loss = validation_loss(self.task, self.teacher, self.student, self.spec)
        self._refresh_codes()
        return loss

    def _refresh_codes(self) -> None:
        if self.integers is not None:
            self.integers.refresh_()

    def _set_bits_(self, bits: float) -> None:
        set_bits_(self.student, bits, on_final_grid=self.schedule.on_final_grid)

    def _enter_stage(self, log: RunLog) -> Stage:
        stage = self.schedule.stage_at(self.step)
        if self.step == stage.first_step:
            self._set_bits_(stage.bits)
            self._refresh_codes()
            log.write_event("stage", self.step, stage=stage.index, bits=stage.bits, num_steps=stage.num_steps)
        return stage

    def _train_step(self, batches: Iterator[Batch], stage: Stage) -> StepRecord:
        start = time.perf_counter()
        learning_rate = self.recovery.rate_factor * self.spec.learning_rate.at(self.step, self.schedule)
        self.optimizer.set_learning_rate_(learning_rate)
        parts = [next(batches) for _ in range(self.spec.accumulation)]
        loss = self.micro_batch.run(lambda num_splits: self._add_gradients(parts, stage, num_splits), self.step)
        if self.integers is not None:
            self.integers.finish_gradients_()
        gradient_norm = self._clip_gradient(stage)
        self.optimizer.step()
        self._refresh_codes()
        if self.average is not None:
            self.average.update()
        self.step += 1
        return self._record(stage, loss, learning_rate, gradient_norm, 1000 * (time.perf_counter() - start))

    def _add_gradients(self, parts: list[Batch], stage: Stage, num_splits: int) -> float:
        """Gradients of the whole batch from none; gives its loss. Each part can be computed in pieces."""
        self.optimizer.zero_grad()
        loss = 0.0
        for index, part in enumerate(parts):
            seed = (self.spec.seed << 32) + self.step * self.spec.accumulation + index
            inputs = self.task.make_inputs(part, torch.Generator().manual_seed(seed))
            for piece, share in self._pieces(inputs, num_splits):
                piece_loss = self._loss(to_device(piece, self.device), stage) * share / self.spec.accumulation
                piece_loss.backward()
                loss += piece_loss.item()
        return loss

    def _pieces(self, inputs: Batch, num_splits: int) -> list[tuple[Batch, float]]:
        if num_splits == 1:
            return [(inputs, 1.0)]
        assert isinstance(self.task, SplittableTask)
        return self.task.split_inputs(inputs, num_splits)

    def _loss(self, inputs: Batch, stage: Stage) -> Tensor:
        with torch.no_grad(), self._autocast():
            teacher_output = self.task.predict(self._called_teacher, inputs)
        with self._autocast():
            student_output = self.task.predict(self._called_student, inputs)
            loss = self.task.loss(student_output, teacher_output, inputs, self.spec.losses)
        if not bool(torch.isfinite(loss)):
            self._fail(stage, self._find_non_finite_layer(inputs), f"the loss is {loss.item()}")
        return loss

    def _clip_gradient(self, stage: Stage) -> float:
        parameters = [p for p in self.trained if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            where = first_non_finite_parameter(self.student)
            self._fail(stage, f"the gradient of {where}", "the gradient is not finite")
        if self.spec.clip_norm is not None:
            clip_grads_with_norm_(parameters, self.spec.clip_norm, norm)
        return norm.item()

    def _finite(self, stage: Stage, validation: float) -> float:
        if not math.isfinite(validation):
            self._fail(stage, "the validation", f"the held-out loss is {validation}")
        return validation

    def _record(
        self, stage: Stage, loss: float, learning_rate: float, gradient_norm: float, step_ms: float
    ) -> StepRecord:
        self.train_s += step_ms / 1000
        self._recent_ms.append(step_ms)
        mean_ms = sum(self._recent_ms) / len(self._recent_ms)
        return StepRecord(
            step=self.step - 1,
            total_steps=self.schedule.total_steps,
            stage=stage.index,
            num_stages=len(self.schedule),
            bits=stage.bits,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            step_ms=step_ms,
            left_s=mean_ms / 1000 * (self.schedule.total_steps - self.step),
            samples_per_s=1000 * self.spec.batch_size / step_ms,
            memory_bytes=peak_memory_bytes(self.device),
        )

    def _finish(self, log: RunLog) -> DistillResult:
        self._set_bits_(self.schedule.stages[-1].bits)
        average = self.average
        if average is not None:
            average.copy_to_model()
        self._refresh_codes()
        self.student.eval()
        self.average = None  # the student is the average now
        loss = self.validate()
        if not math.isfinite(loss):
            self.average = average
            self._fail(self.schedule.stages[-1], "the validation", f"the held-out loss is {loss}")
        log.write_validation(self.step, self.schedule.stages[-1].bits, loss)
        if self.integers is not None:
            self.integers.release_()
        return DistillResult(self.step, self.train_s, loss)

    def _save(self, log: RunLog, stage: Stage | None = None) -> None:
        self.on_phase("saving")
        if stage is not None and (name := first_non_finite_parameter(self.student)) is not None:
            self._fail(stage, f"the parameter {name}", "a weight is not finite after the update")
        state = {
            "recovery": self.recovery.state_dict(),
            "micro_batch": self.micro_batch.state_dict(),
            "step": self.step,
            "train_s": self.train_s,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "stream": self.stream.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        self.store.save(self.step, state)
        log.write_event("checkpoint", self.step)

    def _resume(self) -> None:
        self.on_phase("resuming")
        checkpoint = self.store.load_latest()
        if checkpoint is None:
            return
        state = checkpoint.state
        self.step, self.train_s = checkpoint.step, state["train_s"]
        self.recovery.load_state_dict(state["recovery"])
        self.micro_batch.load_state_dict(state["micro_batch"])
        # Before the first step the student still has its final width.
        stage = self.schedule.stage_at(self.step - 1) if self.step else self.schedule.stages[-1]
        self._set_bits_(stage.bits)
        self.student.load_state_dict(state["student"])
        self._refresh_codes()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.stream.load_state_dict(state["stream"])
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def _leave(self, signal_number: int) -> NoReturn:
        raise InterruptedRunError(
            f"stopped by signal {signal_number} after step {self.step} of {self.schedule.total_steps}: a checkpoint is in "
            f"{self.store.folder}. Run the same command again to go on.",
            signal_number,
        )

    def _fail(self, stage: Stage, where: str, what: str) -> NoReturn:
        kept = f"The newest checkpoint is kept in {self.store.folder}."
        if self.store.is_empty:
            kept = "No checkpoint had been written yet."
        raise NonFiniteLossError(
            f"{what} at step {self.step}, stage {stage.index + 1} of {len(self.schedule)} ({stage.bits:g} bits), first in "
            f"{where}. {kept} Fix: lower train.learning_rate.peak, set "
            "train.clip_norm, or train.autocast: none."
        )

    def _find_non_finite_layer(self, inputs: Batch) -> str:
        for role, model in (("teacher", self.teacher), ("student", self.student)):
            with self._autocast():
                name = first_non_finite_layer(model, lambda m=model: self.task.predict(m, inputs))
            if name is not None:
                return f"{role} layer {name}"
        return "the loss itself"

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.spec.autocast == "none":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def compiled(model: nn.Module, mode: CompileMode) -> nn.Module:
    """The model as training calls it: itself, or compiled."""
    if mode == "none":
        return model
    options: Any = torch.compile(model, mode="reduce-overhead" if mode == "cuda_graphs" else "default")
    return options
