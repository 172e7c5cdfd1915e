"""The run folder: what a run leaves on disk, and the one place that knows its file names.

```
RUN/
  recipe.yaml           the resolved recipe
  environment.json      versions and machine
  layers.json           report of quantize_, and SQNR per layer after training
  log.jsonl             one event per line       tensorboard/   the same for TensorBoard
  checkpoints/          newest training states
  teacher_outputs/      recorded outputs of the teacher, until training ends
  student.safetensors   master weights and quantizer state of the finished student
  result.json           steps, seconds, stages, held-out loss by width; its presence says that training is finished
  evaluation.json       quality of the original, the baselines and the student    samples/  images, texts or sounds of each
  baselines/NAME/       a run folder for every baseline
  export/FORMAT/        exported files           report.html    the page
                        (evaluation, samples and exports of one of several widths end in -N-bits)
```
"""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fraqat.config import Recipe, load_recipe
from fraqat.distill import describe_difference
from fraqat.errors import ModelError, OutputError
from fraqat.files import explain_os_errors, folder_lock, write_json_atomic, write_text_atomic

_BEFORE_TRAINING = re.compile(r"recipe\.yaml|environment\.json|heartbeat[\w-]*\.json|baselines|\..*")
"""What a run folder holds before the first step; names that begin with a dot are locks and files half-written."""
_PACKAGES = ("fraqat", "torch", "diffusers", "transformers", "safetensors", "torchdata", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run.

        Raises:
            ModelError: The folder is no run.
        """
        if not (path / "recipe.yaml").is_file():
            raise ModelError(
                f"{path} is no run folder: recipe.yaml is missing. Fix: pass the folder of `fraqat train --out`."
            )
        return cls(path)

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunFolder:
        """A new run, or the same run again. A finished run keeps its recipe and its record of the environment.

        A run that ended before it trained anything, as by a wrong path, is begun anew with the corrected recipe.

        Raises:
            OutputError: The folder holds something else, such as a recipe that somebody wrote, or a run of another recipe that
                has trained, or another process is at work there; nothing is changed.
        """
        run = cls(path)
        if (path / "recipe.yaml").is_file():
            if not run._wrote_recipe():
                raise OutputError(
                    f"{path} is no run folder: its recipe.yaml is your own, and a run would replace it. Nothing was changed. "
                    "Fix: choose a new folder."
                )
            old, new = run.recipe().fingerprint(), recipe.fingerprint()
            if old != new:
                if run._has_trained():
                    raise OutputError(
                        f"{path} holds a run of another recipe ({describe_difference(old, new)}): nothing was changed. "
                        "Fix: train in a new folder."
                    )
                with folder_lock(path):
                    write_text_atomic(path / "recipe.yaml", recipe.to_yaml())
            if run.is_finished:
                return run
        elif path.exists() and (not path.is_dir() or any(item.name != "baselines" for item in path.iterdir())):
            raise OutputError(f"{path} exists and is no run folder: nothing was changed. Fix: choose a new folder.")
        with explain_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path / "recipe.yaml", recipe.to_yaml())
        engine = {"engine": str(recipe.train.engine.name.value)}
        write_json_atomic(path / "environment.json", environment() | engine)
        return run

    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(str(self.path / "recipe.yaml"))

    def baseline(self, name: str) -> RunFolder:
        """The run of a baseline, whether or not it exists."""
        return RunFolder(self.path / "baselines" / name)

    def methods(self) -> dict[str, RunFolder]:
        """Finished runs by label: the baselines in the recipe's order, then this run itself.

        Raises:
            ModelError: This run is not finished.
        """
        recipe = self.recipe()
        if not self.is_finished:
            raise ModelError(
                f"{self.path} is not trained to the end. Fix: run `fraqat train` with the same recipe and folder."
            )
        baselines = {name: self.baseline(name) for name in recipe.baselines if self.baseline(name).is_finished}
        return {**baselines, recipe.label: self}

    def untrained_baselines(self) -> list[str]:
        """Baselines of the recipe that have not been trained to the end here."""
        return [name for name in self.recipe().baselines if not self.baseline(name).is_finished]

    def _wrote_recipe(self) -> bool:
        """Whether `recipe.yaml` is a run's: its environment lies beside it, or a run was killed before it wrote that."""
        if (self.path / "environment.json").exists():
            return True
        return (self.path / "recipe.yaml").read_text(encoding="utf-8") == self.recipe().to_yaml()

    def _has_trained(self) -> bool:
        """Whether this run or one of its baselines has left more than what is written before the first step."""
        baselines = self.path / "baselines"
        if baselines.is_dir() and any(RunFolder(path)._has_trained() for path in baselines.iterdir() if path.is_dir()):
            return True
        return any(not _BEFORE_TRAINING.fullmatch(path.name) for path in self.path.iterdir())

    @property
    def is_finished(self) -> bool:
        """Whether training has ended."""
        return self.result_path.is_file() and self.student_path.is_file()

    @property
    def student_path(self) -> Path:
        """Master weights and quantizer state."""
        return self.path / "student.safetensors"

    @property
    def result_path(self) -> Path:
        """Steps, seconds, held-out loss."""
        return self.path / "result.json"

    @property
    def layers_path(self) -> Path:
        """Layers and their errors."""
        return self.path / "layers.json"

    @property
    def evaluation_path(self) -> Path:
        """Quality of all methods."""
        return self.path / "evaluation.json"

    @property
    def samples_path(self) -> Path:
        """What each method made of the first prompts, as `LABEL/NN.png`, `.txt` or `.wav`."""
        return self.path / "samples"

    def at_width(self, path: Path, bits: float | None) -> Path:
        """The place beside `path` for one of the widths that the student serves; `path` itself for the final one."""
        return path if bits is None else path.with_name(f"{path.stem}-{bits:g}-bits{path.suffix}")

    @property
    def report_path(self) -> Path:
        """The page."""
        return self.path / "report.html"

    def export_path(self, export_format: str) -> Path:
        """Folder of an export."""
        return self.path / "export" / export_format

    def read_json(self, path: Path) -> Any:
        """A JSON file of the run.

        Raises:
            ModelError: It is missing or damaged.
        """
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}. Fix: run the command that writes it again.") from error


def environment() -> dict[str, str]:
    """Versions and machine, for the record of a run."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = {"machine": platform.machine(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    return {**versions, **machine, "device": device}
