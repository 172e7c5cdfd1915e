"""What the losses compare the student with: the teacher's outputs, computed at every step, or recorded before training.

All that is random in a run is drawn from seeds of the step and part, so the outputs of every step can be computed before the
first one, without the student. Recorded, they are the same bits, and the teacher leaves memory while the student is trained.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import cached_property
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.distill.identity import inputs_identity
from fraqat.distill.log import RunLog
from fraqat.distill.output_files import OutputFiles
from fraqat.distill.parallel import TrainedModels
from fraqat.distill.parts import HeldOutInputs
from fraqat.distill.precision import autocast, precision_name
from fraqat.distill.recording import PHASE, Recorder, RunPlace, constant_outputs, held_out_key, part_key
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, DistillTask, Prediction
from fraqat.distill.teacher import let_go_
from fraqat.distill.workers import Workers
from fraqat.errors import CheckpointError, DataError, config_error
from fraqat.schedules import Schedule

OUTPUTS_FOLDER = "teacher_outputs"
_VERSIONS = ("fraqat", "torch")


class TeacherOutputs:
    """The teacher's outputs, computed when they are asked for.

    Args:
        task: Model family and data.
        models: The teacher as it is called.
        teacher: Itself.
        spec: Of the training.
        workers: The processes; every one asks for its own parts.
        place: The run that they are for.
    """

    def __init__(
        self,
        task: DistillTask,
        models: TrainedModels,
        teacher: nn.Module,
        spec: TrainSpec,
        workers: Workers,
        place: RunPlace,
    ):
        self._task, self._models, self._spec, self._workers = task, models, spec, workers
        self._teacher, self._place, self._folder = teacher, place, place.folder / OUTPUTS_FOLDER
        self._device = next(teacher.parameters()).device

    @property
    def teachers(self) -> dict[str, nn.Module]:
        """The teacher by its role, if it is in memory."""
        return {"teacher": self._teacher}

    @property
    def bad_place(self) -> str | None:
        """Where outputs of the step or batch that was read last are NaN or infinite; None for those that are computed."""
        return None

    @torch.no_grad()
    def of_part(self, step: int, part: int, inputs: Batch) -> Prediction:
        """For a part of a training batch, in the precision of training.

        Args:
            step: Number of finished steps.
            part: Number in the batch.
            inputs: Of the part, or of a piece of it.
        """
        with autocast(self._spec.autocast, self._device.type):
            return self._models.teacher(inputs)

    @torch.no_grad()
    def of_held_out(self, number: int, inputs: Batch) -> Prediction:
        """For a held-out batch, in the model's own precision.

        Args:
            number: Of the batch.
            inputs: Of it.
        """
        return self._models.teacher(inputs)

    def prepare(self, first_step: int, log: RunLog, signal_number: Callable[[], int]) -> float:
        """Call it before training begins or goes on; gives the seconds that recording took.

        Args:
            first_step: From which training goes on.
            log: Told what was recorded.
            signal_number: A signal that this process has received, 0 for none.
        """
        return 0.0

    def remove(self) -> None:
        """Removes what is on disk, also what a process with other settings has left. Call it when training has ended."""
        self._workers.first(lambda: shutil.rmtree(self._folder, ignore_errors=True))


class RecordedOutputs(TeacherOutputs):
    """The teacher's outputs, read from disk; made as `TeacherOutputs` are."""

    _is_ready = False
    _bad_key: str | None = None

    @cached_property
    def _files(self) -> OutputFiles:
        return OutputFiles(self._folder, self._identity(), self._workers)

    @cached_property
    def _constant(self) -> dict[bool, dict[str, Tensor]]:
        return {}

    @property
    def teachers(self) -> dict[str, nn.Module]:
        return {} if self._is_ready else super().teachers

    @property
    def bad_place(self) -> str | None:
        return None if self._bad_key is None else f"the recorded outputs of the teacher ({self._bad_key})"

    def of_part(self, step: int, part: int, inputs: Batch) -> Prediction:
        if not self._is_ready:
            return super().of_part(step, part, inputs)
        return self._read(part_key(step, part), inputs, is_training=True)

    def of_held_out(self, number: int, inputs: Batch) -> Prediction:
        if not self._is_ready:
            return super().of_held_out(number, inputs)
        return self._read(held_out_key(number), inputs, is_training=False)

    def prepare(self, first_step: int, log: RunLog, signal_number: Callable[[], int]) -> float:
        """Records what is missing, and lets the teacher go.

        Raises:
            ConfigError: Outputs would take more than `train.teacher.outputs_limit_gib`, or the teacher draws random numbers.
            OutputError: The disk is full, too small or not writable.
            InterruptedRunError: SIGINT or SIGTERM; what was recorded is kept.
            CheckpointError: Training goes back to a step whose outputs are not recorded, and the teacher is gone.
        """
        if not self._is_ready:
            reason = self._files.load()
            if reason is not None:
                self._place.say(f"{reason}. They are recorded anew")
        steps = self._missing_steps(first_step)
        held_out = HeldOutInputs(self._task, self._spec.batch_size, self._device, self._workers)
        lacks_held_out = any(held_out_key(number) not in self._files for number in range(len(held_out)))
        if self._is_ready:
            if steps or lacks_held_out:
                raise CheckpointError(
                    f"training goes back to step {first_step}, the teacher's outputs are recorded from a later one on, and the "
                    "teacher has left memory. Fix: run the same command again, which records what is missing."
                )
            return 0.0
        start = time.perf_counter()
        if steps or lacks_held_out:
            self._record(steps, held_out if lacks_held_out else None, signal_number)
            seconds = time.perf_counter() - start
            log.write_event(PHASE, first_step, num_steps=len(steps), num_bytes=self._files.num_bytes, seconds=seconds)
        self._keep_constants(held_out)
        if self._is_sharded:
            from fraqat.distill.sharding import reshard_  # FSDP2 is slow to import

            reshard_(self._models.teacher)
        let_go_(self._teacher)
        self._is_ready = True
        return time.perf_counter() - start

    def remove(self) -> None:
        self._files.remove()

    def _record(self, steps: list[int], held_out: HeldOutInputs | None, signal_number: Callable[[], int]) -> None:
        recorder = Recorder(self._task, self._spec, self._workers, self._place, self._files, self._device)
        if held_out is not None:
            recorder.held_out(held_out, super().of_held_out)
        if steps:
            recorder.steps(steps, super().of_part, signal_number)

    def _missing_steps(self, first_step: int) -> list[int]:
        """Steps of which not all parts are recorded."""
        num = self._spec.accumulation
        return [
            step
            for step in range(first_step, self._place.num_steps)
            if any(part_key(step, part) not in self._files for part in range(num))
        ]

    def _read(self, key: str, inputs: Batch, *, is_training: bool) -> Prediction:
        found = self._files.read(key, self._device)
        if found.inputs != inputs_identity(inputs):
            raise DataError(
                f"{key}: the data are not those that the teacher's outputs in {self._folder} were recorded with, as where a "
                "sample could be read then and not now. Fix: remove that folder and run the same command again; if it happens "
                "again, set train.teacher.outputs: computed."
            )
        if self._bad_key is None or self._bad_key.split("/")[0] != key.split("/")[0]:
            self._bad_key = None if found.is_finite else key
        return {**found.outputs, **self._constant.get(is_training, {})}

    def _keep_constants(self, held_out: HeldOutInputs) -> None:
        """What is the same for all batches stays in memory: parameters of the teacher as they are, the rest as copies."""
        names = constant_outputs(self._task)
        if not names:
            return
        own = set() if self._is_sharded else {_place(parameter) for parameter in self._teacher.parameters()}
        number, inputs = next(iter(held_out))
        calls = {True: super().of_part(0, 0, inputs), False: super().of_held_out(number, inputs)}
        for is_training, outputs in calls.items():
            self._constant[is_training] = {
                name: value.detach() if _place(value) in own else value.detach().clone()
                for name, value in outputs.items()
                if name in names
            }

    @property
    def _is_sharded(self) -> bool:
        return self._spec.parallel.teacher == "shard"

    def _identity(self) -> dict[str, Any]:
        """What the outputs depend on."""
        spec = self._spec
        return {
            "settings": dict(self._place.fingerprint),
            "task": type(self._task).__name__,
            "num_steps": self._place.num_steps,
            "batch_size": spec.batch_size,
            "accumulation": spec.accumulation,
            "seed": spec.seed,
            "teacher_dtype": spec.teacher.dtype,
            "compile": spec.compile,
            "products": precision_name(spec.autocast, self._device.type),
            "device": self._device.type,
            "versions": {name: metadata.version(name) for name in _VERSIONS},
        }


def make_outputs(
    task: DistillTask,
    models: TrainedModels,
    teacher: nn.Module,
    spec: TrainSpec,
    workers: Workers,
    place: RunPlace,
    schedule: Schedule,
) -> TeacherOutputs:
    """The teacher's outputs as a recipe wants them.

    Args:
        task, models, teacher, spec, workers, place: See `TeacherOutputs`.
        schedule: The stages of the run.

    Raises:
        ConfigError: Outputs of an automatic schedule cannot be recorded.
    """
    kind = TeacherOutputs
    if spec.teacher.outputs == "recorded":
        check_recordable(is_automatic=schedule.automatic is not None, draws_by_error=spec.draws_by_error)
        kind = RecordedOutputs
    return kind(task, models, teacher, spec, workers, place)


def check_recordable(*, is_automatic: bool, draws_by_error: bool = False) -> None:
    """Refuses recorded outputs where the teacher is asked for what only training decides.

    Args:
        is_automatic: An automatic schedule: where a stage ends, the loss of its last batch is taken at other widths.
        draws_by_error: Noise levels follow the student's error.

    Raises:
        ConfigError: One of them is so.
    """
    if draws_by_error:
        raise config_error(
            "train.teacher.outputs",
            "recorded",
            allowed="computed with train.timestep_importance, whose noise levels depend on the student",
            fix="set train.teacher.outputs: computed, or remove train.timestep_importance",
        )
    if is_automatic:
        raise config_error(
            "train.teacher.outputs",
            "recorded",
            allowed="computed with schedule.kind: automatic, which asks the teacher again at steps that training decides",
            fix="set train.teacher.outputs: computed, or another schedule",
        )


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
