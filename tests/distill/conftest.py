"""Builds trainers of the toy family."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from toy import ToyTask, toy_spec, toy_student, toy_teacher

from fraqat import ScheduleSpec
from fraqat.distill import Distiller


@pytest.fixture
def make_distiller(tmp_path: Path):
    """Builds a fresh process' worth of trainer in the same run folder."""

    def make(steps: int = 18, folder: str = "run", dropout: float = 0.0, hidden: int = 16, **changes: Any) -> Distiller:
        on_step = changes.pop("on_step", lambda record: None)
        warn = changes.pop("warn", lambda text: None)
        fingerprint = changes.pop("fingerprint", {"a": 1})
        task = changes.pop("task", ToyTask())
        schedule = changes.pop("schedule", ScheduleSpec("fractional").resolve(4.0, steps))
        return Distiller(
            task,
            toy_teacher(dropout, hidden),
            toy_student(dropout, hidden),
            schedule,
            toy_spec(**changes),
            tmp_path / folder,
            fingerprint=fingerprint,
            on_step=on_step,
            warn=warn,
        )

    return make
