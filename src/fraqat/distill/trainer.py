"""Algorithm 1 of FraQAT (arXiv 2510.14823): distil a full-precision teacher into a student whose width falls."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from fraqat.distill.checkpoint import CheckpointStore, LoadedCheckpoint
from fraqat.distill.checkpoint_files import DamagedError, loaded
from fraqat.distill.diagnose import non_finite_message
from fraqat.distill.ema import ParameterAverage
from fraqat.distill.finite import FiniteChecks
from fraqat.distill.gradients import BatchGradients, BatchLosses
from fraqat.distill.guidance import samples_of_part, training_stream, training_task
from fraqat.distill.identity import identity
from fraqat.distill.importance import go_on_drawing_
from fraqat.distill.interrupt import InterruptGuard, interrupted
from fraqat.distill.log import RunLog, StepRecord
from fraqat.distill.micro_batch import MICRO_BATCH_EVENT, SPLIT_FILE, MicroBatch, check_splitting
from fraqat.distill.models import check_trainable, make_models, prepare_blocks_
from fraqat.distill.optimizers import make_optimizer
from fraqat.distill.precision import precision_name, precision_warning
from fraqat.distill.ranks import RankDecay
from fraqat.distill.recording import RunPlace
from fraqat.distill.recovery import REWIND_EVENT, Recovery
from fraqat.distill.spec import TrainSpec
from fraqat.distill.stages import StageChooser
from fraqat.distill.state import TrainedState
from fraqat.distill.step_hooks import StepHooks
from fraqat.distill.step_times import DistillResult, StepTimes
from fraqat.distill.task import Batch, DistillTask, Prediction
from fraqat.distill.teacher import hold_teacher_
from fraqat.distill.teacher_outputs import make_outputs
from fraqat.distill.validation import batch_loss, validation_loss
from fraqat.distill.workers import SharedStream, Workers, check_mode, current_workers
from fraqat.errors import CheckpointError, NonFiniteLossError
from fraqat.kernels import EngineName
from fraqat.nn import IntegerLayers, kept_widths, scale_rates_by_name, set_bits_
from fraqat.schedules import Schedule, Stage


class Distiller:
    """One training run of a quantized student; `run` goes on where the newest checkpoint ends.

    Args:
        task: Model family and data.
        teacher: Model in its own dtype; it is frozen, and `spec.teacher` changes how it holds its weights, for good, or lets
            it leave memory.
        student: Model changed by `quantize_`, at its final width. Frozen parameters that equal the teacher's use its memory.
        schedule: Stages of the run.
        spec: Settings.
        folder: Run folder for checkpoints and log.
        fingerprint: Settings that a checkpoint must share to be resumed.
        on_step: Called after every optimizer step, for the progress line.
        on_phase: Called with `training`, `validating`, `saving` or `resuming` when it begins.
        say: Receives lines about what happens.
        warn: Receives lines that a person should not miss.
        workers: The processes that train together; None: those of torch.distributed, or this one alone. The first one writes
            log and checkpoints.
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
        workers: Workers | None = None,
    ):
        self.workers = workers or current_workers()
        check_mode(spec.parallel, self.workers.num)
        parts = self.workers.parts(spec.accumulation)
        task = training_task(task, spec)
        self.task, self.stages, self.spec, self.folder = task, StageChooser(schedule, self.workers), spec, folder
        self.teacher, self.student = teacher.eval().requires_grad_(False), student
        self.on_step, self.on_phase, self.say, self.warn = on_step, on_phase, say, warn
        self.device = next(student.parameters()).device
        self._settings = dict(fingerprint or {})
        self.store = CheckpointStore(
            folder / "checkpoints",
            {**(fingerprint or {}), "models": {"teacher": identity(teacher), "student": type(student).__name__}},
            spec.num_checkpoints_kept,
            warn,
            self.workers,
        )
        self.teacher_memory = hold_teacher_(self.teacher, student, spec.teacher.dtype)
        check_trainable(student, spec, schedule)
        factors = scale_rates_by_name(student)
        self.integers = IntegerLayers(student, spec.engine) if spec.engine.name != EngineName.REFERENCE else None
        self.models = make_models(task, self.teacher, student, spec, self.workers, self.integers, schedule)
        self.trained = self.models.trained_parameters()
        # As the optimizer numbers them: weights, then scales by falling rate.
        order = sorted(self.trained, key=lambda name: -factors.get(name, math.inf))
        rates = {self.trained[name]: factor for name, factor in factors.items()}
        self.optimizer = make_optimizer(list(self.trained.values()), spec, rates, self.models.sum_rows_)
        self.average = ParameterAverage(self.trained, spec.ema_decay) if spec.ema_decay is not None else None
        self._state = TrainedState(
            self.models, student, self.optimizer, order, self.average, spec.optimizer == "adamw_8bit"
        )
        self._parts = parts
        place = RunPlace(folder, self.store.fingerprint, schedule.total_steps, say, on_phase)
        self.outputs = make_outputs(task, self.models, self.teacher, spec, self.workers, place, schedule)
        self._gradients = BatchGradients(task, self.models, self.outputs, spec, self.workers, parts, self.device)
        self._checks = FiniteChecks(self.models, self.outputs, student, spec, self.workers, self._predict, self._fail)
        self.stream = self._new_stream()
        self.precision = precision_name(spec.autocast, self.device.type)
        check_splitting(task, spec.on_out_of_memory, spec.losses)
        self.recovery = Recovery(spec.on_non_finite)
        self.micro_batch = MicroBatch(
            spec.on_out_of_memory,
            samples_of_part(task, spec),
            warn,
            self.workers,
            folder / SPLIT_FILE if self.models.meets_in_passes else None,
        )
        self._ranks = RankDecay(student, schedule.total_steps)
        self.step = 0
        self.bits: float | None = None
        self._log: RunLog | None = None
        self._times = StepTimes(spec.accumulation * samples_of_part(task, spec), self.device)

    def run(self) -> DistillResult:
        """Trains to the end of the schedule and leaves the kept parameters in the student, at the final width.

        Raises:
            NonFiniteLossError: The loss, a gradient or a weight became NaN or infinite, and `spec.on_non_finite` says to stop;
                the newest checkpoint stays.
            DeviceMemoryError: A step does not fit.
            InterruptedRunError: SIGINT or SIGTERM; a checkpoint was written first.
            CheckpointError, OutputError: See `CheckpointStore`.
        """
        with InterruptGuard() as guard:  # over all attempts: a signal must not be lost at a rewind
            while True:
                try:
                    return self._run_from_newest(guard)
                except NonFiniteLossError as error:
                    self.recovery.after_failure(error, self.step, self.store.steps())
                    self.warn(f"{error} {self.recovery.describe()}")
                    self.stream = self._new_stream()

    def _run_from_newest(self, guard: InterruptGuard) -> DistillResult:
        torch.manual_seed(self.spec.seed)
        undo = prepare_blocks_(self.student, self.models, self.spec)
        self._resume()
        spec = self.spec
        log = RunLog(
            self.folder,
            self.step,
            tensorboard=spec.tensorboard,
            wandb=spec.wandb,
            settings=self._settings,
            writes=self.workers.is_first,
        )
        self._log = log
        if self.recovery.pending is not None:
            log.write_event(REWIND_EVENT, self.step, **self.recovery.pending)
            self.recovery.pending = None
        if self.step:
            log.write_event("resume", self.step)
            self.say(f"going on from the checkpoint after step {self.step}")
        self._name_precision(log)
        if self.micro_batch.load_record():
            log.write_event(MICRO_BATCH_EVENT, self.step, samples=self.micro_batch.size)
        self.student.train()
        num_named = -1
        try:
            self._times.train_s += self.outputs.prepare(self.step, log, lambda: guard.signal_number or 0)
            with StepHooks(self.student, self.spec, log, self._gradients.importance) as hooks:
                if self.recovery.wants_first_checkpoint and self.workers.gather([self.store.is_empty])[0][0]:
                    self._begin_save(log)
                    self._finish_save(log)
                while self.step < self.schedule.total_steps:
                    stage = self._enter_stage(log)
                    hooks.before_step(self.step)
                    num_splits = self.micro_batch.num_splits
                    record = self._train_step(stage)
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
                    best = None
                    if self.step % self.spec.validate_every == 0 and not is_last:
                        best = self._validate_and_log(stage, log)
                    # read once: one that comes now is obeyed after the next step
                    signal_number, is_writing = self.workers.agree(guard.signal_number or 0, not self.store.is_written)
                    if not is_writing:
                        self._finish_save(log)
                    if self.step % self.spec.checkpoint_every == 0 or is_last or signal_number or best is not None:
                        self._begin_save(log, stage, best)
                    if signal_number:
                        self._finish_save(log)
                        raise interrupted(signal_number, self.step, self.schedule.total_steps, self.store.folder)
                self._finish_save(log)
            result = self._finish(log)
            signal_number, _ = self.workers.agree(guard.signal_number or 0, False)
            if signal_number:
                raise interrupted(signal_number, self.step, self.schedule.total_steps, self.store.folder)
            self.outputs.remove()
            return result
        finally:
            try:
                if self.workers.num == 1:  # others may be gone
                    self._finish_save(log)
            finally:
                log.close()
                undo()

    def _name_precision(self, log: RunLog) -> None:
        log.write_event("precision", self.step, products=self.precision)
        if self.spec.autocast == "auto":
            self.say(f"matrix products in {self.precision}")

    @property
    def schedule(self) -> Schedule:
        """The stages of the run, of an automatic schedule as far as they are chosen."""
        return self.stages.schedule

    def _validate_and_log(self, stage: Stage, log: RunLog) -> float | None:
        """The held-out loss where it is the lowest so far at the final width, which is worth a checkpoint of its own.

        Of a model that serves several widths, the mean over them.
        """
        losses = self._validate_widths(log, stage, stage.bits)
        is_at_target = stage.index + 1 == len(self.schedule) and stage.bits == self.schedule.target_bits
        if not self.spec.keep_best or not (self.schedule.widths or is_at_target):
            return None
        loss = statistics.fmean(losses.values())
        best = self.store.best_loss()
        return loss if best is None or loss < best else None

    def validate(self) -> float:
        """Held-out distillation loss of the student, averaged if there is an average."""
        self.on_phase("validating")
        if self.average is None:
            return self._validation_loss()
        with self.average.applied():
            self._refresh_codes()
            loss = self._validation_loss()
        self._refresh_codes()
        return loss

    def _validate_widths(self, log: RunLog, stage: Stage, bits: float) -> dict[float, float]:
        """Held-out loss at the present width, or at all that the model serves; the width stays as it is."""
        served = self.schedule.widths or (bits,)
        losses = {width: self._finite(stage, self._at_width(width, self.validate)) for width in served}
        self._set_bits_(bits)
        log.write_widths(self.step, losses)
        return losses

    def _losses_of(self, parts: list[tuple[int, Batch]]) -> dict[float, float]:
        """The loss of the last batch at the widths that an automatic schedule chooses from; the student stays as it is."""
        bits, predict, num_splits = self.schedule.stages[-1].bits, self._predict, self.micro_batch.num_splits

        def piece_loss(inputs: Batch) -> float:
            return batch_loss(self.task, self.teacher, self.student, self.spec, inputs, predict=predict)

        def measure() -> float:
            loss = self._gradients.measure(parts, self.step - 1, num_splits, piece_loss)
            self.models.let_go_()
            return loss

        with torch.no_grad(), kept_widths(self.student):
            losses = {width: self._at_width(width, measure) for width in self.stages.candidates}
        self.bits = bits
        self._refresh_codes()
        return losses

    def _at_width(self, bits: float, measure: Callable[[], float]) -> float:
        self._set_bits_(bits)
        return measure()

    def _validation_loss(self) -> float:
        workers, predict, teach = self.workers, self._predict, self.outputs.of_held_out
        loss = validation_loss(
            self.task, self.teacher, self.student, self.spec, workers=workers, predict=predict, teach=teach
        )
        self.models.let_go_()
        return loss

    def _predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        return (self.models.teacher if model is self.teacher else self.models.student)(inputs)

    def _refresh_codes(self) -> None:
        """Call it whenever weights or widths have changed."""
        self.models.weights_changed_()
        if self.integers is not None:
            self.integers.refresh_()

    def _set_bits_(self, bits: float) -> None:
        self.bits = bits
        if set_bits_(self.student, bits, on_final_grid=self.schedule.on_final_grid, below_final=True):
            self._refresh_codes()
            if not self.schedule.widths:  # learned scales have new values, not only new places
                self.optimizer.parameters_changed_()

    def _enter_stage(self, log: RunLog) -> Stage:
        stage = self.schedule.stage_at(self.step)
        if stage.bits != self.bits:
            self._set_bits_(stage.bits)
        if self._ranks.enter_(self.step, log):
            self._refresh_codes()
            self.optimizer.parameters_changed_()
        if self.step == stage.first_step:
            bits = self.schedule.stages[stage.index].bits
            log.write_event("stage", self.step, stage=stage.index, bits=bits, num_steps=stage.num_steps)
        return stage

    def _train_step(self, stage: Stage) -> StepRecord:
        start = time.perf_counter()
        learning_rate = self.recovery.rate_factor * self.spec.learning_rate.at(self.step, self.schedule)
        self.optimizer.set_learning_rate_(learning_rate)
        parts = list(self.stream.next_parts())
        own = self.micro_batch.run(lambda num_splits: self._gradients_from_none(parts, num_splits), self.step)
        batch = self._gradients.share_(own)
        loss = batch.mean
        self._checks.check_losses(stage, batch)
        if self.integers is not None:
            self.integers.finish_gradients_()
        self.models.collect_gradients_()
        gradient_norm = self._checks.clip_gradient_(stage, list(self.trained.values()))
        self.optimizer.step()
        self.optimizer.zero_grad()  # before new codes and validation, which would hold them too
        self.models.zero_grad_()
        self._refresh_codes()
        if self.average is not None:
            self.average.update()
        self.step += 1
        if self.stages.wants_losses(self.step, loss):
            self.say(self.stages.choose(self.step, self._losses_of(parts)))
        step_ms = 1000 * (time.perf_counter() - start)
        return self._times.record(self.step - 1, self.schedule, stage, loss, learning_rate, gradient_norm, step_ms)

    def _new_stream(self) -> SharedStream:
        stream = training_stream(self.task, self.spec)
        return SharedStream(stream, self.spec.accumulation, self._parts)

    def _gradients_from_none(self, parts: list[tuple[int, Batch]], num_splits: int) -> BatchLosses:
        self.optimizer.zero_grad()
        self.models.zero_grad_()
        return self._gradients.add_(parts, self.step, num_splits)

    def _finite(self, stage: Stage, validation: float) -> float:
        if not math.isfinite(validation):
            self._fail(stage, "the validation", f"the held-out loss is {validation}")
        return validation

    def _finish(self, log: RunLog) -> DistillResult:
        target, last = self.schedule.target_bits, self.schedule.stages[-1]
        self._set_bits_(target)
        average, self.average = self.average, None  # the student is the average now
        if average is not None:
            average.copy_to_model()
            self._refresh_codes()
        self.student.eval()
        try:
            losses = self._validate_widths(log, last, target)
        except NonFiniteLossError:
            self.average = average
            raise
        self._ranks.finish_()
        if self.integers is not None:
            self.integers.release_()
        stages = tuple((stage.bits, stage.num_steps) for stage in self.schedule.stages)
        by_width = {f"{bits:g}": loss for bits, loss in losses.items()}
        return DistillResult(self.step, self._times.train_s, losses[target], by_width, stages)

    def _begin_save(self, log: RunLog, stage: Stage | None = None, loss: float | None = None) -> None:
        """Copies the state; it is written while training goes on, and counts once `_finish_save` has been called."""
        self.on_phase("saving")
        self._finish_save(log)
        if stage is not None:
            self._checks.check_weights(stage)
        state = {
            "recovery": self.recovery.state_dict(),
            "micro_batch": self.micro_batch.state_dict(),
            "step": self.step,
            "train_s": self._times.train_s,
            **self._state.state_dict(),
            "stages": self.stages.state_dict(),
            "stream": self.stream.state_dict(),
            "precision": self.precision,
            "timesteps": importance.state_dict() if (importance := self._gradients.importance) else None,
        }
        self.store.begin(self.step, state, loss)
        if not self.spec.async_checkpoints:
            self._finish_save(log)

    def _finish_save(self, log: RunLog) -> None:
        step = self.store.finish()
        if step is not None:
            log.write_event("checkpoint", step)

    def _resume(self) -> None:
        self.on_phase("resuming")
        checkpoint = self.store.load_latest(self.recovery.before)
        self.recovery.before = None
        if checkpoint is None:
            return
        try:
            self._load(checkpoint)
        except DamagedError as error:
            raise CheckpointError(
                f"the checkpoint after step {checkpoint.step} in {self.store.folder} is sound and not what this program wrote: "
                f"{error}. Fix: remove it."
            ) from error

    def _load(self, checkpoint: LoadedCheckpoint) -> None:
        state = checkpoint.state
        self.step, self._times.train_s = checkpoint.step, state["train_s"]
        self.recovery.load_state_dict(state["recovery"])
        self.micro_batch.load_state_dict(state["micro_batch"])
        self.stages.load_state_dict(state["stages"])
        go_on_drawing_(self._gradients.importance, state.get("timesteps"))
        # Before the first step the student still has its final width.
        self._set_bits_(self.schedule.stage_at(self.step - 1).bits if self.step else self.schedule.target_bits)
        self._state.load_student(state)
        self._ranks.reload_()
        self._refresh_codes()
        self._state.load_rest(state)
        self.stream.load_state_dict(loaded(state["stream"]))
        warning = precision_warning(state.get("precision", self.precision), self.precision)
        if warning:
            self.warn(warning)

    def _fail(self, stage: Stage, where: str, what: str) -> NoReturn:
        if self._log is not None:
            self._finish_save(self._log)
        folder = None if self.store.is_empty else self.store.folder
        raise NonFiniteLossError(non_finite_message(what, where, self.step, stage, len(self.schedule), folder))
