"""How each target's file of one block is written, loaded and called, for `target_latency.py`."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from fraqat import ActivationSpec, QuantSpec, WeightSpec
from fraqat.analysis.layer_error import sqnr_db
from fraqat.errors import FraqatError
from fraqat.export import (
    TARGETS,
    ExportJob,
    FloatDtype,
    LayerPlace,
    ModelDescription,
    Part,
    Target,
    load_packed_,
    read_packed,
)
from fraqat.export.onnx.qdq import RUNTIME_OPTIONS
from fraqat.export.onnx.runtime import open_session
from fraqat.files import save_tensors
from fraqat.nn import IntegerLayers, quantized_layers
from fraqat.quiet import quiet_torchao
from fraqat.tasks.diffusion import OUTPUT, NamedTransformer
from fraqat.tasks.pipelines import build_transformer, transformer_description
from onnx_latency import STATIC, Block, Call, model_of, quantized, session_call

FLOAT, HALF, WEIGHT_ONLY, PER_TOKEN, FIXED = "float32", "bf16", "W4A16", "W4A8 per token", "W4A8 static"
PYTORCH = "PyTorch"
BASE = f"{PYTORCH}, {FLOAT}"
FLOAT_BOUND_DB, HALF_BOUND_DB, INTEGER_BOUND_DB = 60.0, 20.0, 30.0
"""Least SQNR to the student, which is the float model in the first two cases. The last one is for `packed`, whose own bound is
that of its file: a float sum in another order turns a rounding now and then, as in every target with integers."""


@dataclass(frozen=True)
class Arm:
    """A row: a target with widths of weights and inputs."""

    target: str
    width: str

    @property
    def name(self) -> str:
        """As in records."""
        return f"{self.target}, {self.width}"


ARMS = (
    *(Arm(PYTORCH, width) for width in (FLOAT, HALF)),
    *(Arm("packed", width) for width in (WEIGHT_ONLY, PER_TOKEN, FIXED)),
    *(Arm("onnx", width) for width in (FLOAT, HALF, WEIGHT_ONLY, PER_TOKEN, FIXED)),
    *(Arm("onnx-qdq", width) for width in (WEIGHT_ONLY, FIXED)),
    *(Arm("torchao", width) for width in (WEIGHT_ONLY, PER_TOKEN)),
    *(Arm("executorch-xnnpack", width) for width in (FLOAT, HALF, WEIGHT_ONLY, PER_TOKEN)),
)


Notes = Callable[[], dict[str, Any]]


@dataclass
class Made:
    """An arm that is ready, or the reason why it is not.

    Args:
        call: Gives the output.
        student: The output of its student in PyTorch.
        num_bytes: Of its file.
        num_layers: How many layers are quantized.
        notes: Gives what the runtime says about itself, once it was called.
    """

    call: Call
    student: Tensor
    num_bytes: int
    num_layers: int
    notes: Notes = dict


class NotRunError(Exception):
    """Why an arm has no time."""


class Case:
    """A block with its inputs.

    Args:
        block: Which.
        tokens: Of the picture.
        folder: For the arms' files.
    """

    def __init__(self, block: Block, tokens: int, folder: Path):
        self.block, self.tokens, self.folder = block, tokens, folder
        model, self.inputs = model_of(block, tokens)
        self.description = ModelDescription(*transformer_description(model), block.recipe)
        self.float_output: Tensor = self.call(model)()

    def model(self) -> nn.Module:
        """The float model; always the same weights."""
        return model_of(self.block, self.tokens)[0]

    def call(self, model: nn.Module) -> Call:
        """A call of a PyTorch model."""
        named = NamedTransformer(model)
        return torch.no_grad()(lambda: named(**self.inputs))

    def student(self, target: Target, width: str) -> nn.Module:
        """The model on the grid that a recipe with this target trains on; float32 and bf16 leave it as it is.

        Raises:
            NotRunError: The target leaves all layers in floating point.
        """
        model = self.model()
        if width in (FLOAT, HALF):
            return model
        fields: dict[str, Any] = {"range_method": "max_abs", **target.defaults.get("weight", {})}
        weight = WeightSpec(**fields)
        own = ActivationSpec(**target.defaults.get("activation", {}))
        inputs = {WEIGHT_ONLY: None, PER_TOKEN: own, FIXED: own if own.static else STATIC}[width]
        spec = QuantSpec(weight, inputs)
        if target.nearest(LayerPlace("any", "Linear", (64, 64)), spec) is None:
            raise NotRunError("no kernel for such layers; the target leaves them in float32")
        return quantized(model, spec, self.inputs, target)

    def write(self, arm: Arm, student: nn.Module) -> Path:
        """The target's files."""
        part = Part("transformer", NamedTransformer(student), (OUTPUT,), lambda: [self.inputs], {})
        folder = self.folder / arm.name
        folder.mkdir()
        dtype: FloatDtype = "bfloat16" if arm.width == HALF else "float32"
        job = ExportJob(student, lambda: (part,), self.description, None, folder, dtype, say=lambda _: None)
        TARGETS[arm.target].write(job)
        return folder


def make(case: Case, arm: Arm) -> Made:
    """An arm, ready to be called.

    Raises:
        NotRunError: It cannot run here.
    """
    if arm.target == PYTORCH:
        return _make_pytorch(case, arm)
    target = TARGETS[arm.target]
    missing = [name for name in target.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise NotRunError(f"{', '.join(missing)} not installed in this environment")
    if arm.width == HALF and "bfloat16" not in target.float_dtypes:
        raise NotRunError("the target writes float32 alone")
    student = case.student(target, arm.width)
    num_layers = len(dict(quantized_layers(student)))
    expected = case.call(student)() if num_layers else case.float_output
    try:
        folder = case.write(arm, student)
        call, notes = OPEN[arm.target](case, arm, folder, student)
    except FraqatError as error:
        raise NotRunError(str(error)) from error
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Made(call, expected, num_bytes, num_layers, notes)


def _make_pytorch(case: Case, arm: Arm) -> Made:
    model = case.model()
    if arm.width == HALF:
        nn.Module.to(model, torch.bfloat16)  # diffusers' own `to` warns
    path = case.folder / f"{arm.name}.safetensors"
    save_tensors(model.state_dict(), path, {})
    return Made(case.call(model), case.float_output, path.stat().st_size, 0)


def _open_packed(case: Case, arm: Arm, folder: Path, student: nn.Module) -> tuple[Call, Notes]:
    packed = read_packed(folder)
    model = load_packed_(build_transformer(packed.description.class_name, packed.description.config), packed)
    integers = IntegerLayers(model, counts_preparation=False)

    def notes() -> dict[str, Any]:
        engines = sorted({choice.engine for choice in integers.table.choices})
        return {"engines": engines, "integer_layers": integers.num_layers}

    return case.call(model), notes


def _open_onnx(case: Case, arm: Arm, folder: Path, student: nn.Module) -> tuple[Call, Notes]:
    options = RUNTIME_OPTIONS if arm.target == "onnx-qdq" else {}
    session = open_session(folder / "transformer.onnx", **options)
    return session_call(session, {name: value.numpy() for name, value in case.inputs.items()}), dict


def _open_torchao(case: Case, arm: Arm, folder: Path, student: nn.Module) -> tuple[Call, Notes]:
    loader = getattr(diffusers, case.description.class_name)
    with quiet_torchao():
        return case.call(loader.from_pretrained(folder, torch_dtype=torch.float32).eval()), dict


def _open_executorch(case: Case, arm: Arm, folder: Path, student: nn.Module) -> tuple[Call, Notes]:
    with quiet_torchao():
        from executorch.extension.pybindings import portable_lib  # pyright: ignore[reportMissingImports]
    portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
    opened = TARGETS[arm.target].open(folder, student)
    part = Part("transformer", NamedTransformer(student), (OUTPUT,), lambda: [case.inputs], {})
    description = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
    notes = {name: description[name] for name in ("num_delegated", "not_delegated")}
    return lambda: opened.run(part, case.inputs).outputs[OUTPUT], lambda: notes


OPEN: dict[str, Callable[[Case, Arm, Path, nn.Module], tuple[Call, Notes]]] = {
    "packed": _open_packed,
    "onnx": _open_onnx,
    "onnx-qdq": _open_onnx,
    "torchao": _open_torchao,
    "executorch-xnnpack": _open_executorch,
}


def output_of(found: Any) -> Tensor:
    """What a call gave, in float32; ONNX Runtime gives a list of arrays."""
    first = found[0] if isinstance(found, list) else found
    return torch.as_tensor(first).float()


def compare(arm: Arm, made: Made, float_output: Tensor) -> dict[str, Any]:
    """The output against the student's and the float model's, in dB; None is equal bit for bit.

    Raises:
        NotRunError: The output is not the student's.
    """
    output = output_of(made.call())
    if output.shape != made.student.shape or not bool(output.isfinite().all()):
        raise NotRunError(f"a wrong output, {list(output.shape)} where the student gives {list(made.student.shape)}")
    found = sqnr_db(made.student, output)
    if found is not None and found < bound_of(arm):
        raise NotRunError(f"a wrong output: {found:.1f} dB to its student, the bound is {bound_of(arm):g} dB")
    return {"student_db": found, "float32_db": sqnr_db(float_output, output)}


def bound_of(arm: Arm) -> float:
    """Least SQNR of an arm to its student, in dB."""
    if arm.width in (FLOAT, HALF):
        return FLOAT_BOUND_DB if arm.width == FLOAT else HALF_BOUND_DB
    own = TARGETS[arm.target].bound.sqnr_db
    return INTEGER_BOUND_DB if math.isinf(own) else own
