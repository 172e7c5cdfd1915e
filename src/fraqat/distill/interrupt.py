"""SIGINT and SIGTERM during training: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from fraqat.errors import InterruptedRunError


def interrupted(signal_number: int, step: int, total_steps: int, folder: Path) -> InterruptedRunError:
    """What a run that was stopped says.

    Args:
        signal_number: That stopped it.
        step: Finished steps.
        total_steps: Of the run.
        folder: Of the checkpoints.
    """
    return InterruptedRunError(
        f"stopped by signal {signal_number} after step {step} of {total_steps}: a checkpoint is in {folder}. Run the same "
        "command again to go on.",
        signal_number,
    )


class InterruptGuard:
    """While active, SIGINT and SIGTERM set `signal_number` instead of ending the process; a second one ends it.

    Outside the main thread Python cannot catch signals, and the guard does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
