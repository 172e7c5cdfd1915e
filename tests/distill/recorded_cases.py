"""What the tests of recorded outputs share: settings, a task that counts, and what a run has left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toy import ToyTask

from fraqat.distill import Batch, Distiller, Prediction, TeacherSpec, read_log

RECORDED = TeacherSpec(outputs="recorded")
CHANGES: dict[str, Any] = {"dropout": 0.1, "accumulation": 2, "autocast": "none", "teacher": RECORDED}
NUM_STEPS, NUM_PARTS, NUM_HELD_OUT = 18, 2, 2


def facts(folder: Path) -> list[tuple[Any, ...]]:
    """Step, loss and gradient norm, or step and held-out loss, of everything that the log of a run has of them."""
    return [
        (event["event"], event["step"], event["loss"], event.get("gradient_norm"))
        for event in read_log(folder)
        if event["event"] in ("step", "validation", "width")
    ]


def weights(distiller: Distiller) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in distiller.student.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "teacher_outputs" / "manifest.json").read_text())


class CountingTask(ToyTask):
    """Counts the teacher's calls, and does something at one of them."""

    def __init__(self, at: int = -1, act: Callable[[], None] = lambda: None):
        super().__init__()
        self.num_calls, self._at, self._act = 0, at, act

    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            if self.num_calls == self._at:
                self._act()
            self.num_calls += 1
        return super().predict(model, inputs)
