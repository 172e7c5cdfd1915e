"""The record of a run: one JSON object per line, and the same scalars in TensorBoard or Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from fraqat.distill.scalar_sinks import ScalarSink, TensorBoardSink, WandbSink
from fraqat.distill.watch_spec import WandbSpec
from fraqat.files import explain_os_errors, write_text_atomic

LOG_FILE = "log.jsonl"
REWIND_EVENT = "rewind"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as logged and as shown in the progress line.

    `step` counts from 0; `stage` from 0; times in milliseconds and seconds; `memory_bytes` is the peak so far.
    """

    step: int
    total_steps: int
    stage: int
    num_stages: int
    bits: float
    loss: float
    learning_rate: float
    gradient_norm: float
    step_ms: float
    left_s: float
    samples_per_s: float
    memory_bytes: int

    def scalars(self) -> dict[str, float]:
        """What is drawn over the steps."""
        names = ("loss", "bits", "learning_rate", "gradient_norm", "stage", "step_ms", "samples_per_s", "memory_bytes")
        return {f"train/{name}": getattr(self, name) for name in names}


class RunLog:
    """Appends events to `log.jsonl` and scalars to `tensorboard/` of a run folder.

    Args:
        folder: The run folder.
        first_step: Step at which this process begins; later lines of an interrupted process are dropped, so the log of a
            resumed run has every step once.
        tensorboard: Write TensorBoard files too.
        wandb: Log to Weights & Biases too.
        settings: Of the run, to be shown there.
        writes: False keeps no record: another process does.

    Raises:
        ConfigError: TensorBoard or Weights & Biases is wanted and not installed.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int = 0,
        *,
        tensorboard: bool = True,
        wandb: WandbSpec | None = None,
        settings: Mapping[str, Any] | None = None,
        writes: bool = True,
    ):
        self.path = folder / LOG_FILE
        self.writes = writes
        self._stream: TextIO | None = None
        self._sinks: list[ScalarSink] = []
        if not writes:
            return
        kept = [event for event in read_log(folder) if _is_before(event, first_step)]
        write_text_atomic(self.path, "".join(_line(event) for event in kept))
        if wandb is not None:
            self._sinks.append(WandbSink(wandb, folder, settings or {}))
        if tensorboard:
            self._sinks.append(TensorBoardSink(folder / "tensorboard", first_step))
        with explain_os_errors(self.path):
            self._stream = self.path.open("a", encoding="utf-8")

    def write_step(self, record: StepRecord) -> None:
        """Logs one optimizer step."""
        self._write({"event": "step", **asdict(record)})
        self._add(record.scalars(), record.step)

    def write_validation(self, step: int, bits: float, loss: float) -> None:
        """Logs the held-out distillation loss after `step` finished steps."""
        self._write({"event": "validation", "step": step, "bits": bits, "loss": loss})
        self._add({"validation/loss": loss}, step)

    def write_widths(self, step: int, losses: Mapping[float, float]) -> None:
        """Logs the held-out loss after `step` finished steps at every width that is served, the last one as the run's."""
        *others, target = losses
        for bits in others:
            self._write({"event": "width", "step": step, "bits": bits, "loss": losses[bits]})
            self._add({f"validation/loss_{bits:g}_bits": losses[bits]}, step)
        self.write_validation(step, target, losses[target])

    def write_event(self, event: str, step: int, **fields: Any) -> None:
        """Logs anything else: a stage, a checkpoint, a resumption."""
        self._write({"event": event, "step": step, **fields})

    def write_shares(self, event: str, step: int, shares: Mapping[str, float], **fields: Any) -> None:
        """Logs an event with `shares`, which are drawn as `EVENT/NAME`."""
        self.write_event(event, step, **fields, shares=dict(shares))
        self._add({f"{event}/{name}": share for name, share in shares.items()}, step)

    def close(self) -> None:
        """Flushes and closes all records."""
        if self._stream is not None:
            self._stream.close()
        for sink in self._sinks:
            sink.close()

    def _add(self, scalars: Mapping[str, float], step: int) -> None:
        for sink in self._sinks:
            sink.add(scalars, step)

    def _write(self, event: dict[str, Any]) -> None:
        if self._stream is None:
            return
        with explain_os_errors(self.path):
            self._stream.write(_line(event))
            self._stream.flush()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, up to the first line that is none, as a crash or a full disk leaves it."""
    path = folder / LOG_FILE
    if not path.exists():
        return []
    events: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            break
        if not isinstance(event, dict) or not isinstance(event.get("step"), int) or "event" not in event:
            break
        events.append(event)
    return events


def _is_before(event: dict[str, Any], first_step: int) -> bool:
    """Validations and checkpoints carry the number of finished steps, everything else the step that is about to run."""
    if event["event"] == REWIND_EVENT:  # several may lead to the same checkpoint
        return event["step"] <= first_step
    is_after_step = event["event"] in ("validation", "width", "checkpoint")
    return event["step"] < first_step or (is_after_step and event["step"] == first_step > 0)


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"
