"""The record of a run: one JSON object per line, and TensorBoard when it is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from fraqat.errors import config_error
from fraqat.files import explain_os_errors, write_text_atomic

LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as logged and as shown in the progress line.

    `step` counts from 0; `stage` from 0; times in milliseconds and seconds.
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


class RunLog:
    """Appends events to `log.jsonl` and scalars to `tensorboard/` of a run folder.

    Args:
        folder: The run folder.
        first_step: Step at which this process begins; later lines of an interrupted process are dropped, so the log of a
            resumed run has every step once.
        tensorboard: Write TensorBoard files too.
        writes: False keeps no record: another process does.

    Raises:
        ConfigError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, first_step: int = 0, *, tensorboard: bool = True, writes: bool = True):
        self.path = folder / LOG_FILE
        self._stream: TextIO | None = None
        self._writer: Any = None
        if not writes:
            return
        kept = [event for event in read_log(folder) if _is_before(event, first_step)]
        write_text_atomic(self.path, "".join(_line(event) for event in kept))
        with explain_os_errors(self.path):
            self._stream = self.path.open("a", encoding="utf-8")
        self._writer = _summary_writer(folder / "tensorboard", first_step) if tensorboard else None

    def write_step(self, record: StepRecord) -> None:
        """Logs one optimizer step."""
        self._write({"event": "step", **asdict(record)})
        if self._writer is not None:
            scalars = {"loss": record.loss, "bits": record.bits, "learning_rate": record.learning_rate}
            for name, value in scalars.items():
                self._writer.add_scalar(f"train/{name}", value, record.step)

    def write_validation(self, step: int, bits: float, loss: float) -> None:
        """Logs the held-out distillation loss after `step` finished steps."""
        self._write({"event": "validation", "step": step, "bits": bits, "loss": loss})
        if self._writer is not None:
            self._writer.add_scalar("validation/loss", loss, step)

    def write_widths(self, step: int, losses: Mapping[float, float]) -> None:
        """Logs the held-out loss after `step` finished steps at every width that is served, the last one as the run's."""
        *others, target = losses
        for bits in others:
            self._write({"event": "width", "step": step, "bits": bits, "loss": losses[bits]})
            if self._writer is not None:
                self._writer.add_scalar(f"validation/loss_{bits:g}_bits", losses[bits], step)
        self.write_validation(step, target, losses[target])

    def write_event(self, event: str, step: int, **fields: Any) -> None:
        """Logs anything else: a stage, a checkpoint, a resumption."""
        self._write({"event": event, "step": step, **fields})

    def close(self) -> None:
        """Flushes and closes both records."""
        if self._stream is not None:
            self._stream.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, event: dict[str, Any]) -> None:
        if self._stream is None:
            return
        with explain_os_errors(self.path):
            self._stream.write(_line(event))
            self._stream.flush()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The events of a run; a last line cut off by a crash is left out."""
    path = folder / LOG_FILE
    if not path.exists():
        return []
    events: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def _is_before(event: dict[str, Any], first_step: int) -> bool:
    """Validations and checkpoints carry the number of finished steps, everything else the step that is about to run."""
    is_after_step = event["event"] in ("validation", "width", "checkpoint")
    return event["step"] < first_step or (is_after_step and event["step"] == first_step > 0)


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"


def _summary_writer(folder: Path, first_step: int) -> Any:
    if find_spec("tensorboard") is None:
        raise config_error(
            "train.tensorboard",
            True,
            allowed="true only where tensorboard is installed",
            fix="pip install 'fraqat[train]'",
        )
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step or None)
