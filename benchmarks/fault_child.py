"""One small training run in a process of its own, for `faults.py` to disturb; errors and exit codes as `fraqat` has them."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # torch's optimizers do so: once here, and not in every process
from torch import Tensor, nn

from fraqat import QuantSpec, ScheduleSpec, WeightSpec, quantize_
from fraqat.data import encoded
from fraqat.data.encoded import EncodedShard, EncodedStore
from fraqat.data.loader import SampleBatches, ShuffledBatches
from fraqat.data.samples import IndexedSamples
from fraqat.data.worker_watch import WorkerSpec
from fraqat.distill import (
    Batch,
    BatchStream,
    Distiller,
    LossSpec,
    NonFiniteSpec,
    Prediction,
    StepRecord,
    TrainSpec,
    distillation_loss,
)
from fraqat.distill.micro_batch import shares_of, split_batch
from fraqat.errors import FraqatError
from fraqat.files import atomic_file, folder_lock, save_tensors
from fraqat.numerics import RangeMethod
from fraqat.schedules import LearningRateSpec, ScheduleKind

WIDTH, HIDDEN, NUM_ROWS, ROWS_PER_SHARD = 16, 256, 96, 24
POISONS = ("NaN in a gradient", "infinite loss")


@dataclass(frozen=True)
class Settings:
    """What is trained, and what is done to it.

    Args:
        folder: Run folder; encoded data lie in `data/` beside it.
        steps, checkpoint_every, batch_size: Of the run.
        train: More fields of `TrainSpec`.
        num_workers, worker_timeout_s: 0 takes the rows from encoded shards, more reads them in worker processes.
        hangs_at: Reading this row never ends.
        from_disk: Read encoded shards while training instead of holding them.
        nan_at, nan_times: At this step, this often, a number is not finite.
        poison: Which one, of `POISONS`.
        blow_up_over: It is so from step `nan_at` on, as long as the peak of the learning rate is above this.
        memory_for: A forward pass with more samples than this raises torch's error for a full device.
        file_limit: Largest file that the process may write, bytes.
        step_s: Seconds that a step waits, so that there is time for a fault.
    """

    folder: str
    steps: int = 60
    checkpoint_every: int = 4
    batch_size: int = 8
    train: dict[str, Any] = field(default_factory=dict[str, Any])
    num_workers: int = 0
    worker_timeout_s: float = 6.0
    hangs_at: int | None = None
    from_disk: bool = False
    nan_at: int | None = None
    nan_times: int = 1
    poison: str = POISONS[0]
    blow_up_over: float | None = None
    memory_for: int | None = None
    file_limit: int | None = None
    step_s: float = 0.0


class _Rows:
    """Rows for worker processes: made from their number, slowly enough to be disturbed."""

    def __init__(self, hangs_at: int | None):
        self._hangs_at = hangs_at

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        time.sleep(1e6 if index == self._hangs_at else 0.002)
        return {"x": torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))}


def _as_it_is(key: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(row)


def _stacked(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"x": torch.stack([sample["x"] for sample in samples])}


def _shards(num_done: int) -> Iterator[EncodedShard]:
    for number in range(num_done, NUM_ROWS // ROWS_PER_SHARD):
        places = range(number * ROWS_PER_SHARD, (number + 1) * ROWS_PER_SHARD)
        rows = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(i)) for i in places])
        yield EncodedShard({"x": rows}, {}, torch.zeros(len(rows), dtype=torch.int64), {})


class FaultTask:
    """Vectors through a three-layer network, with noise; faults come from `Settings`."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.poison: _Poison | None = None
        if settings.from_disk:
            encoded._MAX_IN_MEMORY_BYTES = 0  # pyright: ignore[reportPrivateUsage]
        self._validation = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(10_000))

    def train_stream(self, batch_size: int, seed: int) -> BatchStream:
        """Of worker processes or of encoded shards."""
        settings = self.settings
        if settings.num_workers:
            workers = WorkerSpec(settings.num_workers, settings.worker_timeout_s)
            samples = IndexedSamples(_Rows(settings.hangs_at), range(NUM_ROWS), _as_it_is)
            return SampleBatches(samples, batch_size, seed, _stacked, workers=workers)
        store = EncodedStore(Path(settings.folder).parent / "data", {"rows": NUM_ROWS})
        return ShuffledBatches(store.build(_shards), batch_size, seed)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches."""
        return NUM_ROWS // batch_size

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """Held-out rows."""
        return [{"x": self._validation}]

    def calibration_batches(self, num_samples: int, batch_size: int) -> list[Batch]:
        """The same."""
        return self.validation_batches(batch_size)

    def make_inputs(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Noise is added."""
        return {"x": batch["x"] + 0.1 * torch.randn(batch["x"].shape, generator=generator)}

    def split_inputs(self, inputs: Batch, num_parts: int) -> list[tuple[Batch, float]]:
        """Pieces and shares of the rows."""
        parts = split_batch(inputs, num_parts)
        return list(zip(parts, shares_of([len(part["x"]) for part in parts]), strict=True))

    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        """One output."""
        limit = self.settings.memory_for
        if limit is not None and torch.is_grad_enabled() and len(inputs["x"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB (injected)")
        return {"output": model(inputs["x"])}

    def loss(self, student: Prediction, teacher: Prediction, inputs: Batch, terms: Sequence[LossSpec]) -> Tensor:
        """Distance of the outputs."""
        loss = distillation_loss(student["output"], teacher["output"], terms)
        is_infinite = torch.is_grad_enabled() and self.poison is not None and self.poison.strikes("infinite loss")
        return loss * float("inf") if is_infinite else loss


def build() -> nn.Module:
    """The teacher."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.SiLU(), nn.Dropout(0.1), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 4)
    )


def train(settings: Settings) -> None:
    """Trains to the end, or goes on, and writes `student.safetensors`."""
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    teacher, student, task = build(), build(), FaultTask(settings)
    quantize_(student, QuantSpec(weight=WeightSpec(range_method=RangeMethod.MSE)))
    values: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "learning_rate": LearningRateSpec(peak=3e-3),
        "checkpoint_every": settings.checkpoint_every,
        "validate_every": 25,
        "tensorboard": False,
        "autocast": "none",
        "ema_decay": 0.9,
        **settings.train,
    }
    if "on_non_finite" in values:
        values["on_non_finite"] = NonFiniteSpec(**values["on_non_finite"])
    schedule = ScheduleSpec(ScheduleKind.FRACTIONAL).resolve(4.0, settings.steps)
    fault = task.poison = _Poison(settings, student)

    def on_step(record: StepRecord) -> None:
        time.sleep(settings.step_s)

    warnings.showwarning = lambda message, *_: _warn(f"warning: {message}")
    with folder_lock(folder):
        distiller = Distiller(
            task, teacher, student, schedule, TrainSpec(**values), folder, on_step=on_step, warn=_warn, say=_warn
        )
        fault.distiller = distiller
        distiller.run()
        with atomic_file(folder / "student.safetensors") as path:
            save_tensors(student.state_dict(), path)


class _Poison:
    """Makes a gradient NaN or the loss infinite at a step: a bit that flipped, or a rate that is too high."""

    def __init__(self, settings: Settings, student: nn.Module):
        self._settings, self._num_left = settings, settings.nan_times
        self.distiller: Distiller | None = None
        if settings.nan_at is not None:
            next(student.parameters()).register_hook(self._poisoned)

    def strikes(self, poison: str) -> bool:
        """Whether this number is not finite now."""
        settings = self._settings
        if settings.nan_at is None or settings.poison != poison:
            return False
        assert self.distiller is not None
        if settings.blow_up_over is not None:
            rate = self.distiller.recovery.rate_factor * self.distiller.spec.learning_rate.peak
            return self.distiller.step >= settings.nan_at and rate > settings.blow_up_over
        is_here = self.distiller.step == settings.nan_at and self._num_left > 0
        self._num_left -= is_here
        return is_here

    def _poisoned(self, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, float("nan")) if self.strikes("NaN in a gradient") else gradient


def _warn(text: str) -> None:
    os.write(2, f"{text}\n".encode())


def run_in_fork(settings: Settings, errors: Path) -> int:
    """Starts a training process and gives its number; imports are done once, here. Its messages are appended to `errors`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        torch.set_num_threads(1)
        if settings.file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (settings.file_limit, settings.file_limit))
        train(settings)
        code = 0
    except FraqatError as error:
        _warn(f"error: {error}")
        code = error.exit_code
    except BaseException:  # noqa: BLE001  # the process ends here, whatever it was
        _warn(traceback.format_exc())
    finally:
        os._exit(code)
