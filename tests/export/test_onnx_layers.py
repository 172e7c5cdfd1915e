"""Every kind of quantized layer as ONNX operators gives what it gives in PyTorch, at any batch size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fraqat.errors import ConfigError, ModelError
from fraqat.export import ExportJob, LayerPlace, ModelDescription, Part, layer_codes, run_module
from fraqat.nn import ActivationSpec, LayerRule, QuantSpec, WeightSpec, calibrate_, quantize_

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.xdist_group("onnx-layers")

IN, OUT = 32, 24


def dynamic(bits: float = 8, granularity: Any = "token", **more: Any) -> ActivationSpec:
    return ActivationSpec(bits, granularity, **more)


def static(bits: float = 8, **more: Any) -> ActivationSpec:
    return ActivationSpec(bits, "tensor", static=True, **more)


INTEGER = {
    "per_token": QuantSpec(),
    "per_sample": QuantSpec(activation=dynamic(granularity="sample")),
    "per_tensor": QuantSpec(activation=dynamic(granularity="tensor")),
    "six_bit_inputs": QuantSpec(activation=dynamic(6)),
    "three_sigma": QuantSpec(activation=dynamic(range_method="three_sigma")),
    "min_max": QuantSpec(activation=dynamic(range_method="min_max")),
    "bfloat16_scales": QuantSpec(WeightSpec(scale_dtype="bfloat16"), dynamic(scale_dtype="bfloat16")),
    "static_uint8": QuantSpec(activation=static(symmetric=False, range_method="three_sigma")),
    "static_int8": QuantSpec(activation=static()),
    "static_six_bits": QuantSpec(activation=static(6)),
    "static_six_bits_zero_point": QuantSpec(activation=static(6, symmetric=False)),
    "eight_bit_weights": QuantSpec(WeightSpec(8)),
    "five_and_a_half_bits": QuantSpec(WeightSpec(5.5)),
    "narrow": QuantSpec(WeightSpec(narrow=True)),
    "one_scale": QuantSpec(WeightSpec(granularity="tensor")),  # type: ignore[arg-type]
    "integer_groups": QuantSpec(WeightSpec(granularity="group", group_size=8, group_scale="integer")),  # type: ignore[arg-type]
}
FLOAT = {
    "float_groups": QuantSpec(WeightSpec(granularity="group", group_size=8)),  # type: ignore[arg-type]
    "offset_weights": QuantSpec(WeightSpec(symmetric=False)),
    "offset_groups": QuantSpec(WeightSpec(symmetric=False, granularity="group", group_size=8)),  # type: ignore[arg-type]
    "offset_inputs": QuantSpec(activation=dynamic(symmetric=False)),
    "sixteen_bit_inputs": QuantSpec(activation=dynamic(16)),
    "static_sixteen_bits": QuantSpec(activation=static(16, symmetric=False)),
    "float_inputs": QuantSpec(activation=None),
    "sixteen_bit_weights": QuantSpec(WeightSpec(16)),
    "eight_and_a_half_bit_weights": QuantSpec(WeightSpec(8.5, symmetric=False)),
    "twenty_bit_weights": QuantSpec(WeightSpec(20), None),
}
LINEAR = {**INTEGER, **FLOAT}
CONVOLUTIONS = {
    "conv_per_token": (QuantSpec(), (1, 1)),
    "conv_per_sample": (QuantSpec(activation=dynamic(granularity="sample")), (1, 1)),
    "conv_static": (QuantSpec(activation=static(symmetric=False)), (1, 1)),
    "conv_strided": (QuantSpec(), (2, 1)),
    "conv_float_strided": (QuantSpec(activation=dynamic(16)), (1, 2)),
    "conv_per_sample_strided": (QuantSpec(activation=dynamic(granularity="sample")), (2, 2)),
    "conv_float_per_sample": (QuantSpec(activation=dynamic(16, granularity="sample")), (1, 1)),
}


class Everything(nn.Module):
    """Every layer on the same input; odd ones without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({n: nn.Linear(IN, OUT, bias=i % 2 == 0) for i, n in enumerate(LINEAR)})
        self.convolution = nn.ModuleDict(
            {n: nn.Conv2d(IN, OUT, 1, stride=stride) for n, (_, stride) in CONVOLUTIONS.items()}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        picture = x.transpose(1, 2).reshape(x.shape[0], IN, 3, 4)
        return (*(layer(x) for layer in self.linear.values()), *(layer(picture) for layer in self.convolution.values()))


def inputs(num: int, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(num, 12, IN, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Everything().eval().requires_grad_(False)
    specs = {f"linear.{n}": s for n, s in LINEAR.items()} | {
        f"convolution.{n}": s for n, (s, _) in CONVOLUTIONS.items()
    }
    quantize_(model, rules=[LayerRule(pattern=name, spec=spec) for name, spec in specs.items()])
    calibrate_(model, lambda batch: model(**batch), [inputs(4), inputs(4, 1)])
    return model


@pytest.fixture(scope="module")
def part(model: nn.Module) -> Part:
    names = (*LINEAR, *CONVOLUTIONS)
    return Part("model", model, names, lambda: [inputs(2)], {"x": {0: "batch"}})


@pytest.fixture(scope="module")
def opened(model: nn.Module, part: Part, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from fraqat.export import TARGETS

    folder = tmp_path_factory.mktemp("onnx")
    TARGETS["onnx"].write(
        ExportJob(model, lambda: (part,), ModelDescription("M", {}, "m"), None, folder, say=lambda _: None)
    )
    onnx.checker.check_model(onnx.load(folder / "model.onnx"))
    return TARGETS["onnx"].open(folder, model)


def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    error = (wanted.double() - found.double()).square().sum()
    return float("inf") if error == 0 else float(10 * torch.log10(wanted.double().square().sum() / error))


@pytest.mark.parametrize("num", [1, 5])
def test_every_layer_gives_what_it_gives_in_pytorch(model: nn.Module, part: Part, opened: Any, num: int) -> None:
    found = opened.run(part, inputs(num, seed=7))
    wanted = run_module(model, model, [], part, inputs(num, seed=7))
    errors = {name: sqnr_db(wanted.outputs[name], found.outputs[name]) for name in part.outputs}
    assert all(found.outputs[n].shape == wanted.outputs[n].shape for n in part.outputs)
    assert min(errors.values()) > 110, {n: e for n, e in errors.items() if e <= 110}


def test_codes_in_the_file_are_the_models(model: nn.Module, opened: Any) -> None:
    codes, found = layer_codes(model), opened.codes()
    assert set(found) == set(codes)
    for name, layer in codes.items():
        assert torch.equal(found[name].int(), layer.codes.int()), name


def test_four_bit_codes_take_four_bits_and_products_are_integers(opened: Any, model: nn.Module) -> None:
    graph = onnx.load(opened._folder / "model.onnx").graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    assert kinds["linear.per_token.codes"] == onnx.TensorProto.INT4
    assert kinds["linear.eight_bit_weights.codes"] == onnx.TensorProto.INT8
    assert kinds["linear.offset_weights.codes"] == onnx.TensorProto.UINT4
    assert kinds["linear.sixteen_bit_weights.codes"] == onnx.TensorProto.INT16
    assert kinds["linear.eight_and_a_half_bit_weights.codes"] == onnx.TensorProto.UINT16
    assert kinds["linear.twenty_bit_weights.codes"] == onnx.TensorProto.INT32
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    num_integer = len(INTEGER) + sum("float" not in name for name in CONVOLUTIONS)
    assert len(products) == num_integer


def test_no_product_can_be_cut_off_at_16_bits(opened: Any) -> None:
    """x86 without VNNI adds two products of signed weights in int16, where 2 * 255 * 65 does not fit."""
    graph = onnx.load(opened._folder / "model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    shifted = {node.input[3].removesuffix(".weight_scale") for node in products if any(node.input[5:6])}
    assert shifted == {"linear.eight_bit_weights", "linear.integer_groups"}


def test_layers_show_their_inputs(part: Part, opened: Any, model: nn.Module) -> None:
    found = opened.run(part, inputs(3))
    assert set(found.layers) == set(layer_codes(model))
    assert torch.equal(found.layer_inputs["linear.per_token"], inputs(3)["x"])
    alone = model.get_submodule("convolution.conv_static")(found.layer_inputs["convolution.conv_static"])
    assert sqnr_db(alone, found.layers["convolution.conv_static"]) > 110


def test_tracing_leaves_the_model_as_it_was(model: nn.Module, opened: Any) -> None:
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ['a"+b', "a'", "a\nb", "a\\", "\u202ea"])
def test_a_name_that_would_end_the_text_of_a_program_is_refused(name: str) -> None:
    from fraqat.export.onnx.graph import trace

    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    quantize_(model)
    part = Part("model", model, ("y",), lambda: [{"input": torch.ones(2, 4)}], {})
    with pytest.raises(ConfigError, match=r"module name = .* but for quotes and backslashes.* rename it"):
        trace(part, model)


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    from fraqat.export.onnx.graph import trace

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.sum()) > 0 else x

    model = Branches()
    quantize_(model)
    part = Part("branches", model, ("y",), lambda: [{"x": torch.ones(2, 4)}], {"x": {0: "batch"}})
    with pytest.raises(ModelError, match=r"branches \(Branches\) cannot be traced for ONNX"):
        trace(part, model)
    assert "forward" not in model.layer.__dict__


def test_of_a_table_only_what_is_read_is_stored(tmp_path: Path) -> None:
    from fraqat.export import TARGETS

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(IN, OUT)
            self.register_buffer("table", torch.randn(1, 24 * 24, OUT))

        def forward(self, x: Tensor) -> Tensor:
            table = self.get_buffer("table").reshape(1, 24, 24, OUT)[:, 10:13, 7:11].reshape(1, -1, OUT)
            return self.layer(x) + table

    model = Positions().eval().requires_grad_(False)
    quantize_(model)
    part = Part("positions", model, ("y",), lambda: [inputs(2)], {"x": {0: "batch"}})
    TARGETS["onnx"].write(ExportJob(model, lambda: (part,), ModelDescription("M", {}, "m"), None, tmp_path))
    graph = onnx.load(tmp_path / "positions.onnx").graph
    assert max(len(t.raw_data) for t in graph.initializer if "codes" not in t.name) == 12 * OUT * 4
    found = TARGETS["onnx"].open(tmp_path, model).run(part, inputs(3))
    assert sqnr_db(model(**inputs(3)), found.outputs["y"]) > 110


def test_floats_in_bfloat16_are_those_of_the_rounded_model(model: nn.Module, part: Part, tmp_path: Path) -> None:
    import copy

    from fraqat.export import TARGETS
    from fraqat.workflows.exporting import round_floats_

    rounded = copy.deepcopy(model)
    job = ExportJob(model, lambda: (part,), ModelDescription("M", {}, "m"), None, tmp_path, "bfloat16", lambda _: None)
    TARGETS["onnx"].write(job)
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert kinds["linear.per_token.bias.bfloat16"] == onnx.TensorProto.BFLOAT16
    assert kinds["linear.per_token.weight_scale"] == onnx.TensorProto.FLOAT
    round_floats_(rounded, "bfloat16")
    found = TARGETS["onnx"].open(tmp_path, model).run(part, inputs(3))
    for name in part.outputs:
        wanted = run_module(rounded, rounded, [], part, inputs(3)).outputs[name]
        assert sqnr_db(wanted, found.outputs[name]) > 110, name
    unrounded = run_module(model, model, [], part, inputs(3)).outputs["per_token"]
    assert sqnr_db(unrounded, found.outputs["per_token"]) < 80


def test_a_layer_that_is_called_twice_is_refused(tmp_path: Path) -> None:
    from fraqat.errors import ConfigError
    from fraqat.export import TARGETS

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    twice = Twice()
    quantize_(twice)
    part = Part("twice", twice, ("y",), lambda: [{"x": torch.ones(2, 4)}], {"x": {0: "batch"}})
    job = ExportJob(twice, lambda: (part,), ModelDescription("M", {}, "m"), None, tmp_path, say=lambda _: None)
    with pytest.raises(ConfigError, match="layers that a part calls once"):
        TARGETS["onnx"].write(job)


def test_zero_points_of_other_runtimes_are_not_taken_for_offsets() -> None:
    from fraqat.export import TARGETS

    spec = QuantSpec(activation=dynamic(symmetric=False, range_method="min_max", zero_point="xnnpack"))
    found = TARGETS["onnx"].nearest(LayerPlace("a", "Linear", (OUT, IN)), spec)
    assert found is not None and found.activation is not None
    assert found.activation.zero_point == "float"


def test_any_specification_is_taken() -> None:
    from fraqat.export import TARGETS

    for spec in LINEAR.values():
        assert TARGETS["onnx"].nearest(LayerPlace("a", "Linear", (OUT, IN)), spec) == spec
