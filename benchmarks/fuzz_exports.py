"""Random students for the writers of ONNX and GGUF: what is written must compute what was trained, or be refused."""

from __future__ import annotations

import contextlib
import io
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fraqat.errors import FraqatError
from fraqat.export import ExportJob, LayerPlace, ModelDescription, Outputs, Part, Target, run_module, target_named
from fraqat.export.codes import codes_of
from fraqat.export.onnx.qdq import RUNTIME_OPTIONS
from fraqat.export.target import Inputs, samples_of
from fraqat.nn import ActivationSpec, LayerRule, QuantSpec, WeightSpec, calibrate_, quantize_
from fraqat.numerics import Granularity
from fraqat.workflows.exporting import check_grid
from fuzz_inputs import ACCEPTED, HOSTILE, REFUSED

ONNX_TARGETS = ("onnx", "onnx-qdq", "qualcomm")
_PICTURE_RANK = 4
SCALES = (0.0, 1e-30, 1e-6, 1.0, 1.0, 1.0, 1e6, 1e30)


def random_spec(rng: random.Random, width: int) -> QuantSpec:
    """Any specification that the library accepts, or raises its error."""
    granularity = rng.choice(tuple(Granularity)[:3])
    group = rng.choice((4, 8, 16, 32, width, 7)) if granularity is Granularity.GROUP else None
    group_size: dict[str, Any] = {"group_size": group} if group else {}
    range_method: Any = rng.choice(("max_abs", "mse", "min_max", "three_sigma", "learned"))
    weight = WeightSpec(
        bits=rng.choice((1.5, 2, 3, 4, 4.5, 5, 8, 8.5, 12, 16, 17, 32)),
        granularity=granularity,
        **group_size,
        symmetric=rng.random() < 0.8,
        narrow=rng.random() < 0.2,
        range_method=range_method,
        scale_dtype=rng.choice(("float32", "bfloat16", "float16")),
        group_scale="integer" if group and rng.random() < 0.3 else "float",
    )
    is_static = rng.random() < 0.4
    kind: Any = "tensor" if is_static else rng.choice(("token", "tensor", "sample"))
    ranges = ("max_abs", "min_max", "three_sigma", *(("percentile", "mse") if is_static else ()))
    input_range: Any = rng.choice(ranges)
    activation = ActivationSpec(
        bits=rng.choice((2, 4, 6, 8, 8, 8, 8.5, 16)),
        granularity=kind,
        static=is_static,
        symmetric=rng.random() < 0.6,
        range_method=input_range,
    )
    return QuantSpec(weight, None if rng.random() < 0.15 else activation)


def _possible_spec(rng: random.Random, width: int) -> QuantSpec:
    """One that the library mostly accepts."""
    while True:
        try:
            spec = random_spec(rng, width)
            if width % (spec.weight.group_size or 1) == 0 or rng.random() < 0.02:
                return spec
        except FraqatError:
            if rng.random() < 0.02:
                raise


def quantize_for_(rng: random.Random, student: nn.Module, target: Target) -> None:
    """Gives every layer a random specification, mostly the nearest to it that a target computes, and some none.

    Raises:
        FraqatError: The library refuses one, or the target the student.
    """
    rules = [LayerRule(pattern="*", skip=True)]
    is_fitted = rng.random() < 0.93
    for name, module in student.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or module.weight[0, 0].numel() > 1 or rng.random() < 0.1:
            continue
        spec: QuantSpec | None = _possible_spec(rng, module.weight.shape[1])
        if is_fitted:
            type_name = "Linear" if isinstance(module, nn.Linear) else "PointwiseConv"
            spec = target.nearest(LayerPlace(name, type_name, tuple(module.weight.shape)), spec)
        if spec is not None:
            rules.append(LayerRule(pattern=name, spec=spec))
    quantize_(student, rules=rules)
    student.eval().requires_grad_(False)


def _odd_name(rng: random.Random, number: int) -> str:
    """Of a module; unique."""
    plain = f"{rng.choice(('fc', 'x', 'weight', 'scale', 'a b', 'codes', 'output'))}{number}"
    return plain if rng.random() < 0.9 else f"{rng.choice(HOSTILE).replace('.', '_')}{number}"


class Layers(nn.Module):
    """One or two layers on the same input, rows or a picture, each with an output of its own."""

    def __init__(self, rng: random.Random):
        super().__init__()
        self.width = rng.choice((1, 3, 8, 16, 24, 32, 33, 64))
        self.is_picture = rng.random() < 0.25
        self.rank = 4 if self.is_picture else rng.choice((2, 3, 3))
        self.layers = nn.ModuleDict()
        for number in range(rng.choice((1, 2))):
            self.layers[_odd_name(rng, number)] = self._layer(rng)
        self.calls_twice = rng.random() < 0.03

    def _layer(self, rng: random.Random) -> nn.Module:
        height, bias = rng.choice((1, 2, 5, 8, 16)), rng.random() < 0.6
        if self.is_picture:
            stride = rng.choice(((1, 1), (1, 1), (2, 1), (2, 2)))
            layer: nn.Module = nn.Conv2d(self.width, height, 1, stride=stride, bias=bias)
        else:
            layer = nn.Linear(self.width, height, bias=bias)
        with torch.no_grad():
            weight: Any = layer.weight
            weight.mul_(rng.choice(SCALES))
            if rng.random() < 0.2:
                weight[0] = 0
        return layer

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Of a batch."""
        shape = {2: (self.width,), 3: (3, self.width), 4: (self.width, 3, 2)}[self.rank]
        return {"x": torch.randn(batch, *shape) + 0.2}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of every layer."""
        found = [layer(x) for layer in self.layers.values()]
        return (*found, found[0] + next(iter(self.layers.values()))(x)) if self.calls_twice else tuple(found)


def onnx_writer(rng: random.Random, folder: Path, target_name: str = "") -> str:
    """One or two layers of random sizes, weights, names and grids, for one of the targets that write ONNX.

    The `onnx` package checks the graph, and its outputs in ONNX Runtime must be the student's.
    """
    import onnx

    _keep_operators()
    torch.manual_seed(rng.randrange(2**31))
    target = target_named(target_name or rng.choice(ONNX_TARGETS))
    student = Layers(rng)
    batches = [student.inputs(2), student.inputs(2)]
    outputs = tuple(f"y{i}" for i in range(len(student.layers) + student.calls_twice))
    part = Part("model", student, outputs, lambda: batches, {"x": {0: "batch"}})
    float_dtype: Any = rng.choice(target.float_dtypes)
    description = ModelDescription("Toy", {}, "zoo:none")
    try:
        quantize_for_(rng, student, target)
        check_grid(student, target, accept_loss=False)
        calibrate_(student, _call(student), batches)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.write(ExportJob(student, lambda: (part,), description, None, folder, float_dtype, say=_quiet))
    except FraqatError as error:
        str(error).encode("utf-8", "surrogatepass")
        return REFUSED
    for path in folder.rglob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
    if target.name == "qualcomm":
        _check_static(student, part, folder / "model.onnx")
    else:
        opened = target.open(folder, student)
        for inputs in (*batches, student.inputs(rng.choice((1, 5)))):
            _check_outputs(student, part, opened.run(part, inputs), inputs, (target.name, float_dtype))
    return ACCEPTED


@cache
def _keep_operators() -> None:
    """`torch.onnx` makes its table of operators anew for every graph, in 0.6 of the time of one with two layers."""
    from torch.onnx._internal.exporter import _registration

    registry: Any = _registration.ONNXRegistry
    registry.from_torchlib = staticmethod(cache(registry.from_torchlib))


def _call(student: nn.Module) -> Any:
    return lambda batch: student(**batch)


def _quiet(text: str) -> None:
    return None


@torch.no_grad()
def _check_outputs(student: Layers, part: Part, found: Outputs, inputs: Inputs, written: tuple[str, str]) -> None:
    wanted = run_module(student, student, [], part, inputs).outputs
    for name, (path, layer) in zip(part.outputs, student.layers.items(), strict=False):
        limit = _limit(path, layer, inputs["x"], written)
        _check_close(name, wanted[name], found.outputs[name], limit)


def _check_close(name: str, wanted: Tensor, found: Tensor, limit: Tensor) -> None:
    assert found.shape == wanted.shape, f"{name}: {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    error = (found.double() - wanted.double()).abs()
    assert bool((error <= limit).all()), f"{name}: {float((error - limit).max()):g} above {float(limit.max()):g}"


def _limit(path: str, layer: Any, x: Tensor, written: tuple[str, str], flips: float = 0.0) -> Tensor:
    """What sums in another order, a bias as whole steps, and roundings turned may differ by; of the output's shape.

    Args:
        path: The layer's name.
        layer: Of the student, quantized or not.
        x: What it is given.
        written: Target, and what is not quantized is stored in.
        flips: Share of a static layer's inputs whose code may be one off.
    """
    from fraqat.export.onnx.qdq_layers import accumulator

    is_quantized = hasattr(layer, "weight_quantizer")
    weight = layer.weight_quantizer(layer.weight) if is_quantized else layer.weight
    matrix_OK = weight.flatten(1).double().abs()
    if x.ndim == _PICTURE_RANK:
        x = x[:, :, :: layer.stride[0], :: layer.stride[1]].movedim(1, -1)
    target, float_dtype = written
    stored = 2**-8 if float_dtype == "bfloat16" else 1e-6
    limit = (1e-5 if is_quantized else 1e-5 + stored) * (x.double().abs().amax(-1, keepdim=True) * matrix_OK.sum(1))
    if layer.bias is not None:
        limit = limit + layer.bias.double().abs() * stored
    if is_quantized and layer.spec.activation is not None and layer.spec.activation.static:
        codes = codes_of(path, layer)
        assert codes.activation is not None
        step_O = codes.activation.scale.double().flatten() * matrix_OK.max(1).values
        limit = limit + step_O * (flips and 1 + flips * matrix_OK.shape[1])
        if target != "onnx" and layer.spec.weight.granularity is not Granularity.GROUP:
            limit = limit + 0.51 * accumulator(codes).scale_O.double()
    return limit.movedim(-1, 1) if x.ndim == _PICTURE_RANK else limit


@torch.no_grad()
def _check_static(student: Layers, part: Part, path: Path) -> None:
    """The graph for the HTP in ONNX Runtime; layers that stay in floating point have 8-bit weights there, and are left out."""
    from fraqat.export.onnx.runtime import open_session

    session = open_session(path, **RUNTIME_OPTIONS)
    samples = [sample for batch in part.batches() for sample in samples_of(part, batch)]
    wanted = [run_module(student, student, [], part, sample).outputs for sample in samples]
    layers: list[tuple[str, Any]] = list(student.layers.items())
    for name, (layer_name, layer) in zip(part.outputs, layers, strict=False):
        if not hasattr(layer, "weight_quantizer"):
            continue
        values = torch.stack([outputs[name] for outputs in wanted])
        width = max(float(values.max().clamp(min=0) - values.min().clamp(max=0)), 1e-4)
        is_byte = layer.spec.activation.bits <= 8
        for sample, outputs in zip(samples, wanted, strict=True):
            (found,) = session.run([name], {"x": sample["x"].numpy()})
            limit = _limit(layer_name, layer, sample["x"], ("qualcomm", "float32"), flips=1 / 16 if is_byte else 1.0)
            _check_close(name, outputs[name], torch.from_numpy(found), limit + width / (255 if is_byte else 65535))
