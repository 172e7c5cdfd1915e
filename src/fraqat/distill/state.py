"""A training run's state as checkpoints hold it: whole tensors, or the rows of them that this process holds.

Whatever number of processes wrote it, any number can go on: rows are cut anew. Codes of 8-bit optimizer states stay what they
are where their blocks of 256 do; elsewhere they pass through float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fraqat.distill.checkpoint_files import Rows, SavedTensor, loaded
from fraqat.distill.ema import ParameterAverage
from fraqat.distill.optimizers import (
    TrainOptimizer,
    _from_plain,  # pyright: ignore[reportPrivateUsage]
    _to_plain,  # pyright: ignore[reportPrivateUsage]
)
from fraqat.distill.parallel import TrainedModels
from fraqat.errors import CheckpointError
from fraqat.nn.shards import is_sharded, own, own_rows

_CODES = "codes"
_SCALE, _SIGNED = "scale", "signed"
_STEP, _SIGNED_STATE = "step", "exp_avg"
_BLOCK = 256
_LEAST_QUANTIZED = 4096


@dataclass
class TrainedState:
    """What training changes, as checkpoints hold it.

    Args:
        models: Give the rows of this process.
        student: Its parameters and saved buffers.
        optimizer: Of `models.trained_parameters()`.
        order: Names of the parameters, as the optimizer numbers them.
        average: Of the trained parameters, if there is one.
        is_8bit: Whether the optimizer keeps 8-bit states.
    """

    models: TrainedModels
    student: nn.Module
    optimizer: TrainOptimizer
    order: list[str]
    average: ParameterAverage | None
    is_8bit: bool

    def state_dict(self) -> dict[str, Any]:
        """`student`, `optimizer` and `average`."""
        return {
            "student": model_state(self.models, self.student),
            "optimizer": optimizer_state(self.models, self.optimizer, self.order),
            "average": average_state(self.models, self.average.state_dict()) if self.average else None,
        }

    def load_student(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict` for the student, at the width that the state is of.

        Raises:
            CheckpointError: It is the state of another model.
        """
        load_model_state(self.student, state["student"])

    def load_rest(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict` for optimizer and average, once the student has its values."""
        load_optimizer_state(self.models, self.optimizer, self.order, state["optimizer"], is_8bit=self.is_8bit)
        if self.average is not None:
            self.average.load_state_dict(loaded_average_state(self.models, state["average"]))


def model_state(models: TrainedModels, student: nn.Module) -> dict[str, Tensor | Rows]:
    """Parameters and saved buffers."""
    return {name: _part(models, value, value) for name, value in student.state_dict().items()}


def load_model_state(student: nn.Module, state: dict[str, SavedTensor]) -> None:
    """Undoes `model_state`, in place.

    Raises:
        CheckpointError: It is the state of another model.
    """
    current = student.state_dict()
    if current.keys() != state.keys():
        differing = sorted(current.keys() ^ state.keys())
        raise CheckpointError(
            f"the checkpoint is of another student: {len(differing)} tensors are not in both, such as {differing[0]}. Fix: "
            "train in a new folder."
        )
    with torch.no_grad():
        for name, value in current.items():
            held = own(value)
            saved = _saved_part(state[name], value)
            if saved.shape != held.shape:
                raise CheckpointError(
                    f"the checkpoint is of another student: {name} has shape {tuple(saved.shape)} there and "
                    f"{tuple(held.shape)} here. Fix: train in a new folder."
                )
            held.copy_(saved)


def average_state(models: TrainedModels, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a `ParameterAverage`."""
    shared = models.shared_parameters()
    averages = {name: _part(models, value, shared[name]) for name, value in state["averages"].items()}
    return {**state, "averages": averages}


def loaded_average_state(models: TrainedModels, state: dict[str, Any]) -> dict[str, Any]:
    """Undoes `average_state`."""
    shared = models.shared_parameters()
    averages = {name: _saved_part(value, shared[name]) for name, value in state["averages"].items()}
    return {**state, "averages": averages}


def optimizer_state(models: TrainedModels, optimizer: TrainOptimizer, order: list[str]) -> dict[str, Any]:
    """The state of an optimizer.

    Args:
        models: Give the rows.
        optimizer: Of `models.trained_parameters()`.
        order: Their names, as the optimizer numbers them.
    """
    state, shared = optimizer.state_dict(), models.shared_parameters()
    parts: dict[str, Any] = {}
    for index, values in state["state"].items():
        parameter = shared[order[index]]
        parts[order[index]] = {key: _optimizer_part(models, value, parameter) for key, value in values.items()}
    return {"state": parts, "param_groups": state["param_groups"]}


def load_optimizer_state(
    models: TrainedModels, optimizer: TrainOptimizer, order: list[str], state: dict[str, Any], *, is_8bit: bool
) -> None:
    """Undoes `optimizer_state`; `is_8bit` says whether the optimizer keeps 8-bit states."""
    shared = models.shared_parameters()
    numbers = {name: number for number, name in enumerate(order)}
    parts: dict[int, Any] = {}
    for name, values in state["state"].items():
        parameter = shared[name]
        parts[numbers[name]] = {
            key: value.whole()
            if key == _STEP
            else _fitted(value, parameter, is_8bit=is_8bit, is_signed=key == _SIGNED_STATE)
            for key, value in values.items()
        }
    optimizer.load_state_dict({"state": parts, "param_groups": loaded(state["param_groups"])})


def _optimizer_part(models: TrainedModels, value: Any, parameter: Tensor) -> Any:
    if not is_sharded(parameter):
        return value
    if isinstance(value, dict):
        if _has_whole_blocks_everywhere(parameter):
            rows, per_row = own_rows(parameter), _row_size(parameter)
            scale = Rows(
                value[_SCALE], (parameter.numel() // _BLOCK,), rows.start * per_row // _BLOCK, is_copy=models.is_copy
            )
            return {**value, _CODES: _part(models, value[_CODES], parameter), _SCALE: scale}
        value = _from_plain(value).dequantize()
    return _part(models, value, parameter) if value.ndim else value


def _fitted(value: Any, parameter: Tensor, *, is_8bit: bool, is_signed: bool) -> Any:
    """A saved state for the rows of `parameter` that are held here, in the precision that the optimizer would choose."""
    rows, size = own_rows(parameter), own(parameter).numel()
    is_quantized = is_8bit and size >= _LEAST_QUANTIZED and size % _BLOCK == 0
    if isinstance(value, SavedTensor):
        tensor = _saved_part(value, parameter)
    else:
        first = (rows.start or 0) * _row_size(parameter)
        if is_quantized and first % _BLOCK == 0:
            blocks = slice(first // _BLOCK, (first + size) // _BLOCK)
            return {**value, _CODES: _saved_part(value[_CODES], parameter), _SCALE: value[_SCALE].rows(blocks)}
        tensor = _from_plain(loaded(value)).dequantize()[rows]
    if not is_quantized:
        return tensor
    codes, scale = torch.zeros(tensor.shape, dtype=torch.uint8), torch.zeros(size // _BLOCK)
    state: Any = _from_plain({_CODES: codes, _SCALE: scale, _SIGNED: is_signed})
    state.copy_(tensor)
    return _to_plain(state)


def _has_whole_blocks_everywhere(parameter: Tensor) -> bool:
    """Whether the 8-bit blocks of every process are blocks of the whole tensor."""
    num_shards = cast(Any, parameter).device_mesh.size(-1)
    num_rows, per_row = parameter.shape[0], _row_size(parameter)
    most = -(-num_rows // num_shards)
    sizes = {min(most, max(0, num_rows - rank * most)) * per_row for rank in range(num_shards)}
    return all(size >= _LEAST_QUANTIZED and size % _BLOCK == 0 for size in sizes)


def _row_size(parameter: Tensor) -> int:
    return math.prod(parameter.shape[1:])


def _part(models: TrainedModels, value: Tensor, parameter: Tensor) -> Tensor | Rows:
    """What this process writes of a tensor that is divided as `parameter` is."""
    if not is_sharded(parameter):
        return value
    rows = own_rows(parameter)
    return Rows(own(value.detach()), tuple(parameter.shape), rows.start, is_copy=models.is_copy)


def _saved_part(saved: SavedTensor, parameter: Tensor) -> Tensor:
    return saved.rows(own_rows(parameter)) if is_sharded(parameter) else saved.whole()
