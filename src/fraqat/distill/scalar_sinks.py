"""Where scalars of a run go beside `log.jsonl`: TensorBoard, and Weights & Biases. The only home of wandb."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fraqat.distill.watch_spec import WandbSpec
from fraqat.errors import OutputError, config_error
from fraqat.files import explain_os_errors, write_text_atomic

WANDB_ID_FILE = "wandb_id.txt"


class ScalarSink(Protocol):
    """Takes numbers by name."""

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """`step` counts from 0."""
        ...

    def close(self) -> None:
        """Writes what is still held."""
        ...


class TensorBoardSink:
    """Event files in a folder.

    Args:
        folder: Of the event files.
        first_step: Later ones of an interrupted process are hidden.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first_step: int):
        if find_spec("tensorboard") is None:
            raise config_error(
                "train.tensorboard",
                True,
                allowed="true only where tensorboard is installed",
                fix="pip install 'fraqat[train]'",
            )
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with explain_os_errors(folder):
            self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Scalars of one step.

        Raises:
            OutputError: Disk full or no permission.
        """
        with explain_os_errors(self._folder):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still held."""
        with explain_os_errors(self._folder):
            self._writer.close()


class WandbSink:
    """A run of Weights & Biases; the same run goes on after an interruption.

    Args:
        spec: Project and mode.
        folder: The run folder; keeps the run's id.
        config: Settings to show, plain values.

    Raises:
        ConfigError: wandb is not installed.
        OutputError: The service refuses, or cannot be reached.
    """

    def __init__(self, spec: WandbSpec, folder: Path, config: Mapping[str, Any]):
        if find_spec("wandb") is None:
            raise config_error(
                "train.wandb",
                spec.project,
                allowed="set only where wandb is installed",
                fix="pip install 'fraqat[wandb]', or remove train.wandb",
            )
        import wandb  # pyright: ignore[reportMissingImports]

        module: Any = wandb
        try:
            self._run = module.init(
                project=spec.project,
                entity=spec.entity,
                mode=spec.mode,
                dir=str(folder),
                id=_run_id(folder),
                name=folder.name,
                resume="allow",
                config=dict(config),
                settings=module.Settings(disable_git=True, disable_code=True, console="off"),
            )
            # A rewound or resumed run logs steps again, which a step that must rise would drop.
            self._run.define_metric("*", step_metric="step")
        except module.Error as error:
            raise OutputError(
                f"Weights & Biases cannot be used: {error}. Fix: `wandb login`, train.wandb: {{mode: offline}}, or remove it."
            ) from error

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Scalars of one step."""
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        """Sends what is still held."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    path = folder / WANDB_ID_FILE
    if not path.exists():
        write_text_atomic(path, uuid.uuid4().hex[:16])
    return path.read_text(encoding="utf-8").strip()
