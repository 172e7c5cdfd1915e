"""Laws of the static graph for the HTP: exact rewrites, a grid for every tensor, and what the emulator computes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fraqat import ActivationSpec, LayerRule, QuantSpec, WeightSpec, calibrate_, quantize_
from fraqat.errors import ConfigError, ModelError
from fraqat.export import ExportJob, LayerPlace, ModelDescription, Outputs, Part, layer_codes, run_module, target_named

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.xdist_group("qualcomm")  # one worker exports for all

STATIC = ActivationSpec(static=True, granularity="tensor", symmetric=False, range_method="three_sigma")
SPEC = QuantSpec(WeightSpec(narrow=True, scale_dtype="bfloat16"), STATIC)


class Toy(nn.Module):
    """What diffusion transformers have, small: sines of the step, RMS norm, linear attention, a mask, moved axes."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(8, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.point = nn.Conv2d(16, 16, 1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor, step: Tensor, mask: Tensor) -> Tensor:
        angles = step[:, None] * torch.exp(-torch.arange(4.0))
        shift = self.step(torch.cat((angles.sin(), angles.cos()), dim=-1))[:, None]
        x = nn.functional.rms_norm(x, (16,)) + shift  # [N, 16, 16]
        query, key = self.query(x).relu(), self.key(x).relu()
        value = nn.functional.pad(self.value(x), (0, 1), value=1.0).transpose(1, 2)  # a row of ones: the divisor
        sums = (value @ key) @ query.transpose(1, 2)
        linear = (sums[:, :-1] / (sums[:, -1:] + 1e-3)).transpose(1, 2)
        scores = (linear @ x.transpose(1, 2)) * 0.25 + (1 - mask.float())[:, None] * -10000.0
        y = (torch.softmax(scores, dim=-1) @ x).transpose(1, 2).reshape(-1, 16, 4, 4)
        y = self.depth(nn.functional.silu(self.point(y))).flatten(2).transpose(1, 2)
        y = self.last(nn.functional.gelu(x + y, approximate="tanh"))
        return torch.einsum("nhwpqc->nchpwq", y.reshape(-1, 4, 4, 2, 2, 2)).reshape(-1, 2, 8, 8)


def batch(size: int) -> dict[str, Tensor]:
    mask = (torch.arange(16) < torch.randint(4, 17, (size, 1))).long()
    return {"x": torch.randn(size, 16, 16), "step": torch.rand(size) * 1000, "mask": mask}


@dataclasses.dataclass(frozen=True)
class Case:
    model: nn.Module
    part: Part
    folder: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    model = Toy().eval().requires_grad_(False)
    quantize_(model, SPEC, rules=[LayerRule(pattern="last", activation_bits=16)])
    batches = [batch(4) for _ in range(8)]
    calibrate_(model, lambda inputs: model(**inputs), batches)
    axes = {name: {0: "batch"} for name in batches[0]}
    part = Part("toy", model, ("y",), lambda: batches, axes)
    folder = tmp_path_factory.mktemp("qualcomm")
    job = ExportJob(model, lambda: (part,), ModelDescription("Toy", {}, "none"), None, folder, say=lambda text: None)
    target_named("qualcomm").write(job)
    return Case(model, part, folder)


def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    error = (wanted.double() - found.double()).square().sum().clamp(min=1e-300)
    return float(10 * torch.log10(wanted.double().square().sum() / error))


def run_on_cpu(model: Path, host: Path, sample: dict[str, Tensor]) -> Tensor:
    from fraqat.export.onnx.encodings import HostPart, all_feeds, run_session
    from fraqat.export.onnx.runtime import open_session

    session = open_session(model)
    feeds = all_feeds(sample, HostPart(host))
    return torch.from_numpy(run_session(session, {item.name: feeds[item.name] for item in session.get_inputs()})["y"])


def test_the_rewritten_float_graph_computes_the_model(case: Case) -> None:
    sample = batch(1)
    found = run_on_cpu(case.folder / "toy.aimet" / "toy.onnx", case.folder / "toy.host.onnx", sample)
    model = Toy().eval()
    codes = layer_codes(case.model)
    model.load_state_dict(case.model.state_dict(), strict=False)
    with torch.no_grad():
        for name, layer in codes.items():
            weight = layer.codes * layer.qparams.scale.reshape(-1, *(1 for _ in layer.codes.shape[1:]))
            model.get_submodule(name).weight.copy_(weight)
        assert sqnr_db(model(**sample), found) > 100


def test_the_float_graph_has_only_what_the_compiler_takes(case: Case) -> None:
    graph = onnx.load(case.folder / "toy.aimet" / "toy.onnx").graph
    types = {node.op_type for node in graph.node}
    assert not types & {"Einsum", "Pad", "Pow", "Reciprocal", "Sin", "Cos", "Squeeze", "Unsqueeze", "Shape", "Layer"}
    ranks = [len(value.type.tensor_type.shape.dim) for value in (*graph.value_info, *graph.output)]
    assert max(ranks) <= 5
    assert {item.name for item in graph.input} == {"x", "host_0", "host_1"}


def test_every_tensor_has_a_grid_and_the_graph_is_near_the_student(case: Case) -> None:
    graph = onnx.load(case.folder / "toy.onnx").graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    constants = {item.name: item for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            continue
        for name in node.input:
            is_parameter = name in constants and constants[name].data_type != onnx.TensorProto.FLOAT
            assert is_parameter or makers.get(name) == "DequantizeLinear" or node.op_type == "DequantizeLinear"
    for node in graph.node:
        if node.op_type.endswith("quantizeLinear"):
            assert len(node.input) == 3  # an implicit zero point is computed wrong in silence
    sample = batch(1)
    found = run_on_cpu(case.folder / "toy.onnx", case.folder / "toy.host.onnx", sample)
    with torch.no_grad():
        assert sqnr_db(case.model(**sample), found) > target_named("qualcomm").bound.sqnr_db


def test_the_three_versions_of_encodings_say_the_same(case: Case) -> None:
    first = json.loads((case.folder / "toy.aimet" / "toy.encodings").read_text())
    old = json.loads((case.folder / "toy.encodings" / "0.6.1.encodings").read_text())
    new = json.loads((case.folder / "toy.encodings" / "2.0.0.encodings").read_text())
    assert [item["version"] for item in (old, first, new)] == ["0.6.1", "1.0.0", "2.0.0"]
    codes = layer_codes(case.model)
    graph = onnx.load(case.folder / "toy.aimet" / "toy.onnx").graph
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    newer = {item["name"]: item for item in new["encodings"]}
    for item in (*first["param_encodings"], *first["activation_encodings"]):
        assert item["name"] in names
        assert np.allclose(item["scale"], newer[item["name"]]["y_scale"], rtol=0)
    for name, layer in codes.items():
        weight = old["param_encodings"][f"{name}.weight"]
        stored = next(item for item in graph.initializer if item.name == f"{name}.weight")
        rows = onnx.numpy_helper.to_array(stored)
        for channel, row, integers in zip(weight, rows, layer.codes, strict=True):
            assert channel["offset"] == -8
            assert np.allclose(np.round(row / channel["scale"]), integers.numpy())
        assert layer.activation is not None
        given = old["activation_encodings"][json.loads(_metadata(case.folder)[name])][0]
        assert given["scale"] == pytest.approx(float(layer.activation.scale))
        assert given["offset"] == -int(layer.activation.zero_point)  # pyright: ignore[reportArgumentType]


def _metadata(folder: Path) -> dict[str, str]:
    model = onnx.load(folder / "toy.onnx")
    told = json.loads({item.key: item.value for item in model.metadata_props}["fraqat.layer_inputs"])
    return {name: json.dumps(tensor) for name, tensor in told.items()}


def test_nearest_keeps_fallbacks_of_single_layers() -> None:
    place, target = LayerPlace("layer", "Linear", (8, 8)), target_named("qualcomm")
    for bits, input_bits in ((4, 8), (4, 16), (8, 8), (8, 16)):
        weight = dataclasses.replace(SPEC.weight, bits=bits)
        spec = QuantSpec(weight, dataclasses.replace(STATIC, bits=input_bits))
        assert target.nearest(place, spec) == spec
    near = target.nearest(place, QuantSpec(WeightSpec(bits=4, granularity="group", group_size=4), None))
    assert near is not None and near.activation is not None
    assert near.weight.narrow and near.weight.granularity == "channel" and near.activation.bits == 16


def outputs_of(case: Case, folder: Path) -> Outputs:
    torch.manual_seed(1)
    return target_named("qualcomm").open(folder, case.model).run(case.part, batch(3))


def edited(case: Case, folder: Path, change: Callable[[Any], None]) -> Path:
    """A copy of the graphs with one thing changed."""
    model = onnx.load(case.folder / "toy.onnx")
    change(model.graph)
    onnx.save(model, folder / "toy.onnx")
    (folder / "toy.host.onnx").write_bytes((case.folder / "toy.host.onnx").read_bytes())
    return folder


def test_the_emulator_computes_every_layer_within_one_step(case: Case) -> None:
    pytest.importorskip("onnxruntime_qnn")
    from fraqat.export.onnx.htp import steps_apart

    target = target_named("qualcomm")
    found_codes = target.open(case.folder, case.model).codes()
    codes = layer_codes(case.model)
    assert found_codes.keys() == codes.keys()
    assert all(torch.equal(found_codes[name], layer.codes.int()) for name, layer in codes.items())
    found = outputs_of(case, case.folder)
    apart = steps_apart(case.folder / "toy.onnx", [found])
    assert apart.keys() == codes.keys()
    assert {name for name, item in apart.items() if item.bits == 16} == {"last"}
    assert max(item.largest for item in apart.values() if item.bits == 8) <= 1
    assert apart["last"].largest <= 64  # a quarter of a step of 8 bits
    torch.manual_seed(1)
    inputs = batch(3)
    wanted = run_module(case.model, case.model, list(codes), case.part, inputs)
    assert sqnr_db(wanted.outputs["y"], found.outputs["y"]) > target.bound.sqnr_db
    for name in codes:
        alone = case.model.get_submodule(name)(found.layer_inputs[name])
        assert sqnr_db(alone, found.layers[name]) > target.bound.layer_sqnr_db


def test_layers_are_shown_without_a_change_to_what_is_shown(case: Case) -> None:
    """8-bit outputs of a graph get other kernels, so the graph that is looked at must have none; the copies are exact."""
    import onnxruntime

    from fraqat.export.onnx.htp import SHOWN, layer_tensors, with_layers_shown

    path = case.folder / "toy.onnx"
    changed, shown = with_layers_shown(path)
    model = onnx.load_from_string(changed)  # type: ignore[arg-type]
    makers = {name: node for node in model.graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in model.graph.output:
        assert types[makers[value.name].input[2]] == onnx.TensorProto.UINT16, value.name
    layers = layer_tensors(onnx.load(path))
    assert shown.keys() == layers.keys()
    pairs = {(a, b) for layer, names in layers.items() for a, b in zip(names, shown[layer], strict=True)}
    assert sum(b == f"{a}{SHOWN}" for a, b in pairs) > len(pairs) / 2
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(v for v in model.graph.value_info if v.name in {a for a, _ in pairs} - present)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(3)
    feeds = {i.name: torch.randn(i.shape, generator=generator).numpy() for i in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(names, feeds), strict=True))
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for original, copy in pairs:
        step = scales[makers[original].input[1]]
        assert (abs(found[original] - found[copy]) < step * 1e-3).all(), original


def initializer(graph: Any, name: str) -> Any:
    return next(item for item in graph.initializer if item.name == name)


def change_scale(graph: Any) -> None:
    tensor = initializer(graph, "query.scale")
    array = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def flip_code(graph: Any) -> None:
    tensor = initializer(graph, "query.codes")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 4]) + tensor.raw_data[1:]


def drop_zero_point(graph: Any) -> None:
    """The provider takes a missing zero point of INT4 for another number than zero, and says nothing."""
    node = next(node for node in graph.node if "query.codes" in node.input)
    del node.input[2]


FAULTS = {"scale x 1.01": change_scale, "one code": flip_code, "zero point removed": drop_zero_point}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_changed_number_is_noticed(case: Case, tmp_path: Path, fault: str) -> None:
    pytest.importorskip("onnxruntime_qnn")
    from fraqat.export.onnx.htp import steps_apart

    found = outputs_of(case, edited(case, tmp_path, FAULTS[fault]))
    apart = steps_apart(case.folder / "toy.onnx", [found])
    assert apart["query"].largest > 1 or apart["query"].share_equal < 0.9
    assert apart["key"].largest <= 1
    codes = target_named("qualcomm").open(tmp_path, case.model).codes()["query"]
    assert int((codes != layer_codes(case.model)["query"].codes).sum()) == (fault == "one code")


def test_the_offline_compiler_writes_a_binary_for_the_phone(case: Case) -> None:
    pytest.importorskip("onnxruntime_qnn")
    files = json.loads((case.folder / "parts.json").read_text())["toy"]["files"]
    assert (case.folder / files["context_binary"]).stat().st_size > 0
    nodes = onnx.load(case.folder / files["context"]).graph.node
    assert [node.op_type for node in nodes] == ["EPContext"]


def test_an_operator_that_the_htp_does_not_take_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    from fraqat.export.onnx.htp import compile_context

    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, [4])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, [4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Acosh", ["x"], ["y"])], "g", [value], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match=r"compiler for SM8750 does not take every operator"):
        compile_context(tmp_path / "bad.onnx")


def test_a_dynamic_input_is_refused_with_the_fix(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    quantize_(model)
    job = ExportJob(model, lambda: (), ModelDescription("Toy", {}, "none"), None, tmp_path)
    with pytest.raises(ConfigError, match=r"0\.activation\.static = False .* train with `--set target=qualcomm`"):
        target_named("qualcomm").write(job)


def test_a_grid_that_the_htp_does_not_compute_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    quantize_(model, QuantSpec(WeightSpec(), STATIC))
    calibrate_(model, model, [torch.randn(4, 8)])
    job = ExportJob(model, lambda: (), ModelDescription("Toy", {}, "none"), None, tmp_path)
    with pytest.raises(ConfigError, match=r"0\.spec = .* allowed is narrow symmetric weights"):
        target_named("qualcomm").write(job)


class Large(nn.Module):
    """Numbers below -1000 that are no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 4000.0 + 1.0


def test_large_negative_numbers_keep_their_range() -> None:
    from fraqat.export.onnx.qualcomm import static_model

    torch.manual_seed(0)
    model = Large().eval().requires_grad_(False)
    quantize_(model, SPEC)
    batches = [{"x": torch.randn(4, 8)}]
    calibrate_(model, lambda inputs: model(**inputs), batches)
    part = Part("large", model, ("y",), lambda: batches, {"x": {0: "batch"}})
    encodings = static_model(part, model, layer_codes(model)).encodings
    assert encodings.activations["y"].low == pytest.approx(float(model(**batches[0]).min()), rel=0.01)
