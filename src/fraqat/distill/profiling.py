"""A torch.profiler trace of chosen steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fraqat.distill.watch_spec import ProfileSpec
from fraqat.files import atomic_file, explain_os_errors, write_text_atomic

PROFILE_FOLDER = "profile"
_NUM_ROWS = 40


class StepProfiler:
    """Records the steps that the spec names; call both methods around every step.

    Writes `steps-A-B.json.gz` (for chrome://tracing or Perfetto) and `steps-A-B.txt`, the most expensive operations.

    Args:
        spec: Which steps; None records nothing.
        folder: The run folder.
    """

    def __init__(self, spec: ProfileSpec | None, folder: Path):
        self._spec, self._folder = spec, folder / PROFILE_FOLDER
        self._profile: Any = None

    def before_step(self, step: int) -> None:
        """`step` counts from 0."""
        if self._spec is None or step != self._spec.first_step:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities, profile_memory=self._spec.memory, record_shapes=self._spec.shapes
        )
        self._profile.start()

    def after_step(self, step: int) -> None:
        """Writes the files after the last step.

        Raises:
            OutputError: Disk full or no permission.
        """
        if self._spec is None or self._profile is None or step + 1 < self._spec.first_step + self._spec.num_steps:
            return
        profile = self.stop()
        name = f"steps-{self._spec.first_step}-{step}"
        with explain_os_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # The exporter compresses by the suffix of the name it gets.
            with atomic_file(self._folder / f"{name}.json.gz") as temporary:
                exported = temporary.with_name(f"{temporary.name}.json.gz")
                profile.export_chrome_trace(str(exported))
                exported.replace(temporary)
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=_NUM_ROWS)
        write_text_atomic(self._folder / f"{name}.txt", table + "\n")

    def stop(self) -> Any:
        """Ends a recording without writing it, and gives it; None if there is none."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
        return profile
