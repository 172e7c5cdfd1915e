"""Laws of QDQ ONNX: the integers, scales and zero points that were trained, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, calibrate_, quantize_
from fraqat.errors import ConfigError
from fraqat.export import ExportJob, ModelDescription, Part, layer_codes, mismatches, run_module, target_named
from fraqat.nn import quantized_layers

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

STATIC = ActivationSpec(static=True, granularity="tensor", symmetric=False, range_method="three_sigma")
SPEC = QuantSpec(WeightSpec(narrow=True, scale_dtype="bfloat16"), STATIC)


class Toy(nn.Module):
    """A linear layer, a 1x1 convolution with strides, and a last layer of 16-bit inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.point = nn.Conv2d(32, 24, 1, stride=2)
        self.last = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.first(x))  # [N, 8, 8, 16] -> [N, 8, 8, 32]
        y = self.point(y.permute(0, 3, 1, 2))
        return self.last(nn.functional.gelu(y.flatten(2).transpose(1, 2))).transpose(1, 2)


def student_and_part(spec: QuantSpec = SPEC) -> tuple[nn.Module, Part]:
    torch.manual_seed(0)
    model = Toy().eval().requires_grad_(False)
    quantize_(model, spec, rules=[LayerRule(pattern="last", activation_bits=16)])
    batches = [{"x": torch.randn(3, 8, 8, 16)} for _ in range(2)]
    if spec.activation is not None and spec.activation.static:
        calibrate_(model, lambda batch: model(**batch), batches)
    return model, Part("toy", model, ("y",), lambda: batches, {"x": {0: "batch"}})


def with_whole_biases_(model: nn.Module) -> None:
    """Moves every bias to a whole number of steps of the accumulator, as an integer runtime has them."""
    for name, layer in quantized_layers(model):
        codes = layer_codes(model)[name]
        assert codes.activation is not None and isinstance(layer.bias, Tensor)
        step = codes.activation.scale.flatten() * codes.qparams.scale.flatten()
        layer.bias.copy_(torch.round(layer.bias / step) * step)


def write(model: nn.Module, part: Part, folder: Path) -> None:
    job = ExportJob(model, lambda: (part,), ModelDescription("Toy", {}, "none"), None, folder, say=lambda text: None)
    target_named("onnx-qdq").write(job)


def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    error = (wanted.double() - found.double()).square().sum().clamp(min=1e-300)
    return float(10 * torch.log10(wanted.double().square().sum() / error))


def compare(model: nn.Module, part: Part, folder: Path) -> tuple[int, dict[str, float], float]:
    """Codes that differ, SQNR of every layer for the same input, and SQNR of the output."""
    opened = target_named("onnx-qdq").open(folder, model)
    codes = layer_codes(model)
    found_codes = opened.codes()
    assert found_codes.keys() == codes.keys()
    wrong = sum(int((found_codes[name] != layer.codes).sum()) for name, layer in codes.items())
    inputs = {"x": torch.randn(5, 8, 8, 16)}  # another batch size than was traced
    found = opened.run(part, inputs)
    wanted = run_module(model, model, list(codes), part, inputs)
    layers = {name: sqnr_db(model.get_submodule(name)(found.layer_inputs[name]), found.layers[name]) for name in codes}
    return wrong, layers, sqnr_db(wanted.outputs["y"], found.outputs["y"])


def test_layers_equal_the_student_and_the_bias_is_a_whole_number_of_steps(tmp_path: Path) -> None:
    model, part = student_and_part()
    write(model, part, tmp_path)
    wrong, layers, output = compare(model, part, tmp_path)
    assert wrong == 0
    assert min(layers.values()) > target_named("onnx-qdq").bound.layer_sqnr_db
    assert output > target_named("onnx-qdq").bound.sqnr_db
    with_whole_biases_(model)  # nothing but the bias was rounded
    _, layers, _ = compare(model, part, tmp_path)
    assert min(layers.values()) > 100


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_inputs_keep_their_scales_in_the_runtime(tmp_path: Path, bits: float) -> None:
    inputs = ActivationSpec(static=True, granularity="tensor")
    model, part = student_and_part(QuantSpec(WeightSpec(bits, granularity="group", group_size=8), inputs))
    write(model, part, tmp_path)
    wrong, layers, _ = compare(model, part, tmp_path)
    assert wrong == 0
    assert min(layers.values()) > target_named("onnx-qdq").bound.layer_sqnr_db


def test_every_number_that_a_compiler_needs_is_in_the_file(tmp_path: Path) -> None:
    model, part = student_and_part()
    write(model, part, tmp_path)
    graph = onnx.load(tmp_path / "toy.onnx").graph
    stored = {item.name: item for item in graph.initializer}
    types = onnx.TensorProto
    for name, inputs in (("first", types.UINT8), ("point", types.UINT8), ("last", types.UINT16)):
        assert stored[f"{name}.codes"].data_type == types.INT4
        zero_points = onnx.numpy_helper.to_array(stored[f"{name}.weight_zero_point"])
        assert stored[f"{name}.weight_zero_point"].data_type == types.INT4 and not zero_points.astype(int).any()
        assert stored[f"{name}.bias"].data_type == types.INT32
        assert stored[f"{name}.input_zero_point"].data_type == inputs
    assert all(len(node.input) == 3 for node in graph.node if node.op_type.endswith("quantizeLinear"))
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


FAULTS = {
    "scale x 1.01": ("first.weight_scale", lambda array: array * 1.01),
    "input scale x 1.01": ("last.input_scale", lambda array: array * 1.01),
    "zero point off by one": ("point.input_zero_point", lambda array: array + 1),
    "one bias off by 8 steps": ("first.bias", lambda array: array + 8 * (array == array.max())),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_changed_number_is_noticed(tmp_path: Path, fault: str) -> None:
    model, part = student_and_part()
    write(model, part, tmp_path)
    with_whole_biases_(model)
    name, change = FAULTS[fault]
    edit(tmp_path / "toy.onnx", name, change)
    _, layers, _ = compare(model, part, tmp_path)
    assert layers[name.rsplit(".", 1)[0]] < 80


def edit(path: Path, name: str, change: Any) -> None:
    file = onnx.load(path)
    tensor = next(item for item in file.graph.initializer if item.name == name)
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(array).astype(array.dtype), name))
    onnx.save(file, path)


def test_a_changed_code_is_noticed(tmp_path: Path) -> None:
    model, part = student_and_part()
    write(model, part, tmp_path)
    path = tmp_path / "toy.onnx"
    file = onnx.load(path)
    tensor = next(item for item in file.graph.initializer if item.name == "point.codes")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    onnx.save(file, path)
    wrong, layers, _ = compare(model, part, tmp_path)
    assert wrong == 1
    assert layers["point"] < target_named("onnx-qdq").bound.layer_sqnr_db


GRIDS = {
    "groups": QuantSpec(WeightSpec(granularity="group", group_size=8), STATIC),
    "whole tensor": QuantSpec(WeightSpec(granularity="tensor"), STATIC),
    "8 bits": QuantSpec(WeightSpec(bits=8), STATIC),
    "signed inputs": QuantSpec(WeightSpec(), ActivationSpec(static=True, granularity="tensor", range_method="max_abs")),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_other_grids_are_lossless_too(tmp_path: Path, grid: str) -> None:
    model, part = student_and_part(GRIDS[grid])
    assert not list(mismatches(model, target_named("onnx-qdq")))
    write(model, part, tmp_path)
    wrong, layers, _ = compare(model, part, tmp_path)
    assert wrong == 0
    assert min(layers.values()) > 50


def test_a_row_of_zeros_keeps_its_bias(tmp_path: Path) -> None:
    model, part = student_and_part()
    layer = model.get_submodule("first")
    assert isinstance(layer, nn.Linear)
    layer.weight[3] = 0
    layer.bias[3] = 1.25
    write(model, part, tmp_path)
    _, layers, _ = compare(model, part, tmp_path)
    assert layers["first"] > 60


def test_a_dynamic_input_is_refused_with_the_fix(tmp_path: Path) -> None:
    model, part = student_and_part(QuantSpec())
    assert next(mismatches(model, target_named("onnx-qdq"))).field == "activation.granularity"
    with pytest.raises(ConfigError, match=r"first\.activation\.static = False .* train with `--set target=onnx-qdq`"):
        write(model, part, tmp_path)
