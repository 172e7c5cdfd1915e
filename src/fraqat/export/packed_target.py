"""The home format as a target: it holds whatever was trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from fraqat.export.packed import load_packed_, read_packed, write_packed_files
from fraqat.export.target import Bound, ExportJob, Inputs, LayerPlace, OpenedExport, Outputs, Part, Target
from fraqat.nn import PackedLayer, QuantSpec, packed_codes, unquantize_
from fraqat.numerics import QParams, dequantize


@final
class PackedTarget(Target):
    """One safetensors file; runs in PyTorch by the integer engines."""

    name = "packed"
    summary = "fraqat's own safetensors file, for PyTorch on CPU and GPU; the source of every other format"
    bound = Bound(float("inf"), float("inf"), "the same scales times the same codes")

    def nearest(self, place: LayerPlace, spec: QuantSpec) -> QuantSpec | None:
        """Everything."""
        return spec

    def write(self, job: ExportJob) -> None:
        """Writes `model.safetensors` and its manifest."""
        write_packed_files(job.student, job.description, job.folder, float_dtype=job.float_dtype)

    def open(self, folder: Path, student: nn.Module) -> OpenedExport:
        """The model from codes, in place of the student in a copy of each part."""
        model = copy.deepcopy(student)
        unquantize_(model)
        return OpenedModel(load_packed_(model, read_packed(folder)), student)


@final
class OpenedModel:
    """A PyTorch model that was read from a file, run in the place of the student.

    Args:
        model: With `PackedLayer`s or other modules of the student's names.
        student: What the parts hold.
        codes: Of every quantized weight; None takes them from the packed layers.
    """

    def __init__(self, model: nn.Module, student: nn.Module, codes: Mapping[str, Tensor] | None = None):
        self._model, self._student = model, student
        self._codes = packed_codes(model) if codes is None else codes

    def codes(self) -> Mapping[str, Tensor]:
        """Integers by layer."""
        return self._codes

    @torch.no_grad()
    def weights(self) -> Mapping[str, Tensor]:
        """Weights of the layers that keep one as numbers or make one of codes."""
        found: dict[str, Tensor] = {}
        for name in self._codes:
            module: Any = self._model.get_submodule(name)
            if isinstance(module, PackedLayer):
                qparams = QParams(module.scale, offset=module.offset)
                found[name] = dequantize(module.codes, qparams, module.layout)
            elif type(module.weight) in (Tensor, nn.Parameter):
                found[name] = module.weight.detach().float()
        return found

    @torch.no_grad()
    def run(self, part: Part, inputs: Inputs) -> Outputs:
        """Calls a copy of the part that holds the model instead of the student."""
        names = list(self._codes)
        module = self._model if part.module is self._student else replaced(part.module, self._student, self._model)
        return run_module(module, self._model, names, part, inputs)


def replaced(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """A copy of `module` that has `new` wherever it has `old`; all else is shared."""
    if module is old:
        return new
    result = copy.copy(module)
    result.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}  # pyright: ignore[reportPrivateUsage]
    for name, child in module._modules.items():  # pyright: ignore[reportPrivateUsage]
        if child is not None:
            result._modules[name] = replaced(child, old, new)  # pyright: ignore[reportPrivateUsage]
    return result


@torch.no_grad()
def run_module(module: nn.Module, model: nn.Module, names: list[str], part: Part, inputs: Inputs) -> Outputs:
    """Calls a part in PyTorch and keeps the outputs of the named layers of `model`."""
    layers: dict[str, Tensor] = {}
    layer_inputs: dict[str, Tensor] = {}

    def keep(name: str, given: tuple[Tensor, ...], output: Tensor) -> None:
        layers[name], layer_inputs[name] = output, given[0]

    def hook(name: str) -> Any:
        return lambda _module, given, output: keep(name, given, output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        found = module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    outputs = found if isinstance(found, tuple) else (found,)
    return Outputs(dict(zip(part.outputs, outputs, strict=True)), layers, layer_inputs)
