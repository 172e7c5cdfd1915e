"""Out of memory in a real run: the planner's advice, or smaller pieces that are recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from cli_helpers import SHORT_ARGUMENTS

from fraqat.tasks.diffusion import DiffusionTask

ARGUMENTS = [*SHORT_ARGUMENTS, "--set", "train.autocast=none"]


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch):
    """Training holds so many samples at a time."""
    predict = DiffusionTask.predict

    def limit_to(num: int) -> None:
        def limited(self, model, inputs):
            if torch.is_grad_enabled() and len(inputs["hidden_states"]) > num:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return predict(self, model, inputs)

        monkeypatch.setattr(DiffusionTask, "predict", limited)

    return limit_to


@pytest.mark.usefixtures("one_block")
def test_the_planner_says_what_would_save_how_much(fraqat, tmp_path: Path, small_device) -> None:
    small_device(4)
    done = fraqat("train", "color-digits", "--out", tmp_path / "run", *ARGUMENTS)
    assert done.code == 8, done.err
    assert "out of memory at step 0 with 8 samples at a time" in done.err
    assert "The planner counts" in done.err
    assert re.search(r"a micro-batch of one sample \(raise train\.accumulation\) saves [\d.]+ GiB", done.err)
    assert "train.optimizer: adamw_8bit saves" in done.err
    beat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert beat["state"] == "failed"
    assert fraqat("status", tmp_path / "run").code == 10


def test_a_run_that_splits_ends_and_records_it(fraqat, tmp_path: Path, small_device) -> None:
    small_device(2)
    run = tmp_path / "run"
    done = fraqat("train", "color-digits", "--out", run, *ARGUMENTS, "--set", "train.on_out_of_memory=split")
    assert done.code == 0, done.err
    assert "going on with 2 samples at a time" in done.err
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], e["samples"]) for e in events if e["event"] == "micro_batch"] == [(0, 2)]
    assert json.loads((run / "heartbeat.json").read_text())["state"] == "finished"
    assert fraqat("status", run).code == 0
