"""Computes the teacher's outputs of a whole run ahead of it, and writes them to disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fraqat.distill.guidance import training_stream
from fraqat.distill.identity import inputs_identity
from fraqat.distill.output_files import OutputFiles, Recorded
from fraqat.distill.parts import HeldOutInputs, part_inputs, to_device
from fraqat.distill.spec import TrainSpec
from fraqat.distill.task import Batch, ConstantOutputs, DistillTask, Prediction
from fraqat.distill.workers import SharedStream, Workers
from fraqat.errors import InterruptedRunError, OutputError, config_error

PHASE = "recording"
_FILE_BYTES = 2**26
_FILE_S = 60.0
"""A file is written when a process has so many bytes, or after so many seconds, which are all that a killed process loses."""
_GIB = 2**30
_TOLD_S = 30.0


@dataclass(frozen=True)
class RunPlace:
    """The run that outputs are recorded for.

    Args:
        folder: Of the run.
        fingerprint: Its settings.
        num_steps: Its length.
        say: Receives lines about what happens.
        on_phase: Told that recording goes on.
    """

    folder: Path
    fingerprint: Mapping[str, Any]
    num_steps: int
    say: Callable[[str], None] = lambda text: None
    on_phase: Callable[[str], None] = lambda phase: None


class Recorder:
    """One pass over held-out and training data with the teacher alone.

    torch's own random numbers go on afterwards as if it had not been.

    Args:
        task: Model family and data.
        spec: Of the training.
        workers: Share the parts, and record together.
        place: Of the run.
        files: Where outputs go.
        device: Of the teacher.
    """

    def __init__(
        self,
        task: DistillTask,
        spec: TrainSpec,
        workers: Workers,
        place: RunPlace,
        files: OutputFiles,
        device: torch.device,
    ):
        self._task, self._spec, self._workers, self._place, self._files = task, spec, workers, place, files
        self._device, self._constant = device, constant_outputs(task)
        self._calls: dict[str, Recorded] = {}
        self._written_at = self._told_at = time.monotonic()
        place.on_phase(PHASE)

    def held_out(self, batches: HeldOutInputs, teach: Callable[[int, Batch], Prediction]) -> None:
        """Records the outputs of held-out batches.

        Args:
            batches: Of this process.
            teach: Gives the teacher's outputs for a batch by its number.
        """
        with _kept_random_numbers(self._device):
            for number, inputs in batches:
                self._record(held_out_key(number), inputs, lambda n=number, i=inputs: teach(n, i))
                self._after_call(0)
        self._write()

    def steps(
        self, steps: list[int], teach: Callable[[int, int, Batch], Prediction], signal_number: Callable[[], int]
    ) -> None:
        """Records the outputs of training steps.

        Args:
            steps: Rising; all parts of each are recorded.
            teach: Gives the teacher's outputs for step, part and inputs.
            signal_number: That this process has received, or 0.

        Raises:
            ConfigError, OutputError, InterruptedRunError: See `RecordedOutputs.prepare`.
        """
        spec, wanted, num_done = self._spec, set(steps), 0
        stream = training_stream(self._task, spec)
        shared = SharedStream(stream, spec.accumulation, self._workers.parts(spec.accumulation))
        with _kept_random_numbers(self._device):
            for step in range(steps[-1] + 1):
                parts = list(shared.next_parts())
                if step not in wanted:
                    continue
                for part, batch in parts:
                    inputs = to_device(part_inputs(self._task, spec, step, part, batch), self._device)
                    self._record(part_key(step, part), inputs, lambda p=part, i=inputs, s=step: teach(s, p, i))
                num_done += 1
                if num_done == 1:
                    self._check_room(len(steps))
                found = self._after_call(signal_number())
                if found:
                    self._write()
                    raise InterruptedRunError(
                        f"stopped by signal {found} while the teacher's outputs were recorded, after step {step + 1} of "
                        f"{self._place.num_steps}: they are kept in {self._files.folder}. Run the same command again to go on.",
                        found,
                    )
                if time.monotonic() - self._told_at >= _TOLD_S:
                    self._place.say(f"the teacher's outputs: {num_done} of {len(steps)} steps recorded")
                    self._told_at = time.monotonic()
        self._write()

    def _record(self, key: str, inputs: Batch, teach: Callable[[], Prediction]) -> None:
        before = _random_states(self._device)
        outputs = teach()
        if any(not torch.equal(old, new) for old, new in zip(before, _random_states(self._device), strict=True)):
            raise config_error(
                "train.teacher.outputs",
                "recorded",
                allowed="computed for a teacher that draws random numbers when it is evaluated",
                fix="set train.teacher.outputs: computed",
            )
        varying = {name: value for name, value in outputs.items() if name not in self._constant}
        is_finite = all(bool(torch.isfinite(value).all()) for value in varying.values())
        self._calls[key] = Recorded(
            {name: host_copy(value) for name, value in varying.items()}, inputs_identity(inputs), is_finite
        )

    def _after_call(self, signal_number: int) -> int:
        """Writes a file where one is due. Gives a signal that any process has received, or 0."""
        is_due = self._num_bytes >= _FILE_BYTES or time.monotonic() - self._written_at >= _FILE_S
        found, is_due = self._workers.agree(signal_number, is_due)
        if is_due:
            self._write()
        return found

    def _write(self) -> None:
        self._place.on_phase(PHASE)
        rank, num = self._workers.rank, self._workers.num
        first = next(iter(self._calls), "none").replace("/", "-")
        self._files.add(f"{first}-by-{rank:05d}-of-{num:05d}", self._calls)
        self._calls = {}
        self._written_at = time.monotonic()
        self._check_limit(self._files.num_bytes)

    def _check_room(self, num_steps: int) -> None:
        """After the first of `num_steps` steps: whether all will fit."""
        told = self._workers.gather([float(self._num_bytes), float(shutil.disk_usage(self._files.folder).free)])
        more_bytes = num_steps * round(sum(row[0] for row in told))
        self._check_limit(self._files.num_bytes + more_bytes)
        free_bytes = min(row[1] for row in told)
        if more_bytes > free_bytes:
            raise OutputError(
                f"the teacher's outputs need {_size(more_bytes)} more, and {_size(free_bytes)} are free where "
                f"{self._files.folder} is. Fix: free space, train fewer steps, or set train.teacher.outputs: computed."
            )
        self._place.say(f"recording the teacher's outputs of {num_steps} steps: {_size(more_bytes)}")

    def _check_limit(self, num_bytes: int) -> None:
        limit = self._spec.teacher.outputs_limit_gib
        if num_bytes > limit * _GIB:
            raise config_error(
                "train.teacher.outputs_limit_gib",
                limit,
                allowed=f"{num_bytes / _GIB:.3g} or more: the outputs of {self._place.num_steps} steps of "
                f"{self._spec.batch_size} samples, and of held-out data, take at least {num_bytes} bytes",
                fix="raise it, train fewer steps, or set train.teacher.outputs: computed",
            )

    @property
    def _num_bytes(self) -> int:
        return sum(call.num_bytes for call in self._calls.values())


def part_key(step: int, part: int) -> str:
    """Of the outputs for a part of a training batch."""
    return f"step-{step:08d}/part-{part}"


def held_out_key(number: int) -> str:
    """Of the outputs for a held-out batch."""
    return f"held-out-{number:08d}"


def constant_outputs(task: DistillTask) -> frozenset[str]:
    """Names of outputs that do not depend on the batch."""
    return task.constant_outputs if isinstance(task, ConstantOutputs) else frozenset()


def host_copy(value: Tensor) -> Tensor:
    """A copy of its own on the host, with the same strides where no two elements share memory."""
    is_plain = all(stride > 0 for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)
    stride = value.stride() if is_plain else torch.empty(value.shape, device="meta").stride()
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device="cpu").copy_(value)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.1f} MiB"


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _kept_random_numbers(device: torch.device) -> Any:
    """Puts torch's random state back at the end."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
